"""One request inside the engine: what the model thread writes and its reader gets."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from dataclasses import dataclass

from errors import DeadlineExceeded, ServiceError
from model.engine.slots import Slot
from model.types import FinishReason, GenerateRequest, Status
from telemetry import Metrics

# Seconds past its deadline that a reader waits for the engine to say so: only a model thread that hangs is later.
_PATIENCE = 5.0


@dataclass(frozen=True, slots=True)
class Finished:
    """The last item of a sequence that ended well."""

    reason: FinishReason


class Sequence:
    """The model thread owns all of it except `get` and `close`, which are the reader's."""

    def __init__(self, request: GenerateRequest, wake: Callable[[], None], now: float, metrics: Metrics) -> None:
        self.request = request
        self.prompt = list(request.prompt_ids)
        self.submitted = self.admitted = self.first = self.latest = now
        self.deadline = now + request.timeout
        self.closed: FinishReason | None = None  # set by the reader: how it left
        self.slot: Slot  # from its admission on
        self.computed = 0  # prompt tokens whose KV is written
        self.cached = 0  # of these, how many were reused
        self.chunk: list[int] = []  # the prompt tokens that are computed next
        self.next = self.prompt[-1]  # the token that the next step reads
        self.generated = 0
        self._items: queue.SimpleQueue[Status | int | Finished | ServiceError] = queue.SimpleQueue()
        self._ended = False
        self._announced: tuple[str, int | None, int | None] | None = None
        self._wake, self._metrics = wake, metrics

    @property
    def rest(self) -> int:
        """Prompt tokens still to be computed before a step may include this sequence: all but the last one."""
        return len(self.prompt) - 1 - self.computed

    @property
    def left(self) -> int:
        """Tokens that may still be computed for it: its part of the backlog."""
        return self.rest + 1 + self.request.max_new_tokens - self.generated

    def announce(self, status: Status) -> None:
        """Tell the reader what it waits for, unless only the eta has changed."""
        news = (status.stage, status.percent, status.position)
        if news != self._announced:
            self._announced = news
            self._items.put(status)

    def emit(self, token: int) -> None:
        self._items.put(token)

    def ending(self, now: float) -> Finished | ServiceError | None:
        """How it ends because its reader left or its time is over; None while it goes on."""
        if self.closed:
            return Finished(self.closed)
        return DeadlineExceeded("the request took longer than its timeout") if now >= self.deadline else None

    def finish(self, ending: Finished | ServiceError, now: float) -> None:
        """Tell the reader that nothing follows, and count it. Only the first call has an effect."""
        if self._ended:
            return
        self._ended = True
        self._items.put(ending)
        self._metrics.finished.labels(ending.reason.value if isinstance(ending, Finished) else ending.code).inc()
        self._metrics.e2e.observe(now - self.submitted)
        if self.generated:
            self._metrics.decode.observe(now - self.first)

    def get(self, timeout: float) -> Status | int | Finished | None:
        """The next item, or None when `timeout` seconds brought none. Raises the ServiceError that ended it."""
        late = self.deadline + _PATIENCE - time.monotonic()
        try:
            item = self._items.get(timeout=max(0.0, min(timeout, late)))
        except queue.Empty:
            if late > timeout:
                return None
            self.close()
            raise DeadlineExceeded("the model did not answer in time") from None
        if isinstance(item, ServiceError):
            raise item
        return item

    def close(self, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """Want no more: the engine frees the slot before its next step. The first reason counts."""
        self.closed = self.closed or reason
        self._wake()
