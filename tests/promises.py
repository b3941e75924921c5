"""docs/promises.md: what the service promises, the tests that prove it, and what these counted when they ran.

`python -m tests.promises [PATH...]` runs the marked tests (those under PATH), and writes their numbers and the table.
A test records its numbers through the fixture `counted`; those of a parametrised test are added up.
"""

from __future__ import annotations

import ast
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs/promises.md"
RECORD = ROOT / "docs/promises.json"  # by test, what it counted
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
    "P11": "Every stream ends with its text or an error event",
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
    "P27": "The page runs no model output",
    "P29": "The same request, the same bytes",
    "P30": "Nobody waits for another's queue",
    "P31": "Preemption loses nothing",
    "P36": "One connection harms no other",
}
LATER = {  # a test fails once one of them is proved after all
    "P26": "This service speaks to no other server yet.",
}

_HEAD = """# Promises, and the tests that prove them

`make promises` runs these tests and writes this file; a test fails when it is not current. "Injected" is what the test
breaks on purpose. "Counted" is what it looks at afterwards; the numbers were counted while it ran.
"""


@dataclass(frozen=True, slots=True)
class Proof:
    """One marker of one test."""

    promise: str
    test: str  # its path and name, as pytest has them
    injected: str
    said: str  # what is looked at
    counts: bool  # whether the test uses `counted`

    @property
    def link(self) -> str:
        path, _, name = self.test.partition("::")
        return f"[{name.removeprefix('test_').replace('_', ' ')}](../{path})"


@cache
def proofs() -> tuple[Proof, ...]:
    """Every marker, in the order of promises, files and lines. Raises ValueError for one that is not complete."""
    found = [proof for file in sorted((ROOT / "tests").rglob("test_*.py")) for proof in _in(file)]
    return tuple(sorted(found, key=lambda proof: int(proof.promise[1:])))


def table() -> str:
    """The whole of docs/promises.md."""
    given, numbers = proofs(), recorded()
    sections = (_section(number, [p for p in given if p.promise == number], numbers) for number in PROMISES)
    return "\n".join([_HEAD, *sections])


def recorded() -> dict[str, dict[str, int]]:
    """What each test counted when it last ran under `make promises`."""
    found: dict[str, dict[str, int]] = json.loads(RECORD.read_text())
    return found


def _section(number: str, given: list[Proof], numbers: dict[str, dict[str, int]]) -> str:
    head = f"## {number}. {PROMISES[number]}\n"
    if not given:
        return f"{head}\n{LATER.get(number, 'No test yet.')}\n"
    rows = [f"| {proof.link} | {proof.injected} | {_counted(proof, numbers.get(proof.test, {}))} |" for proof in given]
    return "\n".join([head, "| Test | Injected | Counted |", "| --- | --- | --- |", *rows, ""])


def _counted(proof: Proof, numbers: dict[str, int]) -> str:
    """`no 5xx: 2,000 bodies, 0 server errors`"""
    listed = ", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in numbers.items())
    return ": ".join(part for part in (proof.said, listed) if part)


def _in(file: Path) -> Iterator[Proof]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            name = f"{file.relative_to(ROOT)}::{node.name}"
            counts = "counted" in {argument.arg for argument in node.args.args}
            yield from (_proof(mark, name, counts) for mark in node.decorator_list if _is_promise(mark))


def _is_promise(mark: ast.expr) -> bool:
    return isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.promise"


def _proof(mark: ast.expr, name: str, counts: bool) -> Proof:
    assert isinstance(mark, ast.Call)
    said = {"injected": "nothing", "counted": ""} | {
        str(word.arg): ast.literal_eval(word.value) for word in mark.keywords
    }
    number = ast.literal_eval(mark.args[0])
    if number not in PROMISES or set(said) != {"injected", "counted"}:
        raise ValueError(f"{name}: a promise is a number of the list; injected= and counted= are optional")
    return Proof(number, name, said["injected"], said["counted"], counts)


@pytest.fixture
def counted(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`counted(bodies=2000, server_errors=0)` records what this test counted; a second call adds to the first."""
    return lambda **numbers: request.node.user_properties.extend(numbers.items())


class Recorder:
    """A pytest plugin that adds up what passing tests counted, by test."""

    def __init__(self) -> None:
        self.numbers: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            for name, number in report.user_properties:
                self.numbers[report.nodeid.partition("[")[0]][name] += int(str(number))


def main(paths: list[str]) -> int:
    recorder = Recorder()
    if failed := pytest.main(["-m", "promise", "-q", *paths], plugins=[recorder]):
        return int(failed)
    known = {proof.test for proof in proofs()}
    numbers = {test: counts for test, counts in {**recorded(), **recorder.numbers}.items() if test in known}
    RECORD.write_text(json.dumps(numbers, indent=2, sort_keys=True) + "\n")
    TABLE.write_text(table())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
