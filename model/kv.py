"""The KV tensors, in pages, and the cache objects through which transformers' models write to them.

Does not know who owns a slot (see slots.py), nor when a token is valid: the attention mask says that.

One tensor a layer and side, `[page, slot, kv_heads, PAGE, head_dim]`: a slice in the two leading dimensions is
contiguous, so that every batch and length bucket reads the same memory without a copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PretrainedConfig

PAGE = 256  # tokens; smaller pages cost more bmm calls a step, larger ones read more unused columns
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
    memory follows the tokens really held. On CUDA a row is one page as long as the context, and taken at once.
    """

    def __init__(self, shape: KvShape, slots: int, context: int, device: str) -> None:
        self.size = PAGE if device == "cpu" else context
        self.pages = -(-context // self.size)
        self.shape = shape
        dimensions = (self.pages, slots, shape.kv_heads, self.size, shape.head_dim)
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
        pages = -(-tokens // self.size)
        for tensor in (*self.keys, *self.values):
            kept = tensor[:pages, a].clone()
            tensor[:pages, a] = tensor[:pages, b]
            tensor[:pages, b] = kept

    def clear(self, slot: int) -> None:
        """Zero a slot whose numbers went wrong: a masked NaN is still NaN."""
        for tensor in (*self.keys, *self.values):
            tensor[:, slot] = 0


def _zeros(dimensions: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Zeros: a masked column's KV is multiplied all the same, and NaN times zero is NaN."""
    if device != "cpu":
        return torch.zeros(dimensions, dtype=dtype, device=device)
    words = {2: np.int16, 4: np.int32}[dtype.itemsize]
    return torch.from_numpy(np.zeros(dimensions, words)).view(dtype)  # numpy's zeros are calloc's: committed lazily


class TokenCache:
    """transformers' cache for tokens of any slots, one a row: a decode step, or the chunks of several prompts.

    slot, position: int64 [rows], where a row's KV goes; last: int64 [rows], the last column that it reads.
    """

    is_compileable = True

    def __init__(
        self, kv: Tensors, slot: torch.Tensor, position: torch.Tensor, last: torch.Tensor | None = None
    ) -> None:
        self.keys, self.values = kv
        self.slot, self.position, self.last = slot, position, position if last is None else last

    def mask(self) -> torch.Tensor:
        """int64 [rows, 1, 1, 2]: slot and last column."""
        return torch.stack([self.slot, self.last], -1)[:, None, None]

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """key, value [rows, kv_heads, 1, d] -> this layer's pages, all of them."""
        keys, values = self.keys[layer], self.values[layer]
        size = keys.shape[3]
        page, offset = self.position // size, self.position % size
        keys[page, self.slot, :, offset] = key[:, :, 0].to(keys.dtype)
        values[page, self.slot, :, offset] = value[:, :, 0].to(values.dtype)
        return keys, values

    def get_seq_length(self, *_: object) -> int:
        return 0


class BatchCache(TokenCache):
    """As TokenCache, for one decode step over the first slots, and PyTorch's own attention over `pages` pages."""

    def __init__(self, kv: Tensors, position: torch.Tensor, pages: int) -> None:
        super().__init__(kv, torch.arange(position.shape[0], device=position.device), position)
        self.pages = pages

    def mask(self) -> torch.Tensor:
        """Additive, float32 [rows, 1, 1, pages * size]."""
        columns = torch.arange(self.pages * self.keys[0].shape[3], device=self.position.device)
        return torch.where(columns[None] <= self.position[:, None], 0.0, _MASKED)[:, None, None]

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """key, value [rows, kv_heads, 1, d] -> pages [pages, rows, kv_heads, size, d]."""
        keys, values = super().update(key, value, layer)
        count = self.position.shape[0]
        return keys[: self.pages, :count], values[: self.pages, :count]


class ChunkCache:
    """transformers' cache for one prefill chunk by PyTorch's own attention: n tokens of a slot, from `start` on."""

    is_compileable = False

    def __init__(self, kv: KvPages, slot: int, start: int, n: int) -> None:
        self.kv, self.slot, self.start, self.end = kv, slot, start, start + n

    def mask(self) -> torch.Tensor:
        """Additive, float32 [1, 1, n, columns]."""
        device = self.kv.keys[0].device
        columns = torch.arange(-(-self.end // self.kv.size) * self.kv.size, device=device)
        positions = torch.arange(self.start, self.end, device=device)
        return torch.where(columns[None] <= positions[:, None], 0.0, _MASKED)[None, None]

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """key, value [1, kv_heads, n, d] -> pages [pages, 1, kv_heads, size, d]."""
        return self._write(self.kv.keys[layer], key), self._write(self.kv.values[layer], value)

    def _write(self, pages: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        size, done = self.kv.size, 0
        while (position := self.start + done) < self.end:
            page, offset = divmod(position, size)
            n = min(size - offset, self.end - position)
            pages[page, self.slot, :, offset : offset + n] = new[0, :, done : done + n]
            done += n
        return pages[: -(-self.end // size), self.slot : self.slot + 1]

    def get_seq_length(self, *_: object) -> int:
        return self.start
