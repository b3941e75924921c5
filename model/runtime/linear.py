"""How matrices are multiplied on the machine at hand, chosen once at load:

- `bitsandbytes`: CUDA, the library's own kernels (nf4, with an int8 head; int8).
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
# Tokens that a step on a GPU reads at most: for more rows bitsandbytes makes floats of most matrices at every call.
FEW = 16
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

    def forward(self, x: Tensor, norm: Tensor | None = None, epsilon: float = 0.0) -> Tensor:
        """x float32 [n, k], first normalised by its root mean square where norm float32 [k] is given -> [n, rows]."""
        y = torch.ops.slots.packed_product(x, self.matrix, norm, epsilon)[:, : self.rows].contiguous()
        return y if self.bias is None else y + self.bias


class FewRows(nn.Module):
    """A 4-bit layer of bitsandbytes that makes no floats of its matrix in a step: more rows come in several calls."""

    def __init__(self, layer: bnb.nn.Linear4bit, most: int) -> None:
        """most: rows that bitsandbytes multiplies with the codes as they are (`fused_rows`)."""
        super().__init__()
        self.layer, self.most = layer, most

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n, k] -> [..., n, rows]; a prompt's chunk, for which floats are made once, stays one call."""
        if not self.most < x.shape[-2] <= FEW:
            return self.layer(x)
        return torch.cat([self.layer(part) for part in x.split(self.most, -2)], -2)


class Int8Linear(nn.Module):
    """weight float [rows, k], stored in int8 with a scale a row, and multiplied with inputs in int8 (no outliers)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        codes, scales, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(weight.half())
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        """x [n, k] -> [n, rows] of x's dtype."""
        codes, scales, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(x.half())
        return torch.ops.bitsandbytes.int8_scaled_mm(codes, self.codes, scales, self.scales, dtype=x.dtype)


def join(parts: list[nn.Linear], chosen: Plan) -> nn.Module:
    """One layer that computes what `parts`, which read the same input, compute together."""
    if chosen.linear_backend == "bitsandbytes":
        return _joined_4bit(parts)
    bias = None if parts[0].bias is None else torch.cat([part.bias.data for part in parts])[None].to(chosen.dtype)
    if chosen.linear_backend != "packed" or parts[0].in_features % BLOCK:
        weight = torch.cat([dense_weight(part) for part in parts]).to(chosen.dtype)
        return DenseLinear(weight, None if bias is None else bias[0])
    four_bits = all(isinstance(part, bnb.nn.Linear4bit) for part in parts)
    made = PackedLinear.nf4(parts) if four_bits else PackedLinear.dense(torch.cat([dense_weight(p) for p in parts]))
    made.bias = bias
    return made


def _joined_4bit(parts: list[bnb.nn.Linear4bit]) -> FewRows:
    """The very codes of all parts, with their scales stored in 8 bits anew (bitsandbytes' double quantisation)."""
    layer, k, rows = parts[0], parts[0].in_features, sum(part.out_features for part in parts)
    if len(parts) > 1:
        first, biased = layer.weight.quant_state, layer.bias is not None
        scales = torch.cat([_scales(part.weight.quant_state) for part in parts])
        offset = scales.mean()
        stored, nested = bnb.functional.quantize_blockwise(scales - offset, blocksize=256)
        state = bnb.functional.QuantState(
            absmax=stored, shape=torch.Size([rows, k]), code=first.code, blocksize=first.blocksize,
            quant_type=first.quant_type, dtype=first.dtype, offset=offset, state2=nested,
        )  # fmt: skip
        codes = torch.cat([part.weight.data.view(-1, 1) for part in parts])
        layer = bnb.nn.Linear4bit(k, rows, biased, layer.compute_dtype, device="meta")
        layer.weight = bnb.nn.Params4bit(
            codes, requires_grad=False, quant_state=state, quant_type=first.quant_type, bnb_quantized=True, module=layer
        )
        if biased:
            layer.bias = nn.Parameter(torch.cat([part.bias.data for part in parts]), requires_grad=False)
    return FewRows(layer, fused_rows(rows, k, layer.weight.device))


def fused_rows(n: int, k: int, device: torch.device) -> int:
    """The most rows, up to FEW, that bitsandbytes multiplies with 4-bit codes [n, k] as they are on this GPU."""
    if device.type != "cuda":
        return FEW
    from bitsandbytes.backends.cuda.ops import _gemm_4bit_use_custom_cuda as takes  # no PyTorch without CUDA imports it

    refused = (rows for rows in range(2, FEW + 1) if not takes(device.index or 0, torch.bfloat16, rows, n, k))
    return next(refused, FEW + 1) - 1


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
    return codes, _scales(state).view(state.shape[0], -1)


def _scales(state: bnb.functional.QuantState) -> Tensor:
    """float32, one for each block of weights."""
    if not state.nested:
        return state.absmax.float()
    return (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()  # double quantisation
