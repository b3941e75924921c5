"""The KV tensors, and the cache through which transformers' models write to them.

One tensor a layer and side, `[page, slot, kv_heads, size, head_dim]`. This project's kernels take pages of PAGE tokens;
for PyTorch's attention a slot is one page as long as the context, and a view ends after any column.
"""

import math
import mmap
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from transformers import PretrainedConfig

PAGE = 256  # tokens
_MASKED = -1e9  # not -inf, of which a softmax over a row that sees nothing makes NaN


@dataclass(frozen=True, slots=True)
class KvShape:
    """What one token's KV takes, read from a transformers config."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, config: PretrainedConfig, dtype: torch.dtype) -> Self:
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, head_dim, dtype)

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize


class KvPages:
    """Keys and values of `slots` rows of up to `context` tokens each; whole: a slot is one page.

    On a CPU the memory is only reserved: the system commits a page of it when it is first written, so that resident
    memory follows the tokens really held. On CUDA it is taken at once.
    """

    def __init__(self, shape: KvShape, slots: int, context: int, device: str, whole: bool) -> None:
        self.shape = shape
        self.columns = pages_for(context) * PAGE
        pages, size = (1, self.columns) if whole else (self.columns // PAGE, PAGE)
        dimensions = (pages, slots, shape.kv_heads, size, shape.head_dim)
        self.keys = [_zeros(dimensions, shape.dtype, device) for _ in range(shape.layers)]
        self.values = [_zeros(dimensions, shape.dtype, device) for _ in range(shape.layers)]
        self.tensors = self.keys, self.values
        self.bytes = slots * self.columns * shape.bytes_per_token  # committed or not

    def swap(self, a: int, b: int, tokens: int) -> None:
        """Exchange the first `tokens` positions of two slots, rounded up to whole pages where there are several."""
        for tensor in (*self.keys, *self.values):
            size = tensor.shape[3]
            first, second = (tensor[: -(-tokens // size), slot, :, : min(tokens, size)] for slot in (a, b))
            kept = first.clone()
            first.copy_(second)
            second.copy_(kept)


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE)


def _zeros(dimensions: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Zeros: a masked column's KV is multiplied all the same, and NaN times zero is NaN."""
    if device != "cpu":
        return torch.zeros(dimensions, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(dimensions) * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # In huge pages, which numpy asks for, a prompt's first token touched 60 MB in a quarter of a second; in small ones
    # it takes 3 ms.
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(dimensions)


class SlotCache:
    """transformers' cache over whole slots: row i of the input is slot `first + i`, which sees `columns` columns.

    positions: int64 [rows, n], where each token's KV goes.
    """

    is_compileable = True

    def __init__(self, kv: tuple[list[Tensor], list[Tensor]], first: int, positions: Tensor, columns: int) -> None:
        self.keys, self.values = kv
        self.slots = slice(first, first + len(positions))
        self.slot = torch.arange(first, first + len(positions), device=positions.device)[:, None]
        self.positions, self.columns = positions, columns

    def mask(self) -> Tensor:
        """Added to the scores: [rows, 1, n, columns] in the KV's dtype, 0 where a token sees a column."""
        seen = torch.arange(self.columns, device=self.positions.device) <= self.positions[:, None, :, None]
        return torch.where(seen, 0.0, _MASKED).to(self.keys[0].dtype)

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """key, value [rows, kv_heads, n, d] -> [rows, kv_heads, columns, d]."""
        return self._write(self.keys[layer], key), self._write(self.values[layer], value)

    def _write(self, tensor: Tensor, new: Tensor) -> Tensor:
        tensor[0, self.slot, :, self.positions] = new.transpose(1, 2).to(tensor.dtype)
        return tensor[0, self.slots, :, : self.columns]

    def get_seq_length(self, *_: object) -> int:
        return 0
