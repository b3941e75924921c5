"""A request inside the engine, and the queue in which requests wait for a slot."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable

from errors import DeadlineExceeded, ServiceError
from model.engine.slots import Slot
from model.types import FinishReason, GenerateRequest, Status
from telemetry import Metrics

# Seconds past its deadline that a reader waits for the engine to say so: only a model thread that hangs is later.
_PATIENCE = 5.0


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
        self._items: queue.SimpleQueue[Status | int | FinishReason | ServiceError] = queue.SimpleQueue()
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

    def ending(self, now: float) -> FinishReason | ServiceError | None:
        """How it ends because its reader left or its time is over; None while it goes on."""
        late = DeadlineExceeded("the request took longer than its timeout") if now >= self.deadline else None
        return self.closed or late

    def finish(self, ending: FinishReason | ServiceError, now: float) -> None:
        """Tell the reader that nothing follows, and count it. Only the first call has an effect."""
        if self._ended:
            return
        self._ended = True
        self._items.put(ending)
        self._metrics.finished.labels(ending.value if isinstance(ending, FinishReason) else ending.code).inc()
        self._metrics.e2e.observe(now - self.submitted)
        if self.generated:
            self._metrics.decode.observe(now - self.first)

    def get(self, timeout: float) -> Status | int | FinishReason | None:
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


class RequestQueue:
    """Users take turns, and a user's own requests keep their order: the k-th is admitted in the k-th round from now.

    64 requests of one user delay another user's first by one at most. The engine's lock and limit guard it.
    """

    def __init__(self) -> None:
        self._waiting: list[Sequence] = []  # in order of arrival
        self._round = 0  # of the latest admission
        self._admitted: dict[str, int] = {}  # owner -> round of its latest admission, where that is `_round` or later

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def tokens(self) -> int:
        """Tokens that may still be computed for all that wait."""
        return sum(sequence.left for sequence in self._waiting)

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def pop(self) -> Sequence:
        """Take out the one whose turn it is. Raises IndexError when none waits."""
        self._round, sequence = self._in_turn()[0]
        self._admitted[sequence.request.owner] = self._round
        self._admitted = {owner: turn for owner, turn in self._admitted.items() if turn >= self._round}
        self._waiting.remove(sequence)
        return sequence

    def sweep(self, now: float, error: ServiceError | None = None) -> None:
        """End those whose reader left, or whose time is over; all of them with `error`."""
        for sequence in tuple(self._waiting):
            if ending := error or sequence.ending(now):
                self._waiting.remove(sequence)
                sequence.finish(ending, now)

    def announce_loading(self, percent: int) -> None:
        for sequence in self._waiting:
            sequence.announce(Status("loading", percent=percent))

    def announce_positions(self, seconds_until_free: Callable[[int], float]) -> None:
        """Tell each its position. seconds_until_free: the time until so many tokens are computed and a slot is free."""
        ahead = 0
        for position, (_, sequence) in enumerate(self._in_turn(), 1):
            sequence.announce(Status("queued", position=position, eta_seconds=seconds_until_free(ahead)))
            ahead += sequence.left

    def _in_turn(self) -> list[tuple[int, Sequence]]:
        """All that wait with their rounds, in the order of admission."""
        rounds = dict(self._admitted)
        turns: list[tuple[int, Sequence]] = []
        for sequence in self._waiting:
            owner = sequence.request.owner
            rounds[owner] = max(self._round, rounds.get(owner, -1) + 1)
            turns.append((rounds[owner], sequence))
        return sorted(turns, key=lambda turn: turn[0])
