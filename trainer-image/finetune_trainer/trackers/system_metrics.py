"""Samples how much CPU, memory and GPU the pod uses. The values have the names of MLflow's system metrics."""

from __future__ import annotations

import psutil

from finetune_trainer.usage import open_nvml, read_container_memory

MEGABYTE = 1e6


class SystemSampler:
    """Reads the current usage. If NVML, a library of the GPU driver, is missing, no GPU values are read."""

    def __init__(self) -> None:
        self._nvml = open_nvml()
        psutil.cpu_percent(None)  # the first call only starts the measurement

    def sample(self) -> dict[str, float]:
        """Return the current usage by the name of the metric. CPU usage is the mean since the last call."""
        used_bytes, total_bytes = read_container_memory()
        values = {
            "system/cpu_utilization_percentage": psutil.cpu_percent(None),
            "system/system_memory_usage_megabytes": round(used_bytes / MEGABYTE, 1),
            "system/system_memory_usage_percentage": round(100 * used_bytes / total_bytes, 1),
        }
        for gpu in self._nvml.read() if self._nvml is not None else ():
            if gpu.utilization_percent is not None:
                values[f"system/gpu_{gpu.index}_utilization_percentage"] = gpu.utilization_percent
            if gpu.memory_used_bytes is not None and gpu.memory_total_bytes:
                values[f"system/gpu_{gpu.index}_memory_usage_megabytes"] = round(gpu.memory_used_bytes / MEGABYTE, 1)
                values[f"system/gpu_{gpu.index}_memory_usage_percentage"] = round(100 * gpu.memory_used_bytes / gpu.memory_total_bytes, 1)
        return values
