"""CPU, memory, disk and shared memory of a pod, if the job does not set them.

Each value has this order: the node pool, `resources.perGpu` (only for pods with GPUs), `resources`, and last the built-in values of this module.

The built-in values for GPUs are chosen so that a pod fits on the smallest machines that clouds offer with its number of GPUs: 4 CPUs and 15 GiB
of memory with one T4, 4 CPUs and 16 GiB with one A10G or L4. The machine's own components need a part of this. With a larger GPU, a pod needs
more memory, because each rank loads weights and collects the state for checkpoints in the host's memory. All machines of the large clouds have
at least two thirds of the GPUs' memory as host memory, so half of it fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_api.quantities import parse_amount

POD_DEFAULTS = {"cpu": "1", "memory": "4Gi", "ephemeral_storage": "20Gi", "shared_memory": "1Gi"}
"""Built-in values of a pod without GPUs. GPU pods had the same values before release 0.2.0."""
GPU_CPUS = 3
GPU_MEMORY_GIB = 10
GPU_SHARED_MEMORY_GIB = 2
"""NCCL and DeepSpeed exchange data between the ranks of a pod in /dev/shm."""
GIB = 2**30


@dataclass(frozen=True)
class ConfiguredResources:
    """The quantities that the operator's configuration sets, by the names of POD_DEFAULTS."""

    pool: Mapping[str, Any] = field(default_factory=dict)
    per_gpu: Mapping[str, Any] = field(default_factory=dict)
    general: Mapping[str, Any] = field(default_factory=dict)


def whole_gpus(gpu_resource: str, gpus: int) -> int:
    """Return the number of whole GPUs. MIG slices (parts of a GPU) count as none: their pods get the same values as pods without GPUs."""
    return 0 if "/mig-" in gpu_resource else gpus


def resources_of_pod(
    gpus: int, gpu_memory: str | int | None, configured: ConfiguredResources, *, has_former_defaults: bool = False
) -> dict[str, str]:
    """Return each quantity of POD_DEFAULTS for a pod with this number of whole GPUs.

    `gpu_memory`: the memory of one GPU, if the pool says it. `has_former_defaults`: the job began with the built-in values before release 0.2.0.
    """
    built_in = POD_DEFAULTS if gpus == 0 or has_former_defaults else _gpu_defaults(gpus, gpu_memory)
    layers = (configured.pool, _times_gpus(configured.per_gpu, gpus), configured.general)
    return {name: str(next((layer[name] for layer in layers if layer.get(name) is not None), built_in[name])) for name in POD_DEFAULTS}


def _gpu_defaults(gpus: int, gpu_memory: str | int | None) -> dict[str, str]:
    gpu_memory_gib = int(parse_amount(str(gpu_memory)) / GIB) if gpu_memory is not None else 0
    return {
        "cpu": str(GPU_CPUS * gpus),
        "memory": f"{max(GPU_MEMORY_GIB, gpu_memory_gib // 2) * gpus}Gi",
        "ephemeral_storage": POD_DEFAULTS["ephemeral_storage"],
        "shared_memory": f"{GPU_SHARED_MEMORY_GIB * gpus}Gi",
    }


def _times_gpus(per_gpu: Mapping[str, Any], gpus: int) -> dict[str, str]:
    """The configured values per GPU, multiplied by the number of GPUs, as whole millicores or bytes."""
    if gpus == 0:
        return {}
    return {
        name: f"{int(parse_amount(str(value)) * 1000 * gpus)}m" if name == "cpu" else str(int(parse_amount(str(value)) * gpus))
        for name, value in per_gpu.items()
        if value is not None
    }
