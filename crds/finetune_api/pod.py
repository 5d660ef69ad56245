"""The pod contract: what goes down to a pod as one file, and what comes back over HTTP and in its last words.

`RunConfig` travels inside the Job as an annotation and is mounted as `run.json`. `ProgressReport` is what `GET /progress` answers.
`TerminationMessage` is the termination message. The operator and the trainer meet here and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any

from pydantic import AliasChoices, Field

from finetune_api.base import LenientModel, WireModel
from finetune_api.names import MAX_TERMINATION_BYTES, FailureClass
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import AddressingStyle, EncryptionType
from finetune_api.status import Checkpoint, Metrics, Output, Progress, Resolved, Stage


class StoreTarget(WireModel):
    """A store, fully resolved: where, and how to connect. Credentials come by environment, never here."""

    uri: str = Field(description="`s3://bucket/prefix`, `file:///path` or `pvc://claim/path`; to read only, `https://host/path`.")
    endpoint: str | None = Field(default=None, description="URL of an S3-compatible store; absent: AWS.")
    region: str | None = Field(default=None, description="Region that requests are signed for.")
    addressing_style: AddressingStyle | None = Field(default=None, description="How the bucket stands in the URL.")
    ca_bundle: str | None = Field(default=None, description="File with PEM certificates to trust.")
    credentials_prefix: str = Field(
        default="", description="Prefix of the AWS_ variables that carry the credentials; empty: the plain ones."
    )
    encryption: EncryptionType | None = Field(
        default=None, description="Server-side encryption to ask for; absent: the bucket's own setting."
    )
    kms_key_id: str | None = Field(default=None, description="Key of the key service, with encryption kms.")
    customer_key_variable: str | None = Field(
        default=None, description="Environment variable that carries the customer's key, with encryption customerKey."
    )


class World(WireModel):
    """Who takes part."""

    nodes: int = Field(ge=1, description="Pods.")
    processes_per_node: int = Field(ge=1, description="Ranks per pod.")
    gpus_per_node: int = Field(ge=0, description="GPUs per pod; 0: CPU.")
    master_address: str = Field(description="Where rank 0 listens: `<job>-0.<service>`; loopback with one pod.")
    master_port: int = Field(ge=0, le=65535, description="Port there; 0 with one pod: any free one.")
    rendezvous_id: str = Field(description="`<uid>-<attempt>`: ranks of another attempt can never join.")

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.nodes * self.processes_per_node


class Resume(WireModel):
    """Where this attempt starts."""

    mode: str = Field(
        description="`auto`: newest healthy checkpoint of this job; `never`; or the uri of one checkpoint."
    )
    expect_step: int = Field(
        default=0,
        ge=0,
        description="Newest step known to be committed; if nothing loads although this is > 0, the pod ends with 73.",
    )
    max_step: int | None = Field(
        default=None, ge=0, description="Ignore checkpoints after this step (rollback after divergence)."
    )


class RunConfig(WireModel):
    """`run.json`: everything a pod needs to know. At most 64 KiB; the same bytes for all pods of an attempt."""

    version: int = Field(default=1, description="Of this contract.")
    name: str = Field(description="Name of the FineTuneJob.")
    namespace: str = Field(description="Its namespace.")
    uid: str = Field(description="Its uid.")
    attempt: int = Field(ge=1, description="Number of the attempt.")
    spec: FineTuneJobSpec = Field(description="The spec with every default filled in and every adaptation applied.")
    defaults: Annotated[list[str], Field(description="Spec paths that were filled in.")] = []
    before_adaptation: dict[str, Any] | None = Field(
        default=None,
        description="What the spec said, by path, where an adaptation has changed it: a user's own file still says that.",
    )
    world: World = Field(description="Who takes part.")
    storage: StoreTarget = Field(description="The job's own tree: `<spec.storage.uri>/<namespace>/<name>/<uid>`.")
    publish: str | None = Field(default=None, description="Root of the published copy, if output.dir is set.")
    model_store: StoreTarget | None = Field(default=None, description="For s3:// models; absent: as storage.")
    dataset_store: StoreTarget | None = Field(default=None, description="For s3:// data; absent: as storage.")
    resume: Resume = Field(description="Where this attempt starts.")
    grace_seconds: int = Field(ge=1, description="Time to save after SIGTERM, in seconds.")

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces. Its sha256 is the run's configuration hash."""
        return json.dumps(self.to_wire(), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    @staticmethod
    def sha256(data: bytes) -> str:
        """Configuration hash, hex."""
        return hashlib.sha256(data).hexdigest()


class Health(LenientModel):
    """What may go wrong next."""

    healthy: bool = Field(
        default=True,
        description="False while a loss or gradient norm is not finite, or a checkpoint could not be kept.",
    )
    seconds_since_step: float | None = Field(default=None, description="Since the newest optimizer step.")
    seconds_since_heartbeat: float | None = Field(
        default=None, validation_alias=AliasChoices("secondsSinceHeartbeat", "secondsSinceSign"), description="Since training last showed that it is alive: a step, a micro-step, a batch of an evaluation, a file."
    )
    median_step_seconds: float | None = Field(default=None, description="Median time of recent optimizer steps.")
    last_save_seconds: float | None = Field(
        default=None, description="Time the last checkpoint took until it was committed."
    )
    checkpoint_problem: str | None = Field(
        default=None, description="Reason word and sentence if a checkpoint was skipped or damaged."
    )


class ProgressReport(LenientModel):
    """What `GET /progress` answers."""

    attempt: int = Field(description="Attempt of this pod.")
    uid: str = Field(description="uid of the FineTuneJob: a pod that took over an address cannot be mistaken.")
    stage: Stage = Field(default=Stage.STARTING, description="What the pod is doing.")
    detail: str | None = Field(default=None, description="The same in words. Example: `model: 1.2 of 2.7 GB`.")
    progress: Progress = Field(default_factory=Progress)
    metrics: Metrics = Field(default_factory=Metrics)
    checkpoints: list[Checkpoint] = Field(default_factory=list)
    latest_checkpoint: str | None = None
    resumed_from_step: int | None = Field(default=None, description="Step this attempt continued from.")
    resolved: Resolved = Field(
        default_factory=Resolved, description="What the run really is; only fields the trainer knows."
    )
    health: Health = Field(default_factory=Health)
    timings: dict[str, float] = Field(default_factory=dict, description="Seconds each stage took, by name.")


class TerminationMessage(LenientModel):
    """The termination message: one JSON object below 4 KiB."""

    class_: Annotated[FailureClass | None, Field(alias="class")] = None
    code: str | None = Field(default=None, description="Stable word for the failure. Example: `DatasetEmpty`.")
    message: str | None = None
    hint: str | None = None
    exit_code: int | None = None
    node: str | None = None
    rank: int | None = None
    step: int | None = Field(default=None, description="Newest optimizer step.")
    checkpoint: str | None = Field(default=None, description="Newest committed checkpoint.")
    committed_step: int | None = Field(default=None, description="Step of that checkpoint.")
    time_ns: int | None = Field(default=None, description="When the failure was noticed, nanoseconds since 1970.")
    origin: bool | None = Field(
        default=None, description="True: this rank failed by itself; False: it noticed a peer's failure."
    )
    output: Output | None = None
    metrics: Metrics | None = None
    progress: Progress | None = None
    checkpoints: list[Checkpoint] = Field(default_factory=list)
    latest_checkpoint: str | None = None
    resumed_from_step: int | None = None
    resolved: Resolved | None = None

    def to_json(self) -> str:
        """The message, cut to what a kubelet keeps: first the lists go, then the long texts are shortened."""
        value = self.to_wire()
        for drop in ("resolved", "checkpoints", "metrics"):
            if len(_compact(value)) <= MAX_TERMINATION_BYTES:
                break
            value.pop(drop, None)
        for key in ("hint", "message"):
            excess = len(_compact(value)) - MAX_TERMINATION_BYTES
            if excess > 0 and isinstance(value.get(key), str):
                kept = (
                    value[key]
                    .encode(errors="replace")[: max(0, len(value[key].encode(errors="replace")) - excess - 16)]
                    .decode(errors="ignore")
                )
                value[key] = kept + " ..."
        return _compact(value).decode()


def _compact(value: dict[str, Any]) -> bytes:
    """Bytes that are always UTF-8: half a character from a torn log line must not cost the whole message."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")
