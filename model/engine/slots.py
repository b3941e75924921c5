"""Who holds which KV slot, and what its KV is worth to the next request.

Imports no torch: it hands out indices and counts tokens; `kv.py` holds the tensors behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Slot:
    """One row of the KV tensors.

    tokens: those whose keys and values are written, in order of position; they stay after the request ends, so that
    the same owner's next prompt can start from them. used: when it was last handed out, by the table's own count.
    """

    index: int
    owner: str = ""
    busy: bool = False
    used: int = 0
    tokens: list[int] = field(default_factory=list)


class SlotTable:
    """All slots of a runner. Not thread-safe: it belongs to the model thread."""

    def __init__(self, count: int) -> None:
        self.slots = [Slot(index) for index in range(count)]
        self._clock = 0

    @property
    def busy(self) -> int:
        return sum(slot.busy for slot in self.slots)

    def allocate(self, owner: str, prompt: Sequence[int]) -> Slot:
        """A free slot. `slot.tokens` is cut to the prefix that `prompt` shares with this owner's last use.

        At least one prompt token is left to compute, for the step that makes the first new token needs it.
        Raises ValueError when none is free.
        """
        free = [slot for slot in self.slots if not slot.busy]
        slot = max(free, key=lambda s: (self._shared(s, owner, prompt), -s.used, -s.index))
        del slot.tokens[self._shared(slot, owner, prompt) :]
        self._clock += 1
        slot.owner, slot.busy, slot.used = owner, True, self._clock
        return slot

    def free(self, slot: Slot, *, keep: bool) -> None:
        """Give a slot back; `keep` says that its tokens' KV is sound and may serve the owner's next prompt."""
        slot.busy = False
        if not keep:
            slot.tokens.clear()

    def hole(self) -> tuple[Slot, Slot] | None:
        """The last busy slot and a free one before it, when swapping them lets the batch use fewer rows."""
        last = next((slot for slot in reversed(self.slots) if slot.busy), None)
        first = next((slot for slot in self.slots if not slot.busy), None)
        return (last, first) if last and first and first.index < last.index else None

    def swap(self, a: Slot, b: Slot) -> None:
        """Exchange two slots' places, after their tensors were exchanged."""
        self.slots[a.index], self.slots[b.index] = b, a
        a.index, b.index = b.index, a.index

    @staticmethod
    def _shared(slot: Slot, owner: str, prompt: Sequence[int]) -> int:
        """Leading tokens of `prompt`, its last one left out, whose KV this slot holds for this owner."""
        if slot.owner != owner:
            return 0
        limit = min(len(slot.tokens), len(prompt) - 1)
        return next((i for i in range(limit) if slot.tokens[i] != prompt[i]), limit)
