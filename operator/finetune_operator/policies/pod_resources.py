"""CPU, memory, disk and shared memory of a pod, if the job does not set them. `finetune_api.pod_resources` has the order and the built-in values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_api.pod_resources import POD_DEFAULTS, ConfiguredResources, resources_of_pod, whole_gpus
from finetune_api.rules import gpus_per_node
from finetune_api.spec import FineTuneJobSpec

from finetune_operator.settings import NodePool, OperatorConfig


def default_resources(
    spec: FineTuneJobSpec, config: OperatorConfig, pool: NodePool | None, recorded_defaults: Mapping[str, Any]
) -> dict[str, str]:
    """Return the default for each field of POD_DEFAULTS. `recorded_defaults`: the defaults of the job's first attempt, by spec path."""
    configured = ConfiguredResources(_fields(pool.resources) if pool else {}, _fields(config.resources.per_gpu), _fields(config.resources))
    gpu_resource = spec.resources.gpu_resource or (pool.gpu_resource if pool else "")
    gpus = whole_gpus(gpu_resource, gpus_per_node(spec))
    return resources_of_pod(
        gpus, pool.gpu_memory if pool else None, configured, has_former_defaults=_has_former_defaults(recorded_defaults)
    )


def _has_former_defaults(recorded_defaults: Mapping[str, Any]) -> bool:
    """Whether the job's first attempt had the values before release 0.2.0.

    If so, the next attempts keep these values, so that they fit on the same nodes.
    """
    return recorded_defaults.get("resources.cpu") == POD_DEFAULTS["cpu"] and recorded_defaults.get("resources.memory") == POD_DEFAULTS["memory"]


def _fields(settings: Any) -> dict[str, Any]:
    """Return the quantities that are set in `resources`, `perGpu` or a pool."""
    return {name: getattr(settings, name, None) for name in POD_DEFAULTS}
