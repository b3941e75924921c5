"""What the audit log says: starts, ends and acts, who wrote them, and finding them again.

Does not know what a request is: the fields are the caller's, but for `kind`, `id` and `writer`.
"""

from __future__ import annotations

import json
import mmap
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from audit import chain
from audit.chain import Record
from audit.journal import AuditUnavailable, Batch, Journal
from audit.segments import segments
from audit.writers import Writer


class Audit:
    """One log. Whatever appends may raise AuditUnavailable; reading raises OSError.

    What a process that died had begun is closed as `aborted` by the next one that writes.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.place = journal.place
        self._folder = self.place.folder
        self._writer: Writer | None = None
        self._opening = Lock()
        self._begun: set[str] = set()  # what this process has yet to end

    def problem(self) -> str | None:
        return None

    def open(self) -> None:
        """Close what dead processes left open. The first record does it too."""
        with self._opening:
            if self._writer is None:
                try:
                    self._writer = self._arrived()
                except OSError as error:
                    raise AuditUnavailable(f"the audit log cannot be opened ({error.strerror})") from error

    def add(self, kind: str, id: str, fields: Record) -> Batch:
        """Have one record written with the next batch; `settle` waits for it."""
        if self._writer is None:
            self.open()
        assert self._writer is not None
        if kind == "start":
            self._begun.add(id)
        elif kind == "end":
            self._begun.discard(id)
        return self._journal.add({"kind": kind, "id": id, "writer": self._writer.name, **fields})

    def settle(self, batch: Batch) -> None:
        """Return once `batch` is durable."""
        self._journal.settle(batch)

    def append(self, kind: str, id: str, fields: Record) -> None:
        self.settle(self.add(kind, id, fields))

    def find(self, wanted: Wanted, newest_first: bool = True) -> Iterator[dict[str, Any]]:
        """The records that match, `mac` included."""
        for line in self._lines(wanted.needles(), newest_first):
            with suppress(ValueError):  # a line that somebody spoiled is for verify to tell of
                record: dict[str, Any] = json.loads(line)
                if wanted.fits(record):
                    yield record

    def _arrived(self) -> Writer:
        writer = Writer.arrive(self._folder / "writers")
        weakref.finalize(self, _leave, writer, self._begun)
        try:
            for dead in writer.dead():
                self._journal.append(*(_aborted(start) for start in self._open(dead)), _died(dead))
                writer.bury(dead)
        except BaseException:
            writer.vanish()
            raise
        return writer

    def _open(self, writer: str) -> list[dict[str, Any]]:
        """The starts of this writer that have no end."""
        found: dict[str, dict[str, Any]] = {}
        for record in self.find(Wanted({"writer": writer}), newest_first=False):
            if record["kind"] == "start":
                found[record["id"]] = record
            elif record["kind"] == "end":
                found.pop(record["id"], None)
        return list(found.values())

    def _lines(self, needles: Collection[bytes], newest_first: bool) -> Iterator[bytes]:
        paths = segments(self._folder)
        for path in reversed(paths) if newest_first else paths:
            with suppress(FileNotFoundError):  # it became too old meanwhile
                for line in _backwards(path) if newest_first else _forwards(path):
                    if all(needle in line for needle in needles):
                        yield line


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which records: those with all of `fields`, from `since` until before `until` (as `stamp` writes them).

    before: only records older than the one of this number; 0 for no bound.
    """

    fields: Mapping[str, str] = field(default_factory=dict)
    since: str = ""
    until: str = "~"  # sorts after every digit
    before: int = 0

    def needles(self) -> list[bytes]:
        return [chain.fragment(name, value) for name, value in self.fields.items()]

    def fits(self, record: Mapping[str, Any]) -> bool:
        if any(record.get(name) != value for name, value in self.fields.items()):
            return False  # the bytes were found, but deeper inside
        return self.since <= record["time"] < self.until and (not self.before or record["seq"] < self.before)


def _aborted(start: Record) -> Record:
    kept = {name: start[name] for name in ("id", "writer", "user", "route", "model") if name in start}
    return {"kind": "end", **kept, "outcome": "aborted"}


def _died(writer: str) -> Record:
    return {"kind": "died", "id": writer, "writer": writer}


def _leave(writer: Writer, begun: Collection[str]) -> None:
    """At the end of the process, if it comes to that."""
    if begun:
        writer.vanish()
    else:
        writer.leave()


def _forwards(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from (line for line in file if line.endswith(b"\n"))


def _backwards(path: Path) -> Iterator[bytes]:
    """Whole lines, last first, without reading what nobody asks for."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            end = text.rfind(b"\n") + 1
            while end > 0:
                begin = text.rfind(b"\n", 0, end - 1) + 1
                yield text[begin:end]
                end = begin
