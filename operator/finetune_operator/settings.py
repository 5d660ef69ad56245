"""The operator's configuration: one file, read once, refused whole if a word in it is not understood.

The chart mounts it at `/etc/finetune-operator/config.yaml`; key names are camelCase as everywhere on the wire.
Every value has a default that suits a small cluster, so that an empty file (or none) is a valid configuration.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import yaml
from finetune_api.base import WireModel
from finetune_api.spec.cluster import LabelKey, Quantity, StorageRoot, Toleration
from pydantic import Field, StringConstraints, ValidationError, model_validator

CONFIG_PATH = Path("/etc/finetune-operator/config.yaml")

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
Seconds = Annotated[float, Field(gt=0, le=86400)]


class StartError(Exception):
    """The operator cannot start; the message says in one line what is missing or wrong."""


class SettingsError(StartError):
    """The configuration file is invalid; the message names the file, each wrong key, and what was found."""


class PullPolicy(StrEnum):
    """When a node pulls the trainer image."""

    ALWAYS = "Always"
    IF_NOT_PRESENT = "IfNotPresent"
    NEVER = "Never"


class LogFormat(StrEnum):
    """Shape of log lines."""

    TEXT = "text"
    JSON = "json"


class LogLevel(StrEnum):
    """Lowest level that is written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class TrainerSettings(WireModel):
    """`trainer`: the pods that train."""

    image: str = Field(default="localhost/finetune-trainer:dev", min_length=1, description="Image of the trainer.")
    image_pull_policy: PullPolicy = Field(default=PullPolicy.IF_NOT_PRESENT, description="When nodes pull it.")
    image_pull_secrets: tuple[Name, ...] = Field(default=(), description="Secrets for pulling, by name.")
    service_account_name: Name | None = Field(
        default=None, description="ServiceAccount of the pods; absent: `default`. Its token is never mounted."
    )
    env: dict[str, str] = Field(default={}, description="Environment variables for every trainer container.")
    labels: dict[str, str] = Field(default={}, description="Labels for every trainer pod.")
    annotations: dict[str, str] = Field(default={}, description="Annotations for every trainer pod.")
    priority_class_name: Name | None = Field(default=None, description="Priority class where the job names none.")


class ResourceSettings(WireModel):
    """`resources`: what a pod gets where the job says nothing."""

    cpu: Quantity = Field(default="1", description="CPU request.")
    memory: Quantity = Field(default="4Gi", description="Memory request and limit; /dev/shm counts as memory.")
    ephemeral_storage: Quantity = Field(default="20Gi", description="Local disk request and limit.")
    shared_memory: Quantity = Field(default="1Gi", description="Size of /dev/shm.")


class PoolResources(WireModel):
    """`nodePools[].resources`: the same, for pods of one pool; absent values come from `resources`."""

    cpu: Quantity | None = None
    memory: Quantity | None = None
    ephemeral_storage: Quantity | None = None
    shared_memory: Quantity | None = None


class NodePool(WireModel):
    """`nodePools[]`: machines of one kind, by a name that users may write into `resources.nodePool`."""

    name: Name = Field(description="Name of the pool.")
    description: str = Field(default="", description="For people; shown when a job names an unknown pool.")
    default: bool = Field(default=False, description="Used by jobs that ask for GPUs and name no pool.")
    node_selector: dict[str, str] = Field(default={}, description="Labels of the pool's nodes.")
    tolerations: tuple[Toleration, ...] = Field(default=(), description="Taints of the pool's nodes.")
    gpu_resource: LabelKey = Field(default="nvidia.com/gpu", description="Resource name of a GPU or of a slice.")
    gpus_per_node: int = Field(default=0, ge=0, le=64, description="GPUs a node has; 0: a pool for CPU training.")
    gpu_memory: Quantity | None = Field(default=None, description="Memory of one GPU, shown where pools are listed.")
    max_nodes: int | None = Field(default=None, ge=1, description="Nodes the pool can have; absent: not known.")
    resources: PoolResources = Field(default=PoolResources(), description="What a pod gets on this pool.")


class LeaderElection(WireModel):
    """`leaderElection`: one active replica, by a Lease."""

    enabled: bool = Field(default=False, description="Needed with two replicas.")
    lease_name: Name = Field(default="finetune-operator", description="Name of the Lease.")
    lease_namespace: Name | None = Field(default=None, description="Its namespace; absent: the operator's own.")
    lease_duration_seconds: Seconds = Field(default=15, description="How long others wait for a silent leader.")
    renew_deadline_seconds: Seconds = Field(default=10, description="How long the leader tries to renew.")
    retry_period_seconds: Seconds = Field(default=2, description="Time between tries.")

    @model_validator(mode="after")
    def _order(self) -> LeaderElection:
        if not self.lease_duration_seconds > self.renew_deadline_seconds > self.retry_period_seconds:
            raise ValueError("leaseDurationSeconds must exceed renewDeadlineSeconds, and that retryPeriodSeconds")
        return self


