"""Tampering with the audit log, byte by byte and row by row; its head, its age, and copies of it."""

from __future__ import annotations

import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from audit.records import chained
from crypto import MacKeys
from tests.audit.logs import DAY, Log, said

ROOT = Path(__file__).parents[2]
COLUMNS = ("seq", "time", "kind", "request", "user", "outcome", "body", "key", "mac")
NAMES = ", ".join(COLUMNS).replace("user", '"user"').replace("time", '"time"')
PUT = f"INSERT INTO audit ({NAMES}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
ALL = f"SELECT {NAMES} FROM audit ORDER BY seq"


@pytest.fixture
def log(tmp_path: Path) -> Log:
    """Eight records."""
    log = Log(tmp_path)
    audit = log.open()
    for n in range(6):
        audit.append({"kind": "end", "id": str(n), "request": "r", "user": "ann", "outcome": "stop", "said": n})
    audit.append(said("last"))
    assert log.whole and log.verify().records == 8
    return log


def rows(log: Log) -> list[tuple[object, ...]]:
    with sqlite3.connect(log.folder / "service.sqlite3") as connection:
        return connection.execute(ALL).fetchall()


def put(log: Log, changed: list[tuple[object, ...]]) -> None:
    with sqlite3.connect(log.folder / "service.sqlite3") as connection:
        connection.execute("DELETE FROM audit")
        connection.executemany(PUT, changed)


def flipped(value: object, place: int) -> object:
    if isinstance(value, int):
        return value ^ (1 << place)
    raw = bytearray(value if isinstance(value, bytes) else str(value).encode())
    raw[place] ^= 1 << (place % 7)
    return bytes(raw) if isinstance(value, bytes) else raw.decode()


@pytest.mark.promise("P14", injected="one bit of each byte of every column of the log and of its head")
def test_every_byte_is_guarded(tmp_path: Path, counted: Callable[..., None]) -> None:
    log = Log(tmp_path)
    log.open().append({"kind": "end", "id": "1", "request": "r", "user": "ann", "outcome": "stop"}, said("last"))
    original, found = rows(log), dict[tuple[object, ...], bool]()
    for row in original:
        for name, value in zip(COLUMNS, row, strict=True):
            for place in range(8 if isinstance(value, int) else len(value or "")):  # type: ignore[arg-type]
                changed = flipped(value, place)
                log.sql(f'UPDATE OR REPLACE audit SET "{name}" = ? WHERE seq = ?', changed, row[0])
                found[row[0], name, place] = not log.whole
                if name == "seq":
                    put(log, original)
                else:
                    log.sql(f'UPDATE audit SET "{name}" = ? WHERE seq = ?', value, row[0])
        for name in ("request", "user", "outcome"):
            log.sql(f'UPDATE audit SET "{name}" = ? WHERE seq = ?', None if row[COLUMNS.index(name)] else "x", row[0])
            found[row[0], name] = not log.whole
            log.sql(f'UPDATE audit SET "{name}" = ? WHERE seq = ?', row[COLUMNS.index(name)], row[0])
    with sqlite3.connect(log.folder / "service.sqlite3") as connection:
        kept = connection.execute("SELECT log, state FROM audit_head").fetchone()
    for name, value in zip(("log", "state"), kept, strict=True):
        for place in range(len(value)):
            log.sql(f"UPDATE audit_head SET {name} = ?", flipped(value, place))
            found[name, place] = not log.whole
            log.sql(f"UPDATE audit_head SET {name} = ?", value)
    counted(changes=len(found), found=sum(found.values()))
    assert [place for place, seen in found.items() if not seen] == []
    assert len(found) > 800 and log.whole


