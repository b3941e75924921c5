"""Writing the audit log: durable, in order, by many, and after whatever happened to it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from audit.journal import AuditUnavailable, Journal
from crypto import MacKeys
from tests.audit.logs import Fault, Log, failing_disk

ROOT = Path(__file__).parents[2]


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path)


def said(log: Log) -> list[object]:
    """What the callers wrote, without the lines that open files."""
    return [record["said"] for record in log.records() if "said" in record]


def test_records_are_numbered_and_stamped_in_the_order_of_writing(log: Log) -> None:
    journal = log.journal()
    journal.append({"said": "a"}, {"said": "b"})
    journal.append({"said": "c"})
    records = log.records()
    assert [(record["seq"], record.get("said")) for record in records] == [(1, None), (2, "a"), (3, "b"), (4, "c")]
    assert {record["time"] for record in records} == {"2027-01-15T08:00:00.000Z"}
    assert log.whole and log.files[0].stat().st_mode & 0o777 == 0o600


def test_it_is_on_disk_before_append_returns(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda file: (real(file), synced.append(os.fstat(file).st_size)))
    log.journal().append({"said": "a"})
    assert synced == [log.files[0].stat().st_size, log.head.stat().st_size], "the record first, then the head"


def test_one_sync_serves_all_that_wait(log: Log) -> None:
    commits: list[int] = []
    journal = Journal(log.place(), lambda records, seconds, written: commits.append(records))
    first = journal.add({"said": "a"})
    others = [journal.add({"said": str(n)}) for n in range(50)]
    journal.settle(others[-1])
    journal.settle(first)
    assert commits == [51] and len(said(log)) == 51


def test_a_batch_that_nobody_waits_for_goes_with_the_next(log: Log) -> None:
    journal = log.journal()
    journal.add({"said": "queued"})
    assert not log.files
    journal.append({"said": "waited for"})
    assert said(log) == ["queued", "waited for"]


@pytest.mark.promise("P16", counted="32 threads x 100 records: 3,200 in the log, no gap, no duplicate")
def test_many_threads_lose_nothing(log: Log) -> None:
    journal = log.journal()

    def write(thread: int) -> None:
        for n in range(100):
            journal.append({"said": f"{thread}.{n}"})

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(write, range(32)))
    assert sorted(said(log)) == sorted(f"{thread}.{n}" for thread in range(32) for n in range(100))
    assert log.whole


@pytest.mark.promise("P16", counted="4 processes x 500 records: exactly 2,000, no gap, no duplicate")
def test_many_processes_lose_nothing(log: Log) -> None:
    code = "import sys; from tests.audit.logs import *; log = Log(Path(sys.argv[1]), most_bytes=100_000)\n"
    code += "journal = log.journal(); sys.stdin.read()\n"
    code += "for n in range(500): journal.append({'said': f'{sys.argv[2]}.{n}'})"
    ready, go = os.pipe()
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(log.folder), str(n)], cwd=ROOT, stdin=ready) for n in range(4)
    ]
    os.close(ready)
    os.close(go)  # the end of file for which all four wait
    assert [process.wait(100) for process in running] == [0, 0, 0, 0]
    assert sorted(said(log)) == sorted(f"{process}.{n}" for process in range(4) for n in range(500))
    report = log.verify()
    assert report.problems == [] and report.segments > 2 and report.last == report.records


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.promise(
    "P13", injected="ENOSPC and EIO at the Nth write or sync, for every N", counted="refused, and all promised is there"
)
def test_a_write_that_fails_promises_nothing_and_the_next_goes_on(log: Log, error: int) -> None:
    journal, kept, faults = log.journal(), ["before"], 0
    journal.append({"said": "before"})
    for at in range(1, 30):
        with failing_disk(Fault(at, error), log.folder) as fault:
            try:
                journal.append({"said": at})
                kept.append(at)  # type: ignore[arg-type]
            except AuditUnavailable:
                faults += 1
        if not fault.injected:
            break
        journal.append({"said": f"after {at}"})
        kept.append(f"after {at}")
    assert faults >= 4 and fault.injected == 0, "every write and every sync was hit once"
    assert [word for word in said(log) if word in kept] == kept and log.whole


@pytest.mark.promise("P13", injected="a short write at the Nth write, for every N", counted="each whole, or refused")
def test_a_short_write_is_finished_or_refused(log: Log) -> None:
    journal, kept = log.journal(), []
    for at in range(1, 12):
        with failing_disk(Fault(at, error=0), log.folder) as fault:
            try:
                journal.append({"said": at})
                kept.append(at)
            except AuditUnavailable:
                pass
        if not fault.injected:
            break
    assert fault.injected == 0 and [word for word in said(log) if word in kept] == kept and log.whole


@pytest.mark.promise("P13", injected="a disk that stays full", counted="every record refused, until there is room")
def test_a_full_disk_refuses_until_there_is_room(log: Log) -> None:
    journal = log.journal()
    journal.append({"said": "before"})
    with failing_disk(Fault(1, lasts=10**6), log.folder) as fault:
        for _ in range(5):
            with pytest.raises(AuditUnavailable, match="No space left"):
                journal.append({"said": "lost"})
    assert fault.injected >= 5
    journal.append({"said": "after"})
    assert said(log) == ["before", "after"] and log.whole


def test_everyone_who_waits_hears_of_a_fault(log: Log) -> None:
    journal, refused = log.journal(), []
    gate = threading.Barrier(8)

    def write() -> None:
        gate.wait(10)
        try:
            journal.append({"said": "x"})
        except AuditUnavailable as error:
            refused.append(error)

    with failing_disk(Fault(1, lasts=10**6), log.folder), ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: write(), range(8)))
    assert len(refused) == 8


@pytest.mark.promise("P12", injected="a process that died before it counted its records", counted="they are kept")
def test_what_a_dead_process_wrote_but_did_not_count_is_kept(log: Log) -> None:
    log.journal().append({"said": "a"})
    before = log.head.read_bytes()
    log.journal().append({"said": "b"}, {"said": "c"})
    log.head.write_bytes(before)
    log.journal().append({"said": "d"})
    assert said(log) == ["a", "b", "c", "d"] and log.whole


def test_what_a_dead_process_half_wrote_is_cut_off(log: Log) -> None:
    log.journal().append({"said": "a"})
    with log.files[0].open("ab") as file:
        file.write(b'{"seq":3,"time":"2027')
    log.journal().append({"said": "b"})
    assert said(log) == ["a", "b"] and log.whole


def test_a_file_that_a_dead_process_began_is_gone_on_with(log: Log) -> None:
    log.journal().append({"said": "a"})
    before = log.head.read_bytes()
    log.most_bytes = 1
    log.journal().append({"said": "b"})
    log.head.write_bytes(before)
    log.most_bytes = 1 << 20
    log.journal().append({"said": "c"})
    assert said(log) == ["a", "b", "c"] and len(log.files) == 2 and log.whole


def test_a_file_that_a_dead_process_left_empty_does_no_harm(log: Log) -> None:
    log.journal().append({"said": "a"})
    (log.folder / "log" / "000000000003.jsonl").touch()
    log.journal().append({"said": "b"})
    assert said(log) == ["a", "b"] and log.whole


@pytest.mark.promise("P12", injected="a head torn in the middle of its write", counted="nothing promised is missing")
@pytest.mark.parametrize("slot", [0, 1])
def test_a_torn_head_costs_nothing(log: Log, slot: int) -> None:
    journal = log.journal()
    for word in "abc":
        journal.append({"said": word})
    raw = bytearray(log.head.read_bytes())
    raw[slot * 512 + 100 : (slot + 1) * 512] = bytes(412)
    log.head.write_bytes(raw)
    log.journal().append({"said": "d"})
    assert said(log) == ["a", "b", "c", "d"] and log.whole


def test_a_new_key_begins_a_new_file_and_the_old_one_still_verifies(log: Log) -> None:
    log.journal().append({"said": "a"})
    changed = replace(log, signer=MacKeys([b"n" * 32, b"k" * 32]))
    changed.journal().append({"said": "b"})
    assert len(changed.files) == 2 and changed.whole and said(changed) == ["a", "b"]
    opened = [record for record in changed.records() if record.get("kind") == "segment"]
    assert [record["why"] for record in opened] == ["first", "key"]


def test_a_lost_key_does_not_stop_the_log_and_is_told(log: Log) -> None:
    log.journal().append({"said": "a"})
    lost = replace(log, signer=MacKeys([b"n" * 32]))
    lost.journal().append({"said": "b"})
    assert said(lost) == ["a", "b"]
    assert any("not signed with a key that is known" in problem for problem in lost.verify().problems)
    assert any("no head" in problem for problem in lost.verify().problems)


def test_a_large_file_is_followed_by_another(log: Log) -> None:
    log.most_bytes = 2000
    journal = log.journal()
    for n in range(40):
        journal.append({"said": n})
    assert said(log) == list(range(40)) and len(log.files) == 3 and log.whole
    assert all(file.stat().st_size < 2500 for file in log.files)


@pytest.mark.parametrize("where", ["log", "kept apart"])
def test_a_folder_that_cannot_be_used_is_refused(log: Log, where: str) -> None:
    (log.folder / where).touch()
    with pytest.raises(AuditUnavailable):
        log.journal().append({"said": "a"})
