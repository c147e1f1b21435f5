"""NVIDIA GPUs, where the driver's management library (NVML) is present."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from typing import Any

from sutazai.tasks.hardware_resource_optimizer.reading import Gpu


@cache
def _library() -> Any | None:
    """Return NVML ready for use; None, remembered, without the Python package or a driver."""
    try:
        import pynvml  # noqa: PLC0415 - an optional extra

        pynvml.nvmlInit()
    except Exception:  # noqa: BLE001, RUF100 - whatever is wrong with the driver, there is no GPU
        return None
    return pynvml


def read() -> list[Gpu]:
    """Return every GPU's usage; empty without NVML."""
    nvml = _library()
    if nvml is None:
        return []
    found = []
    for index in range(nvml.nvmlDeviceGetCount()):
        # A GPU that fell off the bus must not take the whole reading with it.
        with suppress(nvml.NVMLError):
            found.append(_read_one(nvml, index))
    return found


def _read_one(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    name = nvml.nvmlDeviceGetName(handle)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    gpu = Gpu(
        index=index,
        name=name.decode() if isinstance(name, bytes) else name,
        utilization_percent=nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        memory_total=memory.total,
        memory_used=memory.used,
    )
    # Not every model has these sensors.
    with suppress(nvml.NVMLError):
        gpu.temperature_celsius = nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
    with suppress(nvml.NVMLError):
        gpu.power_watts = nvml.nvmlDeviceGetPowerUsage(handle) / 1000
    return gpu
