"""Tampering with the audit log, byte by byte and file by file; and its age."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from audit import chain
from crypto import MacKeys
from tests.audit.logs import DAY, Log


@pytest.fixture
def log(tmp_path: Path) -> Log:
    """Five files of a few records each."""
    log = Log(tmp_path, most_bytes=400)
    journal = log.journal()
    for n in range(12):
        journal.append({"kind": "end", "user": "ann", "said": n})
    assert len(log.files) >= 4 and log.whole
    return log


@pytest.mark.promise("P14", injected="each bit of one byte in turn, for every byte of the log", counted="all found")
def test_every_byte_is_guarded(log: Log) -> None:
    flipped = 0
    for file in log.files:
        content = file.read_bytes()
        for place in range(len(content)):
            changed = bytearray(content)
            changed[place] ^= 1 << (place % 8)
            file.write_bytes(changed)
            assert not log.whole, (file.name, place)
            flipped += 1
        file.write_bytes(content)
    assert flipped > 2000 and log.whole


@pytest.mark.promise(
    "P14", injected="a record deleted, doubled or swapped with the next, everywhere", counted="all found"
)
def test_every_line_is_guarded(log: Log) -> None:
    tried = 0
    for file in log.files:
        content = file.read_bytes()
        lines = content.splitlines(keepends=True)
        for n in range(len(lines)):
            gone, doubled = lines[:n] + lines[n + 1 :], [*lines[:n], lines[n], *lines[n:]]
            swapped = [*lines[:n], *reversed(lines[n : n + 2]), *lines[n + 2 :]]
            for changed in (gone, doubled, swapped):
                if changed != lines:
                    file.write_bytes(b"".join(changed))
                    assert not log.whole, (file.name, n)
                    tried += 1
        file.write_bytes(content)
    assert tried > 30 and log.whole


@pytest.mark.promise("P14", injected="the log cut at every record, and whole files deleted", counted="all found")
def test_a_tail_that_was_cut_off_is_missed(log: Log) -> None:
    last = log.files[-1]
    content = last.read_bytes()
    ends = [place + 1 for place, byte in enumerate(content) if byte == ord("\n")]
    for end in [0, *ends[:-1]]:
        last.write_bytes(content[:end])
        assert not log.whole, end
    last.write_bytes(content)
    for file in log.files:
        hidden = file.rename(file.with_suffix(".hidden"))
        assert not log.whole, file.name
        hidden.rename(file)
    assert log.whole


@pytest.mark.promise("P14", injected="a record signed with another key, and one from another log", counted="both found")
def test_a_record_that_was_forged_or_moved_is_found(log: Log, tmp_path: Path) -> None:
    last = log.files[-1]
    content = last.read_bytes()
    *_, line = content.splitlines(keepends=True)
    before, record = chain.read(line), {"seq": 99, "kind": "end", "user": "mallory"}
    assert before is not None
    stranger = MacKeys([b"x" * 32])
    last.write_bytes(content[: -len(line)] + chain.write(record, "", stranger.newest, stranger)[0])
    assert not log.whole
    other = Log(tmp_path / "other", most_bytes=400)
    for n in range(12):
        other.journal().append({"kind": "end", "user": "bob", "said": n})
    shutil.copy(other.files[1], log.files[1])
    last.write_bytes(content)
    assert not log.whole


@pytest.mark.promise("P14", injected="the head deleted, spoiled, or put back to an earlier one", counted="all found")
def test_the_head_is_guarded(log: Log) -> None:
    head = log.head.read_bytes()
    for spoiled in (b"", bytes(1024), head[:100]):
        log.head.write_bytes(spoiled)
        assert not log.whole
    log.head.unlink()
    assert not log.whole
    log.journal().append({"kind": "end", "said": "the service goes on"})
    assert any("no head" in problem for problem in log.verify().problems), "and it stays told"


@pytest.mark.promise("P14", injected="the newest file cut between two starts", counted="told for good, service goes on")
def test_what_was_cut_off_is_told_after_the_service_went_on(log: Log) -> None:
    last = log.files[-1]
    last.write_bytes(last.read_bytes()[:-20])
    log.journal().append({"kind": "end", "said": "after"})
    assert any("damaged" in problem for problem in log.verify().problems)
    assert b'"said":"after"' in log.files[-1].read_bytes()


def test_what_is_written_meanwhile_is_not_blamed(log: Log) -> None:
    with log.files[-1].open("ab") as file:
        file.write(b'{"seq":')
    assert log.whole


def test_a_copy_verifies_elsewhere_with_the_key(log: Log, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "log", tmp_path / "copy" / "log")
    shutil.copytree(tmp_path / "kept apart", tmp_path / "copy" / "kept apart")
    copy = Log(tmp_path / "copy")
    assert copy.whole
    assert not replace(copy, signer=MacKeys([b"x" * 32])).whole


def aged(tmp_path: Path, days: int) -> Log:
    """A log with one record a day."""
    log = Log(tmp_path)
    journal = log.journal()
    for day in range(days):
        journal.append({"kind": "end", "said": day})
        log.clocks.pass_days(1)
    return log


@pytest.mark.promise("P15", injected="200 days, a record a day", counted="180 days kept, older ones gone by file")
def test_records_are_kept_for_180_days_and_no_longer(tmp_path: Path) -> None:
    log = aged(tmp_path, 200)
    days = [record["said"] for record in log.records() if "said" in record]
    assert days == list(range(days[0], 200)) and 199 - 181 <= days[0] <= 199 - 179
    report = log.verify()
    assert report.problems == [] and report.first == int(log.files[0].stem) > 1


@pytest.mark.promise("P15", injected="a wall clock set to yesterday", counted="order kept, the chain verifies")
def test_a_clock_that_goes_back_changes_no_order(tmp_path: Path) -> None:
    log = Log(tmp_path)
    journal = log.journal()
    for word in ("a", "b"):
        journal.append({"said": word})
        log.clocks.wall -= DAY
    log.journal().append({"said": "c"})
    records = [record for record in log.records() if "said" in record]
    assert [record["said"] for record in records] == ["a", "b", "c"] and log.whole
    assert records[0]["time"] > records[1]["time"] > records[2]["time"]


@pytest.mark.promise(
    "P15", injected="a wall clock 200 days ahead, running and between starts", counted="nothing pruned"
)
@pytest.mark.parametrize("restarted", [False, True])
def test_a_clock_that_jumps_ahead_prunes_nothing(tmp_path: Path, restarted: bool) -> None:
    log = aged(tmp_path, 170)
    journal = log.journal()
    journal.append({"said": "before"})
    log.clocks.wall += 200 * DAY
    journal = log.journal() if restarted else journal
    for _ in range(3):
        journal.append({"said": "after"})
    assert log.records()[1]["said"] == 0, "the oldest is still there"
    assert log.whole


@pytest.mark.promise("P15", injected="a first line that claims to be old", counted="nothing pruned on its word")
def test_nothing_is_pruned_on_the_word_of_a_forged_line(tmp_path: Path) -> None:
    log = aged(tmp_path, 20)
    victim = log.files[5]
    victim.write_bytes(victim.read_bytes().replace(b'"clock":', b'"clock":-99999999.0,"was":', 1))
    journal = log.journal()
    log.clocks.pass_days(2)
    journal.append({"said": "after"})
    log.clocks.pass_days(2)
    journal.append({"said": "after"})
    assert log.records()[1]["said"] == 0 and not log.whole


def test_spoiled_lines_by_chance_never_stop_verifying(log: Log) -> None:
    chance = random.Random(7)
    originals = {file: file.read_bytes() for file in log.files}
    for _ in range(200):
        file = chance.choice(log.files)
        content = bytearray(originals[file])
        for _ in range(chance.randrange(1, 30)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        file.write_bytes(content)
        assert (content == originals[file]) or not log.whole
        file.write_bytes(originals[file])
