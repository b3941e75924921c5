"""Parts of transformers' models that are replaced: by this project's kernels on a CPU, by joined matrices on CUDA."""

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb  # Llama's, for a part of the head's width too

from model.runtime.attention import ATTENTION, block_attention
from model.runtime.kv import BlockCache
from model.runtime.linear import Int8Linear, PackedLinear, Plan, dequantise, join
from model.weights.catalogue import KERNEL_ARCHITECTURES, require_window


class KernelLayer(nn.Module):
    """A decoder layer of KERNEL_ARCHITECTURES by this project's kernels; one call if all is packed."""

    operands: tuple[object, ...] = ()  # what slots::layer takes beside tokens and KV

    def __init__(self, layer: nn.Module, chosen: Plan) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.width, self.scaling = attention.head_dim, attention.scaling
        self.qkv = join(_qkv(attention), chosen)
        self.out = join([attention.o_proj], chosen)
        self.head_norms = nn.ModuleList(getattr(attention, n) for n in ("q_norm", "k_norm") if hasattr(attention, n))
        self.heads = [heads * self.width for heads in _heads(attention)]
        self.gate_up, self.down = join(_gate_up(mlp), chosen), join([mlp.down_proj], chosen)
        self.act, self.norms = _act(mlp), nn.ModuleList([layer.input_layernorm, layer.post_attention_layernorm])
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
    """Attention of transformers' models with one product for queries, keys and values."""

    def __init__(self, attention: nn.Module, chosen: Plan) -> None:
        super().__init__()
        self.layer_idx, self.width, self.scaling = attention.layer_idx, attention.head_dim, attention.scaling
        self.heads = _heads(attention)
        self.qkv, self.out = join(_qkv(attention), chosen), join([attention.o_proj], chosen)
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
        out, _ = block_attention(self, q, keys, values, None, self.scaling, **arguments)
        return self.out(out.flatten(-2)), None


class JoinedMlp(nn.Module):
    """The feed-forward part with one product for gate and up."""

    def __init__(self, mlp: nn.Module, chosen: Plan) -> None:
        super().__init__()
        self.gate_up, self.down = join(_gate_up(mlp), chosen), join([mlp.down_proj], chosen)
        self.act = _act(mlp)

    def forward(self, x: Tensor) -> Tensor:
        """x [1, n, hidden] -> the same shape."""
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(self.act(gate) * up)


def use_bitsandbytes(model: nn.Module, chosen: Plan) -> None:
    """Join the 4-bit matrices of a transformers causal LM that read the same input."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        if all(isinstance(part, Linear4bit) for part in (*_qkv(attention), attention.o_proj)):
            layer.self_attn = JoinedAttention(attention, chosen)
        if all(isinstance(part, Linear4bit) for part in (*_gate_up(mlp), mlp.down_proj)):
            layer.mlp = JoinedMlp(mlp, chosen)


def _qkv(attention: nn.Module) -> list[nn.Linear]:
    """The matrices of queries, keys and values: Phi-3 stores them as one, and so gate and up."""
    if hasattr(attention, "qkv_proj"):
        return [attention.qkv_proj]
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def _heads(attention: nn.Module) -> list[int]:
    """How many of queries, keys and values."""
    config = attention.config
    return [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]


def _gate_up(mlp: nn.Module) -> list[nn.Linear]:
    return [mlp.gate_up_proj] if hasattr(mlp, "gate_up_proj") else [mlp.gate_proj, mlp.up_proj]


def _act(mlp: nn.Module) -> nn.Module:
    return mlp.activation_fn if hasattr(mlp, "activation_fn") else mlp.act_fn


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
    """Replace the decoder layers and the head of a transformers causal LM, in place.

    Raises ValueError for a model whose layers may do more than is known here.
    """
    if type(model).__name__ not in KERNEL_ARCHITECTURES:
        raise ValueError(f"{type(model).__name__} has layers that the CPU kernels do not know")
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = KernelLayer(layer, chosen)
    model.lm_head = KernelHead(model.model.norm, model.lm_head, chosen)


def replace_layers(model: nn.Module, plan: Plan) -> None:
    """Let a transformers causal LM compute as planned, in place."""
    if plan.kernels:
        use_kernels(model, plan)
        return
    model.set_attn_implementation(ATTENTION)
    if plan.linear_backend == "dense":
        dequantise(model, plan.dtype)
    else:
        shrink_head(model, plan)
        use_bitsandbytes(model, plan)


def shrink_head(model: nn.Module, plan: Plan) -> None:
    """Store the head in int8 where the body is in bitsandbytes' 4 bits. Before memory is shared out: it halves."""
    four_bits = any(isinstance(layer, Linear4bit) for layer in model.modules())
    if plan.linear_backend == "bitsandbytes" and four_bits and isinstance(model.lm_head, nn.Linear):
        model.lm_head = Int8Linear(model.lm_head.weight.data)


def is_packed(model: nn.Module) -> bool:
    """Whether all is computed by kernels whose sums have one order: text then depends on request and weights alone."""
    layers = all(isinstance(layer, KernelLayer) and layer.operands for layer in model.model.layers)
    return layers and isinstance(model.lm_head.head, PackedLinear)


class RotaryTable(nn.Module):
    """transformers' rotary embedding of every position, looked up: a compiled step computes it anew for each head.

    Phi-3's longrope turns short and long texts differently. Here all are turned as the longest that is served: what
    shares the batch would decide otherwise, and a text that grows would leave KV behind that was turned differently.
    """

    def __init__(self, rotary: nn.Module, context: int, like: Tensor) -> None:
        super().__init__()
        positions = torch.arange(context, device=like.device)[None]
        for layer_type in rotary.rope_type if isinstance(rotary.rope_type, dict) else [None]:  # Gemma 3 has two
            cos, sin = rotary(like, positions, layer_type)
            self.register_buffer(f"cos_{layer_type}", cos[0], persistent=False)
            self.register_buffer(f"sin_{layer_type}", sin[0], persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        """position_ids int64 [rows, n] -> cosine and sine [rows, n, d] of x's dtype."""
        cos, sin = (getattr(self, f"{name}_{layer_type}") for name in ("cos", "sin"))
        return cos[position_ids], sin[position_ids]


def look_up_positions(model: nn.Module, context: int, dtype: torch.dtype, device: str) -> None:
    """Let a transformers causal LM look its rotary embedding up."""
    like = torch.empty(0, dtype=dtype, device=device)
    model.model.rotary_emb = RotaryTable(model.model.rotary_emb, context, like)


def use_whole_context(model: nn.Module, context: int) -> None:
    """Forget sliding windows that a text of `context` tokens fits into. Raises ModelError for a smaller one."""
    of_config = model.config.model_type in ("mistral", "phi3")  # their attention reads it there, at each call
    for owner in [model.config] if of_config else [layer.self_attn for layer in model.model.layers]:
        require_window(getattr(owner, "sliding_window", None), context)
        owner.sliding_window = None
