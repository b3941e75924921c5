"""Whether an audit log is whole: every line, every link, and the end that the head tells of.

Changes nothing, and may read while others write.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from store import chain
from store.chain import Line, Signer
from store.head import HeadFile
from store.segments import opening, segments


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

    def __init__(self, signer: Signer, seq: int, mac: str) -> None:
        self.report = Report(first=seq)
        self.mac, self.next, self._signer, self._key = mac, seq, signer, ""

    def enter(self, path: Path) -> None:
        found = opening(path, self._signer)
        self._key = found.key if found else ""
        self.report.segments += 1
        if found is None:
            self._blame(path, "its first line is not signed with a key that is known")
        elif found.why in ("damaged", "no head"):
            self._blame(path, f"was begun because of this: {found.why}")
        if self.next == 0:  # no head tells where to begin
            self.next, self.mac = int(path.stem), found.prev if found else ""
        self.report.first = self.report.first or self.next

    def line(self, path: Path, number: int, line: Line | None) -> None:
        self.report.records += 1
        if line is None:
            self._blame(path, f"line {number} is not a whole record")
            self.next += 1
            return
        if line.seq != self.next:
            self._blame(path, f"line {number} is record {line.seq}, where {self.next} belongs")
        elif not line.follows(self.mac, self._key, self._signer):
            self._blame(path, f"line {number} (record {line.seq}) was changed, or the line before it was")
        self.next, self.mac = line.seq + 1, line.mac

    def _blame(self, path: Path, what: str) -> None:
        self.report.problems.append(f"{path.name}: {what}")


def verify(folder: Path, head_path: Path, signer: Signer) -> Report:
    """Read the whole log. Raises OSError when it cannot be read."""
    head = HeadFile(head_path, signer).look()
    walk = _Walk(signer, head.first if head else 0, head.anchor if head else "")
    for path in segments(folder):
        if head and not head.first <= int(path.stem) <= head.seq:
            continue  # about to be dropped, or not promised yet
        walk.enter(path)
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if head and walk.next > head.seq:
                    break  # written since the head was read
                walk.line(path, number, chain.read(raw))
    report = walk.report
    report.last = walk.next - 1
    if head is None:
        report.problems.append("there is no head that is signed with a known key: a tail may be missing")
    elif (report.last, walk.mac) != (head.seq, head.tip):
        report.problems.append(f"the log ends with record {report.last}, but the head counts {head.seq}")
    return report
