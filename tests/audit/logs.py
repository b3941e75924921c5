"""Audit logs for tests: on a real folder, signed with real codes, under clocks that the test moves."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from audit.journal import Journal
from audit.segments import segments
from audit.tail import Place
from audit.verify import Report, verify
from crypto import MacKeys

DAY = 86_400.0


@dataclass(slots=True)
class Clocks:
    """The wall's, which anybody may set, and the time since boot."""

    wall: float = 1_800_000_000.0
    ticks: float = 1000.0

    def pass_days(self, days: float) -> None:
        self.wall += days * DAY
        self.ticks += days * DAY


@dataclass(slots=True)
class Log:
    """One log; `journal()` is a new process that goes on with it."""

    folder: Path
    signer: MacKeys = field(default_factory=lambda: MacKeys([b"k" * 32]))
    clocks: Clocks = field(default_factory=Clocks)
    days: float = 180
    most_bytes: int = 1 << 20

    @property
    def head(self) -> Path:
        return self.folder / "kept apart" / "head"

    @property
    def files(self) -> list[Path]:
        return segments(self.folder / "log")

    def place(self) -> Place:
        wall, ticks = (lambda: self.clocks.wall), (lambda: self.clocks.ticks)
        return Place(self.folder / "log", self.head, self.signer, self.days, self.most_bytes, wall, ticks)

    def journal(self) -> Journal:
        return Journal(self.place())

    def records(self) -> list[dict[str, Any]]:
        """Every line, as it lies there."""
        return [json.loads(line) for file in self.files for line in file.read_bytes().splitlines()]

    def verify(self) -> Report:
        return verify(self.folder / "log", self.head, self.signer)

    @property
    def whole(self) -> bool:
        return not self.verify().problems


@dataclass(slots=True)
class Fault:
    """The `at`-th write or sync of any kind fails, and all after it; counts them."""

    at: int
    error: int = errno.ENOSPC
    lasts: int = 1
    calls: int = 0
    injected: int = 0

    def strikes(self) -> bool:
        self.calls += 1
        struck = self.at <= self.calls < self.at + self.lasts
        self.injected += struck
        return struck


@contextmanager
def failing_disk(fault: Fault, folder: Path) -> Iterator[Fault]:
    """Writes and syncs of files below `folder` fail as `fault` says; a write of error 0 is short instead."""
    real = {name: getattr(os, name) for name in ("pwrite", "fdatasync", "fsync")}

    def ours(file: int) -> bool:
        return os.readlink(f"/proc/self/fd/{file}").startswith(str(folder))

    def pwrite(file: int, data: bytes, place: int) -> int:
        if ours(file) and fault.strikes():
            written: int = real["pwrite"](file, data[: len(data) // 2], place)
            if fault.error:
                raise OSError(fault.error, os.strerror(fault.error))
            return written
        return int(real["pwrite"](file, data, place))

    def syncing(name: str) -> Any:
        def sync(file: int) -> None:
            if ours(file) and fault.strikes() and fault.error:
                raise OSError(fault.error, os.strerror(fault.error))
            real[name](file)

        return sync

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        patch.setattr(os, "fdatasync", syncing("fdatasync"))
        patch.setattr(os, "fsync", syncing("fsync"))
        yield fault
