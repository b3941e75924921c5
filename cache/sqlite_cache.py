"""Cached values in a SQLite file of their own, so that losing it costs speed only."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import structlog

Result = TypeVar("Result")
log = structlog.get_logger("cache")

_BUSY = 0.05  # seconds to wait for another process; a miss costs less than a longer wait
_BROKEN = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_TABLES = """
    PRAGMA journal_mode=WAL;
    PRAGMA synchronous=OFF;
    -- number: bytes written before this entry.
    CREATE TABLE IF NOT EXISTS entries (
        number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, expires REAL NOT NULL,
        size INTEGER NOT NULL, value BLOB NOT NULL
    ) STRICT;
    CREATE INDEX IF NOT EXISTS entries_by_expiry ON entries (expires);
"""
_GET = "SELECT value FROM entries WHERE key = ? AND expires > ?"
_WRITTEN = "SELECT number + size FROM entries ORDER BY number DESC LIMIT 1"
_DROP = "DELETE FROM entries WHERE key = ? OR expires <= ? OR number < ?"
_PUT = "INSERT INTO entries (number, key, expires, size, value) VALUES (?, ?, ?, ?, ?)"


class SqliteCache:
    """The entries among the last `max_bytes` written. Never raises: a fault is a miss.

    One connection behind a lock serves all threads: a look-up takes 10 us. A file that is broken is renamed to
    `.broken`, and one that is only busy is left alone: another process may hold either open.
    """

    def __init__(self, path: Path, max_bytes: int = 64 << 20, clock: Callable[[], float] = time.time) -> None:
        self._path, self._max_bytes, self._clock = path, max_bytes, clock
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._inode = 0
        self._problem: str | None = None
        self._use(lambda connection: None)  # so that a problem is logged at the start

    def get(self, key: str) -> bytes | None:
        row = self._use(lambda connection: connection.execute(_GET, (key, self._clock())).fetchone())
        return None if row is None else bytes(row[0])

    def put(self, key: str, value: bytes, ttl: int) -> None:
        """Keep `value` for `ttl` seconds; not at all when `ttl` is 0."""
        fits = ttl > 0 and len(key) + len(value) <= self._max_bytes
        if fits and self._use(lambda connection: self._write(connection, key, value, ttl)):
            self._problem = None

    def problem(self) -> str | None:
        """SQLite's name for what is wrong with the file; None since the last value was written."""
        return self._problem

    def close(self) -> None:
        """Later uses open the file again."""
        with self._lock:
            if self._connection:
                self._connection.close()
            self._connection = None

    def _write(self, connection: sqlite3.Connection, key: str, value: bytes, ttl: int) -> bool:
        size, now = len(key) + len(value), self._clock()
        connection.execute("BEGIN IMMEDIATE")
        with connection:  # ends the transaction
            (written,) = connection.execute(_WRITTEN).fetchone() or (0,)
            connection.execute(_DROP, (key, now, written + size - self._max_bytes))
            connection.execute(_PUT, (written, key, now + ttl, size, value))
        return True

    def _use(self, work: Callable[[sqlite3.Connection], Result]) -> Result | None:
        with self._lock:
            try:
                return work(self._connection or self._open())
            except (sqlite3.Error, OSError) as error:
                self._failed(error)
                return None

    def _open(self) -> sqlite3.Connection:
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite gives its other files the same mode
        self._inode = self._path.stat().st_ino
        connection = sqlite3.connect(self._path, timeout=_BUSY, isolation_level=None, check_same_thread=False)
        try:
            connection.executescript(_TABLES)
        except sqlite3.Error:
            connection.close()
            raise
        self._connection = connection
        return connection

    def _failed(self, error: Exception) -> None:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without what extended codes add
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return
        problem = getattr(error, "sqlite_errorname", type(error).__name__)
        if problem != self._problem:
            log.warning("the cache file cannot be used", problem=problem, file=self._path.name)
        self._problem = problem
        if code in _BROKEN:
            self.close()
            self._set_aside()

    def _set_aside(self) -> None:
        """Rename the broken file, unless another process has already done so and made a new one."""
        with suppress(OSError):
            if self._path.stat().st_ino == self._inode:
                for suffix in ("-wal", "-shm", ""):  # a new file must not find the WAL of this one
                    with suppress(FileNotFoundError):
                        os.replace(f"{self._path}{suffix}", f"{self._path}.broken{suffix}")
