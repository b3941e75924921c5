"""A cache of bytes, in Redis or in a SQLite file, behind one small interface.

Knows nothing of what it keeps: values come sealed, and what comes back is not to be trusted before it opens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from cache.breaker import Breaker
from cache.redis_link import RedisFault, RedisLink
from errors import StoreUnavailable
from olddb import Database


class Cache(Protocol):
    """Never raises: a fault is a miss, and a value that was put may be gone at any time."""

    def get(self, key: str) -> bytes | None: ...

    def put(self, key: str, value: bytes, ttl: int) -> None:
        """Keep `value` for at most `ttl` seconds; not at all when `ttl` is 0."""

    def close(self) -> None: ...


class RedisCache:
    """A Redis at `url`. Raises ValueError for a malformed URL.

    A request asks twice, to look up and to keep, and may wait a quarter of a second in all.
    """

    def __init__(self, url: str, breaker: Breaker | None = None, timeout: float = 0.1) -> None:
        self._link = RedisLink(url, breaker or Breaker(), timeout)

    def get(self, key: str) -> bytes | None:
        with suppress(RedisFault):
            value = self._link.ask(lambda: self._link.redis.get(key))
            return value if isinstance(value, bytes) else None
        return None

    def put(self, key: str, value: bytes, ttl: int) -> None:
        if ttl > 0:
            with suppress(RedisFault):
                self._link.ask(lambda: self._link.redis.set(key, value, ex=ttl))

    def close(self) -> None:
        self._link.close()


_ENTRIES = (
    (
        # AUTOINCREMENT: the order of writing, also after the newest entry was deleted.
        """CREATE TABLE entries (
            number INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE, expires REAL NOT NULL,
            size INTEGER NOT NULL, value BLOB NOT NULL
        ) STRICT""",
        "CREATE INDEX entries_by_expiry ON entries (expires)",
        "CREATE TABLE total (bytes INTEGER NOT NULL) STRICT",
        "INSERT INTO total VALUES (0)",
        "CREATE TRIGGER grows AFTER INSERT ON entries BEGIN UPDATE total SET bytes = bytes + new.size; END",
        "CREATE TRIGGER shrinks AFTER DELETE ON entries BEGIN UPDATE total SET bytes = bytes - old.size; END",
    ),
)


class SqliteCache:
    """A file of its own, so that losing it costs speed only. Keeps `most_bytes`; the oldest entries go first.

    Not synced to disk on each write. A file that is no database is replaced; raises StoreUnavailable when that fails.
    """

    def __init__(self, path: Path, most_bytes: int = 64 << 20, clock: Callable[[], float] = time.time) -> None:
        self._most = most_bytes
        self._clock = clock
        try:
            self._db = Database(path, _ENTRIES, synchronous="NORMAL")
        except StoreUnavailable:
            _remove(path)
            self._db = Database(path, _ENTRIES, synchronous="NORMAL")

    def get(self, key: str) -> bytes | None:
        with suppress(StoreUnavailable):
            row = self._db.row("SELECT value FROM entries WHERE key = ? AND expires > ?", key, self._clock())
            return None if row is None else bytes(row["value"])
        return None

    def put(self, key: str, value: bytes, ttl: int) -> None:
        size = len(key) + len(value)
        if ttl <= 0 or size > self._most:
            return
        now = self._clock()
        with suppress(StoreUnavailable), self._db.transaction() as connection:
            connection.execute("DELETE FROM entries WHERE key = ? OR expires <= ?", (key, now))
            while connection.execute("SELECT bytes FROM total").fetchone()[0] + size > self._most:
                connection.execute("DELETE FROM entries WHERE number = (SELECT min(number) FROM entries)")
            sql = "INSERT INTO entries (key, expires, size, value) VALUES (?, ?, ?, ?)"
            connection.execute(sql, (key, now + ttl, size, value))

    def close(self) -> None:
        self._db.close()


def _remove(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        with suppress(OSError):
            path.with_name(path.name + suffix).unlink()
