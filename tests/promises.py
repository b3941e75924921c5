"""The table of docs/promises.md: what the service promises, and the tests whose markers say that they prove it.

Runs no test: it reads markers out of the tests' source. `python -m tests.promises` writes the table.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs/promises.md"
PROMISES = {
    "P1": "Bad input gets 4xx, never 5xx or a hang",
    "P2": "One request harms no other",
    "P3": "Out of memory in the middle of a batch is contained",
    "P4": "Health tells the truth",
    "P5": "Numbers that are not finite never become text",
    "P6": "A failed compile falls back to eager",
    "P7": "A bad model fails closed",
    "P8": "Overload is shed",
    "P9": "Slow clients hold nothing",
    "P10": "A gone client frees its slot",
    "P11": "Every stream ends in words",
    "P12": "No reply without an audit record",
    "P13": "Audit faults fail closed",
    "P14": "Tampering with the audit is seen",
    "P15": "180 days of audit, whatever the clock does",
    "P16": "Concurrent audit writers lose nothing",
    "P17": "Redis faults cost speed only",
    "P18": "A revoked token stays revoked",
    "P19": "No cache leak between users",
    "P20": "No mixed replies",
    "P21": "The cache key is complete",
    "P22": "Login resists guessing",
    "P23": "Forged tokens fail",
    "P24": "Denied by default",
    "P25": "Text that a user types is never a control token",
    "P26": "Other servers are not trusted",
}
LATER = {"P26": "This service speaks to no other server yet."}  # a test fails once one of them is proved after all

_HEAD = """# Promises, and the tests that prove them

Made from the tests' own markers by `make promises`; a test fails when this file is not current. The numbers are the
tests' numbers. "Injected" is what was broken on purpose, "counted" what was looked at afterwards.
"""


@dataclass(frozen=True, slots=True)
class Proof:
    """One marker of one test."""

    promise: str
    test: str
    injected: str
    counted: str


@cache
def proofs() -> tuple[Proof, ...]:
    """Every marker, in the order of promises, files and lines. Raises ValueError for one that is not complete."""
    found = [proof for file in sorted((ROOT / "tests").rglob("test_*.py")) for proof in _in(file)]
    return tuple(sorted(found, key=lambda proof: int(proof.promise[1:])))


def table() -> str:
    """The whole of docs/promises.md."""
    given = proofs()
    return "\n".join([_HEAD, *(_section(number, [p for p in given if p.promise == number]) for number in PROMISES)])


def _section(number: str, given: list[Proof]) -> str:
    head = f"## {number}. {PROMISES[number]}\n"
    if not given:
        return f"{head}\n{LATER.get(number, 'No test yet.')}\n"
    rows = [f"| {proof.test} | {proof.injected} | {proof.counted} |" for proof in given]
    return "\n".join([head, "| Test | Injected | Counted |", "| --- | --- | --- |", *rows, ""])


def _in(file: Path) -> Iterator[Proof]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            name = f"[{node.name.removeprefix('test_').replace('_', ' ')}](../{file.relative_to(ROOT)})"
            yield from (_proof(mark, name) for mark in node.decorator_list if _is_promise(mark))


def _is_promise(mark: ast.expr) -> bool:
    return isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.promise"


def _proof(mark: ast.expr, name: str) -> Proof:
    assert isinstance(mark, ast.Call)
    said = {"injected": "nothing"} | {str(word.arg): ast.literal_eval(word.value) for word in mark.keywords}
    number = ast.literal_eval(mark.args[0])
    if number not in PROMISES or set(said) != {"injected", "counted"}:
        raise ValueError(f"{name}: a promise needs a number of the list and counted=; injected= is optional")
    return Proof(number, name, said["injected"], said["counted"])


if __name__ == "__main__":
    TABLE.write_text(table())
