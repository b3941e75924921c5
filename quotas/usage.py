"""Tokens of each user, day and model: reserved before a generation where there is a quota, recorded after every one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from secrets import token_hex

import structlog
from sqlalchemy import BigInteger, Column, Connection, Double, Index, Integer, String, Table, Text, text

from db import Database, metadata
from errors import StoreUnavailable
from quotas.limits import SOON, LimitExceeded, QuotaExceeded, Remaining

log = structlog.get_logger("quotas")

_DAY = 86_400.0
_FLUSH_AFTER = 1.0  # seconds of usage that kill -9 may lose; a sync for each cached answer would halve their number


@dataclass(frozen=True, slots=True)
class Counts:
    """requests: generations that began, cached answers among them; errors: those of them that failed."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    errors: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, each) + getattr(other, each) for each in _COUNTS))


Usage = dict[tuple[int, str, str], Counts]  # by day (since 1970, in UTC), user and model


@dataclass(frozen=True, slots=True)
class Reservation:
    """Tokens set aside for one generation, paid by the day it began. `remaining` is what the day has left beside."""

    id: str
    day: int
    remaining: Remaining


_KEY = ("day", "user_id", "model")
_COUNTS = tuple(field.name for field in fields(Counts))
Table(
    "usage",
    metadata,
    Column("day", Integer, primary_key=True),
    Column("user_id", String(64), primary_key=True),
    Column("model", Text, primary_key=True),  # may be a path
    *(Column(name, BigInteger, nullable=False) for name in _COUNTS),
)
_reservations = Table(
    "reservations",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("user_id", String(64), nullable=False),
    Column("day", Integer, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("expires", Double, nullable=False),  # Unix seconds
    Index("reservations_by_user", "user_id", "day"),
)
_SUM = ", ".join(f"{name} = usage.{name} + excluded.{name}" for name in _COUNTS)
_ADD = text(f"""INSERT INTO usage ({", ".join(_KEY + _COUNTS)}) VALUES (:{", :".join(_KEY + _COUNTS)})
    ON CONFLICT ({", ".join(_KEY)}) DO UPDATE SET {_SUM}""")
_SUMS = text("""SELECT
    (SELECT coalesce(sum(prompt_tokens + generated_tokens), 0) FROM usage WHERE day = :day AND user_id = :user_id),
    (SELECT coalesce(sum(tokens), 0) FROM reservations WHERE day = :day AND user_id = :user_id)""")
_LOCK = text("SELECT pg_advisory_xact_lock(1, hashtext(:user_id))")
_EXPIRE = text("DELETE FROM reservations WHERE user_id = :user_id AND expires <= :now")
_RELEASE = text("DELETE FROM reservations WHERE id = :id")


def import_days(connection: Connection, rows: Iterable[tuple[str, int, int]]) -> None:
    """Add (user_id, day, tokens) of an older version, which kept no models and only this sum."""
    _insert(connection, {(day, user_id, ""): Counts(prompt_tokens=tokens) for user_id, day, tokens in rows})


def _insert(connection: Connection, counts: Usage) -> None:
    """In one order, or two processes could wait for each other's rows."""
    if counts:
        rows = [dict(zip(_KEY, key, strict=True)) | asdict(counts[key]) for key in sorted(counts)]
        connection.execute(_ADD, rows)


class UsageStore:
    """Exact over threads and processes. `reserve` and what reads raise StoreUnavailable.

    lifetime: seconds after which the reservation of a process that died is released.
    """

    def __init__(self, db: Database, lifetime: float, clock: Callable[[], float] = time.time) -> None:
        self._db, self._lifetime, self._clock = db, lifetime, clock
        self._pending: Usage = {}
        self._ended: list[str] = []  # reservations that what is pending replaces
        self._timer: threading.Timer | None = None
        self._lock, self._writing = threading.Lock(), threading.Lock()

    def reserve(self, user_id: str, tokens: int, limit: int) -> Reservation:
        """Set aside what a generation may take at most. Raises QuotaExceeded, and LimitExceeded where it may fit as
        soon as the user's other generations, which have more set aside than they will take, have ended."""
        now, id = self._clock(), token_hex(8)
        day = int(now // _DAY)
        today = {"user_id": user_id, "day": day}
        with self._db.transaction() as connection:
            if not self._db.is_sqlite:  # where a transaction is alone anyway
                connection.execute(_LOCK, today)
            connection.execute(_EXPIRE, {**today, "now": now})
            used, reserved = map(int, connection.execute(_SUMS, today).one())
            if fits := used + reserved + tokens <= limit:
                row = {**today, "id": id, "tokens": tokens, "expires": now + self._lifetime}
                connection.execute(_reservations.insert(), row)
        left = max(limit - used - reserved - tokens * fits, 0)
        remaining = Remaining("Tokens", limit, left, _DAY - now % _DAY)
        if fits:
            return Reservation(id, day, remaining)
        message = f"This request may take {tokens} tokens, and {left} of today's {limit} are left"
        if used + tokens > limit:
            raise QuotaExceeded(f"{message}.", remaining.reset, remaining)
        raise LimitExceeded(f"{message} while your other requests run.", SOON, remaining)

    def record(self, user_id: str, model: str, counts: Counts, reservation: Reservation | None = None) -> None:
        """Add what a generation took. With its reservation it is durable on return, else within a second.

        While the database does not answer it is kept in memory and tried again each second.
        """
        day = reservation.day if reservation else int(self._clock() // _DAY)
        added = {} if counts == Counts() else {(day, user_id, model): counts}
        with self._lock:
            self._add(added, [reservation.id] if reservation else [])
        if reservation:
            self.close()
        else:
            self._close_later()

    def flush(self) -> None:
        """Write everything that is recorded; those who wait here are written together. Raises StoreUnavailable."""
        with self._writing:
            with self._lock:
                pending, ended, self._pending, self._ended = self._pending, self._ended, {}, []
            if not pending and not ended:
                return
            try:
                with self._db.transaction() as connection:
                    if ended:
                        connection.execute(_RELEASE, [{"id": id} for id in ended])
                    _insert(connection, pending)
            except StoreUnavailable:
                with self._lock:
                    self._add(pending, ended)
                raise

    def tokens_today(self, user_id: str) -> int:
        """Tokens of today, without those of what still runs."""
        self.flush()
        with self._db.reading() as connection:
            return int(connection.execute(_SUMS, {"user_id": user_id, "day": int(self._clock() // _DAY)}).one()[0])

    def close(self) -> None:
        """Write what is pending; while the database does not answer, try again each second."""
        with self._lock:
            self._timer = None
        try:
            self.flush()
        except StoreUnavailable as error:
            log.error("usage is kept in memory until it can be written", reason=str(error))
            self._close_later()

    def _add(self, pending: Usage, ended: list[str]) -> None:
        for key, counts in pending.items():
            self._pending[key] = self._pending.get(key, Counts()) + counts
        self._ended += ended

    def _close_later(self) -> None:
        with self._lock:
            if self._timer is None:
                self._timer = threading.Timer(_FLUSH_AFTER, self.close)
                self._timer.daemon = True
                self._timer.start()
