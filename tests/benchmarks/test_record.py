"""An interrupted row goes on where it was, and never with figures of another machine, option or code."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import record
from benchmarks.record import OutOfTime, Record


def options(**changed: object) -> argparse.Namespace:
    return argparse.Namespace(**({"fresh": False, "limit": 60.0, "rounds": 2, "patience": 0.0, "steps": 8} | changed))


@pytest.fixture
def counter() -> Iterator[int]:
    return itertools.count(1)


def run(kept: Record, counter: Iterator[int], rounds: int = 2) -> list[int]:
    return [kept.turn("a", number, lambda: next(counter)) for number in range(rounds)]


def test_what_was_measured_is_not_measured_again(tmp_path: Path, counter: Iterator[int]) -> None:
    assert run(Record.open("decode", options(), tmp_path), counter, 1) == [1]
    again = Record.open("decode", options(rounds=5, patience=9), tmp_path)
    assert run(again, counter) == [1, 2]
    assert again.has(["a"], 2) and not again.has(["a"], 3) and not again.has(["a", "b"], 1)


def test_facts_come_back_with_the_figures(tmp_path: Path, counter: Iterator[int]) -> None:
    first = Record.open("decode", options(), tmp_path)
    first.facts["engine"] = {"version": "1"}
    run(first, counter)
    assert Record.open("decode", options(), tmp_path).facts == {"engine": {"version": "1"}}


@pytest.mark.parametrize("changed", [{"steps": 9}, {"fresh": True}], ids=["another option", "--fresh"])
def test_figures_of_another_measurement_are_not_mixed_in(
    tmp_path: Path, counter: Iterator[int], changed: dict[str, object]
) -> None:
    run(Record.open("decode", options(), tmp_path), counter)
    assert run(Record.open("decode", options(**changed), tmp_path), counter) == [3, 4]


def test_figures_of_other_code_are_not_mixed_in(
    tmp_path: Path, counter: Iterator[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(Record.open("decode", options(), tmp_path), counter)
    monkeypatch.setattr(record, "code", lambda row: "changed")
    assert run(Record.open("decode", options(), tmp_path), counter) == [3, 4]


def test_the_digest_follows_the_engine_and_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setattr(record, "HERE", tmp_path)
    seen = [record.code("decode")]
    for file in ("model/runner.py", "decode.py", "http.py"):
        (tmp_path / file).write_text("changed")
        seen.append(record.code("decode"))
    assert len(set(seen)) == 3 and seen[2] == seen[3]  # another row's file does not count


def test_after_the_time_is_up_no_turn_begins_but_kept_ones_are_shown(
    tmp_path: Path, counter: Iterator[int], capsys: pytest.CaptureFixture[str]
) -> None:
    run(Record.open("decode", options(), tmp_path), counter, 1)
    late = Record.open("decode", options(limit=-1.0), tmp_path)
    with late.bounded():
        run(late, counter)
    assert late.turns == {"a": [1]} and "run the same command again" in capsys.readouterr().err
    with pytest.raises(OutOfTime):
        run(late, counter)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"turns": {}}'])
def test_a_damaged_record_is_measured_anew(tmp_path: Path, counter: Iterator[int], text: str) -> None:
    (tmp_path / "decode.json").write_text(text)
    assert run(Record.open("decode", options(), tmp_path), counter) == [1, 2]
    assert record.read(tmp_path / "decode.json") is not None


def test_a_turn_that_fails_is_not_kept(tmp_path: Path, counter: Iterator[int]) -> None:
    kept = Record.open("decode", options(), tmp_path)
    with pytest.raises(ZeroDivisionError):
        kept.turn("a", 0, lambda: 1 // 0)
    assert run(kept, counter) == [1, 2]


def test_the_machine_is_named_with_its_instructions() -> None:
    assert " cores of " in record.machine() and "\t" not in record.machine()
