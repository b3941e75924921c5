"""The KV's memory: what is committed, written, copied and cleared, and what a token sees of it."""

from __future__ import annotations

import random

import psutil
import pytest
import torch
from torch import Tensor

from model.engine.blocks import BLOCK, Copy, blocks_for
from model.engine.scheduler import Work
from model.runtime.attention import attend_by_definition
from model.runtime.kv import Batch, BlockCache, KvBlocks, KvShape

SMALL = KvShape(2, 2, 4, torch.float32)


def numbered(kernels: bool) -> KvBlocks:
    """Four blocks and block 0, no two numbers of which are the same."""
    kv = KvBlocks(SMALL, 4, "cpu", kernels)
    for number, tensor in enumerate((*kv.keys, *kv.values)):
        tensor.copy_(torch.arange(tensor.numel()).view_as(tensor) + number * tensor.numel())
    return kv


def by_token(kv: KvBlocks, kernels: bool) -> Tensor:
    """A copy of all KV, [tensors, blocks, BLOCK, heads, d] in either layout."""
    found = torch.stack([*kv.keys, *kv.values])
    return found.transpose(2, 3).clone() if kernels else found


@pytest.mark.parametrize("kernels", [False, True])
def test_memory_follows_what_is_written_in_small_pages(kernels: bool) -> None:
    """A prompt's first token, in huge pages, waited a quarter of a second for memory that it did not need."""
    kv, process = KvBlocks(KvShape(30, 3, 64, torch.bfloat16), 512, "cpu", kernels), psutil.Process()
    before = process.memory_info().rss
    for block in (1, 161, 512):
        for tensor in (*kv.keys, *kv.values):
            first = tensor[block].narrow(1 if kernels else 0, 0, 60)
            assert not first.any()
            first.fill_(1)
    assert kv.bytes == 30 * 2 * 512 * BLOCK * 3 * 64 * 2
    assert process.memory_info().rss - before < 24 << 20  # 3 blocks with 60 tokens are 4 MB


def test_each_kind_of_attention_has_its_layout_and_block_0_beside_the_others() -> None:
    shape = KvShape(3, 2, 8, torch.bfloat16)
    assert [tensor.shape for tensor in KvBlocks(shape, 4, "meta", kernels=True).keys] == [(5, 2, BLOCK, 8)] * 3
    assert [tensor.shape for tensor in KvBlocks(shape, 4, "meta", kernels=False).values] == [(5, BLOCK, 2, 8)] * 3


def test_a_batch_tells_of_each_token_where_it_belongs() -> None:
    """A token alone, several of one sequence over a block's border, and a table longer than the others."""
    work = [Work(3, [7], 0, [4]), Work(0, [8, 9, 10], BLOCK - 2, [5, 2]), Work(1, [11], 2 * BLOCK + 9, [6, 1, 3])]
    batch = Batch.of(work)
    id, position, row, sequence = batch.tokens.tolist()
    assert id == [7, 8, 9, 10, 11] and row == [3, 0, 0, 0, 1] and sequence == [0, 1, 1, 1, 2]
    assert position == [0, BLOCK - 2, BLOCK - 1, BLOCK, 2 * BLOCK + 9]
    assert batch.tables.tolist() == [[4, 0, 0], [5, 2, 0], [6, 1, 3]]
    assert batch.spans.tolist() == [[0, 1, 4, 5], [1, BLOCK + 1, 2 * BLOCK + 10, 0]] and batch.longest == 3
    assert (batch.tokens.dtype, batch.tables.dtype, batch.spans.dtype) == (torch.int64, torch.int32, torch.int32)
    assert batch.places.tolist() == [4 * BLOCK, 6 * BLOCK - 2, 6 * BLOCK - 1, 2 * BLOCK, 3 * BLOCK + 9]


