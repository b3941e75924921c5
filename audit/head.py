"""The head of the audit log: how many records there are and which is the last, kept apart from them.

Writes no record. Without it nobody could tell a log whose tail was cut off from one that just ends there.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from audit import chain
from audit.chain import Signer

_SLOT = 512  # bytes; a disk writes a sector of this size whole or not at all
_CHAIN = "head"  # what a head's HMAC is chained to, so that no record can pass for one


@dataclass(frozen=True, slots=True)
class Head:
    """Where the log stands, in record numbers, bytes and seconds.

    seq: the newest record; `tip` is its HMAC. first: the oldest that is kept; `anchor` is the HMAC of the one before.
    segment: the first record in the newest file; `size` is its length, `opened` its beginning on `clock`.
    clock: the time that is believed to have passed since the first record; `time` is the wall's, at the last one.
    key: the name of the key that signs this file and this head.
    """

    seq: int
    first: int
    anchor: str
    tip: str
    segment: int
    size: int
    opened: float
    clock: float
    time: float
    key: str


class HeadFile:
    """Two slots, written in turns: a torn write loses the newer one, whose records nobody was promised yet."""

    def __init__(self, path: Path, signer: Signer) -> None:
        self._path = path
        self._signer = signer
        self._known: tuple[bytes, Head, int] | None = None  # the file as this process left it, and the slot it wrote

    @contextmanager
    def locked(self) -> Iterator[int]:
        """The open file; nobody else, in this process or another, has it meanwhile. Raises OSError."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(file)

    def look(self) -> Head | None:
        """The head, without waiting for a writer or making a file; None where there is none that we signed."""
        with suppress(FileNotFoundError):
            return self._newest(self._path.read_bytes())
        return None

    def read(self, file: int) -> Head | None:
        raw = os.pread(file, 2 * _SLOT, 0)
        return self._known[1] if self._known and self._known[0] == raw else self._newest(raw)

    def write(self, file: int, head: Head) -> None:
        """Durable when it returns. Raises OSError."""
        raw = os.pread(file, 2 * _SLOT, 0).ljust(2 * _SLOT)
        line, _ = chain.write(asdict(head), _CHAIN, head.key, self._signer)
        begin = self._older(raw) * _SLOT
        if os.pwrite(file, line.ljust(_SLOT), begin) != _SLOT:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fdatasync(file)
        self._known = raw[:begin] + line.ljust(_SLOT) + raw[begin + _SLOT :], head, begin // _SLOT

    def _older(self, raw: bytes) -> int:
        """The slot to write next; what this process wrote itself it need not read again."""
        if self._known and self._known[0] == raw:
            return 1 - self._known[2]
        first, second = (self._head(raw, slot) for slot in (0, 1))
        return 1 if first and (second is None or first.seq > second.seq) else 0

    def _newest(self, raw: bytes) -> Head | None:
        heads = [head for slot in (0, 1) if (head := self._head(raw, slot))]
        return max(heads, key=lambda head: head.seq, default=None)

    def _head(self, raw: bytes, slot: int) -> Head | None:
        line = chain.read(raw[slot * _SLOT : (slot + 1) * _SLOT].rstrip(b" \0"))
        if line is None:
            return None
        fields = json.loads(line.body)
        return Head(**fields) if line.follows(_CHAIN, str(fields.get("key")), self._signer) else None
