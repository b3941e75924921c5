"""Where the audit log goes on after a process died in the middle of a write, or somebody touched its files.

Writes no record: what it finds is told by the first line of the next file, for good.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from audit import chain
from audit.chain import Signer
from audit.head import Head
from audit.segments import opening, segment, segments


def resumed(folder: Path, head: Head | None, signer: Signer) -> tuple[Head, str | None]:
    """The head to go on from, and why not in the newest file, if not there."""
    if head is None:
        return _rebuilt(folder, signer)
    path = segment(folder, head.segment)
    if not path.exists() or not _ends_in(path, head):
        return head, "damaged"
    return _adopted(folder, head, signer), None


def _adopted(folder: Path, head: Head, signer: Signer) -> Head:
    """The head, moved over what a process wrote and died before counting; what it half wrote is cut off."""
    path = segment(folder, head.segment)
    for raw in _after(path, head.size).splitlines(keepends=True):
        line = chain.read(raw)
        if line is None or not line.follows(head.tip, head.key, signer):
            break
        head = replace(head, seq=line.seq, tip=line.mac, size=head.size + len(raw))
    if path.stat().st_size > head.size:
        os.truncate(path, head.size)
    return _entered(folder, head, signer)


def _entered(folder: Path, head: Head, signer: Signer) -> Head:
    """The same for a file that was begun after the head's."""
    path = segment(folder, head.seq + 1)
    found = opening(path, signer)
    if found and found.prev == head.tip:
        begun = replace(head, segment=found.seq, size=0, clock=found.clock, opened=found.clock, key=found.key)
        return _adopted(folder, begun, signer)
    path.unlink(missing_ok=True)
    return head


def _after(path: Path, place: int) -> bytes:
    with path.open("rb") as file:
        file.seek(place)
        return file.read()


def _ends_in(path: Path, head: Head) -> bool:
    """Whether the file's first `head.size` bytes end in the last record that the head counts."""
    last = chain.ending(head.tip)
    with path.open("rb") as file:
        file.seek(max(head.size - len(last), 0))
        return file.read(len(last)) == last


def _rebuilt(folder: Path, signer: Signer) -> tuple[Head, str]:
    """A head for a log that has none that we signed, from what its files say."""
    head = Head(0, 1, "", "", 1, 0, 0.0, 0.0, 0.0, signer.newest)
    paths = [path for path in segments(folder) if path.stat().st_size]
    if not paths:
        return head, "first"
    begun = [found for path in paths if (found := opening(path, signer))]
    oldest = opening(paths[0], signer)
    lines = [line for raw in paths[-1].read_bytes().splitlines(keepends=True) if (line := chain.read(raw))]
    known = replace(head, first=int(paths[0].stem), anchor=oldest.prev if oldest else "")
    clock = max((found.clock for found in begun), default=0.0)
    seq, tip = (lines[-1].seq, lines[-1].mac) if lines else (int(paths[-1].stem), "")
    return replace(known, seq=seq, tip=tip, clock=clock), "no head"
