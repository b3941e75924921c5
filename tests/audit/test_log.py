"""Writing the audit log: durable, in order, by many, whatever fails; finding records; closing what was left open."""

from __future__ import annotations

import gc
import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from audit.log import AuditFilter, AuditUnavailable
from audit.records import write_head
from tests.audit.logs import Fault, Log, failing_database, find, said

ROOT = Path(__file__).parents[2]
PROCESSES = multiprocessing.get_context("forkserver")  # of tests/api, where that ran: then all imports are done


def run(log: Log, code: str, **options: object) -> subprocess.Popen[str]:
    """A process of its own with `audit`, the log opened, and `log`."""
    start = "import os, sys; from tests.audit.logs import *; log = Log(Path(sys.argv[1]), sys.argv[2])\n"
    command = [sys.executable, "-c", f"{start}audit = log.open()\n{code}", str(log.folder), log.url]
    return subprocess.Popen(command, cwd=ROOT, text=True, **options)  # type: ignore[call-overload,no-any-return]


def test_records_are_numbered_and_stamped_in_the_order_of_writing(log: Log) -> None:
    audit = log.open()
    audit.append(said("a"), said("b"))
    audit.append(said("c"))
    records = log.records()
    assert [(record["seq"], record.get("said")) for record in records] == [(1, None), (2, "a"), (3, "b"), (4, "c")]
    assert {record["time"] for record in records} == {"2027-01-15T08:00:00.000Z"}
    assert log.whole and log.head.stat().st_mode & 0o777 == 0o600


def test_the_record_is_committed_before_the_head_file_is_written(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[list[object]] = []
    monkeypatch.setattr("audit.log.write_head", lambda *given: (found.append(log.said()), write_head(*given)))
    log.open().append(said("a"))
    assert found == [[], ["a"]], "the first record goes alone"


@pytest.mark.promise("P16", injected="32 threads that write 100 records each")
def test_many_threads_lose_nothing_and_share_commits(log: Log, counted: Callable[..., None]) -> None:
    audit = log.open()

    def write(thread: int) -> None:
        for n in range(100):
            audit.append(said(f"{thread}.{n}"))

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(write, range(32)))
    expected, kept = {f"{thread}.{n}" for thread in range(32) for n in range(100)}, log.said()
    commits = audit._metrics.registry.get_sample_value("llm_audit_commit_seconds_count")
    assert log.whole and commits is not None and commits < 1600
    counted(records=len(kept), lost=len(expected.difference(kept)), duplicates=len(kept) - len(set(kept)))
    counted(commits=int(commits))
    assert sorted(kept) == sorted(expected)


def write_500(folder: Path, url: str, start: Barrier, process: int) -> None:
    """What each of several processes does, once all are ready."""
    audit = Log(folder, url).open()
    start.wait(100)
    for n in range(500):
        audit.append(said(f"{process}.{n}"))


@pytest.mark.timeout(240)
@pytest.mark.promise("P16", injected="4 processes that write 500 records each")
def test_many_processes_lose_nothing(log: Log, counted: Callable[..., None]) -> None:
    start = PROCESSES.Barrier(4)
    running = [PROCESSES.Process(target=write_500, args=(log.folder, log.url, start, n)) for n in range(4)]
    for process in running:
        process.start()
    for process in running:
        process.join(200)
    assert [process.exitcode for process in running] == [0, 0, 0, 0]
    expected, kept, report = {f"{process}.{n}" for process in range(4) for n in range(500)}, log.said(), log.verify()
    counted(records=len(kept), lost=len(expected.difference(kept)), duplicates=len(kept) - len(set(kept)))
    assert sorted(kept) == sorted(expected)
    assert report.problems == [] and report.last == report.records == 2001


@pytest.mark.parametrize("words", ["database or disk is full", "disk I/O error"])
@pytest.mark.promise("P13", injected="full and I/O error at the Nth statement, commit or head write, for every N")
def test_a_write_that_fails_promises_nothing_and_the_next_goes_on(
    log: Log, words: str, counted: Callable[..., None]
) -> None:
    audit, kept, faults = log.open(), ["before"], 0
    audit.append(said("before"))
    for at in range(1, 30):
        with failing_database(Fault(at, words)) as fault:
            try:
                audit.append({"kind": "start", "id": str(at)}, said(at))
                kept.append(at)  # type: ignore[arg-type]
            except AuditUnavailable as error:
                assert error.code == "audit_unavailable" and error.status == 503 and error.retry_after == 5
                faults += 1
        if not fault.injected:
            break
        audit.append(said(f"after {at}"))
        kept.append(f"after {at}")
    assert faults == 5 and fault.injected == 0, "three statements, the commit and the head were hit once each"
    found = [word for word in log.said() if word in kept]
    counted(writes_refused=faults, records=len(kept), lost=len(kept) - len(found))
    assert found == kept and log.whole


