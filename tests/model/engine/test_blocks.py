"""KV blocks: who holds which, what is found again, and that nobody ever reads another's, against a slow model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from model.engine.blocks import BLOCK, BlockPool, Table, blocks_for

TEXT = list(range(3 * BLOCK))


def begun(pool: BlockPool, owner: str, tokens: list[int]) -> Table:
    found = pool.begin(owner, tokens)
    assert found
    table, _ = found
    pool.write(table, tokens[table.computed :])
    return table


def reused(pool: BlockPool, owner: str, tokens: list[int]) -> int:
    found = pool.begin(owner, tokens)
    assert found
    computed = found[0].computed
    pool.release(found[0])
    return computed


def test_blocks_run_out_and_come_back() -> None:
    pool = BlockPool(3)
    table = begun(pool, "a", TEXT[:300])
    assert pool.free == 1 and table.indices == [1, 2]
    assert pool.begin("b", TEXT[:300]) is None and pool.free == 1
    assert pool.begin("b", TEXT[:10], spare=1) is None
    pool.release(table)
    assert pool.free == 3 and pool.begin("b", TEXT)


def test_a_block_that_is_full_is_shared_by_those_who_run_and_those_who_ended() -> None:
    pool = BlockPool(6)
    first = begun(pool, "a", TEXT[:300])
    found = pool.begin("a", [*TEXT[:260], 9, 9])
    assert found and found[0].computed == 260
    second, copy = found
    assert second.indices[0] == first.indices[0] and copy and copy.tokens == 4
    assert (copy.source, copy.target) == (first.indices[1], second.indices[1])
    pool.release(first)
    assert pool.free == 4  # the shared one is still held
    assert reused(pool, "a", [*TEXT[:300], 9]) == 300


def test_a_text_that_goes_on_takes_over_its_last_block_without_a_copy() -> None:
    pool = BlockPool(2)
    pool.release(begun(pool, "a", TEXT[:100]))
    found = pool.begin("a", TEXT[:110])
    assert found and found[1] is None and found[0].computed == 100 and pool.free == 1


@pytest.mark.parametrize("length", [1, 50, BLOCK, BLOCK + 1, 2 * BLOCK])
def test_at_least_the_last_token_is_computed_again(length: int) -> None:
    pool = BlockPool(4)
    pool.release(begun(pool, "a", TEXT[:length]))
    assert reused(pool, "a", TEXT[:length]) == length - 1


@pytest.mark.promise("P19", injected="the same tokens from another owner", counted="of a block, and of its beginning")
def test_nothing_is_shared_between_owners(counted: Callable[..., None]) -> None:
    pool = BlockPool(8)
    held = begun(pool, "a", TEXT[:600])
    pool.release(begun(pool, "a", TEXT[:300]))
    shared = [reused(pool, owner, TEXT[:500]) for owner in ("b", "A", "", "a")]
    counted(tokens_reused_by_others=sum(shared[:3]), tokens_reused_by_the_owner=shared[3])
    assert shared == [0, 0, 0, 499] and held.computed == 600


def test_spoiled_kv_is_never_found_again() -> None:
    pool = BlockPool(4)
    table = begun(pool, "a", TEXT[:300])
    indices = table.indices
    assert sorted(pool.release(table, keep=False)) == indices and reused(pool, "a", TEXT[:300]) == 0


def test_the_least_recently_used_gives_way_and_its_end_before_its_beginning() -> None:
    pool = BlockPool(4)
    for owner in ("a", "b", "a"):  # a's blocks change hands whole the second time
        pool.release(begun(pool, owner, TEXT[: 2 * BLOCK - 1 - (owner == "b")]))
    pool.release(begun(pool, "c", TEXT[:5]))
    assert [len(pool._after[block.chain]) and len(block.tokens) for block in pool._idle] == [256, 255, 256, 5]
    assert reused(pool, "a", TEXT[: 2 * BLOCK]) == 2 * BLOCK - 1
    assert reused(pool, "b", TEXT[: 2 * BLOCK]) == BLOCK


@dataclass(eq=False)
class Held:
    """What the slow model knows of a sequence."""

    owner: str
    tokens: list[int]
    table: Table
    kv: dict[int, tuple[str, tuple[int, ...]]] = field(default_factory=dict)


class Schedules(RuleBasedStateMachine):
    """Random schedules over a memory that remembers, for each place, whose and which text its KV was computed from."""

    running = Bundle("running")

    @initialize(blocks=st.integers(1, 7))
    def make(self, blocks: int) -> None:
        self.pool = BlockPool(blocks)
        self.memory: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}  # (block, place) -> owner, text so far
        self.held: list[Held] = []

    @rule(
        target=running, owner=st.sampled_from("ab"), beginning=st.sampled_from([0, 3, 250, 256, 300, 512, 600]),
        end=st.lists(st.integers(0, 1), min_size=1, max_size=4), length=st.sampled_from([1, 5, 256, 280]),
        spare=st.integers(0, 2),
    )  # fmt: skip
    def begin(self, owner: str, beginning: int, end: list[int], length: int, spare: int) -> object:
        tokens = [*[7] * beginning, *(end * length)[:length]]
        free = self.pool.free
        found = self.pool.begin(owner, tokens, spare)
        if found is None:
            assert self.pool.free == free < blocks_for(len(tokens)) + spare
            return multiple()
        table, copy = found
        if copy:
            for place in range(copy.tokens):
                self.memory[copy.target, place] = self.memory[copy.source, place]
        assert table.computed < len(tokens) <= len(table.blocks) * BLOCK and self.pool.free >= spare
        held = Held(owner, tokens, table)
        self.held.append(held)
        for at in range(table.computed):  # what is reused was computed from this very text, for this owner
            assert self.read(held, at) == (owner, tuple(tokens[: at + 1]))
        return held

    @rule(held=running, count=st.integers(1, 300))
    def compute(self, held: Held, count: int) -> None:
        part = held.tokens[held.table.computed :][:count]
        for at, _ in enumerate(part, held.table.computed):
            self.memory[self.place(held, at)] = (held.owner, tuple(held.tokens[: at + 1]))
        self.pool.write(held.table, part)

    @rule(held=running, token=st.integers(0, 1), count=st.integers(1, 300))
    def grow(self, held: Held, token: int, count: int) -> None:
        more = len(held.tokens) - held.table.computed + count
        if self.pool.grow(held.table, more):
            held.tokens += [token] * count

    @rule(held=consumes(running), keep=st.booleans())
    def release(self, held: Held, keep: bool) -> None:
        for block in self.pool.release(held.table, keep=keep):
            for place in range(BLOCK):
                self.memory.pop((block, place), None)
        self.held.remove(held)

    @invariant()
    def nothing_is_lost_or_owned_twice(self) -> None:
        if not hasattr(self, "pool"):
            return
        indices = [block.index for held in self.held for block in held.table.blocks]
        assert self.pool.free + len(set(indices)) == self.pool.count and 0 not in indices
        for held in self.held:
            for at in range(0, held.table.computed, 37):
                assert self.read(held, at) == (held.owner, tuple(held.tokens[: at + 1]))

    def place(self, held: Held, at: int) -> tuple[int, int]:
        return held.table.indices[at // BLOCK], at % BLOCK

    def read(self, held: Held, at: int) -> tuple[str, tuple[int, ...]]:
        return self.memory[self.place(held, at)]


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
