"""The model's forward pass over KV slots: plain functions of tensors, run as they are or compiled."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from model.runtime.kv import SlotCache
from model.runtime.sampler import Rows, choose

Step = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def through_layers(
    layers: nn.ModuleList, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, keys: list[torch.Tensor],
    values: list[torch.Tensor], slot: torch.Tensor, position: torch.Tensor, last: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """What this project's kernels make of tokens of any slots, one a row: x float32 [n, hidden] -> the same shape.

    slot, position: int64 [n], where a row's KV is written; last: int64 [n], the last column that it sees. Changes
    nothing else, so that it can be tried again.
    """
    for layer, key, value in zip(layers, keys, values, strict=True):
        x = layer(x, cos, sin, key, value, slot, position, last)
    return x


def make_step(columns: int) -> Step:
    """The decode step of transformers' modules and PyTorch's attention over `columns` columns.

    step(model, keys, values, *rows) -> tokens int64 [rows], finite bool [rows], logits float32 [rows, vocabulary].
    Writes one token's KV a row and changes nothing else, so that it can be tried again.
    """

    def step(
        model: nn.Module, keys: list[torch.Tensor], values: list[torch.Tensor], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = Rows(*tensors)
        positions = rows.position[:, None]
        cache = SlotCache((keys, values), 0, positions, columns)
        logits = model.lm_head(hidden(model, cache, rows.ids, positions))[:, -1].float()
        return choose(logits, rows), logits.isfinite().all(-1), logits

    return step


def hidden(model: nn.Module, cache: SlotCache, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The last hidden state of transformers' modules, [rows, n, hidden], after ids at positions, both [rows, n]."""
    state: torch.Tensor = model.model(
        input_ids=ids, position_ids=positions, past_key_values=cache, attention_mask=cache.mask(), use_cache=True
    ).last_hidden_state
    return state


def advance(rows: Rows, tokens: torch.Tensor, finite: torch.Tensor) -> None:
    """Make each active, finite row's new token its next input, seen from now on."""
    moving = rows.active & finite
    rows.ids.copy_(torch.where(moving, tokens, rows.ids[:, 0])[:, None])
    rows.position.add_(moving)
    rows.seen.scatter_(1, rows.ids, rows.seen.gather(1, rows.ids) | moving[:, None])
