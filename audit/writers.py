"""Which processes write to the audit log, and which of them have ended: a lock tells, which the system releases."""

from __future__ import annotations

import fcntl
import os
import weakref
from contextlib import ExitStack
from pathlib import Path
from secrets import token_hex

from sqlalchemy import Connection, text

from db import Database

_TRY_LOCK = text("SELECT pg_try_advisory_xact_lock(:key)")


class Writer:
    """This process under a random name: a locked file in `folder`, or on PostgreSQL a lock of its own session."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.name = token_hex(8)
        self._folder = None if not database.is_sqlite else folder
        held = ExitStack()
        weakref.finalize(self, held.close)
        if self._folder is None:
            connection = held.enter_context(database.reading())
            connection.detach()  # its lock must end with it, and not live on in the pool
            connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _key(self.name)})
            return
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = self._folder / f".{self.name}"
        file = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        held.callback(os.close, file)
        fcntl.flock(file, fcntl.LOCK_EX)
        draft.rename(self._folder / self.name)  # it is never seen without its lock

    def has_ended(self, name: str, connection: Connection) -> bool:
        """Whether another writer's process is gone."""
        if self._folder is None:
            return bool(connection.scalar(_TRY_LOCK, {"key": _key(name)}))
        try:
            file = os.open(self._folder / name, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(file)
        return True

    def tidy(self, connection: Connection) -> None:
        """Remove what ended processes left in the folder."""
        if self._folder is not None:
            for path in self._folder.glob("[0-9a-f]*"):
                if path.name != self.name and self.has_ended(path.name, connection):
                    path.unlink(missing_ok=True)


def _key(name: str) -> int:
    return int(name, 16) - (1 << 63)  # a signed 64-bit integer
