"""The counts behind the limits, for one process: windows and leases in memory, tokens of a day in SQLite.

Decides nothing: what is too much the caller says. shared_counts.py keeps the same for several processes.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable

from olddb import Database


class MemoryWindows:
    """What was counted lately. Keeps at most `most_names`, or a guesser's made-up names would fill the memory: the
    stalest goes first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, most_names: int = 20_000) -> None:
        self._clock, self._most_names = clock, most_names
        self._hits: OrderedDict[str, deque[float]] = OrderedDict()
        self._lock = threading.Lock()

    def hit(self, name: str, most: int, seconds: float) -> tuple[bool, int, float]:
        """Whether it was counted, for how many more there is room, and the seconds until there is more."""
        with self._lock:
            now, hits = self._clock(), self._hits.get(name) or deque()
            while hits and hits[0] <= now - seconds:
                hits.popleft()
            if counted := len(hits) < most:
                hits.append(now)
                self._remember(name, hits)
            blocking = hits[max(len(hits) - most, 0)]  # after it has fallen out there is room, however low `most` is
            return counted, max(most - len(hits), 0), max(blocking + seconds - now, 0.001)

    def forget(self, name: str) -> None:
        with self._lock:
            self._hits.pop(name, None)

    def _remember(self, name: str, hits: deque[float]) -> None:
        self._hits[name] = hits
        self._hits.move_to_end(name)
        while len(self._hits) > self._most_names:
            self._hits.popitem(last=False)


class MemoryLeases:
    """Who holds what. Nothing is lost here: what holds it lives in the same process."""

    def __init__(self) -> None:
        self._held: defaultdict[str, set[str]] = defaultdict(set)
        self._lock = threading.Lock()

    def take(self, name: str, lease: str, most: int) -> bool:
        with self._lock:
            if taken := len(self._held[name]) < most:
                self._held[name].add(lease)
            return taken

    def keep(self, name: str, lease: str) -> None:
        """Needs no keeping."""

    def give_back(self, name: str, lease: str) -> None:
        with self._lock:
            self._held[name].discard(lease)
            if not self._held[name]:
                del self._held[name]


class SqliteQuotas:
    """Tokens of a day. Exact over processes that share the file, and kept through a restart."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def reserve(self, name: str, day: int, bill: str, tokens: int, most: int) -> tuple[bool, int, int]:
        """Whether they fit, what is settled, and what is reserved, this one among it."""
        with self._db.transaction() as connection:
            for table in ("days", "reservations"):
                connection.execute(f"DELETE FROM {table} WHERE owner = ? AND day < ?", (name, day - 1))
            settled, reserved = connection.execute(_SUMS, {"owner": name, "day": day}).fetchone()
            granted = settled + reserved + tokens <= most
            if granted:
                connection.execute("INSERT INTO reservations VALUES (?, ?, ?, ?)", (bill, name, day, tokens))
        return granted, settled, reserved + tokens * granted

    def settle(self, name: str, day: int, bill: str, tokens: int) -> None:
        with self._db.transaction() as connection:
            if connection.execute("DELETE FROM reservations WHERE id = ?", (bill,)).rowcount:
                sql = "INSERT INTO days VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET tokens = tokens + excluded.tokens"
                connection.execute(sql, (name, day, tokens))

    def spent(self, name: str, day: int) -> int:
        row = self._db.row("SELECT tokens FROM days WHERE owner = ? AND day = ?", name, day)
        return 0 if row is None else int(row["tokens"])


_SUMS = """SELECT
    (SELECT coalesce(sum(tokens), 0) FROM days WHERE owner = :owner AND day = :day),
    (SELECT coalesce(sum(tokens), 0) FROM reservations WHERE owner = :owner AND day = :day)"""
