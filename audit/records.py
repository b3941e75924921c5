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

audit = Table(
    "audit",
    metadata,
    Column("seq", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=False),
    Column("time", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("request", Text),
    Column("user", Text),
    Column("outcome", Text),
    Column("body", LargeBinary, nullable=False),  # the JSON that `mac` covers, with seq and the columns above
    Column("key", Text, nullable=False),
    Column("mac", Text, nullable=False),
    Index("audit_by_time", "time", "seq"),
    Index("audit_by_user", "user", "time", "seq"),
    Index("audit_by_kind", "kind", "time", "seq"),
    Index("audit_by_request", "request"),
)
# One row. `log` is the log's random id, made with the tables; `state` the signed head, NULL until the first record.
audit_head = Table("audit_head", metadata, Column("log", Text, primary_key=True), Column("state", LargeBinary))
audit_open = Table(  # generations that have a start and no end
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
    """The row for `event` behind the row whose MAC is `previous`."""
    event = {"seq": seq, "time": time, **event}
    body = json.dumps(event, separators=(",", ":"), allow_nan=False).encode()
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
        text = json.dumps({name: getattr(self, name) for name in self.__slots__}, separators=(",", ":")).encode()
        return f"{keys.newest} {keys.sign(keys.newest, _HEAD_CONTEXT, text)} ".encode() + text

    @classmethod
    def parse(cls, signed: bytes | None, keys: MacKeys) -> Head | None:
        """None for what no key of ours has signed."""
        with suppress(ValueError, KeyError, TypeError):
            key, mac, text = (signed or b"").split(b" ", 2)
            if hmac.compare_digest(keys.sign(key.decode(), _HEAD_CONTEXT, text).encode(), mac):
                return cls(**json.loads(text))
        return None


class HeadFile:
    """The copy of the head outside the database. It may be older than the table's end, by what a crash interrupted."""

    def __init__(self, path: Path, keys: MacKeys) -> None:
        self._path, self._keys = path, keys
        self._is_new = True  # to this process

    def read(self) -> Head | None:
        """None where there is none, or none that a key of ours signed. Raises OSError."""
        with suppress(FileNotFoundError):
            return Head.parse(self._path.read_bytes().rstrip(), self._keys)
        return None

    @contextmanager
    def locked(self) -> Iterator[int]:
        """The open file. Writers on this machine queue here, in turn, where SQLite would poll. Raises OSError."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(file)

    def write(self, file: int, signed: bytes) -> None:
        """Overwrite the head in the locked file. Raises OSError."""
        if self._is_new:
            found = os.pread(file, 2 * _HEAD_SIZE, 0).rstrip()
            if found and Head.parse(found, self._keys) is None:  # an older version's, or a spoiled one
                self._path.with_name(f"{self._path.name}.old").write_bytes(found)
            os.ftruncate(file, _HEAD_SIZE)
        if os.pwrite(file, signed.ljust(_HEAD_SIZE), 0) != _HEAD_SIZE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self._is_new:  # its name and size must last; later writes overwrite one sector in place
            os.fsync(file)
            self._is_new = False
