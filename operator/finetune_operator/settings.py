"""The operator's configuration: one file, read once at startup. If any key or value is wrong, the operator does not start.

The chart mounts the file at `/etc/finetune-operator/config.yaml`. Keys are camelCase. Each value has a default for a small cluster, so an
empty or missing file is a valid configuration.
"""

from __future__ import annotations

import json
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import yaml
from finetune_api.base import WireModel
from finetune_api.gpus import GPU_TYPES
from finetune_api.metadata_addresses import METADATA_CIDRS
from finetune_api.quantities import parse_amount
from finetune_api.rules import NODE_CACHE
from finetune_api.spec.cluster import LabelKey, StorageRoot
from finetune_api.spec.enums import PrepareStrategy
from finetune_api.tenancy import Platform, PlatformPolicy, Pool
from finetune_api.tenancy.settings import NamespacePattern
from pydantic import Field, StringConstraints, ValidationError, field_validator, model_validator

from finetune_operator.config_types import (
    Cidr,
    DnsName,
    EnvVariables,
    HostPath,
    NamespaceName,
    NodeLabels,
    PlatformQuantity,
    PlatformToleration,
    PodAnnotations,
    PodLabels,
)

MODEL_CACHE_PATTERN = r"^(node|pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/([^/\s?#.]|\.[^/\s?#.])[^/\s?#]*)*/?)$"
CONFIG_PATH = Path("/etc/finetune-operator/config.yaml")

Seconds = Annotated[float, Field(gt=0, le=86400)]


class StartError(Exception):
    """The operator cannot start. The message names the cause in one line."""


class SettingsError(StartError):
    """The configuration file is invalid. The message names the file, each wrong key, and why the key or its value is wrong."""


class PullPolicy(StrEnum):
    """When nodes pull an image. The values are those of Kubernetes."""

    ALWAYS = "Always"
    IF_NOT_PRESENT = "IfNotPresent"
    NEVER = "Never"


class LogFormat(StrEnum):
    """Format of log lines."""

    TEXT = "text"
    JSON = "json"


