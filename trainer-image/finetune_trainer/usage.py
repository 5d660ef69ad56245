"""Reads the current memory usage and GPU usage of the pod."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from pathlib import Path

import psutil
from finetune_api.pod import GpuUsage, PodUsage

CGROUP_FOLDER = Path("/sys/fs/cgroup")


class UsageReader:
    """Reads the usage of memory and GPUs on request. NVML is loaded at the first request, because its initialisation can take seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._nvml: Nvml | None = None
        self._is_open = False

    def read(self) -> PodUsage:
        """Return the current usage. Thread-safe."""
        with self._lock:
            if not self._is_open:
                self._nvml, self._is_open = open_nvml(), True
            gpu_usages = self._nvml.read() if self._nvml is not None else []
        used_bytes, total_bytes = read_container_memory()
        return PodUsage(memory_used_bytes=used_bytes, memory_total_bytes=total_bytes, gpus=gpu_usages)


def read_container_memory(cgroup: Path = CGROUP_FOLDER) -> tuple[int, int]:
    """Return used and total memory in bytes: of the container if it has a limit, otherwise of the machine."""
    with contextlib.suppress(OSError, ValueError):
        return int((cgroup / "memory.current").read_text()), int((cgroup / "memory.max").read_text())
    memory = psutil.virtual_memory()
    return memory.total - memory.available, memory.total


class _Utilization(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class Nvml:
    """Calls the few functions of NVML that the trainer needs. NVML is a library of the GPU driver, so no Python package is needed."""

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

    def read(self) -> list[GpuUsage]:
        """Return the usage of each GPU. A value that the driver does not report, for example for MIG slices, is None."""
        usages = []
        for index, device in enumerate(self._devices):
            utilization, memory = _Utilization(), _Memory()
            has_utilization = self._library.nvmlDeviceGetUtilizationRates(device, ctypes.byref(utilization)) == 0
            has_memory = self._library.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) == 0
            usages.append(
                GpuUsage(
                    index=index, utilization_percent=float(utilization.gpu) if has_utilization else None,
                    memory_used_bytes=memory.used if has_memory else None, memory_total_bytes=memory.total if has_memory else None,
                )
            )  # fmt: skip
        return usages


def open_nvml() -> Nvml | None:
    """Load NVML. Returns None if the machine has no NVIDIA driver."""
    try:
        return Nvml(ctypes.CDLL("libnvidia-ml.so.1"))
    except (OSError, AttributeError):
        return None
