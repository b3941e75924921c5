"""Which processes write to the audit log, and which of them have died without a word.

Reads no record. A lock on a file tells: the system lets go of it when its holder ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


class Writer:
    """This process, under a name of its own."""

    def __init__(self, folder: Path, name: str, file: int) -> None:
        self.name = name
        self._folder = folder
        self._held = {name: file}

    @classmethod
    def arrive(cls, folder: Path) -> Writer:
        """Take a name. Raises OSError."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = secrets.token_hex(8)
        draft = folder / f".{name}"
        file = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX)
        draft.rename(folder / name)  # it is never seen without its lock
        return cls(folder, name, file)

    def dead(self) -> Iterator[str]:
        """The names of writers that ended without leaving; each is then ours to `bury`."""
        for path in sorted(self._folder.glob("[0-9a-f]*")):
            with suppress(FileNotFoundError):
                file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.stat(path)  # another may have buried it between the two
                except OSError:  # alive, or gone
                    os.close(file)
                else:
                    self._held[path.name] = file
                    yield path.name

    def bury(self, name: str) -> None:
        """Forget a writer, itself or a dead one."""
        (self._folder / name).unlink(missing_ok=True)
        os.close(self._held.pop(name))

    def leave(self) -> None:
        """End in peace."""
        for name in list(self._held):
            self.bury(name)

    def vanish(self) -> None:
        """End as one that died: whoever comes next finds this writer, and the dead that it had not buried yet."""
        for name in list(self._held):
            os.close(self._held.pop(name))
