"""A torch-free runner for tests of the engine's own decisions: arithmetic instead of a model, and faults on demand.

Its tokens depend on the row's own history alone, as a correct model's do, so that texts can be compared.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence

from model.engine.blocks import BLOCK, Copy, blocks_for
from model.engine.scheduler import Work
from model.types import Sampling

END = 0
UNFIT, NOT_FINITE = 90_001, 90_002  # prompt tokens that a runner chokes on


class ScriptedRunner:
    """A block's KV is the tokens written to it; a step's token is a function of those that its sequence holds."""

    work: Sequence[Work] = ()  # of the step at hand

    def __init__(self, slots: int = 4, context: int = 4096, blocks: int = 0) -> None:
        """blocks: of KV, for all; as many as all slots could fill unless given."""
        self.slots, self.context, self.eos = slots, context, frozenset([END])
        self.blocks = blocks or slots * blocks_for(context)
        self.guesses, self.step_tokens, self.chunk_tokens = 7, 8 * slots, 512
        self.written: dict[int, list[int]] = {}  # block -> its tokens, 0 where none is written
        self.threads: set[int] = set()
        self.steps: list[tuple[int, ...]] = []  # rows
        self.prefilled: list[tuple[int, int, int]] = []  # row, start, count
        self.chunks: list[dict[int, int]] = []  # a chunk each: first token -> count
        self.following: Callable[[Sequence[int]], int] = following
        self.before_prefill: Callable[[], None] = lambda: None
        self.before_step: Callable[[tuple[int, ...]], None] = lambda rows: None
        self.spoil: Callable[[Work], bool] = lambda one: False
        self.compiled = (0, 0)
        self.closed = False

    def begin(self, row: int, sampling: Sampling, seed: int, tokens: Sequence[int]) -> None:
        self._here()
        if tokens[0] == UNFIT:
            raise IndexError("injected: no such token")

    def prefill(self, work: Sequence[Work]) -> list[bool]:
        self._here()
        self.before_prefill()
        if any(UNFIT in one.tokens for one in work):
            raise IndexError("injected: no such token")
        self.chunks.append({one.tokens[0]: len(one.tokens) for one in work})
        for one in work:
            self.prefilled.append((one.row, one.position, len(one.tokens)))
            self._write(one)
        return [NOT_FINITE not in one.tokens for one in work]

    def step(self, work: Sequence[Work]) -> list[list[int | None]]:
        self._here()
        self.work = work
        rows = tuple(one.row for one in work)
        self.before_step(rows)
        self.steps.append(rows)
        for one in work:
            self._write(one)
        return [
            [None if self.spoil(one) else self.following(self.read(one, 1 + at)) for at in range(len(one.tokens))]
            for one in work
        ]

    def read(self, one: Work, count: int = 0) -> list[int]:
        """The tokens that a sequence's blocks hold, up to the last `count` of this work."""
        held = itertools.chain.from_iterable(self.written[block] for block in one.blocks if block in self.written)
        return list(itertools.islice(held, one.position + count))

    def _write(self, one: Work) -> None:
        for at, token in enumerate(one.tokens, one.position):
            self.written.setdefault(one.blocks[at // BLOCK], [0] * BLOCK)[at % BLOCK] = token

    def copy(self, copy: Copy) -> None:
        self._here()
        self.written[copy.target] = self.written[copy.source][: copy.tokens] + [0] * (BLOCK - copy.tokens)

    def clear(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.written.pop(block, None)

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
    return hash(tuple(tokens)) % 96 + 1


def continuation(prompt: Sequence[int], count: int) -> list[int]:
    """What a request for `count` tokens gets, alone or in any company."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(following(tokens))
    return tokens[len(prompt) :]
