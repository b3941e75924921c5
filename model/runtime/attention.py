"""The attention of transformers' models over blocks of KV: PyTorch's FlashAttention, or its definition on a CPU."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from model.engine.blocks import BLOCK, blocks_for
from model.engine.scheduler import Work
from model.runtime.kv import Batch

ATTENTION = "blocks"
# Parts in which one token's columns are read side by side: its few heads alone leave most of a GPU idle. For several
# sequences PyTorch 2.13 leaves rows unwritten then (pytorch/pytorch issue 194167), and where it chooses the number by
# itself it has given NaN (pytorch/torchtitan issue 3235).
_SPLITS_ALONE = 8

# What transformers' models hand over beside the tensors, and the only values understood here.
_INERT = {"dropout": (0.0, 0, None), "sliding_window": (None,), "softcap": (None,), "s_aux": (None,)}
_PASSED = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "is_causal"}


def block_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float, batch: Batch,
    **arguments: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """query [1, heads, n, d]; key, value [blocks, BLOCK, kv_heads, d], n tokens of `batch` -> [1, n, heads, d].

    Raises ValueError for an argument it does not understand, which fails the load (the loader runs one step), so that
    no window or soft cap is ever dropped in silence.
    """
    refuse_unknown(arguments)
    out = _attended(varlen_attn if query.is_cuda else attend_by_definition, query, key, value, scaling, batch)
    return out[None], None


def _attended(
    attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, scaling: float, batch: Batch
) -> Tensor:
    sequences, blocks = batch.tables.shape
    return attend(
        query[0].transpose(0, 1).contiguous(), key, value, batch.spans[0], None, batch.longest, blocks * BLOCK,
        scale=scaling, window_size=(-1, 0), enable_gqa=True, seqused_k=batch.spans[1, :-1], block_table=batch.tables,
        num_splits=_SPLITS_ALONE if sequences == batch.longest == 1 else 1,
    )  # fmt: skip


def verify(heads: int, keys: Tensor, attend: Callable[..., Tensor] = varlen_attn) -> None:
    """Raise ValueError unless `attend` computes what attention is for tensors like `keys` [blocks, BLOCK, kv_heads, d].

    Alone, several at once, and several tokens of one: FlashAttention over blocks had faults in each (see above).
    """
    noise = torch.Generator(keys.device).manual_seed(0)
    key, value = (torch.randn(5, *keys.shape[1:], generator=noise, device=keys.device).to(keys.dtype) for _ in range(2))
    one, other = Work(0, [0], 700, [4, 1, 2]), Work(0, [0], 300, [2, 3])
    for work in ([one], [one, other], [one._replace(tokens=[0] * 5), other]):
        batch = Batch.of(work).to(str(keys.device))
        shape = 1, heads, batch.tokens.shape[1], keys.shape[3]
        query = torch.randn(shape, generator=noise, device=keys.device).to(keys.dtype)
        got, want = (_attended(how, query, key, value, 0.1, batch) for how in (attend, attend_by_definition))
        if not torch.allclose(got.float(), want.float(), atol=0.02, rtol=0.02):
            raise ValueError("FlashAttention of this PyTorch computes wrong numbers on this GPU")


def attend_by_definition(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: None, max_q: int, max_k: int, *,
    scale: float, window_size: tuple[int, int], enable_gqa: bool, seqused_k: Tensor, block_table: Tensor,
    num_splits: int,
) -> Tensor:  # fmt: skip
    """What varlen_attn computes of causal, grouped heads over blocks, where there is no FlashAttention.

    query [n, heads, d]; key, value [blocks, BLOCK, kv_heads, d]; cu_seq_q int32 [sequences + 1]; seqused_k int32
    [sequences]; block_table int32 [sequences, most blocks] -> [n, heads, d].
    """
    return torch.ops.blocks.attend(query, key, value, cu_seq_q, seqused_k, block_table, scale)


@torch.library.custom_op("blocks::attend", mutates_args=())
def _attend(q: Tensor, keys: Tensor, values: Tensor, begins: Tensor, lengths: Tensor, tables: Tensor,
            scale: float) -> Tensor:  # fmt: skip
    out = torch.zeros_like(q)
    for index, (begin, end, length) in enumerate(
        zip(begins[:-1].tolist(), begins[1:].tolist(), lengths.tolist(), strict=True)
    ):
        if begin == end:
            continue
        held = tables[index, : blocks_for(length)]
        k, v = (side[held].flatten(0, 1)[:length].transpose(0, 1)[None] for side in (keys, values))
        mine, mask = q[begin:end].transpose(0, 1)[None], causal_lower_right(end - begin, length)
        made = functional.scaled_dot_product_attention(mine, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
        out[begin:end] = made[0].transpose(0, 1)
    return out


@_attend.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q)


def refuse_unknown(arguments: dict[str, object]) -> None:
    """Raise ValueError for an attention argument whose meaning would be lost."""
    for name, value in arguments.items():
        if name not in _PASSED and (name not in _INERT or value not in _INERT[name]):
            raise ValueError(f"attention argument {name}={value!r} is not supported")


AttentionInterface.register(ATTENTION, block_attention)
