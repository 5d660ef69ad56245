"""Can this spec be run as written, here? Every problem at once, each with its field.

What only another spec can mend is final. What the platform team can mend (a pool, the default storage) is looked at again.

Defaults are filled in once in a job's life: a run whose store, batch or learning rate changed with the operator's configuration or
version between two attempts would be another run, and would not find its checkpoints.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from finetune_api.defaults import PlatformDefaults, Resolution, resolve
from finetune_api.names import MAX_RUN_BYTES, Reason
from finetune_api.rules import check
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.cluster import StorageRoot
from finetune_api.support import unsupported_fields
from pydantic import ValidationError

from finetune_operator.objects import Object
from finetune_operator.settings import NodePool, OperatorConfig
from finetune_operator.text import clean

logger = logging.getLogger(__name__)

MAX_SPEC_BYTES = MAX_RUN_BYTES - 8 * 1024
"""Largest resolved spec: the rest of the run configuration must fit beside it."""
OF_THE_CLUSTER = ("resources", "placement", "policy")
"""Groups whose defaults are taken anew for each attempt: they say where and how long it runs, not what is trained."""
STORE = ("storage.uri", "storage.endpoint")
"""What makes a store another one; the rest is the way to it."""


@dataclass(frozen=True)
class Accepted:
    """The spec with nothing left open."""

    spec: FineTuneJobSpec
    defaults: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    pool: NodePool | None = None


@dataclass(frozen=True)
class Refused:
    """Why it cannot be run."""

    reason: Reason
    message: str
    hint: str = ""
    is_final: bool = True
    spec: FineTuneJobSpec | None = None
    """As far as it can be read and filled in: an attempt that runs already goes on by it."""


def accept(raw: Object, config: OperatorConfig, kept: Mapping[str, Any] | None = None) -> Accepted | Refused:
    """Judge a spec as it stands in the FineTuneJob. `kept`: the defaults, by spec path, with which its first attempt began."""
    try:
        spec = FineTuneJobSpec.model_validate(raw)
    except ValidationError as error:
        return Refused(Reason.REJECTED, clean("; ".join(_shape(item) for item in error.errors())))
    problems = check(spec)
    found = [*problems, *unsupported_fields(spec)]
    if found and not kept:
        reason = Reason.REJECTED if problems else Reason.NOT_SUPPORTED_YET
        return Refused(reason, clean("; ".join(str(one) for one in found)), hint=found[0].hint, spec=spec)
    pool = _pool(spec, config)
    resolution = _resolve(spec, _context(config, None if isinstance(pool, Refused) else pool), kept or {})
    if isinstance(pool, Refused):
        return replace(pool, spec=resolution.spec)
    if resolution.spec.storage.uri is None:
        message = "spec.storage.uri is absent, and the operator's configuration has no default storage"
        hint = "write spec.storage.uri: s3://bucket/prefix"
        return Refused(Reason.STORAGE_NOT_CONFIGURED, message, hint, is_final=False, spec=resolution.spec)
    size = len(resolution.spec.model_dump_json(by_alias=True, exclude_none=True).encode())
    if size > MAX_SPEC_BYTES:
        message = f"the spec with its defaults takes {size} bytes, and a pod's annotation carries {MAX_SPEC_BYTES}"
        return Refused(Reason.REJECTED, message, "put templates and long lists into ConfigMaps and refer to them")
    # A newer operator's rules do not end what an older one let begin, and what nobody may change any more.
    newer = [clean(f"a new job would be refused: {one}") for one in found]
    return Accepted(resolution.spec, resolution.defaults, (*resolution.notes, *newer), pool)


def _resolve(spec: FineTuneJobSpec, context: PlatformDefaults, kept: Mapping[str, Any]) -> Resolution:
    """The spec with its defaults, those that were filled in before over those of today."""
    found = resolve(spec, platform=context)
    if any(found.defaults.get(path) != kept.get(path) for path in STORE) and any(path in kept for path in STORE):
        before = {path.partition(".")[2]: value for path, value in kept.items() if path.startswith("storage.")}
        try:
            found = resolve(spec, platform=replace(context, storage=StorageRoot.model_validate(before)))
        except ValidationError as error:
            logger.warning("the storage that a job began with cannot be read and is not kept: %s", error)
    differing = {
        path: kept[path] for path, value in found.defaults.items()
        if path in kept and kept[path] != value and path.partition(".")[0] not in (*OF_THE_CLUSTER, "storage")
    }  # fmt: skip
    return _with(found, differing) if differing else found


def _with(found: Resolution, values: Mapping[str, Any]) -> Resolution:
    """The same with other defaults at some paths."""
    try:
        return replace(found, spec=found.spec.with_values(values), defaults={**found.defaults, **values})
    except ValidationError as error:
        logger.warning("the defaults that a job began with cannot be used and are not kept: %s", error)
        return found


def _shape(item: Any) -> str:
    path = ".".join(str(part) for part in item["loc"])
    return f"spec.{path}: {item['msg']}" if path else str(item["msg"])


def _context(config: OperatorConfig, pool: NodePool | None) -> PlatformDefaults:
    """Defaults of the operator's configuration, the pool's first."""
    own = pool.resources if pool else None

    def value(name: str) -> str:
        found = getattr(own, name) if own else None
        return str(found if found is not None else getattr(config.resources, name))

    return PlatformDefaults(
        storage=config.storage if config.storage.uri else None,
        gpu_resource=pool.gpu_resource if pool else "nvidia.com/gpu",
        node_pool=pool.name if pool else None,
        cpu=value("cpu"),
        memory=value("memory"),
        ephemeral_storage=value("ephemeral_storage"),
        shared_memory=value("shared_memory"),
    )


def _pool(spec: FineTuneJobSpec, config: OperatorConfig) -> NodePool | Refused | None:
    """The pool that a job runs on: the one it names; else, for GPUs, the default one; else none."""
    wanted = spec.resources
    gpus = 1 if wanted.gpus_per_node is None else wanted.gpus_per_node
    if wanted.node_pool is not None:
        pool = config.pool(wanted.node_pool)
        if pool is None:
            message = f"spec.resources.nodePool is {wanted.node_pool!r}; {_pools(config)}"
            return Refused(Reason.UNKNOWN_NODE_POOL, message, "name one of them", is_final=False)
    else:
        pool = _by_resource(config, wanted.gpu_resource) if gpus else None
        if pool is None:
            return None
    if gpus and wanted.gpu_resource is not None and wanted.gpu_resource != pool.gpu_resource:
        message = f"spec.resources.gpuResource is {wanted.gpu_resource}, and nodes of pool {pool.name} have {pool.gpu_resource}"
        hint = "remove gpuResource, or name a pool that has it"
        return Refused(Reason.POOL_LACKS_RESOURCE, f"{message}; {_pools(config)}", hint, is_final=False)
    if gpus > pool.gpus_per_node:
        message = f"spec.resources.gpusPerNode is {gpus}, and a node of pool {pool.name} has {pool.gpus_per_node}"
        return Refused(Reason.POOL_TOO_SMALL, f"{message}; {_pools(config)}", "ask for fewer, or use more nodes", False)
    nodes = wanted.nodes or 1
    if pool.max_nodes is not None and nodes > pool.max_nodes:
        message = f"spec.resources.nodes is {nodes}, and pool {pool.name} has at most {pool.max_nodes} nodes"
        return Refused(Reason.POOL_TOO_SMALL, f"{message}; {_pools(config)}", "ask for fewer nodes", False)
    return pool


def _by_resource(config: OperatorConfig, resource: str | None) -> NodePool | None:
    """The default pool, or the first that has the resource the job names."""
    default = config.default_pool
    if resource is None or (default and default.gpu_resource == resource):
        return default
    return next((pool for pool in config.node_pools if pool.gpu_resource == resource), None)


def _pools(config: OperatorConfig) -> str:
    if not config.node_pools:
        return "the operator's configuration has no pools"
    return f"pools are: {', '.join(_shown(pool) for pool in config.node_pools)}"


def _shown(pool: NodePool) -> str:
    memory = f" of {pool.gpu_memory}" if pool.gpu_memory is not None else ""
    about = f": {pool.description}" if pool.description else ""
    return f"{pool.name} ({pool.gpus_per_node} x {pool.gpu_resource}{memory}{about})"
