"""Which device is chosen, with a line for each GPU that cannot be used; and the card's own figures."""

import math
import warnings
from types import SimpleNamespace

import pynvml
import pytest
import torch

from model.runtime.gpu import choose_device, watch
from model.weights.catalogue import ModelError
from telemetry import Metrics


def machine(
    monkeypatch: pytest.MonkeyPatch,
    driver: str | int,
    cuda: str | None = "13.0",
    usable: bool = False,
    reason: str = "",
) -> None:
    """A machine with this driver (or an error of NVML's), and a PyTorch for this CUDA that can use a GPU or not."""

    def init() -> None:
        if isinstance(driver, int):
            raise pynvml.NVMLError(driver)

    def is_available() -> bool:
        if reason:
            warnings.warn(reason, stacklevel=1)
        return usable

    monkeypatch.setattr(pynvml, "nvmlInit", init)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 1)
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card")


NONE = pynvml.NVML_ERROR_LIBRARY_NOT_FOUND


@pytest.mark.parametrize("driver", [NONE, pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "580.65.06"])
@pytest.mark.parametrize("cuda", ["13.0", None])
def test_a_cpu_is_taken_where_it_is_named_or_alone(
    monkeypatch: pytest.MonkeyPatch, driver: str | int, cuda: str | None
) -> None:
    machine(monkeypatch, driver, cuda)
    assert choose_device("cpu") == "cpu"
    if isinstance(driver, int):
        assert choose_device("auto") == "cpu"


@pytest.mark.parametrize("driver", ["580.65.06", NONE])  # NVML may be missing in a container that can compute
@pytest.mark.parametrize(("capability", "cuda"), [((8, 0), "13.0"), ((8, 9), "12.6"), ((12, 0), "13.0")])
def test_a_gpu_that_can_be_used_is_used(
    monkeypatch: pytest.MonkeyPatch, driver: str | int, capability: tuple[int, int], cuda: str
) -> None:
    machine(monkeypatch, driver, cuda, usable=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert choose_device("auto") == choose_device("cuda") == "cuda" and choose_device("cpu") == "cpu"


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
@pytest.mark.parametrize(
    ("driver", "cuda", "reason", "line"),
    [
        (
            "570.86.15",
            "13.0",
            "too old",
            "driver 570.86.15 is too old for PyTorch's CUDA 13; update it to 580 or newer",
        ),
        ("520.61.05", "12.6", "", "driver 520.61.05 is too old for PyTorch's CUDA 12; update it to 525 or newer"),
        ("580.65.06", None, "", "PyTorch's CPU build; install the CUDA build"),
        ("550.54.14", None, "", "PyTorch's CPU build; install the CUDA build"),
        ("580.65.06", "13.0", "Error 802\nmore", r"PyTorch cannot use it \(Error 802\); see what nvidia-smi says"),
        ("550.54.14", "12.6", "", r"PyTorch cannot use it \(CUDA_VISIBLE_DEVICES may hide it\)"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "13.0", "", "does not answer .*mismatch.*: restart the machine"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_one_line_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, wanted: str, driver: str | int, cuda: str | None, reason: str, line: str
) -> None:
    machine(monkeypatch, driver, cuda, reason=reason)
    with pytest.raises(ModelError, match=f"^.*{line}.*or set DEVICE=cpu$"):
        choose_device(wanted)


def test_cuda_without_any_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, NONE, None)
    with pytest.raises(ModelError, match=r"^DEVICE=cuda: no NVIDIA GPU is seen; install .* or set DEVICE=cpu$"):
        choose_device("cuda")


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_a_gpu_older_than_ampere_is_one_line(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    machine(monkeypatch, "580.65.06", usable=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ModelError, match=r"^DEVICE=.*: Card has compute capability 7\.5; use .* or set DEVICE=cpu$"):
        choose_device(wanted)


def test_without_nvidias_library_the_gauges_stay_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    metrics = Metrics()
    assert not watch(metrics)
    assert metrics.registry.get_sample_value("llm_gpu_memory_bytes") == 0


def test_the_gauges_follow_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = SimpleNamespace(used=1 << 30, gpu=40)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda gpu: figures)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", lambda gpu: figures)
    metrics = Metrics()
    assert watch(metrics)
    figures.used = 2 << 30
    assert metrics.registry.get_sample_value("llm_gpu_memory_bytes") == 2 << 30
    assert metrics.registry.get_sample_value("llm_gpu_utilisation_ratio") == 0.4


def test_a_card_that_fails_does_not_take_the_metrics_down(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(gpu: object) -> SimpleNamespace:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", unsupported)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", unsupported)
    metrics = Metrics()
    assert watch(metrics)
    value = metrics.registry.get_sample_value("llm_gpu_utilisation_ratio")
    assert value is not None and math.isnan(value)
