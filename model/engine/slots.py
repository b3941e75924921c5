"""Which request holds which KV slot, and which prefix of a prompt a slot already holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Slot:
    """One row of the KV tensors.

    tokens: those whose KV is written, by position; they outlive the request, for the same owner's next prompt.
    used: when it was last handed out, by the table's own count.
    """

    index: int
    owner: str = ""
    busy: bool = False
    used: int = 0
    tokens: list[int] = field(default_factory=list)

    def shared(self, owner: str, prompt: Sequence[int]) -> int:
        """Leading tokens of `prompt`, without its last, whose KV this slot holds for `owner`."""
        if self.owner != owner:
            return 0
        limit = min(len(self.tokens), len(prompt) - 1)
        return next((i for i in range(limit) if self.tokens[i] != prompt[i]), limit)


class SlotTable:
    """All slots of a runner, for the model thread alone."""

    def __init__(self, count: int) -> None:
        self.slots = [Slot(index) for index in range(count)]
        self._clock = 0

    def allocate(self, owner: str, prompt: Sequence[int]) -> Slot:
        """A free slot, its `tokens` cut to the prefix that `prompt` shares with this owner's last use.

        At least one prompt token is left: computing it makes the first new token. Raises ValueError when none is free.
        """
        free = [slot for slot in self.slots if not slot.busy]
        slot = max(free, key=lambda s: (s.shared(owner, prompt), -s.used, -s.index))
        del slot.tokens[slot.shared(owner, prompt) :]
        self._clock += 1
        slot.owner, slot.busy, slot.used = owner, True, self._clock
        return slot

    def free(self, slot: Slot, *, keep: bool) -> None:
        """Give a slot back; `keep`: its KV is sound and may serve the owner's next prompt."""
        slot.busy = False
        if not keep:
            slot.tokens.clear()

    def hole(self) -> tuple[Slot, Slot] | None:
        """The last busy slot and a free one before it: swapping them lets a step compute fewer rows."""
        last = next((slot for slot in reversed(self.slots) if slot.busy), None)
        first = next((slot for slot in self.slots if not slot.busy), None)
        return (last, first) if last and first and first.index < last.index else None

    def swap(self, a: Slot, b: Slot) -> None:
        """Exchange two slots' places, after their tensors were exchanged."""
        self.slots[a.index], self.slots[b.index] = b, a
        a.index, b.index = b.index, a.index
