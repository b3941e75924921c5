"""What the GPU says of itself, read when /metrics is.

Decides nothing by it. Without a GPU, or without NVIDIA's library, the gauges stay at zero.
"""

from __future__ import annotations

import logging

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
    metrics.gpu_memory.set_function(lambda: float(pynvml.nvmlDeviceGetMemoryInfo(gpu).used))
    metrics.gpu_utilisation.set_function(lambda: pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100)
    return True
