"""What the GPU says of itself, read when /metrics is.

Decides nothing by it. Without a GPU, or without NVIDIA's library, the gauges stay at zero.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import pynvml

from telemetry import Metrics

_log = logging.getLogger(__name__)


def watch(metrics: Metrics) -> bool:
    """Let the gauges follow the first GPU; whether there is one."""
    try:
        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
    except pynvml.NVMLError as error:
        _log.info("no GPU metrics: %s", error)
        return False
    metrics.gpu_memory.set_function(_figure(lambda: float(pynvml.nvmlDeviceGetMemoryInfo(gpu).used)))
    metrics.gpu_utilisation.set_function(_figure(lambda: pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100))
    return True


def _figure(ask: Callable[[], float]) -> Callable[[], float]:
    """What the card answers, or NaN: one that fails must not take all of /metrics down with it."""

    def answer() -> float:
        try:
            return ask()
        except pynvml.NVMLError:
            return math.nan

    return answer
