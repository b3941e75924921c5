"""The requests that wait for a slot, in order of arrival.

Bounds nothing and locks nothing: the engine does both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from errors import ServiceError
from model.engine.scheduler import Batch
from model.engine.sequence import Sequence
from model.types import Status
from telemetry import Metrics


class WaitingLine:
    """First come, first served."""

    def __init__(self, metrics: Metrics) -> None:
        self._line: deque[Sequence] = deque()
        self._gauge = metrics.waiting

    def __len__(self) -> int:
        return len(self._line)

    @property
    def tokens(self) -> int:
        """Tokens that those in line still want computed."""
        return sum(sequence.left for sequence in self._line)

    def join(self, sequence: Sequence) -> None:
        self._line.append(sequence)
        self._gauge.set(len(self._line))

    def first(self) -> Sequence:
        """Take the first one out of the line. Raises IndexError when nobody waits."""
        sequence = self._line.popleft()
        self._gauge.set(len(self._line))
        return sequence

    def sweep(self, now: float) -> None:
        """End those that left, or whose time is over."""
        for sequence in tuple(self._line):
            if ending := sequence.ending(now):
                self._line.remove(sequence)
                sequence.finish(ending, now)
        self._gauge.set(len(self._line))

    def dismiss(self, error: ServiceError, now: float) -> None:
        """End all of them."""
        while self._line:
            self.first().finish(error, now)

    def tell_percent(self, percent: int) -> None:
        for sequence in self._line:
            sequence.announce(Status("loading", percent=percent))

    def tell_positions(self, seconds_for: Callable[[int], float]) -> None:
        """Tell each where it stands; seconds_for: the time until so many tokens are computed and a slot is free."""
        ahead = 0
        for position, sequence in enumerate(self._line, 1):
            sequence.announce(Status("queued", position=position, eta_seconds=seconds_for(ahead)))
            ahead += sequence.left


def seconds_until_free(batch: Batch | None, tokens: int) -> float:
    """Time until a slot of `batch` is free after `tokens` more, at the speed measured so far; never under a second."""
    if batch is None:  # still loading: one token a second promises nothing
        return round(min(600.0, max(1.0, tokens)), 1)
    left = [sequence.left for sequence in list(batch.running)]
    return round(min(600.0, max(1.0, (tokens + min(left, default=0) * max(1, len(left))) / batch.speed)), 1)
