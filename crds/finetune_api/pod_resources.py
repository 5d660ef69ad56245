"""Defaults for the CPU, memory, disk and shared memory of a pod.

If the job does not set a quantity, it comes from the operator's configuration: from the job's node pool, else from `resources.perGpu` (only for pods
with GPUs), else from `resources`. If none of these three sets the quantity, the built-in value of this module applies.

With the built-in values, a pod with GPUs fits on the smallest cloud machine with this number of GPUs: 4 CPUs and 15 GiB of memory with one T4,
4 CPUs and 16 GiB with one A10G or L4. The built-in values are lower than these sizes, because the kubelet and the system need a part of the machine. A pod with
larger GPUs needs more memory, because each rank loads weights and collects the state for checkpoints in host memory. The built-in memory of a pod with GPUs is
at least half of the memory of its GPUs. A pod of this size fits on its machine, because machines of the large clouds have at least two thirds as much host
memory as GPU memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_api.quantities import parse_amount

POD_DEFAULTS = {"cpu": "1", "memory": "4Gi", "ephemeral_storage": "20Gi", "shared_memory": "1Gi"}
"""Built-in quantity of each resource, for a pod without GPUs. Before release 0.2.0, pods with GPUs had the same quantities."""
CPUS_PER_GPU = 3
MIN_MEMORY_GIB_PER_GPU = 10
SHARED_MEMORY_GIB_PER_GPU = 2
"""Size of /dev/shm for each GPU. NCCL and DeepSpeed use /dev/shm to exchange data between the ranks of a pod."""
GIBIBYTE = 2**30


@dataclass(frozen=True)
class ConfiguredResources:
    """The quantities that the operator's configuration sets. All keys are keys of POD_DEFAULTS."""

    pool_quantities: Mapping[str, Any] = field(default_factory=dict)
    """Quantities for each pod in the job's node pool."""
    quantities_per_gpu: Mapping[str, Any] = field(default_factory=dict)
    """Quantities for each GPU of a pod, in any pool."""
    platform_quantities: Mapping[str, Any] = field(default_factory=dict)
    """Quantities for each pod, in any pool."""


def count_whole_gpus(gpu_resource: str, gpu_count: int) -> int:
    """Return the number of whole GPUs of a pod. A pod with MIG slices (parts of a GPU) has 0 whole GPUs, and gets the same defaults as a pod without GPUs."""
    return 0 if "/mig-" in gpu_resource else gpu_count


def choose_pod_resources(
    gpu_count: int, gpu_memory: str | int | None, configured_resources: ConfiguredResources, *, has_former_defaults: bool = False
) -> dict[str, str]:
    """Return the default quantity of each pod resource (the keys of POD_DEFAULTS), from the operator's configuration or the built-in values.

    `gpu_count`: number of whole GPUs of the pod. `gpu_memory`: memory of one GPU, if the node pool sets it. `has_former_defaults`: whether the job
    began before release 0.2.0 and keeps the built-in values of the earlier releases.
    """
    built_in_quantities = POD_DEFAULTS if gpu_count == 0 or has_former_defaults else _compute_gpu_defaults(gpu_count, gpu_memory)
    quantities_by_precedence = (
        configured_resources.pool_quantities, _multiply_by_gpus(configured_resources.quantities_per_gpu, gpu_count), configured_resources.platform_quantities,
    )  # fmt: skip
    return {
        name: str(next((quantities[name] for quantities in quantities_by_precedence if quantities.get(name) is not None), built_in_quantities[name]))
        for name in POD_DEFAULTS
    }


def _compute_gpu_defaults(gpu_count: int, gpu_memory: str | int | None) -> dict[str, str]:
    gpu_memory_gib = int(parse_amount(str(gpu_memory)) / GIBIBYTE) if gpu_memory is not None else 0
    return {
        "cpu": str(CPUS_PER_GPU * gpu_count),
        "memory": f"{max(MIN_MEMORY_GIB_PER_GPU, gpu_memory_gib // 2) * gpu_count}Gi",
        "ephemeral_storage": POD_DEFAULTS["ephemeral_storage"],
        "shared_memory": f"{SHARED_MEMORY_GIB_PER_GPU * gpu_count}Gi",
    }


def _multiply_by_gpus(quantities_per_gpu: Mapping[str, Any], gpu_count: int) -> dict[str, str]:
    """Return the quantities of a pod, in whole millicores or bytes: the quantities per GPU, multiplied by the number of GPUs. Empty without GPUs."""
    if gpu_count == 0:
        return {}
    return {
        name: f"{int(parse_amount(str(quantity)) * 1000 * gpu_count)}m" if name == "cpu" else str(int(parse_amount(str(quantity)) * gpu_count))
        for name, quantity in quantities_per_gpu.items()
        if quantity is not None
    }
