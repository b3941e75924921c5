"""The end of the audit log, where it grows: a file a day, each line chained to the one before.

Waits for no other thread; journal.py gathers what many of them have to say.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from audit import chain
from audit.chain import Record, Signer
from audit.head import Head, HeadFile
from audit.mend import resumed
from audit.segments import opening, put, segment, segments, stamp

DAY = 86_400.0  # seconds
Clock = Callable[[], float]


def since_boot() -> float:
    """Seconds that nobody can set, those asleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a log lives and how it is kept. `head` lies apart from `folder`, on another disk if possible.

    days: the least that a record is kept. most_bytes: of one file. wall: Unix seconds; ticks: seconds since boot.
    """

    folder: Path
    head: Path
    signer: Signer
    days: float = 180
    most_bytes: int = 64 << 20
    wall: Clock = time.time
    ticks: Clock = since_boot


class Tail:
    """Appends to one log. Files go whole, once everything in them is too old.

    Age is counted by a clock of the log's own, which a wall clock set wrong cannot drive: within a process it goes by
    the time since boot, and from one process to the next it believes in a day at most.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._heads = HeadFile(place.head, place.signer)
        self._left: Head | None = None  # as this process left it
        self._ticked = 0.0  # on `ticks`, at that time
        self._suspect = False  # a write failed: what the newest file holds on disk is not certain any more

    def append(self, records: Sequence[Record]) -> int:
        """Write `records`; durable when it returns the number of the last. Raises OSError, and nothing was promised."""
        self._place.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._heads.locked() as file:
            head, why = self._found(self._heads.read(file))
            head = self._timed(head)
            doomed: list[Path] = []
            if why := why or self._due(head):
                records = [self._opening(head, why), *records]
                head, doomed = self._begun(head)
            data, new = self._chained(records, head)
            self._suspect = True
            put(segment(self._place.folder, head.segment), data, head.size)
            self._heads.write(file, new)
            self._left, self._suspect = new, False
            for path in doomed:
                path.unlink(missing_ok=True)
            return new.seq

    def _found(self, head: Head | None) -> tuple[Head, str | None]:
        if head is not None and head == self._left:
            path = segment(self._place.folder, head.segment)
            if path.exists() and path.stat().st_size == head.size:
                return head, None  # as this process left it, which is how it nearly always is
        return resumed(self._place.folder, head, self._place.signer)

    def _timed(self, head: Head) -> Head:
        wall, ticks = self._place.wall(), self._place.ticks()
        if self._left is None:
            clock = head.clock + (min(max(wall - head.time, 0.0), DAY) if head.seq else 0.0)
        else:
            clock = max(head.clock, self._left.clock + ticks - self._ticked)
        self._ticked = ticks
        return replace(head, clock=clock, time=wall)

    def _due(self, head: Head) -> str | None:
        """Why the next record begins a new file, if it does."""
        if head.key != self._place.signer.newest:
            return "key"
        if self._suspect:
            return "fault"
        if head.size >= self._place.most_bytes:
            return "size"
        return "day" if head.clock - head.opened >= DAY else None

    def _opening(self, head: Head, why: str) -> Record:
        key = self._place.signer.newest
        return {"kind": "segment", "prev": head.tip, "clock": head.clock, "key": key, "why": why}

    def _begun(self, head: Head) -> tuple[Head, list[Path]]:
        """The head of a new file, and the files that are too old to be kept beside it."""
        first, anchor = head.first, head.anchor
        paths = segments(self._place.folder)
        for later in paths[1:]:
            found = opening(later, self._place.signer)
            if found is None or found.clock > head.clock - self._place.days * DAY:
                break  # what was not signed by us may want the files before it gone
            first, anchor = found.seq, found.prev
        new = replace(head, first=first, anchor=anchor, segment=head.seq + 1, size=0, opened=head.clock)
        return replace(new, key=self._place.signer.newest), [path for path in paths if int(path.stem) < first]

    def _chained(self, records: Iterable[Record], head: Head) -> tuple[bytes, Head]:
        """The lines for `records`, and the head after them."""
        lines, seq, tip, time = [], head.seq, head.tip, stamp(head.time)
        for record in records:
            seq += 1
            line, tip = chain.write({"seq": seq, "time": time, **record}, tip, head.key, self._place.signer)
            lines.append(line)
        data = b"".join(lines)
        return data, replace(head, seq=seq, tip=tip, size=head.size + len(data))
