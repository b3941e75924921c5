"""The audit log: events made durable by any number of threads and processes, and found again."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any

import structlog
from sqlalchemy import ColumnElement, Connection, delete, func, insert, select, tuple_, update

from audit import old_log
from audit.records import Event, Head, audit, audit_head, audit_open, chained, follows, locked_head, stamp, write_head
from audit.verify import disagreement, newest
from crypto import MacKeys
from db import Database
from errors import StoreUnavailable
from telemetry import Metrics

DAY = 86_400.0  # seconds
_PATIENCE = 30.0  # seconds to wait for another thread's commit: a disk that hangs holds the threads that write, no more
_PROBE_EVERY = 1.0  # seconds; /readyz is public
_TELL_EVERY = 600.0  # seconds between two lines in the service's log that say where the audit log stands
_PRUNED = 1000  # records deleted with one commit at most: 5 ms, where a day of a busy service takes seconds

# As text for the driver: SQLAlchemy's own work on these four took 0.3 of a commit's 1.0 ms.
_HEAD = "SELECT log, state FROM audit_head"
_MOVE_HEAD = "UPDATE audit_head SET state = ?"
_ADD = "INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
_OPEN = "INSERT INTO audit_open VALUES (?, ?, ?)"
_CLOSE = "DELETE FROM audit_open WHERE id = ?"
_LOCK = select(func.pg_advisory_xact_lock(7_235_402))

_since_boot = partial(time.clock_gettime, time.CLOCK_BOOTTIME)
_log = structlog.get_logger("audit")


class AuditUnavailable(StoreUnavailable, code="audit_unavailable"):
    """The events are not durable: what they report must not be answered as if it had happened."""

    def __init__(self, detail: str) -> None:
        super().__init__(f"the audit log cannot be written ({detail})")
        self.message = "The service cannot write its audit log just now, and answers nothing without it."


@dataclass(slots=True)
class _Batch:
    """Events that are committed together."""

    events: list[Event] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)
    fault: str | None = "the disk does not answer"


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Which records: all that is given must match. since (included), until (excluded): as `stamp` in a record."""

    user: str | None = None
    kind: str | None = None
    request: str | None = None
    since: str | None = None
    until: str | None = None

    def conditions(self) -> list[ColumnElement[bool]]:
        names = ("user", "kind", "request")
        found = [audit.c[name] == value for name in names if (value := getattr(self, name)) is not None]
        found += [audit.c.time >= self.since] if self.since else []
        return found + ([audit.c.time < self.until] if self.until else [])


class _Writer:
    """This process under a random name: a lock that the system releases tells the others whether it has ended.

    On SQLite a byte in a file of `folder`, locked for as long as it is open; on PostgreSQL a lock of its own session.
    """

    def __init__(self, database: Database, folder: Path) -> None:
        self.name = token_hex(8)
        held = ExitStack()
        weakref.finalize(self, held.close)
        self._file: int | None = None
        if database.is_sqlite:
            self._file = os.open(folder / "audit-writers", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            held.callback(os.close, self._file)
            fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, _flock(self.name))
        else:
            connection = held.enter_context(database.reading())
            connection.detach()  # its lock must end with it, and not live on in the pool
            connection.execute(select(func.pg_advisory_lock(_place(self.name))))

    def has_ended(self, name: str, connection: Connection) -> bool:
        """Whether a writer's process is gone. Of this one: whether its connection was lost."""
        if self._file is None:
            return bool(connection.scalar(select(func.pg_try_advisory_xact_lock(_place(name)))))
        found = fcntl.fcntl(self._file, fcntl.F_OFD_GETLK, _flock(name))
        return bool(struct.unpack_from("h", found)[0] == fcntl.F_UNLCK)


def _place(name: str) -> int:
    return int(name, 16) >> 1  # 63 bits: a byte of a file, or the key of an advisory lock


def _flock(name: str) -> bytes:
    """Its write lock, as `struct flock`."""
    return struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, _place(name), 1, 0)


