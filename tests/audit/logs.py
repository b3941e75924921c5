"""Audit logs for tests: on a real database, signed with real keys, under clocks that the test moves."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, select
from sqlalchemy.engine import Connection, Engine

from audit.log import AuditFilter, AuditLog
from audit.records import audit
from audit.verify import Report, verify
from crypto import MacKeys
from db import Database

DAY = 86_400.0


@dataclass(slots=True)
class Clocks:
    """The wall's, which anybody may set, and the time since boot."""

    wall: float = 1_800_000_000.0
    ticks: float = 1000.0

    def pass_days(self, days: float) -> None:
        self.wall += days * DAY
        self.ticks += days * DAY


@dataclass(slots=True)
class Log:
    """One log; `open()` is a new process that goes on with it."""

    folder: Path
    url: str = ""
    keys: MacKeys = field(default_factory=lambda: MacKeys([b"k" * 32]))
    clocks: Clocks = field(default_factory=Clocks)
    days: float = 180
    database: Database = field(init=False)

    def __post_init__(self) -> None:
        self.database = self.connect()
        self.database.upgrade()

    def connect(self) -> Database:
        return Database(self.url) if self.url else Database.in_folder(self.folder)

    @property
    def head(self) -> Path:
        return self.folder / "kept apart" / "head"

    def open(self) -> AuditLog:
        wall, ticks = (lambda: self.clocks.wall), (lambda: self.clocks.ticks)
        return AuditLog(self.database, self.keys, self.folder, self.head, self.days, wall=wall, ticks=ticks)

    def rows(self) -> list[Any]:
        with self.database.reading() as connection:
            return list(connection.execute(select(audit).order_by(audit.c.seq)))

    def records(self, *kinds: str) -> list[dict[str, Any]]:
        found = [json.loads(row.body) for row in self.rows()]
        return [record for record in found if not kinds or record["kind"] in kinds]

    def said(self) -> list[Any]:
        """What the test wrote, without the log's own records."""
        return [record["said"] for record in self.records("said")]

    def verify(self, **options: Any) -> Report:
        return verify(self.database, self.keys, self.head, **options)

    @property
    def whole(self) -> bool:
        return not self.verify().problems

    def sql(self, statement: str, *values: object) -> None:
        """Tamper with a table (SQLite)."""
        with closing(sqlite3.connect(self.folder / "service.sqlite3", isolation_level=None)) as connection:
            connection.execute("PRAGMA synchronous=OFF")
            connection.execute(statement, values)


def said(what: object) -> dict[str, object]:
    return {"kind": "said", "said": what}


def find(log: AuditLog, **wanted: str) -> list[dict[str, Any]]:
    """In order."""
    return [json.loads(row.body) for row in log.find(AuditFilter(**wanted), 100_000, newest_first=False)]


@dataclass(slots=True)
class Fault:
    """The `at`-th write of the audit log fails, and `lasts` - 1 after it; counts them."""

    at: int
    words: str = "database or disk is full"
    lasts: int = 1
    calls: int = 0
    injected: int = 0

    def strike(self) -> None:
        self.calls += 1
        if self.at <= self.calls < self.at + self.lasts:
            self.injected += 1
            raise sqlite3.OperationalError(self.words)


@contextmanager
def failing_database(fault: Fault) -> Iterator[Fault]:
    """Statements that change the audit's tables, their commits and writes of the head file fail as `fault` says."""

    def before(connection: Connection, _cursor: Any, statement: str, *_: Any) -> None:
        if "audit" in statement and statement.split(" ")[0] in ("INSERT", "UPDATE", "DELETE"):
            connection.info["audited"] = True
            fault.strike()

    def commit(connection: Connection) -> None:
        if connection.info.pop("audited", False):
            fault.strike()

    real = os.pwrite

    def pwrite(file: int, data: bytes, place: int) -> int:
        try:
            fault.strike()
        except sqlite3.OperationalError as error:
            raise OSError(28, str(error)) from error
        return real(file, data, place)

    event.listen(Engine, "before_cursor_execute", before)
    event.listen(Engine, "commit", commit)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "pwrite", pwrite)
            yield fault
    finally:
        event.remove(Engine, "before_cursor_execute", before)
        event.remove(Engine, "commit", commit)
