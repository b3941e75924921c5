"""Whether the model can run on a GPU, and the GPU's own figures for /metrics. Imports torch only to choose a device."""

import logging
import math
import warnings
from collections.abc import Callable

import psutil
import pynvml

from model.weights.catalogue import ModelError
from telemetry import Metrics

_DRIVER = {12: 525, 13: 580}  # major version of CUDA -> the oldest driver (NVIDIA's "CUDA Compatibility")
_CAPABILITY = (8, 0)  # Ampere: bfloat16 and FlashAttention 2

_RESERVE = 2 << 30  # bytes of a GPU left for activations, CUDA graphs and fragmentation
_CPU_PART = 2  # of the available memory all KV, filled to the end, may take one in so many

_log = logging.getLogger(__name__)


def choose_device(wanted: str) -> str:
    """`cpu` or `cuda` for DEVICE=`wanted` (auto, cpu or cuda).

    Raises ModelError, one line that says what to do, where a GPU is asked for, or is there, and cannot be used.
    """
    if wanted == "cpu":
        return "cpu"
    import torch

    with warnings.catch_warnings(record=True) as reasons:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if not usable and wanted == "auto" and not driver():
        return "cpu"
    if problem := _too_old() if usable else _unusable(torch.version.cuda, [str(said.message) for said in reasons]):
        raise ModelError(f"DEVICE={wanted}: {problem}, or set DEVICE=cpu")
    return "cuda"


def driver() -> str | None:
    """The version of NVIDIA's driver where it sees a GPU. Raises ModelError for one that does not answer."""
    try:
        pynvml.nvmlInit()
        return pynvml.nvmlSystemGetDriverVersion() if pynvml.nvmlDeviceGetCount() else None
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return None
    except pynvml.NVMLError as error:
        # "Driver/Library version mismatch": it was updated while the old one is running.
        raise ModelError(
            f"the NVIDIA driver does not answer ({error}): restart the machine, or set DEVICE=cpu"
        ) from None


def memory(device: str) -> tuple[int, int]:
    """Bytes that are free for a model on `device` (`cpu`: RAM), and that it has in all."""
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()  # what PyTorch keeps for later counts as used
        return torch.cuda.mem_get_info()
    ram = psutil.virtual_memory()
    return ram.available, ram.total


def for_kv(free: int, device: str) -> int:
    """How many bytes KV may take of what is free on `device`."""
    return free - _RESERVE if device == "cuda" else free // _CPU_PART


def require_memory(weights: int, device: str) -> None:
    """Raises ModelError unless weights of this many bytes fit into what is free."""
    if weights > (free := memory(device)[0]):
        place = "GPU (nvidia-smi shows what else is on it)" if device == "cuda" else "machine"
        sizes = f"the weights take {weights / 1e9:.1f} GB and {free / 1e9:.1f} GB are free on this {place}"
        raise ModelError(f"{sizes}: use a smaller MODEL; `make estimate` tells which fits")


def _unusable(cuda: str | None, reasons: list[str]) -> str:
    """Why PyTorch, built for this version of CUDA, sees no GPU; `reasons` is what it says itself."""
    if not (version := driver()):
        return "no NVIDIA GPU is seen; install its driver, 580 or newer, and for Docker the NVIDIA Container Toolkit"
    if not cuda:
        return "there is a GPU, but this is PyTorch's CPU build; install the CUDA build (docs/operations.md, Disk)"
    major = int(cuda.split(".")[0])
    if int(version.split(".")[0]) < (needed := _DRIVER.get(major, max(_DRIVER.values()))):
        return f"the NVIDIA driver {version} is too old for PyTorch's CUDA {major}; update it to {needed} or newer"
    reason = reasons[-1].splitlines()[0] if reasons else "CUDA_VISIBLE_DEVICES may hide it"
    return f"there is a GPU, but PyTorch cannot use it ({reason}); see what nvidia-smi says"


def _too_old() -> str | None:
    import torch

    if (capability := torch.cuda.get_device_capability()) >= _CAPABILITY:
        return None
    name, has = torch.cuda.get_device_name(), "{}.{}".format(*capability)
    return f"{name} has compute capability {has}; use a GPU with 8.0 or more (Ampere: bfloat16, FlashAttention 2)"


def watch(metrics: Metrics) -> bool:
    """Let the gauges follow the first GPU; whether there is one. Without one they stay at zero."""
    try:
        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
    except pynvml.NVMLError as error:
        _log.info("no GPU metrics: %s", error)
        return False
    metrics.gpu_memory.set_function(lambda: _figure(lambda: float(pynvml.nvmlDeviceGetMemoryInfo(gpu).used)))
    metrics.gpu_utilisation.set_function(lambda: _figure(lambda: pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100))
    return True


def _figure(ask: Callable[[], float]) -> float:
    """NaN from a card that fails, which must not take all of /metrics down with it."""
    try:
        return ask()
    except pynvml.NVMLError:
        return math.nan