@pytest.mark.promise("P14", injected="each record deleted, doubled, swapped with the next; the log cut there")
def test_every_record_has_its_place(log: Log, counted: Callable[..., None]) -> None:
    original, found = rows(log), list[bool]()
    for n, row in enumerate(original):
        gone, cut = original[:n] + original[n + 1 :], original[:n]
        doubled = [*original, ((99, -9)[n % 2], *row[1:])]
        moved_up = [*original[:n], *((each[0] - 1, *each[1:]) for each in original[n + 1 :])]
        swapped = list(original)
        if n + 1 < len(original):
            swapped[n : n + 2] = (row[0], *original[n + 1][1:]), (original[n + 1][0], *row[1:])
        for changed in (gone, cut, doubled, moved_up, swapped):
            if changed != original:
                put(log, changed)
                found.append(not log.whole)
    counted(changes=len(found), found=sum(found))
    assert len(found) > 30 and all(found)
    put(log, original)
    assert log.whole


@pytest.mark.promise("P14", injected="a record signed with another key, and one from another log")
def test_a_record_that_was_forged_or_moved_is_found(log: Log, tmp_path: Path, counted: Callable[..., None]) -> None:
    original = rows(log)
    forged = chained({"kind": "end", "user": "mallory"}, 8, "2027", str(original[6][8]), MacKeys([b"x" * 32]))
    other = Log(tmp_path / "other")
    for n in range(7):
        other.open().append(said(n))
    found = []
    for record in (tuple(forged[name] for name in COLUMNS), rows(other)[7]):
        put(log, [*original[:7], record])
        found.append(not log.whole)
    counted(records=len(found), found=sum(found))
    assert all(found)


def service(log: Log) -> Path:
    """The database in one file."""
    log.sql("PRAGMA wal_checkpoint(TRUNCATE)")
    return log.folder / "service.sqlite3"


def put_back(log: Log, copy: Path) -> None:
    log.database.close()
    for name in ("service.sqlite3-wal", "service.sqlite3-shm"):
        (log.folder / name).unlink(missing_ok=True)
    shutil.copy(copy, log.folder / "service.sqlite3")


def grow(log: Log, records: int = 3) -> None:
    audit = log.open()
    for n in range(records):
        log.clocks.wall += 3600
        audit.append(said(n))


def test_a_table_put_back_to_an_older_copy_is_found_and_told_for_good(log: Log, tmp_path: Path) -> None:
    copy = Path(shutil.copy(service(log), tmp_path / "copy"))
    grow(log)
    put_back(log, copy)
    assert "the head file remembers record 11, the database ends at 8" in log.verify().problems[0]
    grow(log, 1)
    problems = log.verify().problems
    assert any("damaged" in problem for problem in problems) and any("where 9 belongs" in each for each in problems)
    assert log.records()[-1]["seq"] == 13, "no number is used twice"


@pytest.mark.promise("P14", injected="table and head put back together", counted="by what another machine remembers")
def test_table_and_head_put_back_together_are_told_by_what_another_machine_remembers(
    log: Log, tmp_path: Path, counted: Callable[..., None]
) -> None:
    copy, head = Path(shutil.copy(service(log), tmp_path / "copy")), log.head.read_bytes()
    grow(log)
    told = log.verify()
    put_back(log, copy)
    log.head.write_bytes(head)
    assert log.whole
    remembered = ((told.log, 9), ("another", 1), (told.log, 8))
    found = [bool(log.verify(at_least=each).problems) for each in remembered]
    counted(comparisons=len(found), found=sum(found))
    assert found == [True, True, False], "the last is no more than the log has"


@pytest.mark.promise("P14", injected="a head file that is spoiled, another log's, or deleted")
def test_the_heads_are_guarded(log: Log, tmp_path: Path, counted: Callable[..., None]) -> None:
    head, found = log.head.read_bytes(), list[bool]()
    other = Log(tmp_path / "other")
    grow(other)
    for spoiled in (b"", bytes(1024), head[:100], other.head.read_bytes()):
        log.head.write_bytes(spoiled)
        found.append(not log.whole)
    log.head.unlink()
    found.append(not log.whole)
    counted(head_files=len(found), found=sum(found))
    assert all(found)
    log.open().append(said("the service goes on"))
    assert any("head file is missing" in problem for problem in log.verify().problems), "and it stays told"


