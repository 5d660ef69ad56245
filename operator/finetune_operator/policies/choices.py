"""Lists the node pools from which the preparation of a job may choose, and checks the values that the preparation has chosen.

The preparation makes the choices (`finetune_api.memory.choices`), because only its pod has the model and the data. A preparation's report may contain any
value. So the operator accepts only choices for fields that the user left out, and only values that it would accept from the user.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_api.gpus import GPU_TYPES
from finetune_api.memory.choices import CHOSEN_FIELDS
from finetune_api.memory.plan import POOL_PATH
from finetune_api.pod import GpuPool
from finetune_api.quantities import parse_amount
from finetune_api.rules import check_spec, effective_batch, gpus_per_node, gpus_per_pod
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import Choice, RunPlan
from finetune_api.tenancy import check_policy
from pydantic import ValidationError

from finetune_operator.policies.placement import choose_pool, find_placement_problems
from finetune_operator.policies.verdict import AcceptedSpec
from finetune_operator.settings import NodePool, OperatorConfig

logger = logging.getLogger(__name__)


def get_chosen_values(plan: RunPlan | None) -> dict[str, Any]:
    """Return the values that the plan has chosen, by spec path."""
    return {choice.field: choice.value for choice in (plan.choices if plan is not None else None) or []}


def list_pools_to_choose(spec: FineTuneJobSpec, accepted_spec: AcceptedSpec, config: OperatorConfig, namespace: str) -> list[GpuPool]:
    """Return the pools from which a job may choose. A job that names a pool may use only this pool. `spec`: as the user wrote it."""
    current_pool = accepted_spec.pool
    if gpus_per_node(spec) == 0:
        return []
    return [
        GpuPool(
            name=pool.name, memory_bytes=_find_memory_bytes(pool), gpu_type=pool.gpu_type, price_per_gpu_hour=pool.price_per_gpu_hour,
            gpus_per_node=_compute_max_gpus(spec, pool, config, namespace), is_current=current_pool is not None and pool.name == current_pool.name,
        )
        for pool in config.node_pools
        if pool.gpu_resource == accepted_spec.spec.resources.gpu_resource and _is_allowed(spec.with_values({POOL_PATH: pool.name}), config, namespace)
    ]  # fmt: skip


def _is_allowed(spec: FineTuneJobSpec, config: OperatorConfig, namespace: str) -> bool:
    """Whether the operator would accept the pool that the spec names."""
    pool = choose_pool(spec, config)
    has_price = spec.policy.max_cost is None or (isinstance(pool, NodePool) and pool.price_per_gpu_hour is not None)
    if not isinstance(pool, NodePool) or not has_price or list(find_placement_problems(spec, pool, config)):
        return False
    return not check_policy(spec, config.policy.rules_for(namespace), config.build_platform(namespace))


def _find_memory_bytes(pool: NodePool) -> int | None:
    """Return the bytes of one GPU: the lower value of `gpuMemory` and the memory of `gpuType`.

    `gpuMemory` may be rounded up, and a GPU slice has only a part of the memory of its type.
    """
    sizes_bytes = [int(parse_amount(str(pool.gpu_memory)))] if pool.gpu_memory is not None else []
    sizes_bytes += [GPU_TYPES[pool.gpu_type].memory_bytes] if pool.gpu_type is not None else []
    return min(sizes_bytes, default=None)


def _compute_max_gpus(spec: FineTuneJobSpec, pool: NodePool, config: OperatorConfig, namespace: str) -> int:
    max_gpus = config.policy.rules_for(namespace).max_gpus
    allowed_gpu_count = pool.gpus_per_node if max_gpus is None else min(pool.gpus_per_node, max_gpus // (spec.resources.nodes or 1))
    server_gpu_count = gpus_per_pod(spec) - gpus_per_node(spec)
    return max(allowed_gpu_count - server_gpu_count, gpus_per_node(spec))


def accept_choices(
    reported_choices: Sequence[Choice] | None, spec: FineTuneJobSpec, accepted_spec: AcceptedSpec, config: OperatorConfig, namespace: str
) -> list[Choice] | None:
    """Return the reported choices of a preparation, or None if one of them cannot be used. `spec`: as the user wrote it."""
    if not reported_choices:
        return None
    values_by_path = {choice.field: choice.value for choice in reported_choices}
    problem = _describe_unusable_choice(values_by_path, spec, accepted_spec, config, namespace)
    if problem:
        logger.warning("the choices of the preparation are ignored: %s", problem)
        return None
    return list(reported_choices)


def _describe_unusable_choice(
    values_by_path: Mapping[str, Any], spec: FineTuneJobSpec, accepted_spec: AcceptedSpec, config: OperatorConfig, namespace: str
) -> str:
    for path in values_by_path:
        if path not in CHOSEN_FIELDS or spec.value(path) is not None:
            return f"{path} is not a field that the plan may choose"
    try:
        chosen_spec = spec.with_values(values_by_path)
    except ValidationError as error:
        return str(error)
    problems = [problem for problem in check_spec(chosen_spec) if problem not in check_spec(spec)]
    pools = {pool.name: pool for pool in list_pools_to_choose(spec, accepted_spec, config, namespace)}
    pool = pools.get(str(values_by_path.get(POOL_PATH, accepted_spec.pool.name if accepted_spec.pool else "")))
    if problems:
        return str(problems[0])
    if pool is None or gpus_per_node(chosen_spec) > pool.gpus_per_node or gpus_per_node(chosen_spec) < 1:
        return f"{POOL_PATH} or resources.gpusPerNode is not allowed"
    if effective_batch(chosen_spec) != effective_batch(spec):
        return f"the effective batch would change from {effective_batch(spec)} to {effective_batch(chosen_spec)}"
    return ""
