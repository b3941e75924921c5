"""A request inside the engine, and the queue in which it waits."""

from __future__ import annotations

import queue
import secrets
import time
from collections.abc import Callable
from dataclasses import replace

from errors import DeadlineExceeded, ServiceError
from model.engine.blocks import Table
from model.engine.speculation import Lookup
from model.types import FinishReason, GenerateRequest, Status
from telemetry import Metrics

# Seconds past its deadline that a reader waits for the engine to say so: only a model thread that hangs is later.
_PATIENCE = 5.0


class Sequence:
    """The model thread owns all of it except `get` and `close`, which are the reader's."""

    def __init__(self, request: GenerateRequest, wake: Callable[[], None], now: float, metrics: Metrics) -> None:
        self.request = request
        self.tokens = list(request.prompt_ids)  # and those that were generated; the next step reads the last
        self.seed = secrets.randbits(63) if request.sampling.seed is None else request.sampling.seed
        self.submitted = self.admitted = self.first = self.latest = now
        self.deadline = now + request.timeout
        self.closed: FinishReason | None = None  # set by the reader: how it left
        self.order = 0  # among all that were ever admitted, from its first admission on
        self.row = 0  # its place in the runner, while it runs
        self.table = Table(b"")  # where its KV lies, while it runs
        self.cached = 0  # prompt tokens whose KV was reused
        self.chunk: list[int] = []  # the tokens that are computed next
        self.lookup: Lookup | None = None  # from its first guess on
        self.generated = 0
        self.items: queue.SimpleQueue[Status | int | FinishReason | ServiceError] = queue.SimpleQueue()
        self._ended = False
        self._announced: Status | None = None  # the last, without its eta
        self._wake, self._metrics = wake, metrics

    @property
    def rest(self) -> int:
        """Tokens still to be computed before a step may include this sequence: all but the last one."""
        return len(self.tokens) - 1 - self.table.computed

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def left(self) -> int:
        """Tokens that may still be computed for it: its part of the backlog."""
        return self.rest + 1 + self.request.max_new_tokens - self.generated

    def announce(self, status: Status) -> None:
        """Tell the reader what it waits for, unless only the eta has changed."""
        if (news := replace(status, eta_seconds=None)) != self._announced:
            self._announced = news
            self.items.put(status)

    def ending(self, now: float) -> FinishReason | ServiceError | None:
        """How it ends because its reader left or its time is over; None while it goes on."""
        late = DeadlineExceeded("the request took longer than its timeout") if now >= self.deadline else None
        return self.closed or late

    def finish(self, ending: FinishReason | ServiceError, now: float) -> None:
        """Count it, and tell the reader that nothing follows. Only the first call has an effect."""
        if self._ended:
            return
        self._ended = True
        self._metrics.finished.labels(ending.value if isinstance(ending, FinishReason) else ending.code).inc()
        self._metrics.e2e.observe(now - self.submitted)
        if self.generated:
            self._metrics.decode.observe(now - self.first)
        self.items.put(ending)

    def get(self, timeout: float) -> Status | int | FinishReason | None:
        """The next item, or None when `timeout` seconds brought none. Raises the ServiceError that ended it."""
        late = self.deadline + _PATIENCE - time.monotonic()
        try:
            item = self.items.get(timeout=max(0.0, min(timeout, late)))
        except queue.Empty:
            if late > timeout:
                return None
            self.close()
            raise DeadlineExceeded("the model did not answer in time") from None
        if isinstance(item, ServiceError):
            raise item
        return item

    def close(self, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """Want no more: the engine lets go of it before its next step. The first reason counts."""
        self.closed = self.closed or reason
        self._wake()


class RequestQueue(list[Sequence]):
    """Those that wait, by arrival. Users take turns: a user's k-th request is admitted in the k-th round from now.

    64 requests of one user delay another user's first by one at most. The engine's lock and limit guard it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._round = 0  # of the latest admission
        self._told: list[Sequence] = []  # who waited when positions were told last
        self._admitted: dict[str, int] = {}  # owner -> round of its latest admission, where that is `_round` or later

    def first(self) -> Sequence:
        """The one whose turn it is. Raises IndexError when none waits."""
        return self._in_turn()[0][1]

    def take(self) -> Sequence:
        """Take out the one whose turn it is. Raises IndexError when none waits."""
        self._round, sequence = self._in_turn()[0]
        self._admitted[sequence.request.owner] = self._round
        self._admitted = {owner: turn for owner, turn in self._admitted.items() if turn >= self._round}
        self.remove(sequence)
        return sequence

    def sweep(self, now: float, error: ServiceError | None = None) -> None:
        """End those whose reader left, or whose time is over; all of them with `error`."""
        for sequence in tuple(self):
            if ending := error or sequence.ending(now):
                self.remove(sequence)
                sequence.finish(ending, now)

    def announce_positions(self, seconds_until_free: Callable[[int], float]) -> None:
        """Tell each its position. seconds_until_free: the time until so many tokens are computed and a slot is free."""
        if self == self._told:
            return
        self._told, ahead = list(self), 0
        for position, (_, sequence) in enumerate(self._in_turn(), 1):
            sequence.announce(Status("queued", position=position, eta_seconds=seconds_until_free(ahead)))
            ahead += sequence.left

    def _in_turn(self) -> list[tuple[int, Sequence]]:
        """All that wait with their rounds, in the order of admission."""
        rounds = dict(self._admitted)
        turns: list[tuple[int, Sequence]] = []
        for sequence in self:
            owner = sequence.request.owner
            rounds[owner] = max(self._round, rounds.get(owner, -1) + 1)
            turns.append((rounds[owner], sequence))
        return sorted(turns, key=lambda turn: turn[0])
