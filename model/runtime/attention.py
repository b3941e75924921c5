"""Attention over slots: transformers' models by PyTorch's kernels, or whole decoder layers by this project's own."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface
from transformers.activations import SiLUActivation

from model.runtime.linear import PackedLinear, Plan, join

ATTENTION = "slots"

# What transformers' Llama, Qwen2 and Qwen3 hand over beside the tensors, and the only values understood here.
_INERT = {"dropout": (0.0, 0, None), "sliding_window": (None,), "softcap": (None,), "s_aux": (None,)}
_PASSED = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "is_causal"}
_PREFERRED = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def slot_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **arguments: object
) -> tuple[Tensor, None]:
    """query [rows, heads, n, d]; key, value, mask as SlotCache hands them out -> [rows, n, heads, d].

    Raises ValueError for an argument it does not understand, which fails the load (the loader runs one step), so that
    no window or soft cap is ever dropped in silence.

    A chunk's last query sees every column and each one before it a column less: FlashAttention's own causal mask. For
    one query a row cuDNN comes first, for neither Flash (any mask) nor memory-efficient attention (grouped heads) takes
    it, and what is left repeats keys and values for each query head.
    """
    refuse_unknown(arguments)
    n, columns = query.shape[2], key.shape[2]
    bias = mask if n == 1 else causal_lower_right(n, columns)
    with sdpa_kernel(_PREFERRED, set_priority=True):
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


def refuse_unknown(arguments: dict[str, object]) -> None:
    """Raise ValueError for an attention argument whose meaning would be lost."""
    for name, value in arguments.items():
        if name not in _PASSED and (name not in _INERT or value not in _INERT[name]):
            raise ValueError(f"attention argument {name}={value!r} is not supported")


class KernelLayer(nn.Module):
    """A decoder layer of transformers' Llama, Qwen2 or Qwen3 by this project's kernels; one call if all is packed."""

    operands: tuple[object, ...] = ()  # what slots::layer takes beside tokens and KV

    def __init__(self, layer: nn.Module, chosen: Plan) -> None:
        """Raises ValueError for a layer that does more than is known here."""
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        refuse_unknown({"sliding_window": getattr(attention, "sliding_window", None)})
        self.width, self.scaling = attention.head_dim, attention.scaling
        self.qkv = join([attention.q_proj, attention.k_proj, attention.v_proj], chosen)
        self.out = join([attention.o_proj], chosen)
        self.head_norms = nn.ModuleList(getattr(attention, n) for n in ("q_norm", "k_norm") if hasattr(attention, n))
        self.heads = [attention.q_proj.out_features, attention.k_proj.out_features, attention.v_proj.out_features]
        self.gate_up, self.down = join([mlp.gate_proj, mlp.up_proj], chosen), join([mlp.down_proj], chosen)
        self.act, self.norms = mlp.act_fn, nn.ModuleList([layer.input_layernorm, layer.post_attention_layernorm])
        joined = self.qkv, self.out, self.gate_up, self.down
        whole = all(isinstance(each, PackedLinear) for each in joined) and isinstance(self.act, SiLUActivation)
        if whole and not any(each.bias is not None for each in joined[1:]):
            weights = [*(norm.weight.data for norm in self.norms), *(each.matrix for each in joined), self.qkv.bias]
            heads = [norm.weight.data for norm in self.head_norms] or [None, None]
            self.operands = self.scaling, layer.input_layernorm.variance_epsilon, *weights, *heads

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *at: Tensor) -> Tensor:
        """x float32 [n, hidden], a token a row, of any slots -> the same shape; cos, sin float32 [n, d].

        at: this layer's keys and values; slot, position int64 [n], where a row's KV is written; last int64 [n], the
        last column that it sees. Changes nothing else, so that it can be tried again.
        """
        if self.operands:
            return torch.ops.slots.layer.default(x, cos, sin, *at, *self.operands)
        qkv = self.qkv(self.norms[0](x))
        if self.head_norms:  # Qwen3 normalises each head of queries and keys
            *parts, v = qkv.split(self.heads, -1)
            q, k = (norm(part.unflatten(-1, (-1, self.width))).flatten(-2)
                    for norm, part in zip(self.head_norms, parts, strict=True))  # fmt: skip
            qkv = torch.cat([q, k, v], -1)
        x = x + self.out(torch.ops.slots.attend(qkv, cos, sin, *at, self.scaling))
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, -1)
        return x + self.down((self.act(gate) * up).contiguous())


def use_kernels(model: nn.Module, chosen: Plan) -> None:
    """Replace the decoder layers and the head of a transformers causal LM, in place."""
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = KernelLayer(layer, chosen)
    # 7 bits wherever the body is quantised: it is too large for floats, and 4 bits cost a tenth of the perplexity.
    model.lm_head = join([model.lm_head], chosen)


class RotaryTable(nn.Module):
    """transformers' rotary embedding of every position, looked up: a compiled step computes it anew for each head."""

    def __init__(self, rotary: nn.Module, context: int, like: Tensor) -> None:
        super().__init__()
        cos, sin = rotary(like, torch.arange(context, device=like.device)[None])
        self.register_buffer("cos", cos[0], persistent=False)
        self.register_buffer("sin", sin[0], persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids int64 [rows, n] -> cosine and sine [rows, n, d] of x's dtype."""
        return self.cos[position_ids], self.sin[position_ids]


def look_up_positions(model: nn.Module, context: int, dtype: torch.dtype, device: str) -> None:
    """Let a transformers causal LM look its rotary embedding up, unless that depends on more than the position."""
    rotary = model.model.rotary_emb
    if rotary.rope_type not in ("dynamic", "longrope"):
        model.model.rotary_emb = RotaryTable(rotary, context, torch.empty(0, dtype=dtype, device=device))


AttentionInterface.register(ATTENTION, slot_attention)
