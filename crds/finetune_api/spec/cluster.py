"""`spec.storage`, `spec.resources`, `spec.prepare`, `spec.placement` and `spec.policy`: where and how the pods of the job run."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints

from finetune_api.base import CelRule, Group, spec_field
from finetune_api.patterns import ABSOLUTE_PATH, IDENTIFIER, LABEL_KEY, LABEL_VALUE, NO_SPACE, STORAGE_URI, VOLUME_NAME
from finetune_api.quantities import CPU_KIND, SIZE_KIND
from finetune_api.spec.common import ObjectName, SecretKeyRef, ShortText, StorageConnection, StringMap
from finetune_api.spec.enums import OnDivergence, OnExistingResult, OnOutOfMemory, PrepareStrategy

CpuQuantity = Annotated[str | int, Field(json_schema_extra=CPU_KIND.schema, union_mode="left_to_right")]
SizeQuantity = Annotated[str | int, Field(json_schema_extra=SIZE_KIND.schema, union_mode="left_to_right")]
LabelKey = Annotated[
    str,
    StringConstraints(
        pattern=LABEL_KEY, max_length=317
    ),
]


class StorageRoot(StorageConnection):
    """`spec.storage`: storage for checkpoints, the final model and metrics."""

    cel: ClassVar[tuple[CelRule, ...]] = (
        *StorageConnection.cel,
        CelRule(
            "!has(self.uri) || !self.uri.split('/').exists(part, part == '..')",
            "storage.uri must not contain `..`: write the path without `..`",
            "StorageUriInvalid",
        ),
    )

    uri: Annotated[str, StringConstraints(pattern=STORAGE_URI, max_length=512)] | None = spec_field(
        "Root folder: `s3://bucket/prefix`, `pvc://claim/path` or `file:///path`. The job writes below "
        "`<uri>/<namespace>/<name>/<uid>/`.",
        default_text="the operator's configuration", example="s3://models/finetune",
    )  # fmt: skip


class Resources(Group):
    """`spec.resources`: pods, ranks, and the resources of each pod."""

    cel = (
        CelRule(
            "!has(self.gpuResource) || self.gpuResource.contains('/')",
            "resources.gpuResource needs a domain: write for example nvidia.com/gpu or amd.com/gpu",
            "SchedulingTermInvalid",
        ),
    )

    nodes: Annotated[int, Field(ge=1, le=1024)] | None = spec_field(
        "Number of pods. Each pod runs on a different node.", default=1, example=2
    )
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] | None = spec_field(
        "GPUs per pod. 0: train on CPU. If this field is not set and the job does not fit on one GPU, the preparation may choose more GPUs.", default=1, example=8
    )
    processes_per_node: Annotated[int, Field(ge=1, le=64)] | None = spec_field(
        "Ranks per pod.", default_text="gpusPerNode; 1 on CPU", example=2
    )
    gpu_resource: LabelKey | None = spec_field(
        "Kubernetes resource that the pods request as GPU. Set this field for MIG slices and for GPUs of other vendors.",
        default_text="the node pool's resource, or nvidia.com/gpu if there is no node pool",
        example="nvidia.com/mig-1g.10gb",
    )
    node_pool: ShortText | None = spec_field(
        "Name of a node pool in the operator's configuration.", default_text="the pool that the preparation chooses, otherwise the default pool",
        example="h100",
    )
    cpu: CpuQuantity | None = spec_field("CPUs per pod (request).", default_text="the operator's configuration", example="4")
    memory: SizeQuantity | None = spec_field(
        "Memory per pod (request and limit).", default_text="the operator's configuration", example="32Gi"
    )
    ephemeral_storage: SizeQuantity | None = spec_field(
        "Local disk per pod for downloads and staged checkpoints (request and limit).",
        default_text="the operator's configuration",
        example="100Gi",
    )
    shared_memory: SizeQuantity | None = spec_field(
        "Size of /dev/shm per pod. The memory limit of the pod includes /dev/shm.",
        default_text="the operator's configuration",
        example="8Gi",
    )


class PrepareResources(Group):
    """`spec.prepare.resources`: resources of the preparation pod."""

    cpu: CpuQuantity | None = spec_field("CPUs of the preparation pod (request).", default_text="the operator's configuration, or 1", example="4", since="0.2.0")
    memory: SizeQuantity | None = spec_field(
        "Memory of the preparation pod (request and limit).", default_text="the operator's configuration, or 4Gi", example="16Gi", since="0.2.0"
    )
    ephemeral_storage: SizeQuantity | None = spec_field(
        "Local disk of the preparation pod for the data (request and limit).",
        default_text="the operator's configuration, or 20Gi", example="100Gi", since="0.2.0",
    )  # fmt: skip


class Prepare(Group):
    """`spec.prepare`: the check of spec, model and data in a pod without GPUs, before the first attempt."""

    strategy: PrepareStrategy | None = spec_field(
        "Whether a pod without GPUs checks storage, model and data before the first attempt.",
        default_text="the operator's configuration", example="always", since="0.2.0",
    )  # fmt: skip
    resources: PrepareResources = Field(
        default_factory=PrepareResources,
        description="Resources of the preparation pod. Default: the operator's configuration. Example: `{memory: 16Gi}`.",
    )
    ttl_days: Annotated[int, Field(ge=1, le=3650)] | None = spec_field(
        "Number of days for which prepared rows stay in storage after a job last used them. After these days, later preparations in the namespace and `finetune purge` remove the rows.",
        default_text="30", example=7, since="0.2.0",
    )  # fmt: skip


class Toleration(Group):
    """A toleration of the pods. Its fields are those of a toleration in a pod's spec."""

    cel = (
        CelRule(
            "!has(self.value) || self.value == '' || !has(self.operator) || self.operator != 'Exists'",
            "a toleration with operator Exists has no value: remove value, or write `operator: Equal`",
            "SchedulingTermInvalid",
        ),
        CelRule(
            "has(self.key) || (has(self.operator) && self.operator == 'Exists')",
            "a toleration without key tolerates every taint: write `operator: Exists`, or the key of the taint",
            "SchedulingTermInvalid",
        ),
        CelRule(
            "!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
            "tolerationSeconds requires effect NoExecute: write `effect: NoExecute`, or remove tolerationSeconds",
            "SchedulingTermInvalid",
        ),
    )

    key: LabelKey | None = spec_field(
        "Key of the taint. A toleration without a key and with operator Exists tolerates every taint.",
        default_text="none",
        example="nvidia.com/gpu",
    )
    operator: Literal["Exists", "Equal"] | None = spec_field(
        "How the taint is compared. `Exists`: the taint has the key. `Equal`: the taint has the key and the value.",
        default_text="Equal",
        example="Exists",
    )
    value: Annotated[str, StringConstraints(max_length=63)] | None = spec_field(
        "Value of the taint.", default_text="none", example="present"
    )
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = spec_field(
        "Effect of the taint. `NoSchedule`: the node gets no new pods. `PreferNoSchedule`: the node gets new pods only if no other node "
        "fits. `NoExecute`: running pods are evicted, too.",
        default_text="all effects",
        example="NoSchedule",
    )
    toleration_seconds: Annotated[int, Field(ge=0)] | None = spec_field(
        "Number of seconds for which a NoExecute taint is tolerated.", default_text="forever", example=300
    )


