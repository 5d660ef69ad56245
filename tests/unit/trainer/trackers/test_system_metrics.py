"""The usage of CPU, memory and GPUs is sampled."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
from finetune_api.pod import GpuUsage
from finetune_trainer import usage
from finetune_trainer.trackers import system_metrics
from finetune_trainer.trackers.system_metrics import SystemSampler
from finetune_trainer.usage import Nvml, UsageReader, _Memory, _Utilization, read_container_memory


def test_host_values_are_plausible() -> None:
    host_values = SystemSampler().sample()
    assert 0 <= host_values["system/cpu_utilization_percentage"] <= 100
    assert 0 < host_values["system/system_memory_usage_percentage"] < 100
    assert host_values["system/system_memory_usage_megabytes"] > 10


def test_memory_is_that_of_a_container_with_a_limit(tmp_path: Path) -> None:
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("4000\n")
    assert read_container_memory(tmp_path) == (1000, 4000)
    (tmp_path / "memory.max").write_text("max\n")
    assert read_container_memory(tmp_path)[1] > 4000


class FakeNvml:
    """The functions of NVML for two GPUs. The second GPU does not report its utilization."""

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:  # noqa: N802
        ctypes.cast(count, ctypes.POINTER(ctypes.c_uint))[0] = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, device: Any) -> int:  # noqa: N802
        ctypes.cast(device, ctypes.POINTER(ctypes.c_void_p))[0] = index + 1
        return 0

    def nvmlDeviceGetUtilizationRates(self, device: ctypes.c_void_p, rates: Any) -> int:  # noqa: N802
        ctypes.cast(rates, ctypes.POINTER(_Utilization))[0].gpu = 40
        return 0 if device.value == 1 else 3

    def nvmlDeviceGetMemoryInfo(self, device: ctypes.c_void_p, memory: Any) -> int:  # noqa: N802
        info = ctypes.cast(memory, ctypes.POINTER(_Memory))[0]
        info.total, info.used = 80_000_000_000, 20_000_000_000
        return 0


def test_gpu_values_are_read_with_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_metrics, "open_nvml", lambda: Nvml(FakeNvml()))  # type: ignore[arg-type]
    gpu_values = {name: value for name, value in SystemSampler().sample().items() if "/gpu_" in name}
    assert gpu_values == {
        "system/gpu_0_utilization_percentage": 40.0, "system/gpu_0_memory_usage_megabytes": 20000.0,
        "system/gpu_0_memory_usage_percentage": 25.0, "system/gpu_1_memory_usage_megabytes": 20000.0,
        "system/gpu_1_memory_usage_percentage": 25.0,
    }  # fmt: skip


def test_usage_contains_memory_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    open_calls: list[int] = []
    monkeypatch.setattr(usage, "open_nvml", lambda: open_calls.append(1) or Nvml(FakeNvml()))  # type: ignore[arg-type, func-returns-value]
    reader = UsageReader()
    assert open_calls == []
    assert reader.read().gpus == reader.read().gpus == [
        GpuUsage(index=0, utilization_percent=40.0, memory_used_bytes=20_000_000_000, memory_total_bytes=80_000_000_000),
        GpuUsage(index=1, memory_used_bytes=20_000_000_000, memory_total_bytes=80_000_000_000),
    ]
    assert open_calls == [1]
    assert 0 < (reader.read().memory_used_bytes or 0) < (reader.read().memory_total_bytes or 0)
