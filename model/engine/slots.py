"""Which request holds which KV slot, and which prefix of a prompt a slot already holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count


@dataclass(slots=True, eq=False)
class Slot:
    """One row of the KV tensors. tokens: those whose KV is written, also after the request, for the owner's next."""

    index: int
    owner: str = ""
    busy: bool = False
    used: int = 0  # the larger, the later it was last handed out
    tokens: list[int] = field(default_factory=list)

    def shared(self, owner: str, prompt: Sequence[int]) -> int:
        """Leading tokens of `prompt`, without its last, whose KV this slot holds for `owner`."""
        limit = min(len(self.tokens), len(prompt) - 1) if self.owner == owner else 0
        return next((i for i in range(limit) if self.tokens[i] != prompt[i]), limit)


class SlotTable:
    """All slots of a runner, for the model thread alone."""

    def __init__(self, slots: int) -> None:
        self.slots = [Slot(index) for index in range(slots)]
        self._uses = count(1)

    def allocate(self, owner: str, prompt: Sequence[int]) -> Slot:
        """A free slot, its `tokens` cut to the prefix that `prompt` shares with this owner's last use.

        At least one prompt token is left: computing it makes the first new token. Raises ValueError when none is free.
        """
        free = (slot for slot in self.slots if not slot.busy)
        slot = max(free, key=lambda s: (s.shared(owner, prompt), -s.used, -s.index))
        del slot.tokens[slot.shared(owner, prompt) :]
        slot.owner, slot.busy, slot.used = owner, True, next(self._uses)
        return slot

    def free(self, slot: Slot, *, keep: bool) -> None:
        """Give a slot back; `keep`: its KV is sound and may serve the owner's next prompt."""
        slot.busy = False
        if not keep:
            slot.tokens.clear()

    def holes(self) -> list[tuple[Slot, Slot]]:
        """Busy slots at the end with free ones before them: swapping these lets a step compute fewer rows."""
        busy = [slot.busy for slot in self.slots]
        front, back = self.slots[: sum(busy)], self.slots[sum(busy) :]
        return list(zip((s for s in back if s.busy), (s for s in front if not s.busy), strict=True))

    def swap(self, a: Slot, b: Slot) -> None:
        """Exchange two slots' places, after their tensors were exchanged."""
        self.slots[a.index], self.slots[b.index] = b, a
        a.index, b.index = b.index, a.index
