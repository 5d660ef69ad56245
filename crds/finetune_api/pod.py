"""The data formats that operator and trainer pods exchange.

`RunConfig` configures a pod: the operator writes it to an annotation of the Job's pod template, and the pod mounts the annotation
as the file `run.json`. `ProgressReport` is the response of `GET /progress`. `TerminationMessage` is the container's termination
message. `docs/decisions/0070-contract-across-versions.md` says how an operator and a trainer of neighbouring releases read this data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from pydantic import AliasChoices, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from finetune_api.base import (
    ReportModel,
    WireModel,
    get_value_at_path,
    make_version_sort_key,
    map_fields_to_release,
    remove_value_at_path,
)
from finetune_api.names import CONTRACT_VERSION, MAX_TERMINATION_BYTES, OLDEST_TRAINER, FailureClass, Origin
from finetune_api.redaction import redact_all
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import AddressingStyle, EncryptionType
from finetune_api.status import (
    Checkpoint,
    DataReport,
    EvaluationResult,
    Metrics,
    Output,
    Progress,
    ResolvedConfig,
    RunPlan,
    Stage,
    TimeUse,
)


class StoreTarget(WireModel):
    """A location in storage and the connection to the store. The pod gets the credentials as environment variables."""

    uri: str = Field(description="`s3://bucket/prefix`, `file:///path` or `pvc://claim/path`. A location from which the pod only reads may also be `https://host/path`.")
    endpoint: str | None = Field(default=None, description="URL of an S3-compatible store. Without an endpoint, the store is AWS S3.")
    region: str | None = Field(default=None, description="Region of the store, which is part of each request's signature.")
    addressing_style: AddressingStyle | None = Field(
        default=None, description="Whether the bucket's name is in the path or in the host name of URLs."
    )
    ca_bundle: str | None = Field(default=None, description="Path of a PEM file with trusted CA certificates.")
    credentials_prefix: str = Field(
        default="", description="Prefix of the AWS_ environment variables with the credentials. An empty string means: no prefix."
    )
    encryption: EncryptionType | None = Field(
        default=None, description="Server-side encryption of uploaded objects. Default: the setting of the bucket."
    )
    kms_key_id: str | None = Field(default=None, description="ID of the KMS key. This key is used if `encryption` is kms.")
    customer_key_variable: str | None = Field(
        default=None, description="Environment variable with the encryption key. This variable is used if `encryption` is customerKey."
    )


class World(WireModel):
    """Pods and ranks of one attempt."""

    nodes: int = Field(ge=1, description="Number of pods.")
    processes_per_node: int = Field(ge=1, description="Ranks per pod.")
    gpus_per_node: int = Field(ge=0, description="GPUs per pod. 0: training on CPU.")
    master_address: str = Field(description="Host of the rendezvous: `<job>-0.<service>`, or the loopback address if the attempt has one pod.")
    master_port: int = Field(ge=0, le=65535, description="Port of the rendezvous. An attempt with one pod has the value 0 and uses any free port.")
    rendezvous_id: str = Field(description="`<uid>-<attempt>`. Each attempt has its own ID, so ranks of an older attempt cannot join.")

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.processes_per_node


class ResumeConfig(WireModel):
    """The checkpoint from which an attempt starts."""

    mode: str = Field(
        description="`auto`: start from the newest healthy checkpoint of this job. `never`: start without a checkpoint. Otherwise: URI of a checkpoint."
    )
    expect_step: int = Field(
        default=0,
        ge=0,
        description="Newest committed step that the operator knows, or 0. If this step is above 0 and no checkpoint can be loaded, the pod exits with code 73.",
    )
    max_step: int | None = Field(
        default=None, ge=0, description="Checkpoints after this step are ignored. The operator sets this field to roll back after divergence."
    )
    rolled_back_attempt: int | None = Field(
        default=None, ge=1, description="Number of the first attempt after the rollback. `max_step` does not apply to checkpoints of this attempt and of later ones."
    )
    known_checkpoints: dict[str, str] = Field(
        default={},
        description="The checkpoints in the job's status: sha256 of the manifest, by folder (for example `step-00000400/a1-1f3c9a2b`). A stored checkpoint in one of these folders with another sha256 is refused.",
    )


class PreparedRows(WireModel):
    """Which prepared rows below `<storage.uri>/<namespace>/_prepared/` the job uses, and how long unused rows are kept."""

    digest: str | None = Field(default=None, description="Name of the folder with the rows that the training pods use. Absent in a preparation.")
    manifest_sha256: str | None = Field(default=None, description="Expected sha256 (hex) of the manifest of the prepared rows.")
    ttl_days: int = Field(default=30, ge=1, description="Number of days after the last use of prepared rows; later, the rows may be removed.")


class GpuPool(WireModel):
    """A node pool that the preparation may choose for the job."""

    name: str = Field(description="Name of the pool.")
    memory_bytes: int | None = Field(default=None, ge=1, description="Memory of each GPU in bytes. Absent if it is not known.")
    gpu_type: str | None = Field(default=None, description="Type of the GPUs. Absent if it is not known.")
    price_per_gpu_hour: float | None = Field(default=None, ge=0, description="Price of one GPU-hour. Absent if it is not known.")
    gpus_per_node: int = Field(default=1, ge=1, description="Largest number of GPUs that the job may request on each node.")
    is_current: bool = Field(default=False, description="Whether the job uses this pool if the preparation chooses none.")


_MARK_PREFIX = "#"
_MIN_TRAINER_VERSION_MARK = "minTrainerVersion"
_ROLLED_BACK_ATTEMPT_MARK = "rolledBackAttempt"
_CHECKPOINT_MARK = "checkpoint"
_PREPARED_ROWS_MARK = "preparedRows"
_PREPARED_TTL_DAYS_MARK = "preparedTtlDays"
_GPU_POOL_MARK = "gpuPool"
_GENERATION_URL_MARK = "generationUrl"


class RunConfig(WireModel):
    """`run.json`: the configuration of all pods of an attempt, at most 64 KiB.

    Trainer 0.1.0 refuses unknown fields, but ignores unknown entries of the list `defaults`. Therefore `to_wire` writes `origins`,
    `min_trainer_version`, `resume.rolled_back_attempt`, `resume.known_checkpoints`, `prepared` and `generation_url` as entries of this list, called marks:
    `#platform resources.cpu`, `#minTrainerVersion 0.2.0`, `#rolledBackAttempt 3`, `#checkpoint step-00000400/a1-1f3c9a2b <sha256>`,
    `#preparedTtlDays 30`, `#preparedRows <digest> <sha256>`, `#gpuPool <JSON>`, `#generationUrl http://127.0.0.1:8100`.
    """

    version: int = Field(default=CONTRACT_VERSION, description="Version of the format of `run.json`.")
    name: str = Field(description="Name of the FineTuneJob.")
    namespace: str = Field(description="Namespace of the FineTuneJob.")
    uid: str = Field(description="uid of the FineTuneJob.")
    attempt: int = Field(ge=1, description="Number of the attempt.")
    spec: FineTuneJobSpec = Field(description="The spec with every default filled in and every adaptation applied.")
    defaults: Annotated[list[str], Field(description="Spec paths of the values that the user did not set.")] = []
    origins: Annotated[
        dict[str, Origin],
        Field(description="Origins of values that are listed in `defaults`, by spec path. A listed value without an entry has the origin `default`."),
    ] = {}
    min_trainer_version: str = Field(
        default=OLDEST_TRAINER, description="Oldest trainer release that can run this configuration."
    )
    before_adaptation: dict[str, Any] | None = Field(
        default=None,
        description="Original values, by spec path, of the fields that the operator changed after a failure, for example the micro-batch. The user's own configuration files still contain the original values.",
    )
    world: World = Field(description="Pods and ranks of the attempt.")
    storage: StoreTarget = Field(description="Root folder of the job: `<spec.storage.uri>/<namespace>/<name>/<uid>`.")
    publish: str | None = Field(default=None, description="Folder for the published copy of the final model. Absent without `output.dir`.")
    model_store: StoreTarget | None = Field(default=None, description="Connection to the store of an s3:// model. Default: the connection of `storage`.")
    dataset_store: StoreTarget | None = Field(default=None, description="Connection to the store of s3:// data. Default: the connection of `storage`.")
    resume: ResumeConfig = Field(description="The checkpoint from which the attempt starts.")
    prepared: PreparedRows | None = Field(default=None, description="Prepared rows in storage. Absent for jobs without a preparation.")
    pools: list[GpuPool] = Field(default=[], description="Node pools from which the preparation chooses. Empty for training pods.")
    generation_url: str | None = Field(
        default=None, description="Address of the vLLM server that generates the completions of grpo. Absent if the trainer generates the completions itself."
    )
    grace_seconds: int = Field(ge=1, description="Seconds between SIGTERM and SIGKILL, in which the pod can save a checkpoint.")

    def origin(self, path: str) -> Origin:
        """Return the origin of the value at a spec path."""
        return self.origins.get(path, Origin.DEFAULT) if path in self.defaults else Origin.USER

    def to_wire(self) -> dict[str, Any]:
        """Return the dict for JSON. Spec fields that trainer 0.1.0 does not know are omitted if their origin is `default`."""
        wire_values = super().to_wire()
        release_by_path = map_fields_to_release(FineTuneJobSpec)
        default_paths = [path for path in release_by_path if self.origin(path) is Origin.DEFAULT]
        user_paths = [path for path in release_by_path if path not in default_paths and get_value_at_path(wire_values["spec"], path) is not None]
        required_releases = {wire_values.pop("minTrainerVersion"), *(release_by_path[path] for path in user_paths)}
        for path in default_paths:
            remove_value_at_path(wire_values["spec"], path)
        wire_values["spec"].pop("prepare", None)  # trainer 0.1.0 does not know `prepare`, and only the operator reads this group
        mark_entries = [f"{_MARK_PREFIX}{origin} {path}" for path, origin in wire_values.pop("origins").items()]
        mark_entries.append(f"{_MARK_PREFIX}{_MIN_TRAINER_VERSION_MARK} {max(required_releases, key=make_version_sort_key)}")
        rolled_back_attempt = wire_values["resume"].pop("rolledBackAttempt", None)
        if rolled_back_attempt is not None:
            mark_entries.append(f"{_MARK_PREFIX}{_ROLLED_BACK_ATTEMPT_MARK} {rolled_back_attempt}")
        known_checkpoints = wire_values["resume"].pop("knownCheckpoints", {})
        mark_entries += [f"{_MARK_PREFIX}{_CHECKPOINT_MARK} {folder} {sha256}" for folder, sha256 in known_checkpoints.items()]
        wire_values.pop("prepared", None)
        if self.prepared is not None:
            mark_entries.append(f"{_MARK_PREFIX}{_PREPARED_TTL_DAYS_MARK} {self.prepared.ttl_days}")
            if self.prepared.digest and self.prepared.manifest_sha256:
                mark_entries.append(f"{_MARK_PREFIX}{_PREPARED_ROWS_MARK} {self.prepared.digest} {self.prepared.manifest_sha256}")
        mark_entries += [f"{_MARK_PREFIX}{_GPU_POOL_MARK} {json.dumps(pool, sort_keys=True)}" for pool in wire_values.pop("pools", [])]
        if wire_values.pop("generationUrl", None) is not None:
            mark_entries.append(f"{_MARK_PREFIX}{_GENERATION_URL_MARK} {self.generation_url}")
        return wire_values | {"defaults": [*self.defaults, *sorted(mark_entries)]}

    @model_validator(mode="before")
    @classmethod
    def _move_marks_to_fields(cls, raw_config: Any) -> Any:
        return read_marks(raw_config) if isinstance(raw_config, dict) else raw_config

    def to_bytes(self) -> bytes:
        """Return canonical JSON with sorted keys and without spaces. The sha256 of these bytes is the configuration hash."""
        return json.dumps(self.to_wire(), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    @staticmethod
    def sha256(run_json: bytes) -> str:
        """Return the configuration hash (hex) of the content of `run.json`."""
        return hashlib.sha256(run_json).hexdigest()


def read_marks(raw_config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of the raw `run.json` in which the marks of the list `defaults` are moved to their own fields."""
    default_entries = raw_config.get("defaults")
    mark_entries = [entry for entry in default_entries if str(entry).startswith(_MARK_PREFIX)] if isinstance(default_entries, list) else []
    if not mark_entries:
        return raw_config
    config = raw_config | {"defaults": [entry for entry in raw_config["defaults"] if entry not in mark_entries], "origins": {}}
    for mark in mark_entries:
        mark_name, _, mark_value = mark.removeprefix(_MARK_PREFIX).partition(" ")
        if mark_name == _MIN_TRAINER_VERSION_MARK:
            config["minTrainerVersion"] = mark_value
        elif mark_name == _ROLLED_BACK_ATTEMPT_MARK:
            config["resume"] = {**(config.get("resume") or {}), "rolledBackAttempt": mark_value}
        elif mark_name == _CHECKPOINT_MARK:
            folder, _, sha256 = mark_value.partition(" ")
            resume_values = config.get("resume") or {}
            config["resume"] = {**resume_values, "knownCheckpoints": {**resume_values.get("knownCheckpoints", {}), folder: sha256}}
        elif mark_name == _PREPARED_TTL_DAYS_MARK:
            config["prepared"] = {**(config.get("prepared") or {}), "ttlDays": mark_value}
        elif mark_name == _GPU_POOL_MARK:
            config["pools"] = [*config.get("pools", []), json.loads(mark_value)]
        elif mark_name == _PREPARED_ROWS_MARK:
            digest, _, sha256 = mark_value.partition(" ")
            config["prepared"] = {**(config.get("prepared") or {}), "digest": digest, "manifestSha256": sha256}
        elif mark_name == _GENERATION_URL_MARK:
            config["generationUrl"] = mark_value
        else:
            # An unknown origin counts as `user`, so that the trainer refuses an unknown field instead of ignoring it.
            config["origins"][mark_value] = mark_name if mark_name in list(Origin) else Origin.USER
    return config


