"""Samples the usage of CPU, memory and GPUs of the pod. The names are those of MLflow's system metrics."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

import psutil

MEGABYTE = 1e6
CGROUP = Path("/sys/fs/cgroup")


class SystemSampler:
    """Reads the current usage. GPU values come from NVML, the driver's library; without it there are only host values."""

    def __init__(self) -> None:
        self._nvml = _open_nvml()
        psutil.cpu_percent(None)  # the first call only starts the measurement

    def sample(self) -> dict[str, float]:
        """Return the usage since the last call: values by name."""
        used, total = container_memory()
        values = {
            "system/cpu_utilization_percentage": psutil.cpu_percent(None),
            "system/system_memory_usage_megabytes": round(used / MEGABYTE, 1),
            "system/system_memory_usage_percentage": round(100 * used / total, 1),
        }
        return values | (self._nvml.sample() if self._nvml is not None else {})


def container_memory(cgroup: Path = CGROUP) -> tuple[int, int]:
    """Used and available memory in bytes: those of the container if it has a limit, otherwise those of the machine."""
    with contextlib.suppress(OSError, ValueError):
        return int((cgroup / "memory.current").read_text()), int((cgroup / "memory.max").read_text())
    memory = psutil.virtual_memory()
    return memory.total - memory.available, memory.total


class _Utilization(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _Nvml:
    """The few functions of NVML that are needed. The library is part of the driver, so no package is needed."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._devices: list[ctypes.c_void_p] = []
        count = ctypes.c_uint()
        if library.nvmlInit_v2() != 0 or library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return
        for index in range(count.value):
            device = ctypes.c_void_p()
            if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) == 0:
                self._devices.append(device)

    def sample(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for index, device in enumerate(self._devices):
            utilization, memory = _Utilization(), _Memory()
            if self._library.nvmlDeviceGetUtilizationRates(device, ctypes.byref(utilization)) == 0:
                values[f"system/gpu_{index}_utilization_percentage"] = float(utilization.gpu)
            if self._library.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) == 0:
                values[f"system/gpu_{index}_memory_usage_megabytes"] = round(memory.used / MEGABYTE, 1)
                values[f"system/gpu_{index}_memory_usage_percentage"] = round(100 * memory.used / memory.total, 1)
        return values


def _open_nvml() -> _Nvml | None:
    try:
        return _Nvml(ctypes.CDLL("libnvidia-ml.so.1"))
    except (OSError, AttributeError):
        return None
