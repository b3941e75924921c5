"""Linear layers in 4 bits, or 7, as kernels/product.cpp reads them; and the feed-forward part made of two.

Multiplies by that kernel alone (native.py), and needs float32 inputs whose width is a multiple of 64.
"""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState, dequantize_blockwise
from torch import nn

from model.kernels.native import LANES

BLOCK = 64  # inputs that share a scale; bitsandbytes' NF4 has the same
_STEPS, _OFFSET = 63, 64  # a weight is its block's scale times (byte - 64) / 63


class PackedLinear(nn.Module):
    """Input float32 [..., k] -> float32 [..., rows]; activations are quantised to int8, 64 by 64, inside the kernel.

    A row's result is bitwise the same whatever rows share the batch, and no row's outlier costs another's precision.
    """

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, halves: bool) -> None:
        """codes uint8 [rows, k]: NF4's, to be put two in a byte (halves), or bytes; scales float32 [rows, k / 64]."""
        super().__init__()
        self.rows = codes.shape[0]
        missing = -self.rows % LANES
        codes, scales = (nn.functional.pad(tensor, (0, 0, 0, missing)) for tensor in (codes, scales))
        blocks = scales.shape[1]
        weights = codes.view(-1, LANES, blocks, BLOCK // 4, 4).permute(0, 2, 3, 1, 4)
        if halves:
            weights = weights[:, :, 0::2] | weights[:, :, 1::2] << 4
        scales = (scales / _STEPS).view(-1, LANES, blocks).transpose(1, 2).contiguous().bfloat16()  # off by 0.2 %
        stored = torch.cat([weights.flatten(), scales.view(torch.uint8).flatten()])
        self.register_buffer("matrix", _aligned(stored.view(len(weights), -1)))

    @classmethod
    def nf4(cls, layers: list[bnb.nn.Linear4bit]) -> PackedLinear:
        """The very codes and scales that bitsandbytes holds."""
        codes, scales = zip(*(_unpacked(layer) for layer in layers), strict=True)
        return cls(torch.cat(codes), torch.cat(scales), halves=True)

    @classmethod
    def dense(cls, weight: torch.Tensor) -> PackedLinear:
        """weight float [rows, k], rounded to 7 bits."""
        blocks = weight.float().view(weight.shape[0], -1, BLOCK)
        scales = blocks.abs().amax(-1)
        codes = (blocks * (_STEPS / scales.clamp(min=1e-30))[..., None]).round() + _OFFSET
        return cls(codes.to(torch.uint8).view(weight.shape), scales, halves=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _shaped(torch.ops.slots.packed_product(_rows_of(x), self.matrix), x, self.rows)


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up side by side in one matrix: input and output float32 [..., k]."""

    def __init__(self, gate_up: PackedLinear, down: PackedLinear) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.slots.feed_forward(_rows_of(x), self.gate_up.matrix, self.down.matrix)
        return _shaped(y, x, self.down.rows)


def _rows_of(x: torch.Tensor) -> torch.Tensor:
    """[..., k] as the kernel takes it, float32 [n, k]."""
    return x.float().reshape(-1, x.shape[-1]).contiguous()


def _shaped(y: torch.Tensor, x: torch.Tensor, rows: int) -> torch.Tensor:
    """The kernel's [n, rows and some] in the shape of its input, [..., rows]."""
    return y[:, :rows].reshape(*x.shape[:-1], rows)


def _unpacked(layer: bnb.nn.Linear4bit) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [rows, k] and scales float32 [rows, k / 64] of a 4-bit layer. Raises ValueError for another block."""
    state: QuantState = layer.weight.quant_state
    if state.blocksize != BLOCK or state.quant_type != "nf4":
        raise ValueError(f"4-bit weights of type {state.quant_type} in blocks of {state.blocksize} are not served")
    packed = layer.weight.data.view(torch.uint8).view(-1)
    codes = torch.stack([packed >> 4, packed & 15], -1).view(state.shape)
    scales = state.absmax
    if state.nested:  # double quantisation
        scales = dequantize_blockwise(scales, state.state2) + state.offset
    return codes, scales.float().view(state.shape[0], -1)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, and at a multiple of 32 bytes, as vector loads need it (PyTorch's own allocations are)."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 32 == 0 else tensor.clone()
