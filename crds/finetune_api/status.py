"""The status of a FineTuneJob: what was observed, nothing hoped for. Read by people, kubectl, GitOps tools and our own CLI."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer

from finetune_api.base import LenientModel
from finetune_api.names import Condition as ConditionType
from finetune_api.names import FailureClass, Phase
from finetune_api.spec.enums import OutputKind


def rfc3339(moment: datetime) -> str:
    """Kubernetes' time format: UTC, whole seconds, `Z`."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


Time = Annotated[datetime, PlainSerializer(rfc3339, return_type=str, when_used="json")]


class Condition(LenientModel):
    """One condition, as Kubernetes' own objects have them."""

    type: ConditionType = Field(description="What is spoken of.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds.")
    reason: str = Field(default="", description="One word why.")
    message: str = Field(default="", description="One sentence why.")
    last_transition_time: Time | None = Field(default=None, description="When `status` last changed.")
    observed_generation: int | None = Field(default=None, description="Generation of the spec this was derived from.")


class Attempt(LenientModel):
    """One attempt: one Job."""

    number: int = Field(description="Counted from 1.")
    start_time: Time | None = Field(default=None, description="When its Job was created.")
    end_time: Time | None = Field(default=None, description="When its last pod had ended.")
    reason: str | None = Field(default=None, description="Why it ended.")
    message: str | None = Field(default=None, description="The failing rank's own words.")
    exit_code: int | None = Field(default=None, description="Exit code that counted.")
    node: str | None = Field(default=None, description="Node of the failing rank.")
    resumed_from_step: int | None = Field(
        default=None, description="Optimizer step it continued from; absent: from the start."
    )
    last_step: int | None = Field(default=None, description="Newest optimizer step seen.")
    steps_lost: int | None = Field(default=None, description="Steps that the next attempt had to repeat.")
    config_sha256: str | None = Field(default=None, description="sha256 of its run configuration.")
    committed_step: int | None = Field(default=None, description="Newest step it committed to storage.")
    counted: bool | None = Field(default=None, description="Whether it counts against policy.retries.")


class Progress(LenientModel):
    """How far the run is."""

    step: int | None = Field(default=None, description="Optimizer steps done.")
    total_steps: int | None = Field(default=None, description="Optimizer steps in all.")
    epoch: float | None = Field(default=None, description="Passes over the data done.")
    percent: int | None = Field(default=None, description="Steps done, in whole percent.")
    display: str | None = Field(default=None, description="For people. Example: `120/500 (24%)`.")
    seconds_remaining: int | None = Field(default=None, description="Estimate from the recent pace, in seconds.")
    eta: str | None = Field(default=None, description="The same for people. Example: `1h12m`.")
    tokens_seen: int | None = Field(default=None, description="Tokens trained on, without padding.")
    tokens_per_second: float | None = Field(
        default=None, description="Recent pace of all ranks together, tokens per second."
    )
    update_time: Time | None = Field(default=None, description="When the pod reported this.")


class Metrics(LenientModel):
    """Last values, rounded."""

    train_loss: float | None = Field(default=None, description="Training loss (nats per token).")
    eval_loss: float | None = Field(default=None, description="Validation loss (nats per token).")
    best_eval_loss: float | None = Field(default=None, description="Lowest validation loss.")
    best_step: int | None = Field(default=None, description="Step of the lowest validation loss.")
    learning_rate: float | None = Field(default=None, description="Current learning rate.")
    grad_norm: float | None = Field(default=None, description="Gradient norm before clipping.")


class Checkpoint(LenientModel):
    """A committed checkpoint."""

    step: int = Field(description="Optimizer steps done when it was made.")
    uri: str = Field(description="Folder with its files.")
    sha256: str | None = Field(default=None, description="sha256 of its manifest.")
    bytes: int | None = Field(default=None, description="Size of all files, in bytes.")
    time: Time | None = Field(default=None, description="When it was committed.")
    healthy: bool | None = Field(default=None, description="Whether the steps after it were finite too.")
    eval_loss: float | None = Field(default=None, description="Validation loss at that step.")
    save_seconds: float | None = Field(default=None, description="Seconds that its upload took, up to its commit.")


class Output(LenientModel):
    """The final artefact."""

    uri: str | None = Field(default=None, description="Folder with its files.")
    sha256: str | None = Field(default=None, description="sha256 of its manifest.")
    kind: OutputKind | None = Field(default=None, description="adapter: needs the base model; model: complete.")
    merged_uri: str | None = Field(default=None, description="Base with the adapter merged in, if asked for.")
    published_uri: str | None = Field(default=None, description="Copy below output.dir, if asked for.")
    report_uri: str | None = Field(default=None, description="Report of the run.")
    evaluation: dict[str, Any] | None = Field(
        default=None,
        description="Metrics after training, by name. Of a test set: testRows, testLoss (nats per token), testTokenAccuracy and, where rows have them, testAnswerAccuracy (multiple choice), testPreferenceAccuracy, testReward.",
    )


class Failure(LenientModel):
    """Why the job, or its last attempt, failed."""

    class_: Annotated[FailureClass, Field(alias="class", description="Whose fault it is.")]
    code: str = Field(default="", description="Stable word for this failure. Example: `DatasetEmpty`.")
    message: str = Field(default="", description="What was given and why it cannot be.")
    hint: str | None = Field(default=None, description="What to write or do instead.")
    node: str | None = Field(default=None, description="Node it happened on.")
    rank: int | None = Field(default=None, description="Rank it happened on.")
    step: int | None = Field(default=None, description="Optimizer step it happened at.")
    exit_code: int | None = Field(default=None, description="Exit code of the pod.")


