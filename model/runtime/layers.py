"""Parts of transformers' models that are replaced: by this project's kernels on a CPU, by joined matrices on CUDA."""

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from model.runtime.attention import block_attention, refuse_unknown
from model.runtime.kv import BlockCache
from model.runtime.linear import Int8Linear, PackedLinear, Plan, join


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
        """x float32 [n, hidden], a token of a batch a row -> the same shape; cos, sin float32 [n, d].

        at: this layer's keys and values, and the batch's tables and tokens. Changes nothing but the tokens' KV, so that
        it can be tried again.
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


class JoinedAttention(nn.Module):
    """Attention of transformers' Llama, Qwen2, Qwen3 or Mistral with one product for queries, keys and values."""

    def __init__(self, attention: nn.Module, chosen: Plan) -> None:
        super().__init__()
        self.layer_idx, self.width, self.scaling = attention.layer_idx, attention.head_dim, attention.scaling
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.heads = [part.out_features // self.width for part in parts]
        self.qkv, self.out = join(parts, chosen), join([attention.o_proj], chosen)
        self.sliding_window = getattr(attention, "sliding_window", None)
        self.head_norms = nn.ModuleList(getattr(attention, n) for n in ("q_norm", "k_norm") if hasattr(attention, n))

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], past_key_values: BlockCache,
        **arguments: object,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """hidden_states [1, n, hidden] -> the same shape. Raises ValueError as `block_attention` does."""
        states = self.qkv(hidden_states).unflatten(-1, (-1, self.width)).transpose(1, 2)
        q, k, v = states.split(self.heads, 1)
        if self.head_norms:
            q, k = (norm(part) for norm, part in zip(self.head_norms, (q, k), strict=True))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        keys, values = past_key_values.update(k, v, self.layer_idx)
        del arguments["attention_mask"]
        arguments["sliding_window"] = self.sliding_window
        out, _ = block_attention(self, q, keys, values, None, self.scaling, **arguments)
        return self.out(out.flatten(-2)), None


class JoinedMlp(nn.Module):
    """The feed-forward part with one product for gate and up."""

    def __init__(self, mlp: nn.Module, chosen: Plan) -> None:
        super().__init__()
        self.gate_up, self.down = join([mlp.gate_proj, mlp.up_proj], chosen), join([mlp.down_proj], chosen)
        self.act = mlp.act_fn

    def forward(self, x: Tensor) -> Tensor:
        """x [1, n, hidden] -> the same shape."""
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(self.act(gate) * up)


def use_bitsandbytes(model: nn.Module, chosen: Plan) -> None:
    """Join the 4-bit matrices of a transformers causal LM that read the same input, and store its head in int8."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        if all(isinstance(getattr(attention, f"{name}_proj", None), Linear4bit) for name in "qkvo"):
            layer.self_attn = JoinedAttention(attention, chosen)
        if all(isinstance(getattr(mlp, f"{name}_proj", None), Linear4bit) for name in ("gate", "up", "down")):
            layer.mlp = JoinedMlp(mlp, chosen)
    model.lm_head = Int8Linear(model.lm_head.weight.data)


class KernelHead(nn.Module):
    """The last norm and the output head."""

    def __init__(self, norm: nn.Module, head: nn.Linear, chosen: Plan) -> None:
        super().__init__()
        self.norm = norm
        # 7 bits wherever the body is quantised: it is too large for floats, and 4 bits cost a tenth of the perplexity.
        self.head = join([head], chosen)

    def forward(self, x: Tensor) -> Tensor:
        """x float32 [n, hidden], as the last layer leaves it -> logits float32 [n, vocabulary]."""
        if isinstance(self.head, PackedLinear):
            return self.head(x, self.norm.weight.data, self.norm.variance_epsilon)
        return self.head(self.norm(x))


def use_kernels(model: nn.Module, chosen: Plan) -> None:
    """Replace the decoder layers and the head of a transformers causal LM, in place."""
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = KernelLayer(layer, chosen)
    model.lm_head = KernelHead(model.model.norm, model.lm_head, chosen)


def is_packed(model: nn.Module) -> bool:
    """Whether all is computed by kernels whose sums have one order: text then depends on request and weights alone."""
    layers = all(isinstance(layer, KernelLayer) and layer.operands for layer in model.model.layers)
    return layers and isinstance(model.lm_head.head, PackedLinear)


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
