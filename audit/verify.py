"""Whether the audit log is whole: every record, every link, and the end that two signed heads tell of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, select

from audit.records import COLUMNS, Head, audit, audit_head, follows
from crypto import MacKeys
from db import Database

_SHOWN = 20  # problems; the first ones tell what happened
_COPYING = 600.0  # seconds that may lie between the copies of the database and of the head file in a backup


@dataclass(slots=True)
class Report:
    """What was read and what is wrong with it, in order; the log is whole when nothing is."""

    log: str = ""
    records: int = 0
    first: int = 0
    last: int = 0
    count: int = 0
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def blame(self, problem: str) -> None:
        self.count += 1
        if self.count <= _SHOWN:
            self.problems.append(problem)


def newest(connection: Connection, until: int = 1 << 62) -> Any:
    """seq and mac of the last record up to number `until`, or None."""
    found = select(audit.c.seq, audit.c.mac).where(audit.c.seq <= until)
    return connection.execute(found.order_by(audit.c.seq.desc()).limit(1)).one_or_none()


def verify(database: Database, keys: MacKeys, head: Path, at_least: tuple[str, int] | None = None) -> Report:
    """Read the whole log, while others write. at_least: a log id and a number that another machine remembers.

    Raises StoreUnavailable, OSError.
    """
    kept = Head.read(head, keys)  # before the snapshot: the table may be ahead of the file, and never behind
    with database.reading() as connection:
        connection.detach()  # it ends with the snapshot
        connection.exec_driver_sql("BEGIN" if database.is_sqlite else "BEGIN ISOLATION LEVEL REPEATABLE READ")
        log, state = connection.execute(select(audit_head)).one_or_none() or ("", None)
        last = Head.parse(state, keys)
        report = check_records(connection, keys, last)
        why, is_copy = disagreement(connection, last, kept)
    if why:
        report.remarks.append(why) if is_copy else report.blame(why)
    report.log = log
    if last and last.log != log:
        report.blame("the log's id in the database was changed")
    if at_least and (at_least[0] != log or at_least[1] > report.last):
        report.blame(f"another machine remembers record {at_least[1]} of log {at_least[0]}: this is log {log}")
    return report


def check_records(connection: Connection, keys: MacKeys, head: Head | None) -> Report:
    """Every record in the table, from the first by `head`: whether it is as it was written, and in its place."""
    report, mac = Report(first=head.first, last=head.first - 1) if head else Report(), head.anchor if head else ""
    for row in connection.execute(select(audit).order_by(audit.c.seq), execution_options={"yield_per": 500}):
        for problem in _problems(row, report.last, mac, keys):
            report.blame(f"record {row.seq}{problem}")
        report.records += 1
        report.last, mac = row.seq, row.mac
    return report


def disagreement(connection: Connection, head: Head | None, kept: Head | None) -> tuple[str, bool]:
    """What is wrong between table, database head and head file; and whether a backup may look like that.

    A log that has not begun has no record and no head, but for one in the file that counts none.
    """
    last = newest(connection)
    if head is None:
        begins = last is None and not (kept and kept.seq)
        return "" if begins else "the head in the database is missing, or not signed with a known key", False
    if last != (head.seq, head.mac):
        return f"record {head.seq}, the last by the database's head, is not the last of the table", False
    if kept is None:  # as where another machine begins to write to a shared database
        return "the head file is missing, or not signed with a known key", connection.dialect.name != "sqlite"
    if kept.log != head.log:
        return "the head file belongs to another log", False
    if kept.seq > head.seq:
        why = f"the head file remembers record {kept.seq}, the database ends at {head.seq}: an older copy"
        return why, abs(kept.time - head.time) <= _COPYING
    if kept.seq >= head.first and newest(connection, kept.seq) != (kept.seq, kept.mac):
        return f"record {kept.seq} is not the one that the head file remembers", False
    return "", False


def _problems(row: Any, before: int, mac: str, keys: MacKeys) -> Iterator[str]:
    if not follows(row, mac, keys):
        yield " was changed, signed with an unknown key, or does not follow the one before it"
        return
    fields = json.loads(row.body)
    if fields["seq"] != row.seq or any(fields.get(name) != getattr(row, name) for name in COLUMNS):
        yield " has columns that are not what was signed"
    if row.seq != before + 1 and not (row.kind == "restored" and fields["after"] == before):
        yield f" is where {before + 1} belongs"
    if row.kind == "damaged" or fields.get("why") in ("damaged", "no head"):  # the latter in version 1
        yield f" says that the log was found damaged: {fields['why']}"
