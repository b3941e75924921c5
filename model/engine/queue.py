"""The requests that wait for a slot: users take turns, and a user's own requests keep their order."""

from __future__ import annotations

from collections.abc import Callable

from errors import ServiceError
from model.engine.sequence import Sequence
from model.types import Status
from telemetry import Metrics


class RequestQueue:
    """Not thread-safe and not bounded: the engine's lock and its limit do that.

    A user's k-th waiting request is admitted in the k-th round from now, so that 64 requests of one user delay
    another user's first by one at most.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._waiting: list[Sequence] = []  # in order of arrival
        self._round = 0  # of the latest admission
        self._admitted: dict[str, int] = {}  # owner -> round of its latest admission, where that is `_round` or later
        self._gauge = metrics.waiting

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def tokens(self) -> int:
        """Tokens that may still be computed for all that wait."""
        return sum(sequence.left for sequence in self._waiting)

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)
        self._gauge.set(len(self._waiting))

    def pop(self) -> Sequence:
        """Take out the one whose turn it is. Raises IndexError when none waits."""
        self._round, sequence = self._in_turn()[0]
        self._admitted[sequence.request.owner] = self._round
        self._admitted = {owner: turn for owner, turn in self._admitted.items() if turn >= self._round}
        self._remove(sequence)
        return sequence

    def sweep(self, now: float) -> None:
        """End those whose reader left, or whose time is over."""
        for sequence in tuple(self._waiting):
            if ending := sequence.ending(now):
                self._remove(sequence)
                sequence.finish(ending, now)

    def fail_all(self, error: ServiceError, now: float) -> None:
        for sequence in tuple(self._waiting):
            self._remove(sequence)
            sequence.finish(error, now)

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

    def _remove(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)
        self._gauge.set(len(self._waiting))
