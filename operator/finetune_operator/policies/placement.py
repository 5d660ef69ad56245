"""Chooses a job's node pool, and finds placement values that conflict with the pool or the operator's configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from finetune_api.names import GROUP, Annotation, Label, Reason
from finetune_api.rules import NODE_CACHE, gpus_per_pod
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.cluster import Toleration

from finetune_operator.objects import DEFAULT_CONTAINER_ANNOTATION
from finetune_operator.policies.verdict import RefusedSpec
from finetune_operator.settings import NodePool, OperatorConfig

RESERVED_PREFIXES = (f"{GROUP}/", "batch.kubernetes.io/")
RESERVED_LABELS = (Label.MANAGED_BY, Label.QUEUE, "job-name", "controller-uid")
RESERVED_ANNOTATIONS = (Annotation.RUN_CONFIG, DEFAULT_CONTAINER_ANNOTATION)


def choose_pool(spec: FineTuneJobSpec, config: OperatorConfig) -> NodePool | RefusedSpec | None:
    """Return the pool that `resources.nodePool` names, or a default pool if a GPU job names none. None: the job uses no pool."""
    resources = spec.resources
    gpus_per_node_of_job = 1 if resources.gpus_per_node is None else resources.gpus_per_node
    if resources.node_pool is not None:
        pool = config.find_pool(resources.node_pool)
        if pool is None:
            message = f"spec.resources.nodePool is {resources.node_pool!r}; {_describe_pools(config)}"
            return RefusedSpec(Reason.UNKNOWN_NODE_POOL, message, "name one of these pools", is_final=False)
    else:
        pool = _find_pool_with_resource(config, resources.gpu_resource) if gpus_per_node_of_job else None
        if pool is None:
            return None
    if gpus_per_node_of_job and resources.gpu_resource is not None and resources.gpu_resource != pool.gpu_resource:
        message = f"spec.resources.gpuResource is {resources.gpu_resource}, but nodes of pool {pool.name} have {pool.gpu_resource}"
        hint = "remove gpuResource, or name a pool with this resource"
        return RefusedSpec(Reason.POOL_LACKS_RESOURCE, f"{message}; {_describe_pools(config)}", hint, is_final=False)
    if gpus_per_pod(spec) > pool.gpus_per_node:
        server_part = f" and the vLLM server needs {gpus_per_pod(spec) - gpus_per_node_of_job}" if gpus_per_pod(spec) > gpus_per_node_of_job else ""
        message = f"spec.resources.gpusPerNode is {gpus_per_node_of_job}{server_part}, but a node of pool {pool.name} has {pool.gpus_per_node}"
        hint = "lower gpusPerNode, and raise resources.nodes if the job needs more GPUs"
        return RefusedSpec(Reason.POOL_TOO_SMALL, f"{message}; {_describe_pools(config)}", hint, is_final=False)
    node_count = resources.nodes or 1
    if pool.max_nodes is not None and node_count > pool.max_nodes:
        message = f"spec.resources.nodes is {node_count}, but the maximum of pool {pool.name} is {pool.max_nodes}"
        return RefusedSpec(Reason.POOL_TOO_SMALL, f"{message}; {_describe_pools(config)}", "lower resources.nodes", is_final=False)
    return pool


def _find_pool_with_resource(config: OperatorConfig, gpu_resource: str | None) -> NodePool | None:
    """Return the default pool or, if the job names a GPU resource that this pool lacks, the first pool with the resource."""
    default_pool = config.default_pool
    if gpu_resource is None or (default_pool and default_pool.gpu_resource == gpu_resource):
        return default_pool
    return next((pool for pool in config.node_pools if pool.gpu_resource == gpu_resource), None)


def _describe_pools(config: OperatorConfig) -> str:
    if not config.node_pools:
        return "the operator's configuration has no pools"
    return f"the pools are: {', '.join(_describe_pool(pool) for pool in config.node_pools)}"


def _describe_pool(pool: NodePool) -> str:
    memory_part = f" of {pool.gpu_memory}" if pool.gpu_memory is not None else ""
    description_part = f": {pool.description}" if pool.description else ""
    return f"{pool.name} ({pool.gpus_per_node} x {pool.gpu_resource}{memory_part}{description_part})"


def find_placement_problems(spec: FineTuneJobSpec, pool: NodePool | None, config: OperatorConfig) -> Iterator[str]:
    """Yield a message for each placement value that conflicts with the pool or the operator's configuration."""
    placement, trainer = spec.placement, config.trainer
    yield from _find_selector_problems(placement.node_selector or {}, pool)
    for number, toleration in enumerate(placement.tolerations or []):
        for pool_toleration in pool.tolerations if pool else ():
            if _tolerations_conflict(toleration, pool_toleration):
                job_value, pool_value = toleration.to_wire(), pool_toleration.to_wire()
                yield f"spec.placement.tolerations[{number}] is {job_value}, but pool {pool.name if pool else ''} sets {pool_value}"
    yield from _find_metadata_problems("labels", placement.labels or {}, trainer.labels, RESERVED_LABELS)
    yield from _find_metadata_problems("annotations", placement.annotations or {}, trainer.annotations, RESERVED_ANNOTATIONS)


def find_model_cache_problems(spec: FineTuneJobSpec, namespace: str, config: OperatorConfig) -> Iterator[str]:
    """Yield a message if the job uses a model cache on the nodes, but the platform has no such cache or forbids it in this namespace."""
    if spec.model.cache == NODE_CACHE and not config.model_cache.node.is_enabled_in(namespace):
        problem_text = "no such cache" if config.model_cache.node.path is None else f"no such cache for namespace {namespace}"
        yield f"spec.model.cache is node, but the operator's configuration has {problem_text}: write pvc://claim/path, or remove model.cache"


def _find_selector_problems(node_selector: Mapping[str, str], pool: NodePool | None) -> Iterator[str]:
    for key, value in node_selector.items():
        if pool is not None and pool.node_selector.get(key, value) != value:
            yield f"spec.placement.nodeSelector.{key} is {value!r}, but pool {pool.name} selects nodes with {pool.node_selector[key]!r}"


def _find_metadata_problems(
    field: str, job_values: Mapping[str, str], platform_values: Mapping[str, str], reserved_keys: tuple[str, ...]
) -> Iterator[str]:
    for key, value in job_values.items():
        path = f"spec.placement.{field}.{key}"
        if key.startswith(RESERVED_PREFIXES) or key in reserved_keys:
            hint = "write placement.queueName" if key == Label.QUEUE else "remove it"
            yield f"{path} is {value!r}, but the operator sets this key itself: {hint}"
        elif platform_values.get(key, value) != value:
            yield f"{path} is {value!r}, but the operator's configuration sets {platform_values[key]!r}"


def _tolerations_conflict(job_toleration: Toleration, platform_toleration: Toleration) -> bool:
    """Whether both tolerations match the same taint but differ in other fields."""
    has_same_effect = job_toleration.effect is None or platform_toleration.effect is None or job_toleration.effect == platform_toleration.effect
    return job_toleration.key == platform_toleration.key and has_same_effect and job_toleration != platform_toleration