class NodeAffinityTerm(Group):
    """One requirement on node labels."""

    cel = (
        CelRule(
            "!(self.operator in ['In', 'NotIn']) || (has(self.values) && size(self.values) > 0)",
            "operators In and NotIn need values: write for example `values: [eu-1a]`",
            "SchedulingTermInvalid",
        ),
        CelRule(
            "!(self.operator in ['Exists', 'DoesNotExist']) || !has(self.values) || size(self.values) == 0",
            "operators Exists and DoesNotExist compare no values: remove values, or write operator In or NotIn",
            "SchedulingTermInvalid",
        ),
        CelRule(
            "!(self.operator in ['Gt', 'Lt']) || (has(self.values) && size(self.values) == 1 && self.values[0].matches('^-?[0-9]+$'))",
            "operators Gt and Lt compare with one integer: write for example `values: [\"8\"]`",
            "SchedulingTermInvalid",
        ),
    )

    key: LabelKey = Field(description="Label of the node. Required. Example: `topology.kubernetes.io/zone`.")
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"] = Field(
        description="How the label is compared. `In`: the label has one of the values. `NotIn`: the label has none of the values. `Exists`: the label exists. "
        "`DoesNotExist`: the label does not exist. `Gt`: the label is an integer above the value. `Lt`: the label is an integer below the value. Required. Example: `In`."
    )
    values: Annotated[list[Annotated[str, StringConstraints(max_length=63)]], Field(max_length=64)] | None = spec_field(
        "Values with which the label is compared.", default_text="none", example=["eu-1a"]
    )


