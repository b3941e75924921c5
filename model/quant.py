"""How a 4-bit matrix is multiplied fast on the machine at hand, decided once at load.

bitsandbytes stores the weights; this module only chooses the product. It quantises no checkpoint and knows no HTTP.

Five products:

- `bitsandbytes`: CUDA, the library's own modules, untouched.
- `nf4`: a CPU with AVX512-BF16, bitsandbytes' packed kernel called without its per-call Python.
- `int8`: any other x86 CPU, where that kernel is missing and the stock path would dequantise the whole matrix at
  every call. NF4 (or int8) weights become int8, per output channel, once; FBGEMM multiplies.
- `dequantised`: a CPU without FBGEMM (Arm): floats again, once; large, but never unpacked at every call.
- `dense`: unquantised weights.
"""

from __future__ import annotations

import ctypes
import itertools
import warnings
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import bitsandbytes as bnb
import torch
from bitsandbytes.cextension import lib
from torch import nn

# Matrices of one transformers decoder layer that read the same input and are multiplied as one.
FUSED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))

# Activations are 7-bit in [-63, 63], offset 64: AVX2's u8 x i8 pair sums (127 * 127 * 2) then fit 16 bits.
_INT8_STEPS, _INT8_OFFSET = 63, 64

_HAS_FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines

_ops = torch.library.Library("slots", "DEF")
_ops.define("int8_product(Tensor x, Tensor handle, int rows) -> Tensor")
_ops.define("nf4_product(Tensor x, Tensor weight, Tensor absmax, int rows, int blocksize) -> Tensor")
# FBGEMM's packed matrices by handle: a compiled graph takes tensors, not such objects. The handle is a tensor too,
# so that a graph compiled in another process holds no number of that process.
_packed: dict[int, torch.ScriptObject] = {}
_handles = itertools.count()


@dataclass(frozen=True, slots=True)
class Plan:
    """product: one of the five above; dtype: of activations, norms and KV."""

    product: str
    dtype: torch.dtype


def plan(device: str, quantization: str, avx512_bf16: bool | None = None) -> Plan:
    """The product for this machine. `avx512_bf16` overrides what the CPU says (tests mask it)."""
    if device != "cpu":
        return Plan("dense" if quantization == "none" else "bitsandbytes", torch.bfloat16)
    kernel = bool(bnb.functional.has_avx512bf16()) if avx512_bf16 is None else avx512_bf16
    dtype = torch.bfloat16 if kernel else torch.float32  # AVX2 emulates bf16: float32 measured 2 to 4 times faster
    if quantization == "none":
        return Plan("dense", dtype)
    if not _HAS_FBGEMM:
        return Plan("dequantised", dtype)
    return Plan("nf4", dtype) if kernel and quantization == "nf4" else Plan("int8", torch.float32)


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


class Nf4Linear(nn.Module):
    """weight float [rows, k], rows % 32 == 0 -> NF4 in blocks of 64; input bfloat16 [..., k], output [..., rows]."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.rows, k = weight.shape
        layer = bnb.nn.Linear4bit(k, self.rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", blocksize=64)
        layer = layer.to("cpu").eval()
        with torch.no_grad():
            layer(torch.zeros(1, k, dtype=torch.bfloat16))  # bitsandbytes packs at the first call in eval mode
        state = layer.weight.quant_state
        self.blocksize = state.blocksize
        self.register_buffer("weight", layer.weight.data.view(torch.uint8))
        self.register_buffer("absmax", state.absmax.to(torch.bfloat16).contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y = torch.ops.slots.nf4_product(rows, self.weight, self.absmax, self.rows, self.blocksize)
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

    def __init__(self, parts: list[nn.Linear], product: type[nn.Module], dtype: torch.dtype) -> None:
        super().__init__()
        self.sizes = [part.out_features for part in parts]
        self.linear = product(torch.cat([dense_weight(part) for part in parts]).to(dtype))
        biases = [part.bias for part in parts]
        self.bias = None if biases[0] is None else nn.Parameter(torch.cat(biases), requires_grad=False)
        self.pending: tuple[torch.Tensor, ...] = ()

    def take(self, x: torch.Tensor, index: int) -> torch.Tensor:
        if index == 0:
            y = self.linear(x)
            self.pending = (y if self.bias is None else y + self.bias).split(self.sizes, -1)
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

    The output head becomes int8 wherever the body is quantised: measured faster than an NF4 head, at a tenth of its
    error. Raises nothing of its own; a layer that is named otherwise stays as it is.
    """
    if chosen.product in ("bitsandbytes", "dense"):
        return
    product = _PRODUCTS[chosen.product]
    for owner in list(model.modules()):
        for names in FUSED:
            if all(isinstance(getattr(owner, name, None), nn.Linear) for name in names):
                _fuse(owner, names, product, chosen.dtype)
    if product is not FloatLinear:
        model.lm_head = Part(Fused([model.get_output_embeddings()], Int8Linear, chosen.dtype), 0)


_PRODUCTS: dict[str, type[nn.Module]] = {"nf4": Nf4Linear, "int8": Int8Linear, "dequantised": FloatLinear}


def _fuse(owner: nn.Module, names: Iterable[str], product: type[nn.Module], dtype: torch.dtype) -> None:
    fused = Fused([getattr(owner, name) for name in names], product, dtype)
    for index, name in enumerate(names):
        setattr(owner, name, Part(fused, index))


def _int8_product(x: torch.Tensor, handle: torch.Tensor, rows: int) -> torch.Tensor:
    return _int8_kernel(x, 1 / _INT8_STEPS, _INT8_OFFSET, _packed[int(handle)])


def _nf4_product(
    x: torch.Tensor, weight: torch.Tensor, absmax: torch.Tensor, rows: int, blocksize: int
) -> torch.Tensor:
    m, k = x.shape
    out = x.new_empty((m, rows))
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, weight, absmax, out)]
    sizes = [ctypes.c_int64(n) for n in (m, rows, k)]
    strides = [ctypes.c_int64(n) for n in (blocksize, k, rows)]
    lib.gemv_4bit_inference_cpu_nf4_bf16(*sizes, *pointers, *strides)
    return out


_int8_kernel = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
_ops.impl("int8_product", _int8_product, "CPU")
_ops.impl("nf4_product", _nf4_product, "CPU")
_ops.impl("int8_product", lambda x, handle, rows: x.new_empty((x.shape[0], rows)), "Meta")
_ops.impl("nf4_product", lambda x, weight, absmax, rows, blocksize: x.new_empty((x.shape[0], rows)), "Meta")
