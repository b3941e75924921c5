"""A torch-free runner for tests of the engine's own decisions: arithmetic instead of a model, and faults on demand.

Its tokens depend on the row's own history alone, as a correct model's do, so that texts can be compared.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

from model.types import Sampling

END = 0
UNFIT, NOT_FINITE = 90_001, 90_002  # prompt tokens that a runner chokes on


class ScriptedRunner:
    """Row state is (token, position, running hash of what was written); a step's token is a function of these."""

    def __init__(self, slots: int = 4, context: int = 4096) -> None:
        self.slots, self.context, self.eos = slots, context, frozenset([END])
        self.written: list[dict[int, int]] = [{} for _ in range(slots)]
        self.active: list[tuple[int, int]] = [(0, 0)] * slots
        self.threads: set[int] = set()
        self.steps: list[tuple[int, ...]] = []
        self.prefilled: list[tuple[int, int, int]] = []  # slot, start, count
        self.chunks: list[dict[int, int]] = []  # a chunk each: first token -> count
        self.before_prefill: Callable[[], None] = lambda: None
        self.before_step: Callable[[tuple[int, ...]], None] = lambda active: None
        self.spoil: Callable[[int], bool] = lambda slot: False
        self.compiled = (0, 0)
        self.closed = False

    def init_row(self, slot: int, sampling: Sampling, seed: int, prompt: Sequence[int]) -> None:
        self._here()
        if prompt[0] == UNFIT:
            raise IndexError("injected: no such token")

    def prefill(self, chunks: Sequence[tuple[int, Sequence[int], int]]) -> list[bool]:
        self._here()
        self.before_prefill()
        if any(UNFIT in ids for _, ids, _ in chunks):
            raise IndexError("injected: no such token")
        self.chunks.append({ids[0]: len(ids) for _, ids, _ in chunks})
        for slot, ids, start in chunks:
            self.prefilled.append((slot, start, len(ids)))
            self.written[slot].update(enumerate(ids, start))
        return [NOT_FINITE not in ids for _, ids, _ in chunks]

    def activate(self, slot: int, token: int, position: int) -> None:
        self.active[slot] = (token, position)

    def deactivate(self, slot: int, position: int) -> None:
        self.active[slot] = (0, position)

    def step(self, active: Sequence[int]) -> list[int | None]:
        self._here()
        self.before_step(tuple(active))
        self.steps.append(tuple(active))
        out: list[int | None] = [None] * self.slots
        for slot in active:
            token, position = self.active[slot]
            self.written[slot][position] = token
            if not self.spoil(slot):
                out[slot] = following([self.written[slot][i] for i in range(position + 1)])
                self.active[slot] = (out[slot] or 0, position + 1)
        return out

    def swap(self, a: int, b: int, tokens: int) -> None:
        self._here()
        for rows in (self.written, self.active):
            rows[a], rows[b] = rows[b], rows[a]  # type: ignore[index]

    def clear(self, slot: int) -> None:
        self.written[slot].clear()

    def load_compiled(self, idle: bool) -> bool:
        return False

    def compile_state(self) -> tuple[int, int]:
        return self.compiled

    def close(self) -> None:
        self.closed = True

    def details(self) -> Mapping[str, str | int]:
        return {"slots": self.slots, "context": self.context}

    def _here(self) -> None:
        self.threads.add(threading.get_ident())


def following(tokens: Sequence[int]) -> int:
    """The token after these, between 1 and 96: never the end."""
    state = 17
    for token in tokens:
        state = (state * 31 + token) % 9973
    return state % 96 + 1


def continuation(prompt: Sequence[int], count: int) -> list[int]:
    """What a request for `count` tokens gets, alone or in any company."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(following(tokens))
    return tokens[len(prompt) :]