class EnvVar(Group):
    """One environment variable of the trainer container."""

    cel = (
        CelRule(
            "!(has(self.value) && has(self.secretKeyRef))",
            "an environment variable has either `value` or `secretKeyRef`: remove one of the two",
            "EnvironmentContradiction",
        ),
    )

    name: Annotated[str, StringConstraints(pattern=IDENTIFIER, max_length=128)] = Field(
        description="Name of the variable. Required. Example: `NCCL_DEBUG`."
    )
    value: Annotated[str, StringConstraints(max_length=4096)] | None = spec_field(
        "Value of the variable. For secrets use secretKeyRef.", default_text="none", example="INFO"
    )
    secret_key_ref: SecretKeyRef | None = spec_field(
        "Key of a Secret with the value of the variable.", default_text="none", example={"name": "proxy", "key": "password"}
    )


class Volume(Group):
    """A volume with exactly one source."""

    cel = (
        CelRule(
            "[has(self.persistentVolumeClaim), has(self.configMap), has(self.secret)].filter(x, x).size() == 1",
            "a volume needs exactly one of `persistentVolumeClaim`, `configMap` and `secret`",
            "VolumeContradiction",
        ),
    )

    name: Annotated[str, StringConstraints(pattern=VOLUME_NAME, max_length=63)] = Field(
        description="Name of the volume. Required. Example: `cache`."
    )
    persistent_volume_claim: ObjectName | None = spec_field(
        "PersistentVolumeClaim in the job's namespace.", default_text="none", example="model-cache"
    )
    config_map: ObjectName | None = spec_field(
        "ConfigMap in the job's namespace.", default_text="none", example="extra-files"
    )
    secret: ObjectName | None = spec_field("Secret in the job's namespace.", default_text="none", example="certificates")


class VolumeMount(Group):
    """A mount of a volume in the trainer container."""

    name: ShortText = Field(description="Name of a volume in placement.volumes. Required. Example: `cache`.")
    mount_path: Annotated[str, StringConstraints(pattern=ABSOLUTE_PATH, max_length=512)] = Field(
        description="Absolute mount path in the container. Required. Example: `/mnt/cache`."
    )
    sub_path: Annotated[str, StringConstraints(max_length=512)] | None = spec_field(
        "Path in the volume.", default_text="the root of the volume", example="hub"
    )
    read_only: bool | None = spec_field("Mount the volume read-only.", default=False, example=True)


class Placement(Group):
    """`spec.placement`: scheduling and identity of the pods. The group contains a subset of the fields of a pod's spec."""

    cel = (
        CelRule(
            "!has(self.volumeMounts) || (has(self.volumes) && self.volumeMounts.all(m, self.volumes.exists(v, v.name == m.name)))",
            "every placement.volumeMounts[].name must be the name of a volume in placement.volumes",
            "VolumeContradiction",
        ),
        CelRule(
            f"!has(self.labels) || self.labels.all(key, self.labels[key].matches('{LABEL_VALUE}'))",
            "a label value has at most 63 letters, digits, `-`, `_` and `.`, with a letter or digit first and last: correct placement.labels",
            "LabelSyntax",
        ),
        CelRule(
            f"!has(self.nodeSelector) || self.nodeSelector.all(key, self.nodeSelector[key].matches('{LABEL_VALUE}'))",
            "a label value has at most 63 letters, digits, `-`, `_` and `.`, with a letter or digit first and last: correct placement.nodeSelector",
            "LabelSyntax",
        ),
    )

    node_selector: Annotated[StringMap, Field(max_length=32)] | None = spec_field(
        "Labels that a node must have, in addition to the labels of the node pool.",
        default_text="none",
        example={"topology.kubernetes.io/zone": "eu-1a"},
    )
    tolerations: Annotated[list[Toleration], Field(max_length=32)] | None = spec_field(
        "Tolerations of the pods, in addition to the tolerations of the node pool.",
        default_text="none",
        example=[{"key": "nvidia.com/gpu", "operator": "Exists"}],
    )
    node_affinity: Annotated[list[NodeAffinityTerm], Field(max_length=32)] | None = spec_field(
        "Requirements on node labels. A node must meet all requirements.",
        default_text="none",
        example=[{"key": "topology.kubernetes.io/zone", "operator": "In", "values": ["eu-1a"]}],
    )
    priority_class_name: ObjectName | None = spec_field(
        "PriorityClass of the pods.", default_text="the cluster's default", example="batch"
    )
    scheduler_name: ShortText | None = spec_field(
        "Scheduler of the pods.", default_text="the cluster's default", example="volcano"
    )
    queue_name: ObjectName | None = spec_field("Name of the Kueue LocalQueue.", default_text="no queue", example="team-a")
    service_account_name: ObjectName | None = spec_field(
        "ServiceAccount of the pods, for workload identity. The pods do not mount the token of the ServiceAccount.",
        default_text="the operator's configuration",
        example="trainer",
    )
    image_pull_secrets: Annotated[list[ObjectName], Field(max_length=16)] | None = spec_field(
        "Secrets for pulling the trainer image.", default_text="the operator's configuration", example=["registry"]
    )
    image: Annotated[str, StringConstraints(pattern=NO_SPACE, max_length=512)] | None = spec_field(
        "Trainer image.", default_text="the operator's configuration", example="registry.example.com/trainer:0.2.0"
    )
    env: Annotated[list[EnvVar], Field(max_length=64)] | None = spec_field(
        "Additional environment variables of the trainer container.",
        default_text="none",
        example=[{"name": "NCCL_DEBUG", "value": "INFO"}],
    )
    volumes: Annotated[list[Volume], Field(max_length=16)] | None = spec_field(
        "Additional volumes.", default_text="none", example=[{"name": "cache", "persistentVolumeClaim": "model-cache"}]
    )
    volume_mounts: Annotated[list[VolumeMount], Field(max_length=32)] | None = spec_field(
        "Mounts of placement.volumes in the trainer container.",
        default_text="none",
        example=[{"name": "cache", "mountPath": "/mnt/cache"}],
    )
    labels: Annotated[StringMap, Field(max_length=32)] | None = spec_field(
        "Additional labels of the Job and its pods. The operator refuses labels with keys that the operator itself sets.", default_text="none", example={"kueue.x-k8s.io/priority-class": "high"}
    )
    annotations: Annotated[StringMap, Field(max_length=32)] | None = spec_field(
        "Additional annotations of the Job and its pods. The operator refuses annotations with keys that the operator itself sets.", default_text="none", example={"example.com/cost-center": "42"}
    )