@pytest.mark.promise("P14", injected="the table, its head or both emptied")
@pytest.mark.parametrize(
    "statements",
    [
        ["DELETE FROM audit"],
        ["DELETE FROM audit_head"],
        ["UPDATE audit_head SET state = NULL"],
        ["DELETE FROM audit", "UPDATE audit_head SET state = NULL"],
        ["DELETE FROM audit", "UPDATE audit_head SET log = 'x', state = NULL"],
    ],
)
def test_an_emptied_log_is_no_first_start(log: Log, statements: list[str], counted: Callable[..., None]) -> None:
    for statement in statements:
        log.sql(statement)
    found = [not log.whole]
    log.open().append(said("after"))
    found.append(not log.whole)
    counted(checks=len(found), found=sum(found))
    assert all(found) and log.records("log", "damaged")[-1]["kind"] == "damaged"


def test_another_database_beside_the_same_head_is_found(log: Log) -> None:
    put_back(log, service(Log(log.folder / "new")))
    assert not log.whole
    log.open().append(said("after"))
    assert not log.whole


@pytest.mark.promise("P12", injected="a process that died before it wrote the head file")
def test_a_head_file_that_is_behind_is_no_fault(log: Log, counted: Callable[..., None]) -> None:
    before = log.head.read_bytes()
    grow(log)
    log.head.write_bytes(before)
    assert log.whole
    grow(log)
    records, problems = log.records(), log.verify().problems
    counted(records=len(records), problems=len(problems))
    assert problems == [] and len(records) == 14


@pytest.mark.parametrize(("before", "kinds"), [(1, []), (2, ["log", "started"])])
def test_a_crash_before_or_between_the_first_writes_of_the_head_file_is_no_fault(
    tmp_path: Path, before: int, kinds: list[str]
) -> None:
    log = Log(tmp_path)
    code = "import os, sys; from tests.audit.logs import *; import audit.log\n"
    code += "write, done = audit.log.write_head, []\ndef killed(*given):\n    done.append(given)\n"
    code += "    write(*given) if len(done) < int(sys.argv[2]) else os.kill(os.getpid(), 9)\n"
    code += "audit.log.write_head = killed; Log(Path(sys.argv[1])).open().open()"
    command = [sys.executable, "-c", code, str(log.folder), str(before)]
    assert subprocess.run(command, cwd=ROOT).returncode == -9
    assert [record["kind"] for record in log.records()] == kinds and log.whole
    log.open().append(said("a"))
    assert log.whole and log.records("damaged") == []


@pytest.mark.parametrize("head_first", [True, False])
@pytest.mark.parametrize("resumed", [True, False])
def test_a_live_copy_verifies_in_either_order(log: Log, tmp_path: Path, head_first: bool, resumed: bool) -> None:
    audit, copy = log.open(), tmp_path / "copy"
    (copy / "kept apart").mkdir(parents=True)

    def take_head() -> None:
        shutil.copy(log.head, copy / "kept apart" / "head")

    def take_database() -> None:
        log.sql("VACUUM INTO ?", str(copy / "service.sqlite3"))

    steps = [take_head, take_database] if head_first else [take_database, take_head]
    steps[0]()
    for n in range(5):
        audit.append(said(f"meanwhile {n}"))
        log.clocks.wall += 10
    steps[1]()
    restored = Log(copy, clocks=log.clocks)
    assert restored.verify().problems == [] and bool(restored.verify().remarks) != head_first
    if resumed:
        restored.open().append(said("after"))
        assert restored.verify().problems == []
        assert [record["kind"] for record in restored.records("restored")] == [] if head_first else ["restored"]


def test_a_copy_verifies_with_the_key_alone(log: Log) -> None:
    assert not replace(log, keys=MacKeys([b"x" * 32])).whole
    more = replace(log, keys=MacKeys([b"n" * 32, b"k" * 32]))
    more.open().append(said("with a new key"))
    assert more.whole and len({row.key for row in more.rows()}) == 2


