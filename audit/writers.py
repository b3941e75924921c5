"""Which processes write to the audit log, and which of them have ended: a lock tells, which the system releases."""

from __future__ import annotations

import fcntl
import os
import struct
import weakref
from contextlib import ExitStack
from pathlib import Path
from secrets import token_hex

from sqlalchemy import Connection, text

from db import Database


class Writer:
    """This process under a random name, which is the place of its lock.

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
            fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, _byte(self.name))
        else:
            connection = held.enter_context(database.reading())
            connection.detach()  # its lock must end with it, and not live on in the pool
            connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _key(self.name)})

    def has_ended(self, name: str, connection: Connection) -> bool:
        """Whether a writer's process is gone. Of this one: whether its connection was lost."""
        if self._file is None:
            return bool(connection.scalar(text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": _key(name)}))
        found = fcntl.fcntl(self._file, fcntl.F_OFD_GETLK, _byte(name))
        return bool(struct.unpack_from("h", found)[0] == fcntl.F_UNLCK)


def _key(name: str) -> int:
    return int(name, 16) - (1 << 63)  # a signed 64-bit integer


def _byte(name: str) -> bytes:
    """Its write lock, as `struct flock`."""
    return struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, int(name, 16) >> 2, 1, 0)
