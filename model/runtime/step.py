"""The model's forward pass over KV slots, and the decode step that is run as it is or compiled.

Plain functions of tensors: owns no slot, no bucket and no compiler.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from model.runtime.kv import BatchCache, ChunkCache, TokenCache
from model.runtime.sampler import Rows, choose, choose_soundly

Step = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def make_step(pages: int | None) -> Step:
    """The decode step as a plain function: run as it is, or compiled for one bucket.

    pages: how many PyTorch's own attention goes over; None for this project's kernels, whose attention follows each
    row's length.
    step(model, keys, values, *rows) -> tokens int64 [rows], finite bool [rows], logits float32 [rows, vocabulary].
    Writes one token's KV a row and changes nothing else, so that it can be tried again.
    """

    def step(
        model: nn.Module, keys: list[torch.Tensor], values: list[torch.Tensor], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = Rows(*tensors)
        if pages is None:
            slot = torch.arange(rows.position.shape[0])
            cache = TokenCache((keys, values), slot, rows.position, torch.where(rows.active, rows.position, 0))
        else:
            cache = BatchCache((keys, values), rows.position, pages)
        logits = model.lm_head(hidden(model, cache, rows.ids, rows.position[:, None]))[:, -1].float()
        if pages is None:
            return *choose_soundly(logits, rows), logits
        return choose(logits, rows), logits.isfinite().all(-1), logits

    return step


def prefill(
    model: nn.Module,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    ids: torch.Tensor,
    slot: torch.Tensor,
    position: torch.Tensor,
) -> torch.Tensor:
    """Write the KV of tokens of any slots, all int64 [n]; whether each one's last hidden state is finite, bool [n].

    By this project's kernel, and as a plain function too: may be repeated, and is compiled once for every n above 1.
    """
    cache = TokenCache((keys, values), slot, position)
    return hidden(model, cache, ids[:, None], position[:, None]).isfinite().all(-1)[:, 0]


def hidden(
    model: nn.Module, cache: TokenCache | BatchCache | ChunkCache, ids: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """The last hidden state, [rows, n, hidden], after ids at positions, both int64 [rows, n]."""
    state: torch.Tensor = model.model(
        input_ids=ids, position_ids=positions, past_key_values=cache, attention_mask=cache.mask(), use_cache=True
    ).last_hidden_state
    return state


def advance_by_kernel(rows: Rows, tokens: torch.Tensor, finite: torch.Tensor) -> None:
    """As `advance`, in one call; it tells by the token which row is finite."""
    torch.ops.slots.advance(rows.ids, rows.position, rows.active, rows.seen, tokens)


def advance(rows: Rows, tokens: torch.Tensor, finite: torch.Tensor) -> None:
    """Make each active, finite row's new token its next input, seen from now on."""
    moving = rows.active & finite
    rows.ids.copy_(torch.where(moving, tokens, rows.ids[:, 0])[:, None])
    rows.position.add_(moving)
    rows.seen.scatter_(1, rows.ids, rows.seen.gather(1, rows.ids) | moving[:, None])
