"""The files of the audit log: their names, their first lines, and how bytes get into them for good.

Does not decide when a file is begun, or which may go.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from audit import chain
from audit.chain import Signer


@dataclass(frozen=True, slots=True)
class Opening:
    """The first line of a file: what it follows, signed with which key, at what age of the log, and why it was begun.

    why: first, day, size, key, fault (a write failed), damaged (the file before it is not as it was left) or no head.
    """

    seq: int
    prev: str
    clock: float
    key: str
    why: str


def stamp(seconds: float) -> str:
    """Unix seconds as they stand in a record: UTC, and of one length, so that texts compare as times do."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def segments(folder: Path) -> list[Path]:
    """The files, oldest first."""
    return sorted(path for path in folder.glob("*.jsonl") if path.stem.isdigit())


def segment(folder: Path, first: int) -> Path:
    """The file that begins with this record."""
    return folder / f"{first:012}.jsonl"


def opening(path: Path, signer: Signer) -> Opening | None:
    """How a file begins; None where there is none, or its first line was not signed with a key that we have."""
    with suppress(OSError, ValueError, KeyError, TypeError), path.open("rb") as file:
        if line := chain.read(file.readline()):
            record = line.record
            found = Opening(line.seq, record["prev"], record["clock"], record["key"], record["why"])
            return found if line.follows(found.prev, found.key, signer) else None
    return None


def put(path: Path, data: bytes, place: int) -> None:
    """Write `data` at `place`, the end of the file, where 0 begins it. Durable when it returns.

    Raises OSError, and has then taken back what it wrote, if that was possible.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (0 if place else os.O_TRUNC), 0o600)
    try:
        _write(file, data, place)
        os.fdatasync(file)
        if place == 0:
            _sync_name(path.parent)
    except OSError:
        with suppress(OSError):
            os.ftruncate(file, place)
        raise
    finally:
        os.close(file)


def _write(file: int, data: bytes, place: int) -> None:
    while data:  # a disk that is nearly full takes a part, and says why at the next try
        written = os.pwrite(file, data, place)
        data, place = data[written:], place + written


def _sync_name(folder: Path) -> None:
    """A new file's name is to last as long as its lines."""
    entry = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(entry)
    finally:
        os.close(entry)
