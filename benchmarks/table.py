"""Markdown tables of figures with medians and spread, and the places in the documents that hold them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

NONE = "-"  # where there is no figure
BEGIN, END = "<!-- make bench writes from here -->", "<!-- to here -->"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def median(values: Sequence[float], form: str = ".1f") -> str:
    """The median, and how far the rounds lie from it: `41.2 ±3 %`; a dash where there is no figure."""
    if not values:
        return NONE
    middle = statistics.median(values)
    shown = format(middle, form)
    if len(values) == 1 or not middle:
        return shown
    return f"{shown} ±{(max(values) - min(values)) / 2 / abs(middle):.0%}".replace("%", " %")


def beside(ours: Sequence[float], theirs: Sequence[float], form: str = ".1f") -> str:
    """A peer's median, and ours over it in brackets."""
    return f"{median(theirs, form)} ({ratio(ours, theirs)})" if theirs else NONE


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The median of the ratios round by round, with its spread: drift between rounds cancels out."""
    pairs = ratios(ours, theirs)
    return median(pairs, ".2f") if pairs else NONE


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ours over theirs, round by round."""
    return [a / b for a, b in zip(ours, theirs, strict=False) if b]


def replace_block(file: Path, text: str) -> None:
    """Put `text` between the two markers of a file. Raises ValueError when they are not there."""
    before, begin, rest = file.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{file} lacks the lines `{BEGIN}` and `{END}`")
    file.write_text(f"{before}{BEGIN}\n{text.strip()}\n{END}{after}")
