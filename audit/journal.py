"""Many threads and processes append to one audit log, and one sync serves all that wait for it.

Knows no fields: what a record says is the caller's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from audit.chain import Record
from audit.tail import Place, Tail
from errors import StoreUnavailable

_PATIENCE = 30.0  # seconds for others to make a batch durable; a disk that hangs holds the threads that write, no more


class AuditUnavailable(StoreUnavailable):
    """The records are not safe on disk. Whoever waits for them must not be answered as if they were."""

    code = "audit_unavailable"


@dataclass(slots=True)
class Batch:
    """Records that will be synced together. `last` is the number of the newest, once they are."""

    records: list[Record] = field(default_factory=list)
    led: bool = False
    done: threading.Event = field(default_factory=threading.Event)
    last: int | None = None
    fault: str = "the disk does not answer"


class Journal:
    """The log at `place`, for all threads. `on_commit` hears of every sync: records, seconds, and whether it went well.

    There is no thread behind it: the first that waits for a batch writes it, and meanwhile the next one fills.
    """

    def __init__(self, place: Place, on_commit: Callable[[int, float, bool], None] = lambda *_: None) -> None:
        self.place = place
        self._tail = Tail(place)
        self._on_commit = on_commit
        self._filling = Batch()
        self._mutex = threading.Lock()
        self._writing = threading.Lock()

    def append(self, *records: Record) -> None:
        """Write `records`, in this order; durable when it returns. Raises AuditUnavailable."""
        self.settle(self.add(*records))

    def add(self, *records: Record) -> Batch:
        """Have `records` written with the next batch, which comes when somebody settles it."""
        with self._mutex:
            self._filling.records.extend(records)
            return self._filling

    def settle(self, batch: Batch) -> None:
        """Wait until `batch` is durable. Raises AuditUnavailable when it cannot be made so."""
        with self._mutex:
            leads, batch.led = not batch.led, True
        if leads:
            self._write(batch)
        batch.done.wait(_PATIENCE)
        if batch.last is None:
            raise AuditUnavailable(f"the audit log cannot be written ({batch.fault})")

    def _write(self, batch: Batch) -> None:
        with self._writing:
            with self._mutex:
                self._filling = Batch()
            begin = time.perf_counter()
            try:
                batch.last = self._tail.append(batch.records)
            except OSError as error:
                batch.fault = error.strerror or type(error).__name__
            finally:  # also after a bug: whoever waits for this batch must not wait for ever
                batch.done.set()
                self._on_commit(len(batch.records), time.perf_counter() - begin, batch.last is not None)