@pytest.mark.promise("P13", injected="the kernel cuts writes short, at 60 sizes of the file")
def test_a_short_write_is_finished_or_refused(tmp_path: Path, counted: Callable[..., None]) -> None:
    log = Log(tmp_path)
    code = """
import resource, signal
from audit.log import AuditUnavailable
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
audit.append(said("before"))
for n in range(60):
    size = os.stat(log.folder / "service.sqlite3-wal").st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 700 * n, hard))
    try:
        audit.append(said(n)); print("kept", n, flush=True)
    except AuditUnavailable: print("refused", n, flush=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    audit.append(said(f"after {n}"))
"""
    process = run(log, code, stdout=subprocess.PIPE)
    lines = [line.split() for line in process.communicate(timeout=100)[0].splitlines()]
    answers = {int(line[1]): line[0] for line in lines if line and line[0] in ("kept", "refused")}
    told, kept = log.said(), [n for n, answer in answers.items() if answer == "kept"]
    expected = [*kept, *(f"after {n}" for n in range(60))]
    counted(sizes=len(answers), written=len(kept), refused=len(answers) - len(kept))
    counted(lost=len(set(expected).difference(told)))
    assert process.returncode == 0 and len(answers) == 60 and len(answers) - len(kept) >= 10
    assert [n for n in told if answers.get(n) == "kept"] == kept
    assert set(expected) <= set(told) and log.whole


@pytest.mark.promise("P13", injected="a database that stays full, and then does not")
def test_a_full_disk_refuses_until_there_is_space(tmp_path: Path, counted: Callable[..., None]) -> None:
    log = Log(tmp_path)
    audit = log.open()
    audit.append(said("before"))
    _limit_pages(log, full=True)
    refused = 0
    for _ in range(100):
        try:
            audit.append(said("x" * 2000))
        except AuditUnavailable as error:
            assert "SQLITE_FULL" in str(error)
            refused += 1
    assert refused > 90
    _limit_pages(log, full=False)
    audit._probed = 0
    assert audit.problem() is None and log.records()[-1]["kind"] == "resumed"
    audit.append(said("after"))
    counted(refused_while_full=refused, written_afterwards=log.said().count("after"))
    assert log.said()[0] == "before" and log.said()[-1] == "after" and log.whole


def _limit_pages(log: Log, full: bool) -> None:
    """Of the one connection in the pool of writers."""
    with log.database._writer.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one() if full else 1 << 30
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}").scalar_one()


def test_everyone_who_waits_is_told_of_a_fault(log: Log) -> None:
    audit, refused, gate = log.open(), [], threading.Barrier(8)
    audit.append(said("before"))

    def write() -> None:
        gate.wait(10)
        try:
            audit.append(said("x"))
        except AuditUnavailable as error:
            refused.append(error)

    with failing_database(Fault(1, lasts=10**6)), ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: write(), range(8)))
    assert len(refused) == 8


def test_a_problem_is_told_until_a_write_works_again(log: Log) -> None:
    audit = log.open()
    assert audit.problem() is None
    with failing_database(Fault(1, lasts=10**6)):
        with pytest.raises(AuditUnavailable):
            audit.open()
        assert audit.problem() is not None
        audit._probed = 0
        assert audit.problem() is not None
    audit._probed = 0
    assert audit.problem() is None and audit.problem() is None
    assert [record["kind"] for record in log.records()] == ["log", "resumed"]


def test_a_folder_that_cannot_be_used_is_refused(log: Log) -> None:
    log.head.parent.touch()
    with pytest.raises(AuditUnavailable):
        log.open().open()


@pytest.mark.promise("P12", injected="kill -9 with two of three generations open")
def test_what_a_killed_process_left_open_is_closed(log: Log, counted: Callable[..., None]) -> None:
    code = "for id in 'abc': audit.append({'kind': 'start', 'id': id, 'user': 'ann', 'route': '/generate'})\n"
    code += "audit.append({'kind': 'end', 'id': 'b', 'outcome': 'stop'}); os.kill(os.getpid(), 9)"
    assert run(log, code).wait(60) == -9
    log.open().open()
    ends = log.records("end")
    aborted = [end for end in ends if end["outcome"] == "aborted"]
    counted(starts=len(log.records("start")), ends=len(ends), closed_as_aborted=len(aborted))
    assert [(end["id"], end["outcome"]) for end in ends] == [("b", "stop"), ("a", "aborted"), ("c", "aborted")]
    assert all(end["user"] == "ann" and end["route"] == "/generate" for end in ends[1:]) and log.whole
    log.open().open()
    assert len(log.records("end")) == 3, "once is enough"
    assert sum(file.stat().st_size for file in log.folder.glob("audit-writers")) == 0, "locks leave nothing behind"


