"""Computes the default CPU, memory, disk and shared memory of a training pod. `finetune_api.pod_resources` has the built-in values and says which
source takes precedence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_api.pod_resources import POD_DEFAULTS, ConfiguredResources, choose_pod_resources, count_whole_gpus
from finetune_api.rules import gpus_per_node
from finetune_api.spec import FineTuneJobSpec

from finetune_operator.settings import NodePool, OperatorConfig


def compute_default_resources(
    spec: FineTuneJobSpec, config: OperatorConfig, pool: NodePool | None, recorded_defaults: Mapping[str, Any]
) -> dict[str, str]:
    """Return the default quantity of each pod resource (the keys of POD_DEFAULTS): from the pool, the operator's configuration or built-in values.

    `recorded_defaults`: the defaults of the job's first attempt, by spec path.
    """
    pool_quantities = _read_quantities(pool.resources) if pool else {}
    configured_resources = ConfiguredResources(pool_quantities, _read_quantities(config.resources.per_gpu), _read_quantities(config.resources))
    gpu_resource = spec.resources.gpu_resource or (pool.gpu_resource if pool else "")
    gpu_count = count_whole_gpus(gpu_resource, gpus_per_node(spec))
    return choose_pod_resources(
        gpu_count, pool.gpu_memory if pool else None, configured_resources, has_former_defaults=_has_former_defaults(recorded_defaults)
    )


def _has_former_defaults(recorded_defaults: Mapping[str, Any]) -> bool:
    """Whether the job's first attempt had the default CPU and memory of releases before 0.2.0.

    If so, later attempts keep these values, so that they fit on the same nodes.
    """
    return recorded_defaults.get("resources.cpu") == POD_DEFAULTS["cpu"] and recorded_defaults.get("resources.memory") == POD_DEFAULTS["memory"]


def _read_quantities(section: Any) -> dict[str, Any]:
    """Return the quantities in a section of the configuration, with None for each absent quantity."""
    return {name: getattr(section, name, None) for name in POD_DEFAULTS}
