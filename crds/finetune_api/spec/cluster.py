"""`spec.storage`, `spec.resources`, `spec.placement` and `spec.policy`: what running on a cluster needs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from finetune_api.base import Group, option
from finetune_api.spec.common import ObjectName, SecretKeyRef, StorageConnection, StringMap, Word
from finetune_api.spec.enums import OnDivergence, OnOutOfMemory

Quantity = Annotated[
    str | int,
    Field(json_schema_extra={"x-kubernetes-int-or-string": True}, union_mode="left_to_right"),
]
LabelKey = Annotated[
    str,
    StringConstraints(
        pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$", max_length=317
    ),
]


class StorageRoot(StorageConnection):
    """`spec.storage`: where everything the job writes lies."""

    uri: Annotated[str, StringConstraints(pattern=r"^(s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^\s?#]*)?|file:///[^\s?#]*|pvc://[a-z0-9][-a-z0-9.]*(/[^\s?#]*)?)$", max_length=512)] | None = option(
        "Root of all that the job writes: `s3://bucket/prefix`; the job's own tree is `<uri>/<namespace>/<name>/<uid>/`. `pvc://claim/path` and `file:///path` are roots, too; a web server (`https://`) can only be read.",
        default_text="the operator's configuration", example="s3://models/finetune",
    )  # fmt: skip


class Resources(Group):
    """`spec.resources`: pods, ranks and what each pod gets."""

    nodes: Annotated[int, Field(ge=1, le=1024)] | None = option("Pods, one a node.", default=1, example=2)
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] | None = option(
        "GPUs per pod; 0 trains on CPU.", default=1, example=8
    )
    processes_per_node: Annotated[int, Field(ge=1, le=64)] | None = option(
        "Ranks per pod.", default_text="gpusPerNode, or 1 on CPU", example=2
    )
    gpu_resource: LabelKey | None = option(
        "Resource name of a GPU: MIG slices and other vendors by their name.",
        default_text="the node pool's, else nvidia.com/gpu",
        example="nvidia.com/mig-1g.10gb",
    )
    node_pool: Word | None = option(
        "Pool of the operator's configuration.", default_text="the pool marked as default, else none", example="h100"
    )
    cpu: Quantity | None = option("CPUs per pod (request).", default_text="the operator's configuration", example="4")
    memory: Quantity | None = option(
        "Memory per pod (request and limit).", default_text="the operator's configuration", example="32Gi"
    )
    ephemeral_storage: Quantity | None = option(
        "Local disk per pod for downloads and staged checkpoints (request and limit).",
        default_text="the operator's configuration",
        example="100Gi",
    )
    shared_memory: Quantity | None = option(
        "Size of /dev/shm per pod; counts as memory.", default_text="the operator's configuration", example="8Gi"
    )


class Toleration(Group):
    """A toleration, as in a pod."""

    key: LabelKey | None = option(
        "Taint key; absent with operator Exists matches all. Default: none.", example="nvidia.com/gpu"
    )
    operator: Literal["Exists", "Equal"] | None = option(
        "How key and value are compared.", default_text="Equal", example="Exists"
    )
    value: Annotated[str, StringConstraints(max_length=63)] | None = option(
        "Taint value. Default: none.", example="present"
    )
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = option(
        "Taint effect. Default: all effects.", example="NoSchedule"
    )
    toleration_seconds: Annotated[int, Field(ge=0)] | None = option(
        "Seconds that a NoExecute taint is tolerated. Default: forever.", example=300
    )


class NodeAffinityTerm(Group):
    """One requirement on node labels; all of them must hold."""

    key: LabelKey = Field(description="Node label. Required. Example: `topology.kubernetes.io/zone`.")
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"] = Field(
        description="Comparison. Required. Example: `In`."
    )
    values: Annotated[list[Annotated[str, StringConstraints(max_length=63)]], Field(max_length=64)] | None = option(
        "Values compared with. Default: none.", example=["eu-1a"]
    )


class EnvVar(Group):
    """One environment variable of the trainer container."""

    cel = (
        (
            "!(has(self.value) && has(self.secretKeyRef))",
            "an environment variable has either `value` or `secretKeyRef`: remove one",
        ),
    )

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=128)] = Field(
        description="Name. Required. Example: `NCCL_DEBUG`."
    )
    value: Annotated[str, StringConstraints(max_length=4096)] | None = option(
        "Value; for secrets use secretKeyRef. Default: none.", example="INFO"
    )
    secret_key_ref: SecretKeyRef | None = option(
        "Secret key that the value comes from. Default: none.", example={"name": "s", "key": "k"}
    )


class Volume(Group):
    """A volume: exactly one of the three sources."""

    cel = (
        (
            "[has(self.persistentVolumeClaim), has(self.configMap), has(self.secret)].filter(x, x).size() == 1",
            "a volume has exactly one of `persistentVolumeClaim`, `configMap` and `secret`",
        ),
    )

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)] = Field(
        description="Name. Required. Example: `cache`."
    )
    persistent_volume_claim: ObjectName | None = option("Claim in the job's namespace. Default: none.", example="cache")
    config_map: ObjectName | None = option("ConfigMap in the job's namespace. Default: none.", example="extra")
    secret: ObjectName | None = option("Secret in the job's namespace. Default: none.", example="extra")


class VolumeMount(Group):
    """Where a volume is seen in the trainer container."""

    name: Word = Field(description="Name of one of placement.volumes. Required. Example: `cache`.")
    mount_path: Annotated[str, StringConstraints(pattern=r"^/[^\s:]+$", max_length=512)] = Field(
        description="Absolute path. Required. Example: `/mnt/cache`."
    )
    sub_path: Annotated[str, StringConstraints(max_length=512)] | None = option(
        "Path inside the volume. Default: its root.", example="hub"
    )
    read_only: bool | None = option("Mount read-only.", default=False, example=True)


class Placement(Group):
    """`spec.placement`: where and as whom the pods run. A small typed subset of a pod, never all of it."""

    cel = (
        (
            "!has(self.volumeMounts) || (has(self.volumes) && self.volumeMounts.all(m, self.volumes.exists(v, v.name == m.name)))",
            "every placement.volumeMounts[].name must be the name of one of placement.volumes",
        ),
    )

    node_selector: Annotated[StringMap, Field(max_length=32)] | None = option(
        "Labels that the node must have, beside the pool's. Default: none.", example={"zone": "a"}
    )
    tolerations: Annotated[list[Toleration], Field(max_length=32)] | None = option(
        "Tolerations, beside the pool's. Default: none.", example=[{"key": "gpu", "operator": "Exists"}]
    )
    node_affinity: Annotated[list[NodeAffinityTerm], Field(max_length=32)] | None = option(
        "Required node labels with comparisons; all must hold. Default: none.",
        example=[{"key": "zone", "operator": "In", "values": ["a"]}],
    )
    priority_class_name: ObjectName | None = option(
        "Priority class of the pods. Default: the cluster's.", example="batch"
    )
    scheduler_name: Word | None = option("Scheduler of the pods. Default: the cluster's.", example="volcano")
    queue_name: ObjectName | None = option("Kueue LocalQueue. Default: none, no queue.", example="team-a")
    service_account_name: ObjectName | None = option(
        "ServiceAccount of the pods, for workload identity; its token is not mounted. Default: the operator's configuration.",
        example="trainer",
    )
    image_pull_secrets: Annotated[list[ObjectName], Field(max_length=16)] | None = option(
        "Secrets for pulling the image. Default: the operator's configuration.", example=["registry"]
    )
    image: Annotated[str, StringConstraints(pattern=r"^[^\s]+$", max_length=512)] | None = option(
        "Trainer image. Default: the operator's configuration.", example="registry.example.com/trainer:1.2"
    )
    env: Annotated[list[EnvVar], Field(max_length=64)] | None = option(
        "Further environment variables. Default: none.", example=[{"name": "NCCL_DEBUG", "value": "INFO"}]
    )
    volumes: Annotated[list[Volume], Field(max_length=16)] | None = option(
        "Further volumes. Default: none.", example=[{"name": "cache", "persistentVolumeClaim": "cache"}]
    )
    volume_mounts: Annotated[list[VolumeMount], Field(max_length=32)] | None = option(
        "Where those volumes are mounted. Default: none.", example=[{"name": "cache", "mountPath": "/mnt/cache"}]
    )
    labels: Annotated[StringMap, Field(max_length=32)] | None = option(
        "Further labels on the pods. Default: none.", example={"team": "a"}
    )
    annotations: Annotated[StringMap, Field(max_length=32)] | None = option(
        "Further annotations on the pods. Default: none.", example={"note": "x"}
    )


class Policy(Group):
    """`spec.policy`: time limits and what happens after a failure."""

    active_deadline_seconds: Annotated[int, Field(ge=1, le=31536000)] | None = option(
        "Seconds of running time, all attempts together, after which the job fails; queued and suspended time does not count. Default: none.",
        example=86400,
    )
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=31536000)] | None = option(
        "Seconds after the end when Jobs and Pods are removed; the FineTuneJob stays. Default: none, they stay.",
        example=86400,
    )
    retries: Annotated[int, Field(ge=0, le=1000)] | None = option(
        "Attempts without progress that are allowed before the job fails.", default=3, example=3
    )
    termination_grace_period_seconds: Annotated[int, Field(ge=1, le=86400)] | None = option(
        "Seconds a stopping pod has to save. If not given, the next attempt has at least three times what the newest checkpoint took.",
        default=300,
        example=300,
    )
    start_timeout_seconds: Annotated[int, Field(ge=1, le=31536000)] | None = option(
        "Seconds that pods may take to run before the job shows as stalled.", default=1800, example=1800
    )
    stall_timeout_seconds: Annotated[int, Field(ge=1, le=31536000)] | None = option(
        "Seconds without a step after which an attempt is restarted.",
        default_text="from the run's own step time, at least 600",
        example=900,
    )
    on_out_of_memory: OnOutOfMemory | None = option(
        "Adapt: retry with a smaller micro-batch and the same effective batch. Fail: end.",
        default="Adapt",
        example="Adapt",
    )
    on_divergence: OnDivergence | None = option(
        "Rollback: go back to a healthy checkpoint. Fail: end.", default="Rollback", example="Rollback"
    )