def test_what_a_living_process_has_open_is_left_alone(log: Log) -> None:
    living = log.open()
    living.append({"kind": "start", "id": "a"})
    log.open().append({"kind": "start", "id": "b"})
    assert log.records("end") == []
    living.append({"kind": "end", "id": "a", "outcome": "stop"})
    assert [end["outcome"] for end in log.records("end")] == ["stop"]


@pytest.mark.promise("P12", injected="an end that cannot be written, then a clean end of the process")
def test_a_start_whose_end_was_lost_does_not_stay_open(log: Log, counted: Callable[..., None]) -> None:
    audit = log.open()
    for id in ("a", "b"):
        audit.append({"kind": "start", "id": id, "user": "ann"})
        with failing_database(Fault(1)), pytest.raises(AuditUnavailable):
            audit.append({"kind": "end", "id": id, "outcome": "stop"})
        if id == "a":
            audit.append(said("the process goes on"))
            assert [(end["id"], end["outcome"]) for end in log.records("end")] == [("a", "audit_unavailable")]
    del audit
    gc.collect()
    log.open().open()
    ends = log.records("end")
    counted(starts=len(log.records("start")), ends=len(ends))
    assert [(end["id"], end["outcome"]) for end in ends][1:] == [("b", "aborted")]


@pytest.mark.parametrize("log", ["postgresql"], indirect=True)
def test_a_lost_connection_closes_no_generation_that_lives(log: Log) -> None:
    audit = log.open()
    audit.append({"kind": "start", "id": "a"})
    others = "FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = current_database()"
    with log.database.reading() as connection:
        connection.exec_driver_sql(f"SELECT pg_terminate_backend(pid) {others}")
    audit.append(said("on new connections"))
    log.open().open()
    assert log.records("end") == []
    audit.append({"kind": "end", "id": "a", "outcome": "stop"})
    assert [end["outcome"] for end in log.records("end")] == ["stop"]


@pytest.mark.parametrize("log", ["postgresql"], indirect=True)
def test_another_machine_may_join_a_shared_database(log: Log, tmp_path: Path) -> None:
    log.open().append(said("here"))
    there = Log(tmp_path / "there", log.url)
    for _ in range(2):
        there.open().append(said("there"))
        log.open().append(said("here again"))
    assert [record["kind"] for record in log.records() if record["kind"] != "said"] == ["log", "restored"]
    assert log.whole and there.whole and there.head != log.head
    there.database.close()


@pytest.fixture
def three(log: Log) -> Log:
    """Three generations of two users, over two days."""
    audit = log.open()
    for day, (id, user) in enumerate((("r1", "ann"), ("r2", "bob"), ("r3", "ann"))):
        audit.append({"kind": "start", "id": id, "request": id, "user": user, "parameters": {"user": "bob"}})
        audit.append({"kind": "end", "id": id, "request": id, "user": user, "outcome": "stop" if day else "length"})
        log.clocks.pass_days(1)
    return log


def test_filters_are_all_to_be_met(three: Log) -> None:
    audit = three.open()
    assert [record["id"] for record in find(audit, user="ann", kind="end")] == ["r1", "r3"]
    assert [record["kind"] for record in find(audit, request="r2")] == ["start", "end"]
    assert find(audit, user="an") == [] == find(audit, user='"')
    since = find(audit, kind="end")[1]["time"]
    assert [record["id"] for record in find(audit, kind="end", since=since)] == ["r2", "r3"]
    assert [record["id"] for record in find(audit, kind="end", until=since)] == ["r1"]


def test_pages_lead_through_the_log_both_ways(three: Log) -> None:
    audit = three.open()
    for newest_first in (True, False):
        seen, after = [], 0
        while page := audit.find(AuditFilter(kind="end"), 2, after, newest_first):
            seen += [row.seq for row in page]
            after = page[-1].seq
        assert seen == sorted(seen, reverse=newest_first) and len(seen) == 3


@pytest.mark.parametrize("wanted", [{"user": "x"}, {"kind": "x"}, {"request": "x"}, {"since": "2"}, {"until": "2"}])
def test_every_filter_is_looked_up_in_an_index(tmp_path: Path, wanted: dict[str, str]) -> None:
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    log, plans = Log(tmp_path), []

    def explain(connection, cursor, statement, parameters, *_):  # type: ignore[no-untyped-def]
        if statement.startswith("SELECT audit.seq"):
            plans.append([row[3] for row in cursor.execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall()])

    audit = log.open()
    audit.append(said("a"))
    event.listen(Engine, "before_cursor_execute", explain)
    try:
        for after in (0, 1):
            audit.find(AuditFilter(**wanted), 10, after)
    finally:
        event.remove(Engine, "before_cursor_execute", explain)
    assert len(plans) == 2 and all("SEARCH audit USING INDEX" in plan[0] for plan in plans), plans
    assert not any("TEMP B-TREE" in step for plan in plans for step in plan) or "request" in wanted
