"""Whether an audit log is whole: every line, every link, and the end that the head tells of.

Changes nothing, and may read while others write.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from audit import chain
from audit.chain import Line, Signer
from audit.head import Head, HeadFile
from audit.segments import opening, segments


@dataclass(slots=True)
class Report:
    """What was read and what is wrong with it, in order; the log is whole when nothing is."""

    segments: int = 0
    records: int = 0
    first: int = 0
    last: int = 0
    problems: list[str] = field(default_factory=list)


class _Walk:
    """Goes through the lines one by one. After a fault it goes on from what it found, so as to find the rest."""

    def __init__(self, signer: Signer, head: Head | None) -> None:
        self.report = Report(first=head.first if head else 0)
        self.next, self._mac = (head.first, head.anchor) if head else (0, "")
        self._signer, self._key, self._head = signer, "", head
        self._arrived = False

    def enter(self, path: Path) -> None:
        found = opening(path, self._signer)
        self._key = found.key if found else ""
        self.report.segments += 1
        if found is None:
            self._blame(path, "its first line is not signed with a key that is known")
        elif found.why in ("damaged", "no head"):
            self._blame(path, f"was begun because of this: {found.why}")
        if self.next == 0:  # no head tells where to begin
            self.next, self._mac = int(path.stem), found.prev if found else ""
        self.report.first = self.report.first or self.next

    def line(self, path: Path, number: int, line: Line | None) -> None:
        self.report.records += 1
        if line is None:
            self._blame(path, f"line {number} is not a whole record")
            self.next += 1
            return
        if line.seq != self.next:
            self._blame(path, f"line {number} is record {line.seq}, where {self.next} belongs")
        elif not line.follows(self._mac, self._key, self._signer):
            self._blame(path, f"line {number} (record {line.seq}) was changed, or the line before it was")
        self.next, self._mac = line.seq + 1, line.mac
        if self._head and line.seq == self._head.seq:
            self._arrived = line.mac == self._head.tip

    def end(self) -> Report:
        """Whether the last record that the head counts was there."""
        self.report.last = self.next - 1
        if self._head is None:
            self.report.problems.append("there is no head that is signed with a known key: a tail may be missing")
        elif not self._arrived:
            self.report.problems.append(f"record {self._head.seq}, the last that the head counts, is not there")
        return self.report

    def _blame(self, path: Path, what: str) -> None:
        self.report.problems.append(f"{path.name}: {what}")


def verify(folder: Path, head_path: Path, signer: Signer) -> Report:
    """Read the whole log. Raises OSError when it cannot be read."""
    head = HeadFile(head_path, signer).look()
    walk = _Walk(signer, head)
    for path in segments(folder):
        if head and not head.first <= int(path.stem) <= head.seq:
            continue  # about to be dropped, or not promised yet
        walk.enter(path)
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                line = chain.read(raw)
                if line is None and head and walk.next > head.seq:
                    break  # just being written
                walk.line(path, number, line)
    return walk.end()