def test_a_batch_is_filled_up_with_what_has_no_token_and_no_block() -> None:
    work = [Work(0, [8, 9], 3, [5]), Work(4, [0], 0, [0])]  # the second is nobody's token
    small, padded = Batch.of(work), Batch.of(work, sequences=4, blocks=3)
    assert padded.tables.tolist() == [[5, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert padded.spans.tolist() == [[0, 2, 3, 3, 3], [5, 1, 0, 0, 0]] and padded.longest == 2
    assert torch.equal(padded.tokens, small.tokens) and torch.equal(padded.places, small.places)
    assert padded.places.tolist() == [5 * BLOCK + 3, 5 * BLOCK + 4, 0]


def test_tokens_are_written_where_their_blocks_are_and_nowhere_else() -> None:
    """Tables in random order; nobody's tokens, of which there may be several, write to block 0 alone."""
    kv, work = numbered(False), [Work(0, [1, 2, 3, 4], BLOCK - 2, [3, 1]), Work(1, [5], 7, [4])]
    want, nobody = by_token(kv, False), [Work(4, [0], 0, [0])] * 2
    batch, new = Batch.of([*work, *nobody]), -torch.arange(1.0, 57).view(1, 2, 7, 4)  # [1, heads, n, d]
    keys, values = BlockCache(kv.tensors, batch.places).update(new, new - 100, 1)
    assert keys is kv.keys[1] and values is kv.values[1]
    for at, (block, place) in enumerate([(3, BLOCK - 2), (3, BLOCK - 1), (1, 0), (1, 1), (4, 7)]):
        want[1, block, place], want[3, block, place] = new[0, :, at], new[0, :, at] - 100
    found = by_token(kv, False)
    assert torch.equal(found[:, 1:], want[:, 1:]) and torch.equal(found[:, 0, 1:], want[:, 0, 1:])
    assert torch.equal(found[[0, 2]], want[[0, 2]])  # and no other layer


def test_what_is_written_has_the_dtype_of_the_blocks() -> None:
    kv = KvBlocks(KvShape(1, 2, 4, torch.bfloat16), 1, "cpu", kernels=False)
    new = torch.full((1, 2, 1, 4), 1 / 3)
    keys, _ = BlockCache(kv.tensors, Batch.of([Work(0, [1], 9, [1])]).places).update(new, new, 0)
    assert torch.equal(keys[1, 9], new[0, :, 0].bfloat16())


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("tokens", [1, 100, BLOCK])
def test_the_first_tokens_of_a_block_are_copied_and_no_more(tokens: int, kernels: bool) -> None:
    kv = numbered(kernels)
    want = by_token(kv, kernels)
    want[:, 1, :tokens] = want[:, 4, :tokens]
    kv.copy(Copy(source=4, target=1, tokens=tokens))
    assert torch.equal(by_token(kv, kernels), want)


@pytest.mark.parametrize("kernels", [False, True])
def test_cleared_blocks_are_zeros_whatever_was_there_and_the_others_untouched(kernels: bool) -> None:
    kv = numbered(kernels)
    want = by_token(kv, kernels)
    want[:, [1, 3]] = 0
    for tensor in (*kv.keys, *kv.values):
        tensor[3] = torch.nan
    kv.clear([3, 1])
    assert torch.equal(by_token(kv, kernels), want)
    kv.clear([])
    assert torch.equal(by_token(kv, kernels), want)


def attention(q: Tensor, keys: Tensor, values: Tensor, work: list[Work]) -> Tensor:
    """q [n, heads, d] by the textbook, a token at a time, in float64."""
    rows, n = [], iter(q.double())
    for one in work:
        mine = (side[one.blocks].flatten(0, 1).double() for side in (keys, values))
        k, v = (side.repeat_interleave(q.shape[1] // keys.shape[2], 1) for side in mine)
        for last, _ in enumerate(one.tokens, one.position):
            seen = torch.softmax(torch.einsum("hd,thd->ht", next(n), k[: last + 1]) / 2, -1)
            rows.append(torch.einsum("ht,thd->hd", seen, v[: last + 1]))
    return torch.stack(rows).float()


@pytest.mark.parametrize("padding", [0, 3])
def test_a_token_sees_its_own_sequence_up_to_itself(padding: int) -> None:
    """Whole prompts, guesses and single tokens, beside nobody's tokens and empty sequences; blocks in random order."""
    torch.manual_seed(0)
    chance = random.Random(0)
    lengths = [(0, 40), (BLOCK - 3, 8), (2 * BLOCK, 1), (0, BLOCK + 1), (BLOCK - 1, 1)]  # (position, tokens)
    free = iter(chance.sample(range(1, 20), 19))
    work = [
        Work(row, [0] * count, position, [next(free) for _ in range(blocks_for(position + count))])
        for row, (position, count) in enumerate(lengths)
    ]
    work += [Work(5, [0], 0, [0])] * padding
    keys, values = (torch.randn(20, BLOCK, 2, 8) for _ in range(2))
    for block in free:  # nobody holds these
        keys[block], values[block] = torch.nan, torch.nan
    batch = Batch.of(work, sequences=12, blocks=4)
    q = torch.randn(batch.tokens.shape[1], 6, 8)
    got = attend_by_definition(
        q, keys, values, batch.spans[0], None, batch.longest, 4 * BLOCK, scale=0.5, window_size=(-1, 0),
        enable_gqa=True, seqused_k=batch.spans[1, :-1], block_table=batch.tables, num_splits=1,
    )  # fmt: skip
    torch.testing.assert_close(got, attention(q, keys, values, work))
