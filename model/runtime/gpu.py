"""The GPU's own figures, read when /metrics is. Without a GPU or NVIDIA's library the gauges stay at zero."""

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
    metrics.gpu_memory.set_function(lambda: _figure(lambda: float(pynvml.nvmlDeviceGetMemoryInfo(gpu).used)))
    metrics.gpu_utilisation.set_function(lambda: _figure(lambda: pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100))
    return True


def _figure(ask: Callable[[], float]) -> float:
    """NaN from a card that fails, which must not take all of /metrics down with it."""
    try:
        return ask()
    except pynvml.NVMLError:
        return math.nan