class Adaptation(LenientModel):
    """Something the operator changed to let the job go on."""

    time: Time = Field(description="When.")
    reason: str = Field(description="Why. Example: `OutOfMemory`.")
    change: str = Field(
        description="What, from and to. Example: `batchSizePerDevice 4 -> 2, gradientAccumulationSteps 4 -> 8`."
    )
    set: dict[str, Any] | None = Field(default=None, description="Values that now hold, by spec path.")


class Workers(LenientModel):
    """Pods of the current attempt."""

    ready: int = Field(default=0, description="Pods that are ready.")
    total: int = Field(default=0, description="Pods wanted.")
    display: str = Field(default="0/0", description="For people. Example: `2/2`.")


class Resolved(LenientModel):
    """What the run really is, every default and everything found out filled in."""

    world_size: int | None = Field(default=None, description="Ranks in all.")
    effective_batch: int | None = Field(
        default=None, description="Rows per optimizer step: batchSizePerDevice x accumulation x world size."
    )
    method: str | None = Field(default=None, description="Fine-tuning method.")
    strategy: str | None = Field(default=None, description="Strategy really active: single, ddp, fsdp or deepspeed.")
    attention: str | None = Field(default=None, description="Attention implementation really active.")
    device: str | None = Field(default=None, description="Device trained on. Example: `NVIDIA H100`.")
    trainable_parameters: int | None = Field(default=None, description="Parameters that are trained.")
    total_parameters: int | None = Field(default=None, description="Parameters of the model.")
    model_revision: str | None = Field(default=None, description="Commit or digest of the base model.")
    dataset_digest: str | None = Field(default=None, description="sha256 of the training data.")
    dataset_rows: int | None = Field(default=None, description="Rows trained on.")
    dataset_format: str | None = Field(default=None, description="Format of the rows, given or recognised.")
    image: str | None = Field(default=None, description="Trainer image asked for.")
    image_digest: str | None = Field(default=None, description="Digest of the image that runs.")
    node_pool: str | None = Field(default=None, description="Node pool used.")
    config_sha256: str | None = Field(default=None, description="sha256 of the current run configuration.")
    resume_exact: bool | None = Field(
        default=None, description="Whether a resumed run equals an undisturbed one bit by bit."
    )
    resume_note: str | None = Field(default=None, description="Why not, if not.")
    storage: dict[str, Any] | None = Field(default=None, description="Abilities of the store, probed at start.")
    defaults: dict[str, Any] | None = Field(default=None, description="Every default that was filled in, by spec path.")
    notes: list[str] | None = Field(
        default=None, description="What had to be said. Example: `maxSteps 40 wins over epochs`."
    )


class FineTuneJobStatus(LenientModel):
    """The whole story of a run."""

    observed_generation: int = Field(
        default=-1, description="Generation of the spec this status speaks of; -1 before the first look."
    )
    phase: Phase | None = Field(default=None, description="One word for people; programs read conditions.")
    conditions: list[Condition] = Field(default_factory=list, description="What holds, by type.")
    attempt: int | None = Field(default=None, description="Number of the current attempt.")
    restarts: int | None = Field(default=None, description="Attempts after the first.")
    retries_used: int | None = Field(
        default=None, description="Attempts in a row that made no progress and count against policy.retries."
    )
    active_seconds: int | None = Field(
        default=None,
        description="Seconds that ended attempts ran, all together; queued and suspended time does not count.",
    )
    attempts: list[Attempt] = Field(default_factory=list, description="The newest ten attempts.")
    progress: Progress | None = Field(default=None, description="How far the run is.")
    metrics: Metrics | None = Field(default=None, description="Last values.")
    checkpoints: list[Checkpoint] = Field(
        default_factory=list, description="The newest five committed checkpoints and the best."
    )
    latest_checkpoint: str | None = Field(default=None, description="Folder of the newest committed checkpoint.")
    output: Output | None = Field(default=None, description="The final artefact.")
    failure: Failure | None = Field(default=None, description="Why the job, or its last attempt, failed.")
    adaptations: list[Adaptation] = Field(default_factory=list, description="What was changed to let the job go on.")
    workers: Workers | None = Field(default=None, description="Pods of the current attempt.")
    resolved: Resolved | None = Field(default=None, description="What the run really is.")
    start_time: Time | None = Field(default=None, description="When the first attempt's Job was created.")
    completion_time: Time | None = Field(default=None, description="When the job finished.")
    duration: str | None = Field(default=None, description="Time from start to end, for people. Example: `2h3m`.")

    def condition(self, kind: ConditionType) -> Condition | None:
        """The condition of that type; None if nothing is said of it."""
        return next((one for one in self.conditions if one.type == kind), None)

    def holds(self, kind: ConditionType) -> bool:
        """Whether a condition is True."""
        found = self.condition(kind)
        return found is not None and found.status == "True"

    @property
    def steps_done(self) -> int:
        """Newest step that was told of; 0: none."""
        return (self.progress.step if self.progress else None) or 0


class Stage(StrEnum):
    """What a pod is doing; finer than the phase."""

    STARTING = "starting"
    DOWNLOADING = "downloading"
    CHECKING = "checking"
    LOADING = "loading"
    RESTORING = "restoring"
    TRAINING = "training"
    EVALUATING = "evaluating"
    SAVING = "saving"
    UPLOADING = "uploading"
    STOPPING = "stopping"
    DONE = "done"
    FAILED = "failed"
