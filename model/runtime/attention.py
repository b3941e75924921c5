"""Grouped-query attention of many slots at once, registered with transformers under the name `slots`.

Knows the layout of the KV pages and nothing of who owns them.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from model.runtime.kv import TokenCache
from model.runtime.linear import Part

NAME = "slots"

# What transformers' Llama, Qwen2 and Qwen3 hand over beside the tensors, and the only values understood here.
_INERT = {"dropout": (0.0, 0, None), "sliding_window": (None,), "softcap": (None,), "s_aux": (None,)}
_PASSED = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "is_causal"}

# PyTorch's kernels in the order in which `_fused` wants them, each where it can.
_PREFERRED = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **arguments: object,
) -> tuple[torch.Tensor, None]:
    """query [rows, heads, n, d]; key, value and attention_mask as the cache in use hands them out (kv.py).

    Returns [rows, n, heads, d]. Raises ValueError for an argument it does not understand, which fails the load (the
    loader runs one step), so that no window or soft cap is ever dropped in silence.
    """
    refuse_unknown(arguments)
    if query.is_cuda:
        return _fused(query, key, value, attention_mask, scaling), None
    return _paged(query, key, value, attention_mask, scaling), None


def refuse_unknown(arguments: dict[str, object]) -> None:
    """Raise ValueError for an attention argument whose meaning would be lost."""
    for name, value in arguments.items():
        if name not in _PASSED and (name not in _INERT or value not in _INERT[name]):
            raise ValueError(f"attention argument {name}={value!r} is not supported")


def _paged(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """One bmm a page: on a CPU, SDPA is slow for one query and bmm copies what is not contiguous."""
    rows, heads, n, d = query.shape
    pages, _, kv_heads, size, _ = key.shape
    group = heads // kv_heads
    query = query.reshape(rows * kv_heads, group * n, d)
    keys = key.reshape(pages, rows * kv_heads, size, d)
    values = value.reshape(pages, rows * kv_heads, size, d)
    scores = torch.cat([torch.bmm(query, keys[page].transpose(1, 2)) for page in range(pages)], -1)
    scores = scores.view(rows, kv_heads, group, n, pages * size).float() * scaling + mask[:, :, None]
    weights = torch.softmax(scores, -1).to(value.dtype).view(rows * kv_heads, group * n, pages * size)
    out = torch.bmm(weights[..., :size], values[0])
    for page in range(1, pages):
        out = torch.baddbmm(out, weights[..., page * size : (page + 1) * size], values[page])
    return out.view(rows, kv_heads, group, n, d).permute(0, 3, 1, 2, 4).reshape(rows, n, heads, d)


def _fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """PyTorch's own kernels, for CUDA, where a slot is one page (see kv.py).

    A chunk's last query sees every column and each one before it a column less: FlashAttention's own causal mask. For
    one query a row cuDNN comes first, for neither Flash (any mask) nor memory-efficient attention (grouped heads) takes
    it, and what is left repeats keys and values for each query head.
    """
    n, columns = query.shape[2], key.shape[3]
    bias = mask.to(query.dtype) if n == 1 else causal_lower_right(n, columns)
    with sdpa_kernel(_PREFERRED, set_priority=True):
        out = functional.scaled_dot_product_attention(
            query, key[0], value[0], attn_mask=bias, scale=scaling, enable_gqa=True
        )
    return out.transpose(1, 2).contiguous()


class SlotAttention(nn.Module):
    """The attention of transformers' Llama, Qwen2 and Qwen3 by this project's kernel, for one token a row.

    Between the products of its input and that of its output one call rotates, writes the KV and attends.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj
        self.norms = nn.ModuleList(getattr(layer, name) for name in ("q_norm", "k_norm") if hasattr(layer, name))
        self.layer, self.width, self.scaling = layer.layer_idx, layer.head_dim, layer.scaling

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: TokenCache,
        **_: object,
    ) -> tuple[torch.Tensor, None]:
        """hidden_states float32 [rows, 1, hidden] -> the same shape."""
        cache, (cos, sin) = past_key_values, position_embeddings
        out = torch.ops.slots.attend(
            self._qkv(hidden_states)[:, 0].contiguous(), cos[:, 0], sin[:, 0], cache.keys[self.layer],
            cache.values[self.layer], cache.slot, cache.position, cache.last, self.scaling,
        )  # fmt: skip
        return self.o_proj(out[:, None]), None

    def _qkv(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, 1, all heads of queries, then of keys, then of values]."""
        if isinstance(self.q_proj, Part) and not self.norms:
            whole: torch.Tensor = self.q_proj.fused(x)
            return whole
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.norms:
            q, k = (
                norm(t.unflatten(-1, (-1, self.width))).flatten(-2) for norm, t in zip(self.norms, (q, k), strict=True)
            )
        return torch.cat([q, k, v], -1)


def attend_by_kernel(model: nn.Module) -> None:
    """Replace the attention of each layer, in place. Raises ValueError for one that does more than is known here."""
    for layer in model.model.layers:
        if not isinstance(layer.self_attn, (LlamaAttention, Qwen2Attention, Qwen3Attention)):
            raise ValueError(f"{type(layer.self_attn).__name__} is not supported")
        refuse_unknown({"sliding_window": getattr(layer.self_attn, "sliding_window", None)})
        layer.self_attn = SlotAttention(layer.self_attn)


class RotaryTable(nn.Module):
    """transformers' rotary embedding of every position, looked up: a compiled step computes it anew for each head."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, rotary: nn.Module, context: int, like: torch.Tensor) -> None:
        """like: a tensor of the hidden states' dtype and device."""
        super().__init__()
        cos, sin = rotary(like, torch.arange(context, device=like.device)[None])
        self.register_buffer("cos", cos[0], persistent=False)
        self.register_buffer("sin", sin[0], persistent=False)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids int64 [rows, n] -> cosine and sine [rows, n, d] of x's dtype."""
        return self.cos[position_ids], self.sin[position_ids]


def look_up_positions(model: nn.Module, context: int, dtype: torch.dtype, device: str) -> None:
    """Let a transformers causal LM look its rotary embedding up, unless that depends on more than the position."""
    rotary = getattr(model.model, "rotary_emb", None)
    if getattr(rotary, "rope_type", "dynamic") not in ("dynamic", "longrope"):
        model.model.rotary_emb = RotaryTable(rotary, context, torch.empty(0, dtype=dtype, device=device))


AttentionInterface.register(NAME, slot_attention)