class LogLevel(StrEnum):
    """Log lines below this level are not written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class TrainerSettings(WireModel):
    """`trainer`: settings of the training pods."""

    image: str = Field(default="finetune-trainer:0.2.0", min_length=1, description="Image of the trainer.")
    image_pull_policy: PullPolicy = Field(default=PullPolicy.IF_NOT_PRESENT, description="When nodes pull the image.")
    generation_image: Annotated[str, StringConstraints(pattern=r"^\S*$", max_length=512)] | None = Field(
        default=None, description="Image of the vLLM server for jobs that request one and do not name an image."
    )
    image_pull_secrets: tuple[DnsName, ...] = Field(
        default=(), description="Names of pull Secrets. The Secrets must exist in each job's namespace."
    )
    service_account_name: DnsName | None = Field(
        default=None, description="ServiceAccount of the pods; default: `default`. The ServiceAccount's token is not mounted."
    )
    fixed_user: bool = Field(
        default=True, description="Whether the pods run as user and group 10001. If false, the platform chooses the user, as OpenShift does."
    )
    env: EnvVariables = Field(default={}, description="Environment variables of each trainer container.")
    labels: PodLabels = Field(default={}, description="Labels of each trainer pod.")
    annotations: PodAnnotations = Field(default={}, description="Annotations of each trainer pod.")
    priority_class_name: DnsName | None = Field(
        default=None, description="Priority class of jobs that do not set placement.priorityClassName."
    )


class PodResources(WireModel):
    """Resources of a training pod. `finetune_api.pod_resources` says where absent values come from."""

    cpu: PlatformQuantity | None = Field(default=None, description="CPU request.")
    memory: PlatformQuantity | None = Field(default=None, description="Memory request and limit, including /dev/shm.")
    ephemeral_storage: PlatformQuantity | None = Field(default=None, description="Local disk request and limit.")
    shared_memory: PlatformQuantity | None = Field(default=None, description="Size of /dev/shm.")


class ResourcesPerGpu(WireModel):
    """`resources.perGpu`: resources per GPU, for pods with whole GPUs. MIG slices do not count as GPUs here."""

    cpu: PlatformQuantity | None = Field(default=None, description="CPU request per GPU.")
    memory: PlatformQuantity | None = Field(default=None, description="Memory request and limit per GPU, including /dev/shm.")
    shared_memory: PlatformQuantity | None = Field(default=None, description="Size of /dev/shm per GPU.")


class ResourceSettings(PodResources):
    """`resources`: resources of a training pod if neither the job nor the node pool sets them. Built-in values replace absent values.

    Without GPUs, the built-in values are 1 CPU, 4Gi of memory, 20Gi of disk and 1Gi of shared memory. With GPUs, the values for each GPU are 3 CPUs,
    2Gi of shared memory, and memory of half of the pool's gpuMemory but at least 10Gi; the disk is 20Gi per pod.
    """

    per_gpu: ResourcesPerGpu = Field(
        default=ResourcesPerGpu(), description="Values per GPU. For pods with GPUs, they take precedence over the other values of `resources`."
    )


class PrepareSettings(WireModel):
    """`prepare`: settings of the preparation pods, which check storage, model and data without GPUs before the first attempt."""

    strategy: PrepareStrategy = Field(
        default=PrepareStrategy.NEVER, description="Whether jobs without spec.prepare.strategy are prepared: auto, always or never."
    )
    cpu: PlatformQuantity = Field(default="1", description="CPU request of a preparation pod.")
    memory: PlatformQuantity = Field(default="4Gi", description="Memory request and limit of a preparation pod.")
    ephemeral_storage: PlatformQuantity = Field(default="20Gi", description="Local disk request and limit of a preparation pod.")
    node_selector: NodeLabels = Field(default={}, description="Labels of the nodes for preparation pods.")
    tolerations: tuple[PlatformToleration, ...] = Field(default=(), description="Tolerations of preparation pods.")


class NodeCacheSettings(WireModel):
    """`modelCache.node`: the cache of base models on the disk of each node, for `model.cache: node`. Pods mount it with hostPath."""

    path: HostPath | None = Field(default=None, description="Folder on the nodes, writable for user 10001; default: there is no cache on the nodes.")
    size_limit: PlatformQuantity = Field(default="200Gi", description="Maximum size of all models in the cache of one node.")
    namespaces: tuple[NamespacePattern, ...] = Field(
        default=(), description="Namespaces whose jobs may use the cache; `*` matches any text. The Pod Security levels "
        "baseline and restricted forbid hostPath, so the namespaces need another level.",
    )  # fmt: skip

    def is_enabled_in(self, namespace: str) -> bool:
        """Whether jobs of the namespace may use the cache."""
        return self.path is not None and any(fnmatchcase(namespace, pattern) for pattern in self.namespaces)

    @property
    def size_limit_bytes(self) -> int:
        """Maximum size of all models in the cache of one node, in bytes."""
        return int(parse_amount(str(self.size_limit)))


class ModelCacheSettings(WireModel):
    """`modelCache`: the cache of base models."""

    default: Annotated[str, StringConstraints(pattern=MODEL_CACHE_PATTERN)] | None = Field(
        default=None, description="`model.cache` of jobs that do not set it: `node`, or `pvc://claim/path` with a claim in each namespace; default: no cache."
    )
    node: NodeCacheSettings = NodeCacheSettings()

    @model_validator(mode="after")
    def _check_node(self) -> ModelCacheSettings:
        if (self.node.path is None) != (not self.node.namespaces):
            raise ValueError("node.path and node.namespaces only have an effect together: write both, or remove both")
        if self.default == NODE_CACHE and self.node.path is None:
            raise ValueError("default is node, but node.path and node.namespaces are empty: write both, or remove default")
        return self

    def default_for(self, namespace: str) -> str | None:
        """Return the default of `model.cache` for jobs of a namespace, or None for no cache."""
        return None if self.default == NODE_CACHE and not self.node.is_enabled_in(namespace) else self.default


class NodePool(WireModel):
    """`nodePools[]`: a group of equal nodes. Users select the pool with its name in `resources.nodePool`."""

    name: DnsName = Field(description="Name of the pool.")
    description: str = Field(default="", description="Description for users, shown when a job names an unknown pool.")
    default: bool = Field(default=False, description="Whether GPU jobs without resources.nodePool use this pool.")
    node_selector: NodeLabels = Field(default={}, description="Labels of the pool's nodes.")
    tolerations: tuple[PlatformToleration, ...] = Field(
        default=(), description="Tolerations for the taints of the pool's nodes."
    )
    gpu_resource: LabelKey = Field(default="nvidia.com/gpu", description="Resource name of a GPU or of a GPU slice.")
    gpus_per_node: int = Field(
        default=0, ge=0, le=64, description="GPUs of each node; 0: the pool is for CPU training."
    )
    gpu_memory: PlatformQuantity | None = Field(
        default=None, description="Memory of one GPU, for lists of pools and for the memory plan; default: the memory of `gpuType`."
    )
    gpu_type: str | None = Field(
        default=None, description="Type of the GPUs, for the plans of memory and time; without it, the plan of time uses the name that the driver reports."
    )
    price_per_gpu_hour: float | None = Field(default=None, ge=0, description="Price of one GPU for one hour, in `currency`; default: costs are not shown.")
    max_nodes: int | None = Field(default=None, ge=1, description="Maximum number of nodes in the pool; default: no limit.")
    resources: PodResources = Field(default=PodResources(), description="Resources of pods in this pool.")


    @field_validator("gpu_type")
    @classmethod
    def _check_gpu_type(cls, value: str | None) -> str | None:
        if value is not None and value not in GPU_TYPES:
            raise ValueError(f"the type {value} is not known: write one of {', '.join(GPU_TYPES)}, or remove gpuType")
        return value


class LeaderElection(WireModel):
    """`leaderElection`: how the replicas elect one active replica with a Lease."""

    enabled: bool = Field(default=False, description="Whether to elect a leader; required with several replicas.")
    lease_name: DnsName = Field(default="finetune-operator", description="Name of the Lease.")
    lease_namespace: NamespaceName | None = Field(
        default=None, description="Namespace of the Lease; default: the operator's own."
    )
    lease_duration_seconds: Seconds = Field(
        default=15, description="If the leader does not renew the Lease for this time, another replica becomes the leader."
    )
    renew_deadline_seconds: Seconds = Field(
        default=10, description="If the leader cannot renew the Lease for this time, the leader stops."
    )
    retry_period_seconds: Seconds = Field(default=2, description="Time between two renewals of the Lease.")

    @model_validator(mode="after")
    def _check_order(self) -> LeaderElection:
        if not self.lease_duration_seconds > self.renew_deadline_seconds > self.retry_period_seconds:
            raise ValueError(
                "leaseDurationSeconds must exceed renewDeadlineSeconds, and renewDeadlineSeconds must exceed retryPeriodSeconds"
            )
        return self


class IsolationSettings(WireModel):
    """`isolation`: how each attempt is protected from other pods. A change of these settings affects only attempts that start later."""

    secret: bool = Field(
        default=False, description="Whether each attempt gets a Secret. A pod without this Secret cannot read the attempt's progress or join its ranks."
    )
    key_secret_name: DnsName = Field(
        default="finetune-operator-attempt-key",
        description="Name of the Secret with the key from which the operator derives the Secrets of attempts. The operator creates it in its own namespace.",
    )
    network_policy: bool = Field(
        default=False, description="Whether each attempt gets a NetworkPolicy, with which only its own pods, the operator and `metricsFrom` reach its pods."
    )
    operator_namespace: NamespaceName | None = Field(default=None, description="Namespace of the operator; default: its own. Required by `networkPolicy`.")
    operator_labels: NodeLabels = Field(default={}, description="Labels of the operator's pods. Required by `networkPolicy`.")
    metrics_from: tuple[dict[str, Any], ...] = Field(
        default=(), description="Peers that may also reach the progress port, as in the `from` of a NetworkPolicy. For example, Prometheus."
    )
    block_metadata: bool = Field(
        default=False, description="Whether the NetworkPolicy also blocks the metadata addresses of clouds. Jobs may need them for workload identity."
    )
    blocked_cidrs: tuple[Cidr, ...] = Field(default=(), description="Further address ranges that the NetworkPolicy blocks.")

    @model_validator(mode="after")
    def _check_network_policy(self) -> IsolationSettings:
        if self.network_policy and not (self.operator_namespace and self.operator_labels):
            raise ValueError("networkPolicy needs operatorNamespace and operatorLabels: otherwise the operator could not read the progress of jobs")
        if not self.network_policy and (self.block_metadata or self.blocked_cidrs or self.metrics_from):
            raise ValueError("blockMetadata, blockedCidrs and metricsFrom have no effect without networkPolicy: set networkPolicy to true, or remove them")
        return self

    @property
    def all_blocked_cidrs(self) -> tuple[str, ...]:
        """All address ranges that training pods cannot reach, including the metadata addresses if they are blocked."""
        return (*(METADATA_CIDRS if self.block_metadata else ()), *self.blocked_cidrs)


class ScrapeSettings(WireModel):
    """`scrape`: how the operator reads the progress report of rank 0's pod."""

    interval_seconds: Seconds = Field(default=15, description="Time between two requests to the same pod.")
    starting_interval_seconds: Seconds = Field(default=3, description="Time between two requests before the first training step.")
    timeout_seconds: Seconds = Field(default=3, description="Timeout of one request.")
    concurrency: int = Field(default=32, ge=1, le=1024, description="Concurrent requests.")
    url: str = Field(
        default="http://{ip}:{port}{path}",
        description="URL of the report; {ip}, {port}, {path}, {namespace} and {pod} are replaced.",
    )


