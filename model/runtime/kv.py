"""The KV tensors, in pages, and the cache objects through which transformers' models write to them.

Does not know who owns a slot (see slots.py), nor when a token is valid: the attention mask says that.

One tensor a layer and side, `[page, slot, kv_heads, size, head_dim]`: every batch and length bucket is a view of it.
On a CPU a page has PAGE tokens, so that such a view is contiguous, as fast products want it. On CUDA a slot is one page
as long as the context, and a view ends after any column.
"""

from __future__ import annotations

import math
import mmap
from contextlib import suppress
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

PAGE = 256  # tokens, the unit of length buckets; smaller ones cost more bmm calls a step, larger ones read more unused
_MASKED = -1e9  # added to the scores of columns not to be seen; not -inf, since an idle row may see no column at all

Tensors = tuple[list[torch.Tensor], list[torch.Tensor]]  # keys and values, one of each a layer


@dataclass(frozen=True, slots=True)
class KvShape:
    """What one token's KV takes, read from a transformers config."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, config: PretrainedConfig, dtype: torch.dtype) -> KvShape:
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, head_dim, dtype)

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize


class KvPages:
    """Keys and values of `slots` rows of up to `context` tokens each.

    On a CPU the memory is only reserved: the system commits a page of it when it is first written, so that resident
    memory follows the tokens really held. On CUDA it is taken at once. pages: the context in units of PAGE.
    """

    def __init__(self, shape: KvShape, slots: int, context: int, device: str) -> None:
        self.pages = pages_for(context)
        self.whole = device != "cpu"  # a slot is one page
        self.shape = shape
        pages, size = (1, self.pages * PAGE) if self.whole else (self.pages, PAGE)
        dimensions = (pages, slots, shape.kv_heads, size, shape.head_dim)
        self.keys = [_zeros(dimensions, shape.dtype, device) for _ in range(shape.layers)]
        self.values = [_zeros(dimensions, shape.dtype, device) for _ in range(shape.layers)]

    @property
    def tensors(self) -> Tensors:
        return self.keys, self.values

    @property
    def bytes(self) -> int:
        """Bytes of all tensors, committed or not."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def swap(self, a: int, b: int, tokens: int) -> None:
        """Exchange the first `tokens` positions of two slots."""
        for tensor in (*self.keys, *self.values):
            first, second = columns_of(tensor, a, tokens), columns_of(tensor, b, tokens)
            kept = first.clone()
            first.copy_(second)
            second.copy_(kept)

    def clear(self, slot: int) -> None:
        """Zero a slot whose numbers went wrong: a masked NaN is still NaN."""
        for tensor in (*self.keys, *self.values):
            tensor[:, slot] = 0


def pages_for(tokens: int) -> int:
    """How many times PAGE holds so many tokens."""
    return -(-tokens // PAGE)


def columns_of(tensor: torch.Tensor, slots: int | slice, columns: int) -> torch.Tensor:
    """The first `columns` columns of some slots, a view: [pages, slots, kv_heads, size, d].

    Of several pages all are whole: `columns` is rounded up to the next.
    """
    size = tensor.shape[3]
    return tensor[: -(-columns // size), slots, :, : min(columns, size)]


def _zeros(dimensions: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Zeros: a masked column's KV is multiplied all the same, and NaN times zero is NaN."""
    if device != "cpu":
        return torch.zeros(dimensions, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(dimensions) * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # In huge pages, which numpy asks for, a prompt's first token touched 60 MB in a quarter of a second; in small ones
    # it takes 3 ms.
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(dimensions)


class TokenCache:
    """What this project's kernel writes and reads, for tokens of any slots, one a row: a step, or prompts' chunks.

    slot, position: int64 [rows], where a row's KV goes; last: int64 [rows], the last column that it reads.
    """

    is_compileable = True

    def __init__(
        self, kv: Tensors, slot: torch.Tensor, position: torch.Tensor, last: torch.Tensor | None = None
    ) -> None:
        self.keys, self.values = kv
        self.slot, self.position, self.last = slot, position, position if last is None else last

    def mask(self) -> torch.Tensor:
        """Stands for a mask, or transformers would make one: the kernel goes by `last`."""
        return self.last[:, None, None, None]

    def get_seq_length(self, *_: object) -> int:
        return 0


class BatchCache:
    """transformers' cache for one decode step over the first slots, by PyTorch's own attention over `pages` pages."""

    is_compileable = True

    def __init__(self, kv: Tensors, position: torch.Tensor, pages: int) -> None:
        self.keys, self.values = kv
        self.slot = torch.arange(position.shape[0], device=position.device)
        self.position, self.pages = position, pages

    def mask(self) -> torch.Tensor:
        """Additive, float32 [rows, 1, 1, pages * size]."""
        columns = torch.arange(self.pages * PAGE, device=self.position.device)
        return torch.where(columns[None] <= self.position[:, None], 0.0, _MASKED)[:, None, None]

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """key, value [rows, kv_heads, 1, d] -> [pages, rows, kv_heads, size, d]."""
        keys, values = self.keys[layer], self.values[layer]
        page, offset = self.position // keys.shape[3], self.position % keys.shape[3]
        keys[page, self.slot, :, offset] = key[:, :, 0].to(keys.dtype)
        values[page, self.slot, :, offset] = value[:, :, 0].to(values.dtype)
        slots, columns = slice(len(self.slot)), self.pages * PAGE
        return columns_of(keys, slots, columns), columns_of(values, slots, columns)

    def get_seq_length(self, *_: object) -> int:
        return 0


class ChunkCache:
    """transformers' cache for one prefill chunk by PyTorch's own attention: n tokens of a slot, from `start` on."""

    is_compileable = False

    def __init__(self, kv: KvPages, slot: int, start: int, n: int) -> None:
        self.kv, self.slot, self.start, self.end = kv, slot, start, start + n
        self.columns = self.end if kv.whole else pages_for(self.end) * PAGE

    def mask(self) -> torch.Tensor:
        """Additive, float32 [1, 1, n, columns]."""
        device = self.kv.keys[0].device
        columns = torch.arange(self.columns, device=device)
        positions = torch.arange(self.start, self.end, device=device)
        return torch.where(columns[None] <= positions[:, None], 0.0, _MASKED)[None, None]

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """key, value [1, kv_heads, n, d] -> [pages, 1, kv_heads, size, d]."""
        return self._write(self.kv.keys[layer], key), self._write(self.kv.values[layer], value)

    def _write(self, pages: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        size, done = pages.shape[3], 0
        while (position := self.start + done) < self.end:
            page, offset = divmod(position, size)
            n = min(size - offset, self.end - position)
            pages[page, self.slot, :, offset : offset + n] = new[0, :, done : done + n]
            done += n
        return columns_of(pages, slice(self.slot, self.slot + 1), self.columns)

    def get_seq_length(self, *_: object) -> int:
        return self.start
