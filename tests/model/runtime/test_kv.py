"""The KV's memory: what is committed, and the views that buckets read."""

from __future__ import annotations

import psutil
import torch

from model.runtime.kv import PAGE, KvPages, KvShape, columns_of


def test_memory_follows_what_is_written_in_small_pages() -> None:
    """A prompt's first token, in huge pages, waited a quarter of a second for memory that it did not need."""
    kv, process = KvPages(KvShape(30, 3, 64, torch.bfloat16), 16, 8192, "cpu"), psutil.Process()
    before = process.memory_info().rss
    for slot in (0, 5, 15):
        for tensor in (*kv.keys, *kv.values):
            assert not tensor[0, slot, :, :60].any()
            tensor[0, slot, :, :60] = 1
    assert kv.bytes == 30 * 2 * 16 * 8192 * 3 * 64 * 2
    assert process.memory_info().rss - before < 24 << 20  # 3 slots of 60 tokens are 4 MB


def test_a_view_has_whole_pages_or_any_columns_of_the_only_one() -> None:
    paged, whole = torch.arange(4 * 3 * PAGE).view(4, 3, 1, PAGE, 1), torch.arange(3 * 1000).view(1, 3, 1, 1000, 1)
    assert columns_of(paged, slice(2), PAGE).shape == (1, 2, 1, PAGE, 1)
    assert columns_of(paged, slice(2), PAGE + 1).shape == (2, 2, 1, PAGE, 1)
    assert columns_of(whole, slice(1, 3), 777).shape == (1, 2, 1, 777, 1)
    view = columns_of(whole, 1, 10)
    view[...] = -1
    assert whole[0, 1, 0, :10].eq(-1).all() and whole.eq(-1).sum() == 10


def test_on_a_gpu_a_slot_is_one_page() -> None:
    kv = KvPages(KvShape(1, 2, 8, torch.bfloat16), 4, 1000, "meta")
    assert kv.whole and kv.pages == 4 and kv.keys[0].shape == (1, 4, 2, 4 * PAGE, 8)


def test_swapping_exchanges_what_is_written() -> None:
    kv = KvPages(KvShape(1, 1, 4, torch.float32), 3, 4 * PAGE, "cpu")
    kv.keys[0][:, 0], kv.keys[0][:, 2] = 1, 2
    kv.swap(0, 2, PAGE + 5)
    assert kv.keys[0][:2, 0, 0, :5].eq(2).all() and kv.keys[0][:2, 2, 0, :5].eq(1).all()
    assert kv.keys[0][2:, 0].eq(1).all()  # beyond what is written nothing is moved
