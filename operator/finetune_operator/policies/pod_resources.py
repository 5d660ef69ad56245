"""Computes the CPU, memory, disk and shared memory of a pod if the job does not set them.

Each value comes from the first of these sources that has it: the node pool, `resources.perGpu` of the configuration (only for pods with
GPUs), `resources` of the configuration, and the built-in values of this module.

The built-in values for GPUs are chosen so that a pod fits on the smallest machines that clouds offer with its number of GPUs: 4 CPUs and 15 GiB
of memory with one T4, 4 CPUs and 16 GiB with one A10G or L4. The pod gets less than that, because the components of the node also need CPU
and memory. With a larger GPU, a pod needs more memory, because each rank loads weights and collects the state for checkpoints in the host's
memory. The default host memory is therefore half of the GPU memory. This fits, because the host memory of all GPU machines of the large
clouds is at least two thirds of their GPU memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_api.quantities import parse_amount
from finetune_api.rules import gpus_per_node
from finetune_api.spec import FineTuneJobSpec

from finetune_operator.settings import NodePool, OperatorConfig

POD_DEFAULTS = {"cpu": "1", "memory": "4Gi", "ephemeral_storage": "20Gi", "shared_memory": "1Gi"}
"""Built-in values of a pod without GPUs. GPU pods had the same values before release 0.2.0."""
GPU_CPUS = 3
GPU_MEMORY_GIB = 10
GPU_SHARED_MEMORY_GIB = 2
"""NCCL and DeepSpeed exchange data between the ranks of a pod in /dev/shm."""
GIB = 2**30


def default_resources(
    spec: FineTuneJobSpec, config: OperatorConfig, pool: NodePool | None, recorded_defaults: Mapping[str, Any]
) -> dict[str, str]:
    """Return the default for each field of POD_DEFAULTS. `recorded_defaults`: the defaults of the job's first attempt, by spec path."""
    gpus = _whole_gpus(spec, pool)
    built_in = POD_DEFAULTS if gpus == 0 or _has_former_defaults(recorded_defaults) else _gpu_defaults(gpus, pool)
    configured = [_fields(pool.resources) if pool else {}, _per_gpu_resources(config, gpus), _fields(config.resources)]
    return {name: str(next((values[name] for values in configured if name in values), built_in[name])) for name in POD_DEFAULTS}


def _whole_gpus(spec: FineTuneJobSpec, pool: NodePool | None) -> int:
    """Return the number of whole GPUs of the pod. 0 for MIG slices (parts of a GPU): their pods get the same values as pods without GPUs."""
    resource = spec.resources.gpu_resource or (pool.gpu_resource if pool else "")
    return 0 if "/mig-" in resource else gpus_per_node(spec)


def _has_former_defaults(recorded_defaults: Mapping[str, Any]) -> bool:
    """Whether the job's first attempt had the values before release 0.2.0.

    If so, the next attempts keep these values, so that they fit on the same nodes.
    """
    return recorded_defaults.get("resources.cpu") == POD_DEFAULTS["cpu"] and recorded_defaults.get("resources.memory") == POD_DEFAULTS["memory"]


def _gpu_defaults(gpus: int, pool: NodePool | None) -> dict[str, str]:
    gpu_memory_gib = int(parse_amount(str(pool.gpu_memory)) / GIB) if pool and pool.gpu_memory is not None else 0
    return {
        "cpu": str(GPU_CPUS * gpus),
        "memory": f"{max(GPU_MEMORY_GIB, gpu_memory_gib // 2) * gpus}Gi",
        "ephemeral_storage": POD_DEFAULTS["ephemeral_storage"],
        "shared_memory": f"{GPU_SHARED_MEMORY_GIB * gpus}Gi",
    }


def _per_gpu_resources(config: OperatorConfig, gpus: int) -> dict[str, str]:
    """Return the configured values per GPU, multiplied by the number of GPUs, as whole millicores or bytes."""
    if gpus == 0:
        return {}
    values = _fields(config.resources.per_gpu)
    return {
        name: f"{int(parse_amount(str(value)) * 1000 * gpus)}m" if name == "cpu" else str(int(parse_amount(str(value)) * gpus))
        for name, value in values.items()
    }


def _fields(settings: Any) -> dict[str, Any]:
    """Return the quantities that are set in `resources`, `perGpu` or a pool."""
    return {name: getattr(settings, name) for name in POD_DEFAULTS if getattr(settings, name, None) is not None}