class HealthReport(ReportModel):
    """Health of the training in a pod, from which the operator detects stalls, divergence and checkpoint problems."""

    healthy: bool = Field(
        default=True,
        description="Whether training is healthy. False while a loss or gradient norm is not finite, or a checkpoint could not be stored.",
    )
    seconds_since_step: float | None = Field(default=None, description="Seconds since the last optimizer step.")
    seconds_since_heartbeat: float | None = Field(
        default=None,
        validation_alias=AliasChoices("secondsSinceHeartbeat", "secondsSinceSign"),
        description="Seconds since the last heartbeat of training: a step, a micro-step, an evaluation batch or a transferred file.",
    )
    median_step_seconds: float | None = Field(default=None, description="Median duration of recent optimizer steps.")
    last_save_seconds: float | None = Field(
        default=None, description="Seconds from the start of the last checkpoint's upload to its commit."
    )
    checkpoint_problem: str | None = Field(
        default=None, description="Reason (a CamelCase word) and one sentence about a checkpoint that was skipped or is damaged."
    )

    tracker_problem: str | None = Field(
        default=None, description="Reason (a CamelCase word) and one sentence about a tracker that does not accept metrics at present."
    )

    @model_serializer(mode="wrap")
    def _write_old_name(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Also write `secondsSinceHeartbeat` under its old name.

        Operator 0.1.0 reads only the old name, `secondsSinceSign`. Without this name, operator 0.1.0 would treat a long evaluation as a stall.
        """
        wire_values: dict[str, Any] = handler(self)
        if wire_values.get("secondsSinceHeartbeat") is not None:
            wire_values["secondsSinceSign"] = wire_values["secondsSinceHeartbeat"]
        return wire_values


class ProgressReport(ReportModel):
    """The response of `GET /progress`."""

    attempt: int = Field(description="Attempt of this pod.")
    uid: str = Field(description="uid of the FineTuneJob. An unexpected uid shows that the pod's address now belongs to a pod of another job.")
    stage: Stage = Field(default=Stage.STARTING, description="What the pod is doing.")
    detail: str | None = Field(default=None, description="Details of the stage. Example: `model: 1.2 of 2.7 GB`.")
    progress: Progress = Field(default_factory=Progress)
    metrics: Metrics = Field(default_factory=Metrics)
    checkpoints: list[Checkpoint] = Field(default_factory=list)
    latest_checkpoint: str | None = None
    output: Output | None = Field(default=None, description="The final model or adapter, as soon as it is committed.")
    evaluation: EvaluationResult | None = Field(default=None, description="Results of the evaluation after training.")
    resumed_from_step: int | None = Field(default=None, description="Optimizer step from which this attempt resumed.")
    plan: RunPlan | None = Field(default=None, description="Memory, work, time and cost that the plan expects for the run, and the measured values.")
    data: DataReport | None = Field(default=None, description="Counts of the rows and tokens that a preparation has read so far.")
    resolved: ResolvedConfig = Field(
        default_factory=ResolvedConfig, description="The configuration in use, without fields that this trainer release does not know."
    )
    health: HealthReport = Field(default_factory=HealthReport)
    timings: dict[str, float] = Field(default_factory=dict, description="Durations of the stages in seconds, by name of the stage.")
    time_use: TimeUse | None = Field(default=None, description="What the container's time since its start was used for.")


class GpuUsage(ReportModel):
    """Current usage of one GPU. Values that the driver does not report are absent."""

    index: int = Field(description="Number of the GPU in the pod.")
    utilization_percent: float | None = Field(default=None, description="Share of the last sampling interval in which the GPU computed.")
    memory_used_bytes: int | None = Field(default=None, description="Used GPU memory, in bytes.")
    memory_total_bytes: int | None = Field(default=None, description="Memory of the GPU, in bytes.")


class PodUsage(ReportModel):
    """The response of `GET /usage`."""

    memory_used_bytes: int | None = Field(default=None, description="Used memory of the container, in bytes.")
    memory_total_bytes: int | None = Field(default=None, description="Memory limit of the container; without a limit: memory of the machine, in bytes.")
    gpus: list[GpuUsage] = Field(default_factory=list)


class StorageCheckResult(ReportModel):
    """The termination message of a pod that runs the command `check-storage`."""

    ok: bool = Field(description="Whether the pod can write, read and list in storage.")
    code: str = Field(default="", description="Code of the failure.")
    message: str = Field(default="", description="What failed or, after a success, what the store supports.")
    hint: str = Field(default="", description="What the user can do after a failure.")

    def to_json(self) -> str:
        """Return the result as JSON of at most 4096 bytes, the kubelet's limit, without secrets."""
        return _make_termination_json(self.to_wire())


class TerminationMessage(ReportModel):
    """The termination message of a trainer pod: one JSON object of at most 4096 bytes."""

    class_: Annotated[FailureClass | None, Field(alias="class")] = None
    code: str | None = Field(default=None, description="Code of the failure, for programs. Example: `DatasetEmpty`.")
    message: str | None = None
    hint: str | None = None
    exit_code: int | None = None
    node: str | None = None
    rank: int | None = None
    step: int | None = Field(default=None, description="Last completed optimizer step.")
    checkpoint: str | None = Field(default=None, description="URI of the newest committed checkpoint.")
    committed_step: int | None = Field(default=None, description="Optimizer step of the newest committed checkpoint.")
    time_ns: int | None = Field(default=None, description="Time of the failure's detection, in nanoseconds since 1970.")
    origin: bool | None = Field(
        default=None, description="True: this rank itself failed. False: this rank noticed the failure of another rank."
    )
    stage: Stage | None = Field(
        default=None, description="The stage that failed, if it follows the commit of the model. Absent if training failed."
    )
    output: Output | None = None
    evaluation: EvaluationResult | None = None
    data: DataReport | None = Field(default=None, description="Counts of the rows and tokens that a preparation has read.")
    metrics: Metrics | None = None
    progress: Progress | None = None
    checkpoints: list[Checkpoint] = Field(default_factory=list)
    latest_checkpoint: str | None = None
    resumed_from_step: int | None = None
    resolved: ResolvedConfig | None = None
    plan: RunPlan | None = None
    time_use: TimeUse | None = Field(default=None, description="What the container's time since its start was used for.")

    def to_json(self) -> str:
        """Return the message as JSON of at most 4096 bytes, the kubelet's limit, without secrets.

        From a longer message, optional fields are removed first. If the message is still too long without these fields, its texts are cut.
        """
        return _make_termination_json(self.to_wire(), _PART_REMOVERS)


def _make_termination_json(message: dict[str, Any], part_removers: tuple[Callable[[dict[str, Any]], None], ...] = ()) -> str:
    """Return the JSON of a termination message, shortened to at most 4096 bytes. `part_removers`: functions that shorten a message, in order of use.

    Secrets in the message and in the hint are replaced, because everyone who may read a pod can read its termination message.
    """
    redacted_texts = {key: redact_all(message[key], "[redacted]") for key in ("hint", "message") if isinstance(message.get(key), str)}
    message |= redacted_texts
    for remove_part in part_removers:
        if len(_to_compact_json(message)) <= MAX_TERMINATION_BYTES:
            break
        remove_part(message)
    for key in sorted(redacted_texts, key=lambda name: len(redacted_texts[name]), reverse=True):  # Cut the longest text first, so that a short hint stays complete.
        excess_bytes = len(_to_compact_json(message)) - MAX_TERMINATION_BYTES
        if excess_bytes > 0:
            text_bytes = redacted_texts[key].encode(errors="replace")
            message[key] = text_bytes[: max(0, len(text_bytes) - excess_bytes - 16)].decode(errors="ignore") + " ..."
    return _to_compact_json(message).decode()


def _drop_texts_of_passed_gates(message: dict[str, Any]) -> None:
    for gate in message.get("evaluation", {}).get("gates", []):
        if gate["passed"]:
            gate.pop("text", None)


def _drop_reasons_of_verification(message: dict[str, Any]) -> None:
    for artefact in message.get("output", {}).get("verification", {}).get("artefacts", []):
        artefact.pop("reason", None)


_PART_REMOVERS: tuple[Callable[[dict[str, Any]], None], ...] = (
    partial(remove_value_at_path, path="plan.memory"),
    partial(remove_value_at_path, path="resolved"),
    partial(remove_value_at_path, path="checkpoints"),
    partial(remove_value_at_path, path="metrics"),
    partial(remove_value_at_path, path="timeUse"),
    _drop_texts_of_passed_gates,
    partial(remove_value_at_path, path="evaluation.benchmarks"),
    partial(remove_value_at_path, path="evaluation.metrics"),
    partial(remove_value_at_path, path="evaluation"),
    partial(remove_value_at_path, path="output.evaluation"),
    _drop_reasons_of_verification,
    partial(remove_value_at_path, path="output.lineageUri"),
    partial(remove_value_at_path, path="output.reportUri"),
    partial(remove_value_at_path, path="output.publishedUri"),
    partial(remove_value_at_path, path="output.mergedUri"),
    partial(remove_value_at_path, path="output.hubUri"),
    partial(remove_value_at_path, path="latestCheckpoint"),
    partial(remove_value_at_path, path="checkpoint"),
)
"""Functions that shorten a termination message that is too long: each removes one part. They are listed in the order of use.

All results of the evaluation are also in storage. The removed URIs are also in the last progress report and in the status.
"""


def _to_compact_json(message: dict[str, Any]) -> bytes:
    """Return a message as compact JSON in valid UTF-8. An incomplete character, such as at the end of a log line that was cut, is replaced by `?`."""
    return json.dumps(message, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")
