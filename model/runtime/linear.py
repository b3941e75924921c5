"""How a 4-bit matrix is multiplied fast on the machine at hand, decided once at load.

bitsandbytes stores the weights; this module only chooses the product. It quantises no checkpoint and knows no HTTP.

Five products:

- `bitsandbytes`: CUDA, the library's own modules, untouched.
- `packed`: an x86 CPU with AVX2 and a C++ compiler, this project's own kernel (packed.py): bitsandbytes' NF4 codes as
  they are, 7 bits for what is not stored in 4.
- `int8`: an x86 CPU without a compiler, where bitsandbytes would dequantise the whole matrix at every call. Weights
  become int8, per output channel, once; FBGEMM multiplies.
- `dequantised`: a CPU without FBGEMM (Arm): floats again, once; large, but never unpacked at every call.
- `dense`: unquantised weights.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from dataclasses import dataclass

import bitsandbytes as bnb
import torch
from torch import nn
from transformers.activations import SiLUActivation

from model.runtime import packed

# Matrices of one transformers decoder layer that read the same input and are multiplied as one.
FUSED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))

# Activations are 7-bit in [-63, 63], offset 64: AVX2's u8 x i8 pair sums (127 * 127 * 2) then fit 16 bits.
_INT8_STEPS, _INT8_OFFSET = 63, 64

_HAS_FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines

_ops = torch.library.Library("slots", "DEF")
_ops.define("int8_product(Tensor x, Tensor handle, int rows) -> Tensor")
# FBGEMM's packed matrices by handle: a compiled graph takes tensors, not such objects. The handle is a tensor too,
# so that a graph compiled in another process holds no number of that process.
_packed: dict[int, torch.ScriptObject] = {}
_handles = itertools.count()


@dataclass(frozen=True, slots=True)
class Plan:
    """product: one of the five above; dtype: of activations and norms; kv: of the KV.

    kernels: attention, too, is this project's own (kernels/attention.cpp).
    """

    product: str
    dtype: torch.dtype
    kv: torch.dtype
    kernels: bool = False


def plan(device: str, quantization: str, kernels: bool) -> Plan:
    """The product for this machine. kernels: those of native.py can be used.

    On CPUs activations are float32: AVX2 emulates bfloat16, at a half to a quarter of the speed.
    """
    if device != "cpu":
        return Plan("dense" if quantization == "none" else "bitsandbytes", torch.bfloat16, torch.bfloat16)
    kv = torch.bfloat16 if kernels else torch.float32
    quantised = "packed" if kernels else "int8" if _HAS_FBGEMM else "dequantised"
    return Plan("dense" if quantization == "none" else quantised, torch.float32, kv, kernels)


class Int8Linear(nn.Module):
    """weight float [rows, k] -> int8 per row; input float32 [..., k], output float32 [..., rows].

    Activations are scaled by their own row's maximum, so that a row's result is bitwise the same whatever rows share
    the batch (FBGEMM's own dynamic quantisation takes one scale for the whole tensor: one user's outlier would cost
    another's precision).
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        weight = weight.float()
        self.rows = weight.shape[0]
        scale = (weight.abs().amax(1) / 127).clamp(min=1e-12).double()
        zero = torch.zeros(self.rows, dtype=torch.long)
        with warnings.catch_warnings():
            # Deprecated without a date; its successors have no AVX2 kernel (measured 8 to 90 times slower).
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
            quantised = torch.quantize_per_channel(weight, scale, zero, 0, torch.qint8)
        handle = next(_handles)
        _packed[handle] = torch.ops.quantized.linear_prepack(quantised, None)
        weakref.finalize(self, _packed.pop, handle)
        self.register_buffer("handle", torch.tensor(handle))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.float().reshape(-1, x.shape[-1])
        scale = rows.abs().amax(-1, keepdim=True).clamp(min=1e-12)
        y = torch.ops.slots.int8_product((rows / scale).contiguous(), self.handle, self.rows) * scale
        return y.view(*x.shape[:-1], self.rows)


class FloatLinear(nn.Module):
    """weight float [rows, k], as it is."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight)


class Fused(nn.Module):
    """Linear layers over one input, multiplied together at the first part's call; each part hands out its slice."""

    def __init__(self, parts: list[nn.Linear], product: nn.Module) -> None:
        super().__init__()
        self.sizes = [part.out_features for part in parts]
        self.linear = product
        biases = [part.bias for part in parts]
        self.bias = None if biases[0] is None else nn.Parameter(torch.cat(biases), requires_grad=False)
        self.pending: tuple[torch.Tensor, ...] = ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y if self.bias is None else y + self.bias

    def take(self, x: torch.Tensor, index: int) -> torch.Tensor:
        if index == 0:
            self.pending = self(x).split(self.sizes, -1)
        out = self.pending[index]
        if index == len(self.sizes) - 1:
            self.pending = ()  # nothing outlives the layer, or the compiled graph would have to return it
        return out


class Part(nn.Module):
    """Stands where transformers expects one of the fused layers."""

    def __init__(self, fused: Fused, index: int) -> None:
        super().__init__()
        if index == 0:
            self.fused = fused
        else:
            object.__setattr__(self, "fused", fused)  # a submodule once only
        self.index = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fused.take(x, self.index)


def dense_weight(layer: nn.Linear) -> torch.Tensor:
    """The layer's weight as floats [rows, k], dequantised where bitsandbytes holds it in 4 bits."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return layer.weight.data


def install(model: nn.Module, chosen: Plan) -> None:
    """Replace the linear layers of a transformers causal LM by the chosen product, in place.

    The output head becomes int8 or 7 bits wherever the body is quantised: it is too large for floats, and 4 bits cost
    it a tenth of the perplexity. Raises nothing of its own; a layer that is named otherwise stays as it is.
    """
    if chosen.product in ("bitsandbytes", "dense"):
        return
    for owner in list(model.modules()):
        for names in FUSED:
            parts = [getattr(owner, name, None) for name in names]
            if all(isinstance(part, nn.Linear) for part in parts):
                fused = Fused(parts, product(parts, chosen))
                for index, name in enumerate(names):
                    setattr(owner, name, Part(fused, index))
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            if (layers := _feed_forward(child)) is not None:
                setattr(owner, name, packed.FeedForward(*layers))
    if chosen.product != "dequantised":
        head = [model.get_output_embeddings()]
        model.lm_head = Part(Fused(head, product(head, chosen)), 0)


def _feed_forward(layer: nn.Module) -> tuple[packed.PackedLinear, packed.PackedLinear] | None:
    """The two packed matrices of transformers' SwiGLU layers; None for any other, or where there are biases."""
    parts = [getattr(layer, name, None) for name in ("gate_proj", "down_proj")]
    fused = [part.fused for part in parts if isinstance(part, Part) and part.fused.bias is None]
    matrices = [each.linear for each in fused if isinstance(each.linear, packed.PackedLinear)]
    silu = isinstance(getattr(layer, "act_fn", None), SiLUActivation)
    return (matrices[0], matrices[1]) if silu and len(matrices) == 2 else None


def product(parts: list[nn.Linear], chosen: Plan) -> nn.Module:
    """One layer that computes what `parts`, which read the same input, compute together, but for their biases."""
    if chosen.product == "packed" and parts[0].in_features % packed.BLOCK == 0:
        if all(isinstance(part, bnb.nn.Linear4bit) for part in parts):
            return packed.PackedLinear.nf4(parts)
        return packed.PackedLinear.dense(torch.cat([dense_weight(part) for part in parts]))
    weight = torch.cat([dense_weight(part) for part in parts]).to(chosen.dtype)
    return FloatLinear(weight) if chosen.product == "dequantised" or not _HAS_FBGEMM else Int8Linear(weight)


def _int8_product(x: torch.Tensor, handle: torch.Tensor, rows: int) -> torch.Tensor:
    return _int8_kernel(x, 1 / _INT8_STEPS, _INT8_OFFSET, _packed[int(handle)])


_int8_kernel = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
_ops.impl("int8_product", _int8_product, "CPU")
_ops.impl("int8_product", lambda x, handle, rows: x.new_empty((x.shape[0], rows)), "Meta")
