"""One SQLite file: durable, shared by threads and processes, upgraded in place.

Knows no table; who keeps something brings its SQL.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from errors import StoreUnavailable
from oldschema import STATE

_BUSY = 5.0  # seconds to wait for another writer; ours hold the lock for milliseconds


class _Connection(sqlite3.Connection):
    """A connection that can be remembered weakly: a thread that ends takes its own along."""


class Database:
    """A connection for each thread, full sync by default: what `transaction` wrote survives a power cut.

    `migrations`: for each version of the schema the statements that lead to it; published ones are never edited.
    Raises StoreUnavailable, here and in every method, when the file cannot be used.
    """

    def __init__(
        self,
        path: Path,
        migrations: Sequence[Sequence[str]] = STATE,
        synchronous: Literal["FULL", "NORMAL"] = "FULL",
    ) -> None:
        self._path = path
        self._synchronous = synchronous
        self._mine = threading.local()
        self._all: weakref.WeakSet[_Connection] = weakref.WeakSet()
        with _failures():
            _make_private(path)
            self._migrate(migrations)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, and alone: the write lock is taken first, so what is read inside stays true."""
        with _failures():
            connection = self._connection()
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            finally:  # a full disk may have ended the transaction already
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

    def rows(self, sql: str, *values: object) -> list[sqlite3.Row]:
        """Read without a lock."""
        with _failures():
            return self._connection().execute(sql, values).fetchall()

    def row(self, sql: str, *values: object) -> sqlite3.Row | None:
        """The first row, or None."""
        return next(iter(self.rows(sql, *values)), None)

    def write(self, sql: str, *values: object) -> int:
        """One statement as a transaction of its own; returns how many rows it changed."""
        with self.transaction() as connection:
            return connection.execute(sql, values).rowcount

    def close(self) -> None:
        """Close every thread's connection. A later call opens a new one."""
        for connection in list(self._all):
            connection.close()
        self._mine = threading.local()

    def _connection(self) -> _Connection:
        connection: _Connection | None = getattr(self._mine, "connection", None)
        if connection is None:
            connection = self._mine.connection = self._open()
        return connection

    def _open(self) -> _Connection:
        connection = sqlite3.connect(
            self._path, timeout=_BUSY, isolation_level=None, check_same_thread=False, factory=_Connection
        )
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode=WAL").fetchone()
        connection.execute(f"PRAGMA synchronous={self._synchronous}")
        self._all.add(connection)
        return connection

    def _migrate(self, migrations: Sequence[Sequence[str]]) -> None:
        with self.transaction() as connection:  # alone, so that two processes do not both upgrade
            version: int = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > len(migrations):
                raise StoreUnavailable(f"{self._path.name} was written by a newer version of this service")
            for statements in migrations[version:]:
                for statement in statements:
                    connection.execute(statement)
            connection.execute(f"PRAGMA user_version={len(migrations)}")


def _make_private(path: Path) -> None:
    """Mode 600; SQLite gives its -wal and -shm files the mode of the database."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600)) as file:
        os.fchmod(file.fileno(), 0o600)


@contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        reason = getattr(error, "sqlite_errorname", None) or type(error).__name__
        raise StoreUnavailable(f"the store does not answer ({reason})") from error
