"""A worker answers turns, says why it cannot, and ends when its parent does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.worker import Worker, WorkerFailed, prompt

CHILD = """
import os
from benchmarks.worker import serve

def add(a, b):
    print("noise from a library")
    return {"sum": a + b}

serve({"add": add, "fail": lambda: {}[0], "die": lambda: os._exit(3)})
"""


def worker(folder: Path, code: str = CHILD) -> Worker:
    return Worker([sys.executable, "-c", code], folder / "log", {})


def test_turns_are_answered_and_noise_goes_to_the_log(tmp_path: Path) -> None:
    with worker(tmp_path) as child:
        assert [child.ask("add", a=1, b=n)["sum"] for n in range(3)] == [1, 2, 3]
        process = child._child
    assert process.returncode == 0 and "noise" in (tmp_path / "log").read_text()


def test_a_turn_that_fails_does_not_end_the_worker(tmp_path: Path) -> None:
    with worker(tmp_path) as child:
        with pytest.raises(WorkerFailed, match="KeyError"):
            child.ask("fail")
        assert child.ask("add", a=1, b=1) == {"sum": 2}


@pytest.mark.parametrize("code", [CHILD, "raise SystemExit('no such model')"], ids=["during a turn", "at the start"])
def test_a_worker_that_dies_is_an_error_with_its_last_words(tmp_path: Path, code: str) -> None:
    with worker(tmp_path, code) as child, pytest.raises(WorkerFailed) as caught:
        child.ask("die")
    assert ("no such model" in str(caught.value)) == (code != CHILD)


def test_prompts_differ_between_rows_and_extend_each_other() -> None:
    assert prompt(0, 50) != prompt(1, 50) and prompt(3, 50)[:20] == prompt(3, 20)
