"""Decoding beside busy processes: how much longer a step takes when the cores are not one's own.

    python -m benchmarks.shared_core [--rounds 3] [--batches 1 8] [--busy 2] [--steps 48] [--fresh]

This engine's bare steps, alone and beside processes that only count, in turns A B A B. Fair is the share of the cores
that is left: with as many busy processes as cores a step takes twice as long.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import record, table
from benchmarks.engines import OURS, ours
from benchmarks.record import Record
from benchmarks.worker import Worker
from settings import Settings

CONTEXT = 128


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that each keep a core busy."""
    counting = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in counting:
            process.kill()
            process.wait()


def turn(rows: int, others: int) -> str:
    """The name of a turn."""
    return f"batch {rows}, {f'beside {others} busy processes' if others else 'alone'}"


def measure(record: Record, settings: Settings, chosen: argparse.Namespace) -> None:
    """All turns that are not kept yet: the median step of each, in seconds."""
    loads = (0, chosen.busy)
    if record.has([turn(rows, others) for rows in chosen.batches for others in loads], chosen.rounds):
        return
    with tempfile.TemporaryDirectory() as folder, ours(settings, Path(folder), chosen.patience) as engine:
        record.facts[OURS] = engine.ask("facts")
        for number in range(chosen.rounds):
            for rows in chosen.batches:
                for others in loads:
                    with busy(others):
                        record.turn(turn(rows, others), number, partial(_step, engine, rows, chosen.steps))


def _step(engine: Worker, rows: int, steps: int) -> float:
    """The mean, which counts the steps that waited long."""
    return statistics.fmean(engine.ask("decode", rows=rows, context=CONTEXT, steps=steps)["seconds"])


def shown(kept: Mapping[str, Any], batches: list[int], others: int) -> str:
    """The table of this row."""
    lines = []
    for rows in batches:
        alone, beside = (kept.get(turn(rows, count), []) for count in (0, others))
        milliseconds = [table.median([second * 1000 for second in turns]) for turns in (alone, beside)]
        lines.append([f"a step of batch {rows}, ms", *milliseconds, table.ratio(beside, alone)])
    return table.markdown(["", "alone", f"beside {others} busy processes", "times as long"], lines)


def _told(kept: Record, chosen: argparse.Namespace) -> tuple[str, str]:
    return f"medians of {chosen.rounds} rounds", shown(kept.turns, chosen.batches, chosen.busy)


def main() -> None:
    parser = record.options(__doc__, rounds=3, minutes=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--busy", type=int, default=2, help="processes that keep a core busy each")
    parser.add_argument("--steps", type=int, default=48)
    record.run("shared_core", parser, measure, _told)


if __name__ == "__main__":
    main()
