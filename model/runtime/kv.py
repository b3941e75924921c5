"""The KV tensors, in blocks that all sequences share, and what a batch tells of where its tokens belong.

One tensor a layer and side: `[blocks, heads, BLOCK, d]` for this project's kernels, `[blocks, BLOCK, heads, d]` for
FlashAttention. Which block is whose, engine/blocks.py says; block 0 is nobody's.
"""

import itertools
import math
import mmap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from model.engine.blocks import BLOCK, Copy
from model.engine.scheduler import Work


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


class KvBlocks:
    """Keys and values of `count` blocks, and of block 0. kernels: laid out for those.

    On a CPU the memory is only reserved: the system commits a page of it when it is first written, so that resident
    memory follows the tokens really held. On CUDA it is taken at once.
    """

    def __init__(self, shape: KvShape, count: int, device: str, kernels: bool) -> None:
        self.shape, self._along = shape, 1 if kernels else 0
        inner = (shape.kv_heads, BLOCK) if kernels else (BLOCK, shape.kv_heads)
        dimensions = (count + 1, *inner, shape.head_dim)
        self.keys = [_zeros(dimensions, shape.dtype, device) for _ in range(shape.layers)]
        self.values = [_zeros(dimensions, shape.dtype, device) for _ in range(shape.layers)]
        self.tensors = self.keys, self.values
        self.bytes = count * BLOCK * shape.bytes_per_token  # committed or not

    def copy(self, copy: Copy) -> None:
        for tensor in (*self.keys, *self.values):
            source, target = (tensor[block].narrow(self._along, 0, copy.tokens) for block in (copy.source, copy.target))
            target.copy_(source)

    def clear(self, blocks: Sequence[int]) -> None:
        """Zeros again: a masked column's KV is multiplied all the same, and NaN times zero is NaN."""
        for tensor in (*self.keys, *self.values):
            tensor[list(blocks)] = 0


def _zeros(dimensions: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    if device != "cpu":
        return torch.zeros(dimensions, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(dimensions) * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # In huge pages, which numpy asks for, a prompt's first token touched 60 MB in a quarter of a second; in small ones
    # it takes 3 ms.
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(dimensions)


class Batch(NamedTuple):
    """Tokens of several sequences, one sequence's after the other's.

    tokens: int64 [4, n], of each its id, its position, the row whose rules choose what follows, and its sequence, a
    row of `tables`. tables: int32 [sequences, most blocks], where each sequence's KV lies.
    spans: int32 [2, sequences + 1]: where each sequence's tokens begin (and where all end), and how many tokens it has,
    these included. longest: no sequence has more tokens here.
    """

    tokens: Tensor
    tables: Tensor
    spans: Tensor
    longest: int

    @classmethod
    def of(cls, work: Sequence[Work], sequences: int = 0, blocks: int = 1) -> Self:
        """On the CPU. sequences, blocks: how many there are at least, empty ones and those of nobody included."""
        width, count = max(blocks, *(len(one.blocks) for one in work)), max(sequences, len(work))
        tables = np.zeros((count, width), np.int32)
        for table, one in zip(tables, work, strict=False):
            table[: len(one.blocks)] = one.blocks
        ends = [0, *itertools.accumulate(len(one.tokens) for one in work)]
        lengths = [one.position + len(one.tokens) for one in work]
        missing = [0] * (count - len(work))
        tokens = [
            (id, at, one.row, index)
            for index, one in enumerate(work)
            for at, id in enumerate(one.tokens, one.position)
        ]  # fmt: skip
        return cls(
            torch.from_numpy(np.array(tokens).T.copy()),  # a quarter of the time that torch.tensor takes
            torch.from_numpy(tables),
            torch.from_numpy(np.array([ends + [ends[-1] for _ in missing], [*lengths, *missing, 0]], np.int32)),
            max(len(one.tokens) for one in work),
        )

    def to(self, device: str) -> Self:
        return self._replace(**{name: getattr(self, name).to(device) for name in ("tokens", "tables", "spans")})

    @property
    def places(self) -> Tensor:
        """int64 [n]: where each token's KV goes, counted in tokens over all blocks."""
        _, position, _, sequence = self.tokens
        return self.tables[sequence, position // BLOCK].long() * BLOCK + position % BLOCK


class BlockCache:
    """transformers' cache over blocks: writes each token's KV, and hands all blocks on to `attention.attend`."""

    is_compileable = True

    def __init__(self, kv: tuple[list[Tensor], list[Tensor]], places: Tensor) -> None:
        self._kv, self._places = kv, places

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """key, value [1, kv_heads, n, d] -> this layer's blocks."""
        for side, new in zip(self._kv, (key, value), strict=True):
            tensor = side[layer].flatten(0, 1)
            tensor[self._places] = new[0].transpose(0, 1).to(tensor.dtype)
        return self._kv[0][layer], self._kv[1][layer]

    def get_seq_length(self, *_: object) -> int:
        return 0