class RetrySettings(WireModel):
    """`retry`: the pause between two attempts, which doubles with each attempt without progress."""

    base_seconds: Seconds = Field(default=10, description="First pause.")
    max_seconds: Seconds = Field(default=600, description="Longest pause.")


class ApiSettings(WireModel):
    """`api`: settings of the client of the API server."""

    connections: int = Field(default=32, ge=1, le=1024, description="Concurrent connections.")
    timeout_seconds: Seconds = Field(default=30, description="Timeout of one request.")


class HttpSettings(WireModel):
    """`http`: the operator's HTTP server with `/healthz`, `/readyz` and `/metrics`."""

    host: str = Field(default="0.0.0.0", description="Address to listen on.")  # noqa: S104 -- probes come from outside the pod
    port: int = Field(default=8080, ge=0, le=65535, description="Port to listen on; 0: any free port, which is logged.")


class LogSettings(WireModel):
    """`log`: log lines on standard error."""

    format: LogFormat = Field(default=LogFormat.TEXT, description="text for people, json for log collectors.")
    level: LogLevel = Field(default=LogLevel.INFO, description="Log lines below this level are not written.")


class OperatorConfig(WireModel):
    """The whole configuration file."""

    namespaces: tuple[NamespaceName, ...] = Field(
        default=(), description="Namespaces whose jobs the operator runs; empty: all namespaces."
    )
    trainer: TrainerSettings = TrainerSettings()
    storage: StorageRoot = Field(
        default=StorageRoot(), description="Default storage for jobs that do not set spec.storage. The fields are those of spec.storage."
    )
    resources: ResourceSettings = ResourceSettings()
    prepare: PrepareSettings = PrepareSettings()
    model_cache: ModelCacheSettings = ModelCacheSettings()
    node_pools: tuple[NodePool, ...] = ()
    currency: str = Field(default="USD", min_length=1, max_length=16, description="Currency of `nodePools[].pricePerGpuHour` and of `spec.policy.maxCost`.")
    policy: PlatformPolicy = Field(
        default=PlatformPolicy(), description="Rules about what the FineTuneJobs of each namespace may use. A new rule does not affect jobs that have started."
    )
    workers: int = Field(default=16, ge=1, le=256, description="Jobs that are reconciled concurrently.")
    resync_seconds: Seconds = Field(default=300, description="Time between two full lists of all watched objects.")
    progress_seconds: Seconds = Field(default=15, description="Minimum time between two writes of a job's progress to its status.")
    lost_node_seconds: Seconds = Field(
        default=60, description="If a deleted pod still exists this long after its grace period, its node counts as lost."
    )
    stuck_seconds: Seconds = Field(
        default=300, description="If a job has waited this long for a worker, /healthz fails."
    )
    leader_election: LeaderElection = LeaderElection()
    isolation: IsolationSettings = IsolationSettings()
    scrape: ScrapeSettings = ScrapeSettings()
    retry: RetrySettings = RetrySettings()
    api: ApiSettings = ApiSettings()
    http: HttpSettings = HttpSettings()
    log: LogSettings = LogSettings()

    @model_validator(mode="after")
    def _check_pools(self) -> OperatorConfig:
        pool_names = [pool.name for pool in self.node_pools]
        duplicate_names = sorted({name for name in pool_names if pool_names.count(name) > 1})
        if duplicate_names:
            raise ValueError(f"nodePools contains {', '.join(duplicate_names)} more than once: use different names")
        default_pool_names = [pool.name for pool in self.node_pools if pool.default]
        if len(default_pool_names) > 1:
            raise ValueError(f"nodePools marks {' and '.join(default_pool_names)} as default: mark only one pool")
        return self

    def find_pool(self, name: str) -> NodePool | None:
        """Return the pool with this name, or None if no such pool exists."""
        return next((pool for pool in self.node_pools if pool.name == name), None)

    def build_platform(self, namespace: str) -> Platform:
        """Return what the rules of `policy` need to know about the platform: the namespace, the default storage and the pools."""
        pools = tuple(Pool(pool.name, pool.gpu_resource, pool.default) for pool in self.node_pools)
        return Platform(namespace, self.storage.uri, pools)

    @property
    def default_pool(self) -> NodePool | None:
        """The pool for GPU jobs that do not name a pool."""
        return next((pool for pool in self.node_pools if pool.default), None)


def parse_config(raw_config: Any, source_name: str) -> OperatorConfig:
    """Return the configuration in a parsed file. Errors: SettingsError, whose message names `source_name` and each wrong key with its problem."""
    try:
        return OperatorConfig.model_validate(raw_config if raw_config is not None else {})
    except ValidationError as error:
        problems = []
        for field_error in error.errors():
            key = ".".join(str(part) for part in field_error["loc"]) or "file"
            problems.append(f"{key}: {field_error['msg'].removeprefix('Value error, ')}")
        raise SettingsError(f"{source_name} is not valid: " + "; ".join(problems)) from error


def load_config(path: Path) -> OperatorConfig:
    """Read the configuration file at `path`. Errors: SettingsError if it is missing, not YAML, or not valid."""
    try:
        config_text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error
    try:
        raw_config = json.loads(config_text) if config_text.lstrip().startswith("{") else yaml.safe_load(config_text)
    except (ValueError, yaml.YAMLError) as error:
        # The text of a YAML error has several lines; join them into one.
        raise SettingsError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    return parse_config(raw_config, str(path))