class Policy(Group):
    """`spec.policy`: time limits, and what happens after failures."""

    active_deadline_seconds: Annotated[int, Field(ge=1, le=31536000)] | None = spec_field(
        "Maximum running time of all attempts together, in seconds. After this time, the job fails. Time in the queue and suspended time do not count.",
        default_text="no limit",
        example=86400,
    )
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=31536000)] | None = spec_field(
        "Seconds from the end of the FineTuneJob to the deletion of its Jobs and Pods. The FineTuneJob itself is not deleted.",
        default_text="Jobs and Pods are kept",
        example=3600,
    )
    max_cost: Annotated[float, Field(gt=0, le=1e9)] | None = spec_field(
        "Maximum cost of the GPU-hours of all attempts, in the currency of the operator's configuration. A prepared job does not start if the lower bound of its planned cost is already above this maximum. A running job that has spent this amount saves a checkpoint and fails. This field requires that the node pool has a price.",
        default_text="no limit",
        example=250.5,
        since="0.2.0",
    )
    retries: Annotated[int, Field(ge=0, le=1000)] | None = spec_field(
        "Maximum number of consecutive failed attempts without progress. If one more attempt fails without progress, the job fails.", default=3, example=5
    )
    termination_grace_period_seconds: Annotated[int, Field(ge=1, le=86400)] | None = spec_field(
        "Seconds in which a stopping pod can save a checkpoint. If this field is not set and saving takes long, the operator raises "
        "the value to three times the duration of the newest checkpoint.",
        default=300,
        example=600,
    )
    start_timeout_seconds: Annotated[int, Field(ge=1, le=31536000)] | None = spec_field(
        "If the pods of an attempt do not run after this many seconds, the operator reports the job as stalled.", default=1800, example=7200
    )
    stall_timeout_seconds: Annotated[int, Field(ge=1, le=31536000)] | None = spec_field(
        "After this many seconds without an optimizer step, the operator ends the attempt and starts another one. While the ranks load the model, the operator ends the attempt after this many seconds in which the ranks neither compute nor read.",
        default_text="computed from recent step durations, at least 600",
        example=900,
    )
    on_out_of_memory: OnOutOfMemory | None = spec_field(
        "What the operator does after GPU memory was exhausted.", default="Adapt", example="Fail"
    )
    on_divergence: OnDivergence | None = spec_field(
        "What the operator does after the loss or a gradient was not finite.", default="Rollback", example="Fail"
    )
    on_existing_result: OnExistingResult | None = spec_field(
        "What happens if storage already holds the final model of an earlier FineTuneJob with the same namespace and name, for example after a cluster was rebuilt from Git. "
        "The preparation pod compares the spec and the inputs of the two jobs. With adopt or fail, a preparation runs even if prepare.strategy would not require it.",
        default_text="adopt for jobs with a preparation, otherwise train",
        example="train",
        since="0.2.0",
    )
