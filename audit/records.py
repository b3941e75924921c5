"""The tables of the audit log, how its events are chained, and its head: where the log stands."""

from __future__ import annotations

import errno
import fcntl
import hmac
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import BigInteger, Column, Index, Integer, LargeBinary, Table, Text

from crypto import MacKeys
from db import metadata

Event = Mapping[str, Any]

COLUMNS = ("time", "kind", "request", "user", "outcome")  # of a row: copies of its body's fields, for look-ups
_HEAD_SIZE = 512  # bytes: a disk writes a sector of this size whole or not at all
_HEAD_CONTEXT = b"audit head"
_encoded = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode

audit = Table(
    "audit",
    metadata,
    Column("seq", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=False),
    *(Column(name, Text, nullable=name not in ("time", "kind")) for name in COLUMNS),
    Column("body", LargeBinary, nullable=False),  # the JSON that `mac` covers; it repeats seq and COLUMNS
    Column("key", Text, nullable=False),
    Column("mac", Text, nullable=False),
    Index("audit_by_time", "time", "seq"),
    Index("audit_by_user", "user", "time", "seq"),
    Index("audit_by_kind", "kind", "time", "seq"),
    Index("audit_by_request", "request"),
)
# One row: the log's random id, and the signed head.
audit_head = Table("audit_head", metadata, Column("log", Text, primary_key=True), Column("state", LargeBinary))
# Generations with no end as yet, and the processes that write them.
audit_open = Table(
    "audit_open",
    metadata,
    Column("id", Text, primary_key=True),
    Column("seq", BigInteger, nullable=False),
    Column("writer", Text, nullable=False),
)


def stamp(seconds: float) -> str:
    """Unix seconds as a record has them: UTC, always of one length, so that texts compare as times do."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def chained(event: Event, seq: int, time: str, previous: str, keys: MacKeys) -> dict[str, Any]:
    """The row for `event`, in the table's order, behind the row whose MAC is `previous`."""
    event = {"seq": seq, "time": time, **event}
    body = _encoded(event).encode()
    mac = keys.sign(keys.newest, previous.encode(), body)
    return {"seq": seq, **{name: event.get(name) for name in COLUMNS}, "body": body, "key": keys.newest, "mac": mac}


def follows(row: Any, previous: str, keys: MacKeys) -> bool:
    """Whether `row` is as it was written, behind the row whose MAC is `previous`."""
    try:
        return hmac.compare_digest(keys.sign(row.key, previous.encode(), row.body), row.mac)
    except (KeyError, TypeError):  # signed with no key of ours; not ASCII
        return False


@dataclass(frozen=True, slots=True)
class Head:
    """Where the log stands; a signed copy lies in the database and one in a file apart from it.

    seq, mac: of the newest record. first: the oldest that is kept; `anchor` is the MAC of the one before.
    clock: seconds that are believed to have passed since the first record; `day`: at the newest daily mark.
    time: the wall clock's, at the newest record.
    """

    log: str
    seq: int = 0
    mac: str = ""
    first: int = 1
    anchor: str = ""
    clock: float = 0.0
    day: float = 0.0
    time: float = 0.0

    def signed(self, keys: MacKeys) -> bytes:
        text = _encoded({name: getattr(self, name) for name in self.__slots__}).encode()
        return f"{keys.newest} {keys.sign(keys.newest, _HEAD_CONTEXT, text)} ".encode() + text

    @classmethod
    def parse(cls, signed: bytes | None, keys: MacKeys) -> Head | None:
        """None for what no key of ours has signed."""
        with suppress(ValueError, KeyError, TypeError):
            key, mac, text = (signed or b"").split(b" ", 2)
            if hmac.compare_digest(keys.sign(key.decode(), _HEAD_CONTEXT, text).encode(), mac):
                return cls(**json.loads(text))
        return None

    @classmethod
    def read(cls, path: Path, keys: MacKeys) -> Head | None:
        """The copy in a file, which a crash may leave behind the database's. Raises OSError."""
        with suppress(FileNotFoundError):
            return cls.parse(path.read_bytes()[:_HEAD_SIZE].rstrip(), keys)
        return None


@contextmanager
def locked_head(path: Path) -> Iterator[int]:
    """The open file. Writers on this machine queue here, in turn, where SQLite would poll. Raises OSError."""
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
    finally:
        os.close(file)


def write_head(file: int, signed: bytes) -> None:
    """Overwrite the head in its locked file: one sector, in place. Raises OSError."""
    is_new = os.fstat(file).st_size < _HEAD_SIZE
    if os.pwrite(file, signed.ljust(_HEAD_SIZE), 0) != _HEAD_SIZE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if is_new:  # its name and size must last
        os.fsync(file)