class AuditLog:
    """One log. What writes raises AuditUnavailable, what reads StoreUnavailable.

    Group commit without a thread: the first that waits writes for all that wait, and meanwhile the next batch fills.
    A generation that its process left open is closed as `aborted` by the next process that writes.

    folder: for the locks of living writers, and where an older version kept its log. head: the file that tells a log
    that was cut or put back to an older copy; best on another disk. days: that a record is kept at least. wall: Unix
    seconds; ticks: seconds since boot, those asleep included, which no administrator can set.
    """

    def __init__(
        self,
        database: Database,
        keys: MacKeys,
        folder: Path,
        head: Path | None = None,
        days: float = 180,
        metrics: Metrics | None = None,
        wall: Callable[[], float] = time.time,
        ticks: Callable[[], float] = _since_boot,
    ) -> None:
        self.database, self.keys, self.head_path = database, keys, head or folder / "audit-head"
        self._folder, self._days, self._metrics = folder, days, metrics or Metrics()
        self._wall, self._ticks, self._ticked = wall, ticks, 0.0
        self._mutex, self._writing = threading.Lock(), threading.Lock()
        self._filling = _Batch()
        self._writer: _Writer | None = None
        self._left: Head | None = None  # as this process left it, and its bytes in the database
        self._signed = b""
        self._doomed = 0  # records before this one are too old to keep
        self._lost: set[str] = set()  # generations of which an event could not be written
        self._fault: str | None = None
        self._probed = self._told = float("-inf")

    def open(self) -> None:
        """Say that a process starts, check the log's end, and close what dead processes left open."""
        self.append({"kind": "started"})

    def append(self, *events: Event) -> None:
        """Write `events` (JSON objects with a `kind`; starts and ends of generations with an `id`), in this order.

        They are durable when it returns. Raises AuditUnavailable.
        """
        with self._mutex:
            batch = self._filling
            leads = not batch.events
            batch.events.extend(events)
        if leads:
            self._write(batch)
        batch.done.wait(_PATIENCE)
        if batch.fault is not None:
            raise AuditUnavailable(batch.fault)

    def problem(self) -> str | None:
        """Why nothing can be written, None if it can. After a fault it tries again, at most once a second."""
        if self._fault is not None and time.monotonic() - self._probed >= _PROBE_EVERY:
            self._probed = time.monotonic()
            with suppress(AuditUnavailable):
                self.append({"kind": "resumed"})
        return self._fault

    def find(self, wanted: AuditFilter, limit: int, after: int = 0, newest_first: bool = True) -> Sequence[Any]:
        """seq, body and mac of at most `limit` records in order of time, from the one that follows record `after`."""
        order, conditions = (audit.c.time, audit.c.seq), wanted.conditions()
        with self.database.reading() as connection:
            if after:
                at = connection.scalar(select(audit.c.time).where(audit.c.seq == after)) or ""
                place, there = tuple_(*order), tuple_(at, after)
                conditions.append(place < there if newest_first else place > there)
            query = select(audit.c.seq, audit.c.body, audit.c.mac).where(*conditions).limit(limit)
            query = query.order_by(*(column.desc() if newest_first else column for column in order))
            return connection.execute(query).all()

    def _write(self, batch: _Batch) -> None:
        with self._writing:
            with self._mutex:
                self._filling = _Batch()
            begin = time.perf_counter()
            try:
                self._commit(batch.events)
                batch.fault = None
            except (StoreUnavailable, OSError) as error:
                batch.fault = str(error)
                self._lost.update(event["id"] for event in batch.events if event["kind"] in ("start", "end"))
                _log.error("audit unavailable", reason=batch.fault)
            finally:  # also after a bug, so that the others do not wait for ever
                self._fault = batch.fault
                batch.done.set()
                self._metrics.audited(len(batch.events), time.perf_counter() - begin, batch.fault is None)

    def _commit(self, events: Sequence[Event]) -> None:
        with locked_head(self.head_path) as file:
            with self.database.transaction() as connection:
                if not self.database.is_sqlite:
                    connection.execute(_LOCK)
                head, remarks = self._found(connection, file)
                head = self._timed(head)
                writer, ended = self._writers(connection)
                news = [*remarks, *self._closing(connection, ended), *events]
                is_new_day = head.clock - head.day >= DAY
                if is_new_day or self._left is None:
                    self._doomed = self._too_old(connection, head)
                if is_new_day:
                    head = replace(head, day=head.clock)
                    news.append({"kind": "day", "clock": head.clock})
                head = self._pruned(connection, self._added(connection, news, head, writer))
                signed = head.signed(self.keys)
                self._run(connection, _MOVE_HEAD, [(signed,)])
            self._left, self._signed = head, signed
            self._lost.clear()
            if any(remark["kind"] == "imported" for remark in remarks):
                old_log.set_aside(self._folder)
            write_head(file, signed)
        self._tell(head)

    def _run(self, connection: Connection, statement: str, rows: list[tuple[Any, ...]]) -> None:
        if rows:
            connection.exec_driver_sql(statement if self.database.is_sqlite else statement.replace("?", "%s"), rows)

    def _found(self, connection: Connection, file: int) -> tuple[Head, list[Event]]:
        """The head to go on from, and what is to be said about how the log was found. file: the locked head file."""
        log, state = connection.exec_driver_sql(_HEAD).one_or_none() or ("", None)
        if self._left is not None and state == self._signed:
            return self._left, []
        head = Head.parse(state, self.keys)
        if self._left and head and head.log == self._left.log and head.seq >= self._left.seq:
            return head, []  # another process wrote meanwhile
        if not log:
            log = token_hex(8)
            connection.execute(insert(audit_head).values(log=log))
        kept = Head.read(self.head_path, self.keys)
        why, is_copy = disagreement(connection, head, kept)
        if head is None and not why:
            begun = old_log.take_over(connection, log, self._folder, self.head_path, self.keys)
            write_head(file, Head(log).signed(self.keys))  # before the first record: from now on it is never missing
            return begun
        if head is None:
            last, first = newest(connection), connection.scalar(select(func.min(audit.c.seq)))
            head = Head(log, last.seq if last else 0, last.mac if last else "", first or 1)
        remark = {"kind": "restored" if is_copy else "damaged", "why": why, "after": head.seq}
        if kept and kept.log == log:  # no number is used twice
            head = replace(head, seq=max(head.seq, kept.seq))
        return head, [remark] if why else []

    def _timed(self, head: Head) -> Head:
        """The head now. The log counts its age itself, so that a wall clock set wrong makes no record old.

        Within a process it goes by the time since boot; from one process to the next it believes in a day at most.
        """
        wall, ticks = self._wall(), self._ticks()
        if self._left is None:
            clock = head.clock + (min(max(wall - head.time, 0.0), DAY) if head.time else 0.0)
        else:
            clock = max(head.clock, self._left.clock + ticks - self._ticked)
        self._ticked = ticks
        return replace(head, clock=clock, time=wall)

    def _closing(self, connection: Connection, ended: list[str]) -> list[Event]:
        """Ends for generations that have lost theirs: their process is gone, or a write failed."""
        if not ended and not self._lost:
            return []
        lacking = audit_open.c.id.in_(self._lost) | audit_open.c.writer.in_(ended)
        starts = select(audit_open, audit.c.body).outerjoin(audit, audit.c.seq == audit_open.c.seq).where(lacking)
        rows = connection.execute(starts.order_by(audit_open.c.seq)).all()
        return [_end(row.id, row.body, "aborted" if row.writer in ended else "audit_unavailable") for row in rows]

    def _writers(self, connection: Connection) -> tuple[str, list[str]]:
        """This process's name, and the writers that have ended.

        They are looked for when this process begins, or has lost the connection of its lock and with it its name.
        """
        own = self._writer
        if own and self._left and (self.database.is_sqlite or not own.has_ended(own.name, connection)):
            return own.name, []
        self._writer = new = _Writer(self.database, self._folder)
        if own:
            connection.execute(update(audit_open).where(audit_open.c.writer == own.name).values(writer=new.name))
        names = connection.scalars(select(audit_open.c.writer).distinct()).all()
        return new.name, [name for name in names if name != new.name and new.has_ended(name, connection)]

    def _added(self, connection: Connection, events: Sequence[Event], head: Head, writer: str) -> Head:
        rows, mac, started, ended = list[tuple[Any, ...]](), head.mac, dict[str, int](), set[str]()
        for seq, event in enumerate(events, head.seq + 1):
            row = chained(event, seq, stamp(head.time), mac, self.keys)
            rows.append(tuple(row.values()))
            mac = row["mac"]
            if event["kind"] == "start":
                started[event["id"]] = seq
            elif event["kind"] == "end":
                ended.add(event["id"])
        self._run(connection, _ADD, rows)
        self._run(connection, _OPEN, [(id, seq, writer) for id, seq in started.items() if id not in ended])
        self._run(connection, _CLOSE, [(id,) for id in ended if id not in started])
        return replace(head, seq=head.seq + len(rows), mac=mac)

    def _too_old(self, connection: Connection, head: Head) -> int:
        """The newest daily mark behind which everything may go, by marks that are signed; 0 for none."""
        before = audit.alias()
        marks = select(audit, before.c.mac.label("previous")).outerjoin(before, before.c.seq == audit.c.seq - 1)
        found = 0
        for row in connection.execute(marks.where(audit.c.kind.in_(("log", "day", "segment"))).order_by(audit.c.seq)):
            is_ours = follows(row, row.previous or head.anchor, self.keys)
            if not is_ours or json.loads(row.body)["clock"] > head.clock - self._days * DAY:
                break
            found = row.seq
        return found

    def _pruned(self, connection: Connection, head: Head) -> Head:
        if self._doomed <= head.first:
            return head
        last = newest(connection, min(self._doomed, head.first + _PRUNED) - 1)
        if last is None or last.seq < head.first:
            return head
        connection.execute(delete(audit).where(audit.c.seq <= last.seq))
        return replace(head, first=last.seq + 1, anchor=last.mac)

    def _tell(self, head: Head) -> None:
        """Where the log stands, for other machines to remember: one that is behind this was put back."""
        self._metrics.audit_last_seq.labels(head.log).set(head.seq)
        if time.monotonic() - self._told >= _TELL_EVERY:
            self._told = time.monotonic()
            _log.info("audit head", log=head.log, seq=head.seq, mac=head.mac)


def _end(id: str, start: bytes | None, outcome: str) -> Event:
    kept = ("request", "user", "user_id", "key", "route", "model")
    fields = {name: value for name, value in json.loads(start or b"{}").items() if name in kept}
    return {"kind": "end", "id": id, **fields, "outcome": outcome}
