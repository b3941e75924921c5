"""The KV's memory: what is committed, written and seen."""

from __future__ import annotations

import psutil
import pytest
import torch

from model.runtime.kv import PAGE, KvPages, KvShape, SlotCache


def test_memory_follows_what_is_written_in_small_pages() -> None:
    """A prompt's first token, in huge pages, waited a quarter of a second for memory that it did not need."""
    kv, process = KvPages(KvShape(30, 3, 64, torch.bfloat16), 16, 8192, "cpu", whole=False), psutil.Process()
    before = process.memory_info().rss
    for slot in (0, 5, 15):
        for tensor in (*kv.keys, *kv.values):
            assert not tensor[0, slot, :, :60].any()
            tensor[0, slot, :, :60] = 1
    assert kv.bytes == 30 * 2 * 16 * 8192 * 3 * 64 * 2
    assert process.memory_info().rss - before < 24 << 20  # 3 slots of 60 tokens are 4 MB


def test_rows_write_where_they_are_told_and_see_no_later_column() -> None:
    kv = KvPages(KvShape(1, 2, 4, torch.float32), 4, 300, "cpu", whole=True)
    cache = SlotCache(kv.tensors, 1, torch.tensor([[5, 6], [0, 299]]), 300)
    new = torch.arange(1, 33).float().view(2, 2, 2, 4)  # [rows, heads, n, d]
    keys, values = cache.update(new, -new, 0)
    assert keys.shape == (2, 2, 300, 4) and torch.equal(values, -keys)
    assert torch.equal(keys[0, :, 5:7], new[0]) and torch.equal(keys[1][:, [0, 299]], new[1])
    assert kv.keys[0].count_nonzero() == new.numel()  # and nothing else was touched
    seen = cache.mask()[:, 0] == 0
    assert seen.sum(-1).tolist() == [[6, 7], [1, 300]] and seen[0, 0, :6].all()


def test_for_pytorchs_attention_a_slot_is_one_page() -> None:
    kv = KvPages(KvShape(1, 2, 8, torch.bfloat16), 4, 1000, "meta", whole=True)
    assert kv.columns == 4 * PAGE and kv.keys[0].shape == (1, 4, 2, 4 * PAGE, 8)


@pytest.mark.parametrize("whole", [False, True])
def test_swapping_exchanges_what_is_written(whole: bool) -> None:
    kv = KvPages(KvShape(1, 1, 4, torch.float32), 3, 4 * PAGE, "cpu", whole)
    kv.keys[0][:, 0], kv.keys[0][:, 2] = 1, 2
    kv.swap(0, 2, PAGE + 5)
    first, last = (kv.keys[0][:, slot, 0].flatten(0, 1) for slot in (0, 2))
    assert first[: PAGE + 5].eq(2).all() and last[: PAGE + 5].eq(1).all()
    assert first[2 * PAGE :].eq(1).all() and last[2 * PAGE :].eq(2).all()  # beyond what is written nothing is moved
