"""How matrices are multiplied on the machine at hand, chosen once at load:

- `bitsandbytes`: CUDA, the library's own modules (nf4, int8).
- `packed`: an x86 CPU with AVX2 and a C++ compiler, kernels/product.cpp: bitsandbytes' NF4 codes as they are, 7 bits
  for what is not stored in 4 (the output head, and every matrix under QUANTIZATION=int8).
- `dense`: QUANTIZATION=none, and a CPU without the kernels, where 4-bit matrices become floats once.
"""

from dataclasses import dataclass
from typing import Self

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise
from torch import Tensor, nn

from model.kernels.native import LANES

BLOCK = 64  # inputs that share a scale; bitsandbytes' NF4 has the same
_STEPS, _OFFSET = 63, 64  # a packed weight is its block's scale times (byte - 64) / 63


@dataclass(frozen=True, slots=True)
class Plan:
    linear_backend: str  # one of the three above
    dtype: torch.dtype  # of activations and norms
    kv: torch.dtype  # of the KV cache
    kernels: bool = False  # layers, attention and sampler are this project's own (kernels/*.cpp)


def plan(device: str, quantization: str, kernels: bool) -> Plan:
    """The backend for this machine. kernels: those of native.py can be used."""
    if device != "cpu":
        return Plan("dense" if quantization == "none" else "bitsandbytes", torch.bfloat16, torch.bfloat16)
    if kernels:
        return Plan("dense" if quantization == "none" else "packed", torch.float32, torch.bfloat16, kernels)
    # A CPU that cannot multiply bfloat16 emulates it, at a half to a quarter of float32's speed.
    dtype = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    return Plan("dense", dtype, dtype)


class DenseLinear(nn.Module):
    """weight float [rows, k], bias float [rows] or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class PackedLinear(nn.Module):
    """Activations are quantised to int8, 64 by 64, inside the kernel; k is a multiple of 64.

    A row's result is bitwise the same whatever rows share the batch, and no row's outlier costs another's precision.
    """

    def __init__(self, codes: Tensor, scales: Tensor, halves: bool) -> None:
        """codes uint8 [rows, k]: NF4's, to be put two in a byte (halves), or bytes; scales float32 [rows, k / 64]."""
        super().__init__()
        self.rows = codes.shape[0]
        self.bias: Tensor | None = None
        missing = -self.rows % LANES
        codes, scales = (nn.functional.pad(tensor, (0, 0, 0, missing)) for tensor in (codes, scales))
        blocks = scales.shape[1]
        weights = codes.view(-1, LANES, blocks, BLOCK // 4, 4).permute(0, 2, 3, 1, 4)
        if halves:
            weights = weights[:, :, 0::2] | weights[:, :, 1::2] << 4
        scales = (scales / _STEPS).view(-1, LANES, blocks).transpose(1, 2).contiguous().bfloat16()  # off by 0.2 %
        stored = torch.cat([weights.flatten(), scales.view(torch.uint8).flatten()])
        self.register_buffer("matrix", stored.view(len(weights), -1))  # vector loads need PyTorch's 64-byte alignment

    @classmethod
    def nf4(cls, layers: list[bnb.nn.Linear4bit]) -> Self:
        """The very codes and scales that bitsandbytes holds."""
        codes, scales = zip(*(_unpacked(layer) for layer in layers), strict=True)
        return cls(torch.cat(codes), torch.cat(scales), halves=True)

    @classmethod
    def dense(cls, weight: Tensor) -> Self:
        """weight float [rows, k], rounded to 7 bits."""
        blocks = weight.float().view(weight.shape[0], -1, BLOCK)
        scales = blocks.abs().amax(-1)
        codes = (blocks * (_STEPS / scales.clamp(min=1e-30))[..., None]).round() + _OFFSET
        return cls(codes.to(torch.uint8).view(weight.shape), scales, halves=False)

    def forward(self, x: Tensor) -> Tensor:
        """x float32 [n, k] -> float32 [n, rows]."""
        y = torch.ops.slots.packed_product(x, self.matrix)[:, : self.rows].contiguous()
        return y if self.bias is None else y + self.bias


def join(parts: list[nn.Linear], chosen: Plan) -> PackedLinear | DenseLinear:
    """One layer that computes what `parts`, which read the same input, compute together."""
    bias = None if parts[0].bias is None else torch.cat([part.bias.data for part in parts])[None].to(chosen.dtype)
    if chosen.linear_backend != "packed" or parts[0].in_features % BLOCK:
        weight = torch.cat([dense_weight(part) for part in parts]).to(chosen.dtype)
        return DenseLinear(weight, None if bias is None else bias[0])
    four_bits = all(isinstance(part, bnb.nn.Linear4bit) for part in parts)
    made = PackedLinear.nf4(parts) if four_bits else PackedLinear.dense(torch.cat([dense_weight(p) for p in parts]))
    made.bias = bias
    return made


def dense_weight(layer: nn.Linear) -> Tensor:
    """The layer's weight as floats [rows, k], dequantised where bitsandbytes holds it in 4 bits."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return layer.weight.data


def dequantise(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace each 4-bit layer by one of floats, in place."""
    for owner in list(model.modules()):
        for name, layer in list(owner.named_children()):
            if isinstance(layer, bnb.nn.Linear4bit):
                setattr(owner, name, DenseLinear(dense_weight(layer).to(dtype), layer.bias))


def _unpacked(layer: bnb.nn.Linear4bit) -> tuple[Tensor, Tensor]:
    """Codes uint8 [rows, k] and scales float32 [rows, k / 64] of a 4-bit layer. Raises ValueError for another block."""
    state = layer.weight.quant_state
    if state.blocksize != BLOCK or state.quant_type != "nf4":
        raise ValueError(f"4-bit weights of type {state.quant_type} in blocks of {state.blocksize} are not served")
    packed = layer.weight.data.view(torch.uint8).view(-1)
    codes = torch.stack([packed >> 4, packed & 15], -1).view(state.shape)
    scales = state.absmax
    if state.nested:  # double quantisation
        scales = dequantize_blockwise(scales, state.state2) + state.offset
    return codes, scales.float().view(state.shape[0], -1)
