"""GPU gauges: the card's own figures where there is one, zeros elsewhere."""

import math
from types import SimpleNamespace

import pynvml
import pytest

from model.runtime.gpu import watch
from telemetry import Metrics


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