class ScrapeSettings(WireModel):
    """`scrape`: how progress is read from rank 0's pod."""

    interval_seconds: Seconds = Field(default=15, description="Between two reads of one job that trains.")
    starting_interval_seconds: Seconds = Field(default=3, description="The same before the first step.")
    timeout_seconds: Seconds = Field(default=3, description="For one read.")
    concurrency: int = Field(default=32, ge=1, le=1024, description="Reads at the same time.")
    url: str = Field(
        default="http://{ip}:{port}{path}",
        description="Address of a pod's progress; {ip}, {port}, {path}, {namespace} and {pod} are filled in.",
    )


class RetrySettings(WireModel):
    """`retry`: the pause before another attempt; it doubles with each attempt that made no progress."""

    base_seconds: Seconds = Field(default=10, description="First pause.")
    max_seconds: Seconds = Field(default=600, description="Longest pause.")


class ApiSettings(WireModel):
    """`api`: how the operator talks to the API server."""

    connections: int = Field(default=32, ge=1, le=1024, description="Connections at the same time.")
    timeout_seconds: Seconds = Field(default=30, description="For one request.")


class HttpSettings(WireModel):
    """`http`: `/healthz`, `/readyz` and `/metrics`."""

    host: str = Field(default="0.0.0.0", description="Address to listen on.")  # noqa: S104 -- probes come from outside the pod
    port: int = Field(default=8080, ge=0, le=65535, description="Port; 0 takes a free one and logs it.")


class LogSettings(WireModel):
    """`log`: log lines on standard error."""

    format: LogFormat = Field(default=LogFormat.TEXT, description="text for people, json for collectors.")
    level: LogLevel = Field(default=LogLevel.INFO, description="Lowest level written.")


class OperatorConfig(WireModel):
    """The whole file."""

    namespaces: tuple[Name, ...] = Field(default=(), description="Namespaces to serve; empty: all of the cluster.")
    trainer: TrainerSettings = TrainerSettings()
    storage: StorageRoot = Field(default=StorageRoot(), description="Where the job says nothing; as spec.storage.")
    resources: ResourceSettings = ResourceSettings()
    node_pools: tuple[NodePool, ...] = ()
    workers: int = Field(default=16, ge=1, le=256, description="Jobs looked at side by side.")
    resync_seconds: Seconds = Field(default=300, description="Between two full lists.")
    progress_seconds: Seconds = Field(default=15, description="Shortest time between two progress writes of one job.")
    lost_node_seconds: Seconds = Field(
        default=60, description="Silence after a pod's grace period before its node counts as lost."
    )
    stuck_seconds: Seconds = Field(default=300, description="/healthz fails when a due job waited this long.")
    leader_election: LeaderElection = LeaderElection()
    scrape: ScrapeSettings = ScrapeSettings()
    retry: RetrySettings = RetrySettings()
    api: ApiSettings = ApiSettings()
    http: HttpSettings = HttpSettings()
    log: LogSettings = LogSettings()

    @model_validator(mode="after")
    def _pools(self) -> OperatorConfig:
        names = [pool.name for pool in self.node_pools]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"nodePools holds {', '.join(twice)} more than once: names must differ")
        defaults = [pool.name for pool in self.node_pools if pool.default]
        if len(defaults) > 1:
            raise ValueError(f"nodePools marks {' and '.join(defaults)} as default: mark one")
        return self

    def pool(self, name: str) -> NodePool | None:
        """Pool by name."""
        return next((pool for pool in self.node_pools if pool.name == name), None)

    @property
    def default_pool(self) -> NodePool | None:
        """Pool for jobs that name none."""
        return next((pool for pool in self.node_pools if pool.default), None)


def parse(value: Any, origin: str) -> OperatorConfig:
    """Configuration from a parsed file. Errors: SettingsError naming `origin` and every wrong key."""
    try:
        return OperatorConfig.model_validate(value if value is not None else {})
    except ValidationError as error:
        lines = [f"{'.'.join(str(part) for part in item['loc']) or 'file'}: {item['msg']}" for item in error.errors()]
        raise SettingsError(f"{origin} cannot be used: " + "; ".join(lines)) from error


def load(path: Path) -> OperatorConfig:
    """Read the file at `path`. Errors: SettingsError if it is missing, not YAML, or not understood."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error
    try:
        value = json.loads(text) if text.lstrip().startswith("{") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise SettingsError(f"{path} is not YAML: {error}") from error
    return parse(value, str(path))