def test_a_lost_key_does_not_stop_the_log_and_is_told(log: Log) -> None:
    lost = replace(log, keys=MacKeys([b"n" * 32]))
    lost.open().append(said("b"))
    assert lost.said()[-1] == "b" and any("unknown key" in problem for problem in lost.verify().problems)


def test_spoiled_rows_by_chance_never_stop_verifying(log: Log) -> None:
    chance, original = random.Random(7), rows(log)
    for _ in range(200):
        changed = [list(row) for row in original]
        row = chance.choice(changed)
        column = chance.choice((5, 6, 6, 7, 8))
        raw = bytearray(row[column] if isinstance(row[column], bytes) else str(row[column]).encode())
        for _ in range(chance.randrange(1, 30)):
            raw[chance.randrange(len(raw))] = chance.randrange(256 if column == 6 else 128)
        row[column] = bytes(raw) if column == 6 else raw.decode()
        put(log, [tuple(row) for row in changed])
        assert changed == [list(row) for row in original] or not log.whole


def aged(tmp_path: Path, days: int) -> Log:
    """A log with one record a day."""
    log = Log(tmp_path)
    audit = log.open()
    for day in range(days):
        audit.append(said(day))
        log.clocks.pass_days(1)
    return log


@pytest.mark.promise("P15", injected="200 days, a record a day")
def test_records_are_kept_for_180_days_and_no_longer(tmp_path: Path, counted: Callable[..., None]) -> None:
    log = aged(tmp_path, 200)
    days, report = log.said(), log.verify()
    counted(records_kept=len(days), records_pruned=days[0], problems=len(report.problems))
    assert days == list(range(days[0], 200)) and 199 - 181 <= days[0] <= 199 - 179
    assert report.problems == [] and report.first == log.rows()[0].seq > 1
    log.sql("DELETE FROM audit WHERE seq = ?", report.first)
    assert not log.whole, "nobody else prunes"


@pytest.mark.promise("P15", injected="a wall clock set to yesterday", counted="in the order of writing")
def test_a_clock_that_goes_back_changes_no_order(tmp_path: Path, counted: Callable[..., None]) -> None:
    log = Log(tmp_path)
    audit = log.open()
    for word in ("a", "b"):
        audit.append(said(word))
        log.clocks.wall -= DAY
    log.open().append(said("c"))
    times = [record["time"] for record in log.records("said")]
    problems = log.verify().problems
    counted(records=len(times), problems=len(problems))
    assert log.said() == ["a", "b", "c"] and problems == [] and times == sorted(times, reverse=True)


@pytest.mark.promise("P15", injected="a wall clock 200 days ahead, running and between starts")
@pytest.mark.parametrize("restarted", [False, True])
def test_a_clock_that_jumps_ahead_prunes_nothing(tmp_path: Path, restarted: bool, counted: Callable[..., None]) -> None:
    log, written = aged(tmp_path, 170), [*range(170), "before", *["after"] * 3]
    audit = log.open()
    audit.append(said("before"))
    log.clocks.wall += 200 * DAY
    audit = log.open() if restarted else audit
    for _ in range(3):
        audit.append(said("after"))
    kept = log.said()
    counted(records_kept=len(kept), records_pruned=len(written) - len(kept))
    assert kept == written and log.whole


@pytest.mark.promise("P15", injected="a daily mark that claims to be old")
def test_a_forged_mark_makes_nothing_pruned(tmp_path: Path, counted: Callable[..., None]) -> None:
    log, written = aged(tmp_path, 20), [*range(20), "after"]
    log.sql("UPDATE audit SET body = replace(body, '\"clock\":', '\"clock\":-99999999.0,\"was\":') WHERE kind = 'day'")
    log.clocks.pass_days(2)
    log.open().append(said("after"))
    kept = log.said()
    counted(records_kept=len(kept), records_pruned=len(written) - len(kept))
    assert kept == written and not log.whole
