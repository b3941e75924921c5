"""A request inside the engine, the queue in which it waits, and the KV slot that it gets."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from errors import DeadlineExceeded, ServiceError
from model.types import FinishReason, GenerateRequest, Status
from telemetry import Metrics

# Seconds past its deadline that a reader waits for the engine to say so: only a model thread that hangs is later.
_PATIENCE = 5.0


@dataclass(slots=True, eq=False)
class Slot:
    """One row of the KV tensors. tokens: those whose KV is written, also after the request, for the owner's next."""

    index: int
    owner: str = ""
    busy: bool = False
    used: int = 0  # the larger, the later it was last handed out
    tokens: list[int] = field(default_factory=list)

    def shared(self, owner: str, prompt: list[int]) -> int:
        """Leading tokens of `prompt`, without its last, whose KV this slot holds for `owner`."""
        limit = min(len(self.tokens), len(prompt) - 1) if self.owner == owner else 0
        return next((i for i in range(limit) if self.tokens[i] != prompt[i]), limit)


class Sequence:
    """The model thread owns all of it except `get` and `close`, which are the reader's."""

    def __init__(self, request: GenerateRequest, wake: Callable[[], None], now: float, metrics: Metrics) -> None:
        self.request = request
        self.prompt = list(request.prompt_ids)
        self.submitted = self.admitted = self.first = self.latest = now
        self.deadline = now + request.timeout
        self.closed: FinishReason | None = None  # set by the reader: how it left
        self.slot = Slot(-1)  # a real one from its admission on
        self.cached = 0  # prompt tokens whose KV was reused
        self.chunk: list[int] = []  # the prompt tokens that are computed next
        self.next = self.prompt[-1]  # the token that the next step reads
        self.generated = 0
        self.items: queue.SimpleQueue[Status | int | FinishReason | ServiceError] = queue.SimpleQueue()
        self._ended = False
        self._announced: Status | None = None  # the last, without its eta
        self._wake, self._metrics = wake, metrics

    @property
    def rest(self) -> int:
        """Prompt tokens still to be computed before a step may include this sequence: all but the last one."""
        return max(0, len(self.prompt) - 1 - len(self.slot.tokens))

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
        """Want no more: the engine frees the slot before its next step. The first reason counts."""
        self.closed = self.closed or reason
        self._wake()


class RequestQueue(list[Sequence]):
    """Those that wait, by arrival. Users take turns: a user's k-th request is admitted in the k-th round from now.

    64 requests of one user delay another user's first by one at most. The engine's lock and limit guard it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._round = 0  # of the latest admission
        self._admitted: dict[str, int] = {}  # owner -> round of its latest admission, where that is `_round` or later

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
        ahead = 0
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


class SlotTable:
    """All slots of a runner, for the model thread alone."""

    def __init__(self, slots: int) -> None:
        self.slots = [Slot(index) for index in range(slots)]

    def allocate(self, owner: str, prompt: list[int]) -> Slot:
        """A free slot, its `tokens` cut to the prefix that `prompt` shares with this owner's last use.

        At least one prompt token is left: computing it makes the first new token. Raises ValueError when none is free.
        """
        free = (slot for slot in self.slots if not slot.busy)
        slot = max(free, key=lambda s: (s.shared(owner, prompt), -s.used, -s.index))
        del slot.tokens[slot.shared(owner, prompt) :]
        slot.owner, slot.busy, slot.used = owner, True, 1 + max(s.used for s in self.slots)
        return slot

    def free(self, slot: Slot, *, keep: bool) -> None:
        """Give a slot back; `keep`: its KV is sound and may serve the owner's next prompt."""
        slot.busy = False
        if not keep:
            slot.tokens.clear()

    def compact(self) -> Iterator[tuple[Slot, Slot]]:
        """Move busy slots before the free ones, so that a step computes fewer rows; their tensors move meanwhile."""
        busy = [slot.busy for slot in self.slots]
        front, back = self.slots[: sum(busy)], self.slots[sum(busy) :]
        for last, free in zip((s for s in back if s.busy), (s for s in front if not s.busy), strict=True):
            yield last, free
            self.slots[last.index], self.slots[free.index] = free, last
            last.index, free.index = free.index, last.index
