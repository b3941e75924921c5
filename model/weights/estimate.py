"""What MODEL takes, and whether it fits this machine or a GPU of some size, before it is fetched: `make estimate`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from model.engine.blocks import BLOCK
from model.runtime import gpu
from model.weights.catalogue import NF4_BITS, ModelError, ModelSpec, Shape, find, read_json
from model.weights.checkpoint import as_model_error, check_config, check_served
from settings import Settings, SettingsError

_BITS = {"nf4": NF4_BITS, "int8": 8, "none": 0}  # 0: as what is not quantised
_QUANTISING = 2 << 30  # bytes beside the result: the libraries, and one matrix as it was


@dataclass(frozen=True, slots=True)
class Estimate:
    """Sizes in bytes. `tokens`: of KV cache. `missing`: memory, 0 where the model fits."""

    weights: int
    tokens: int
    missing: int
    fetched: int
    stored: int
    quantising: int


def estimate(spec: ModelSpec, shape: Shape, quantization: str, memory: int, device: str) -> Estimate:
    """What this model takes on a device (`cuda` or `cpu`) that has `memory` bytes for it.

    On a CPU what is not quantised becomes float32; without a C++ compiler all of it does, which is not counted.
    """
    dense, head = 16 if device == "cuda" else 32, shape.vocabulary * shape.hidden
    held = in_memory(shape, quantization, device)
    weights = shape.weight_bytes(_BITS[held] or dense, spec.skip_modules, dense)
    if held == "nf4":  # the head has a byte a weight; where it is the embedding's matrix, that stays beside it
        weights += head - (0 if shape.tied else head * dense // 8)
    left, block = gpu.for_kv(memory - weights, device), BLOCK * shape.kv_bytes
    short = max(0, 2 * block - left)  # a block is nobody's, and with none the service does not start
    stored = shape.weight_bytes(NF4_BITS, spec.skip_modules) if quantization == "nf4" else 0  # else files are linked
    return Estimate(
        weights,
        tokens=max(0, left // block - 1) * BLOCK,
        missing=short if device == "cuda" else 2 * short,
        fetched=shape.weight_bytes(16) if spec.shape else 0,
        stored=stored,
        quantising=stored + _QUANTISING if stored else 0,
    )


def in_memory(shape: Shape, quantization: str, device: str) -> str:
    """The QUANTIZATION of weights while they are served: transformers' modules on a CPU take floats."""
    return quantization if device == "cuda" or shape.kernels else "none"


def shape_of(spec: ModelSpec) -> Shape:
    """From the catalogue, or from a folder's config.json. Raises ModelError where neither tells."""
    if spec.shape:
        return spec.shape
    if spec.revision:
        line = "fetch its config.json and tokenizer.json, and set MODEL to their folder"
        raise ModelError(f"the sizes of {spec.name} are not known here: {line}")
    with as_model_error(f"config.json of {spec.source}"):
        check_config(Path(spec.source))
        return Shape.of(read_json(Path(spec.source) / "config.json"))


def report(settings: Settings, gpu_size: float | None) -> str:
    """The lines for MODEL on a GPU of `gpu_size` GB, or on this machine. Raises ModelError."""
    spec = find(settings)
    shape = shape_of(spec)
    if not spec.shape:
        check_served(Path(spec.source), settings.quantization, settings.max_context)
    device = "cuda" if gpu_size else gpu.choose_device(settings.device)
    ram = gpu.memory("cpu")[0]
    memory = int(gpu_size * 1e9) if gpu_size else gpu.memory("cuda")[1] if device == "cuda" else ram
    sizes = estimate(spec, shape, settings.quantization, memory, device)
    place = f"{_gb(memory)} of {'GPU memory' if device == 'cuda' else 'free RAM'}"
    held = in_memory(shape, settings.quantization, device)
    verdict = f"does not fit: {_gb(sizes.missing)} are missing" if sizes.missing else "fits"
    return f"""\
{spec.name} on {place}: {verdict}
  weights     {_gb(sizes.weights)} as {held}, {shape.parameters / 1e9:.2f} billion parameters
  KV cache    {sizes.tokens:,} tokens of {shape.kv_bytes:,} bytes, for prompts and answers of all slots together
  disk        {_gb(sizes.fetched)} fetched, which may be deleted afterwards, and {_gb(sizes.stored)} quantised
  quantising  {_gb(sizes.quantising)} of RAM, once; {_gb(ram)} are free here"""


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


if __name__ == "__main__":
    options = argparse.ArgumentParser(prog="python -m model.weights.estimate", description=__doc__)
    options.add_argument("gpu", type=float, nargs="?", help="GB of a GPU's memory, instead of this machine's")
    try:
        print(report(Settings.from_environment(), options.parse_args().gpu))
    except (SettingsError, ModelError) as error:
        sys.exit(str(error))
