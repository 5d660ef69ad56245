"""The status of a FineTuneJob: the state that the operator has observed. Users, kubectl, GitOps tools and the CLI read it.

The operator writes a change of a field marked `prompt` at once. Changes of other fields (progress, metrics, checkpoints) may wait
for the next periodic write.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from enum import StrEnum
from functools import cache
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, PlainSerializer

from finetune_api.base import PROMPT, Prompt, ReportModel, status_field
from finetune_api.names import Condition as ConditionType
from finetune_api.names import FailureClass, Phase
from finetune_api.spec.enums import OutputKind


def rfc3339(moment: datetime) -> str:
    """Return a time in the format of Kubernetes: UTC, whole seconds, `Z`."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


Time = Annotated[datetime, PlainSerializer(rfc3339, return_type=str, when_used="json")]


class Condition(ReportModel):
    """One condition, with the same fields as the conditions of Kubernetes' own objects."""

    type: ConditionType = status_field("Name of the condition.", default=..., prompt=Prompt.VALUE)
    status: Literal["True", "False", "Unknown"] = status_field(
        "Whether the condition holds. Values: `True`: it holds. `False`: it does not hold. `Unknown`: it is not known yet.",
        default=..., prompt=Prompt.VALUE,
    )  # fmt: skip
    reason: str = status_field(
        "One word: why the condition has this status.", default="", example="Unschedulable", prompt=Prompt.VALUE
    )
    message: str = status_field("One sentence: why the condition has this status.", default="")
    last_transition_time: Time | None = status_field("When `status` last changed.", example="2026-03-01T12:00:00Z")
    observed_generation: int | None = status_field(
        "metadata.generation of the spec that the condition was computed from.", example=1
    )


class Attempt(ReportModel):
    """One attempt to run the job. Each attempt is one Kubernetes Job."""

    number: int = status_field("Number of the attempt; the first is 1.", default=..., example=1, prompt=Prompt.VALUE)
    start_time: Time | None = status_field(
        "When the attempt's Job was created or, with a queue, admitted.", example="2026-03-01T12:00:00Z"
    )
    end_time: Time | None = status_field(
        "When the attempt's last pod ended.", example="2026-03-01T14:00:00Z", prompt=Prompt.VALUE
    )
    reason: str | None = status_field("One word: why the attempt ended.", example="OutOfMemory", prompt=Prompt.VALUE)
    message: str | None = status_field("Error message of the rank that failed.")
    exit_code: int | None = status_field(
        "Exit code that decided how the attempt ended. docs/reference/names.md lists the codes.", example=71
    )
    node: str | None = status_field("Node of the rank that failed.", example="gpu-node-3")
    resumed_from_step: int | None = status_field(
        "Optimizer step that the attempt continued from. Absent: it started from the beginning.", example=400
    )
    last_step: int | None = status_field("Last optimizer step that the attempt completed.", example=450)
    steps_lost: int | None = status_field("Optimizer steps that the next attempt had to repeat.", example=50)
    config_sha256: str | None = status_field("sha256 (hex) of the attempt's run.json.")
    committed_step: int | None = status_field(
        "Optimizer step of the newest checkpoint that the attempt committed to storage.", example=400
    )
    counted: bool | None = status_field("Whether the attempt counts against policy.retries.", example=True)


class Progress(ReportModel):
    """How far the run is."""

    step: int | None = status_field("Optimizer steps completed.", example=120)
    total_steps: int | None = status_field("Optimizer steps of the whole run.", example=500)
    epoch: float | None = status_field("Passes over the training data completed.", example=0.72)
    percent: int | None = status_field("Steps completed, in whole percent.", example=24)
    display: str | None = status_field("Steps and percent as text.", example="120/500 (24%)")
    seconds_remaining: int | None = status_field(
        "Estimated seconds to the end of training, from the recent step time.", example=4320
    )
    eta: str | None = status_field("Estimated time to the end of training as text.", example="1h12m")
    tokens_seen: int | None = status_field("Tokens trained on, without padding.", example=983040)
    tokens_per_second: float | None = status_field(
        "Recent training throughput of all ranks together, in tokens per second.", example=2730.7
    )
    update_time: Time | None = status_field("When the trainer reported these values.", example="2026-03-01T12:00:00Z")


class Metrics(ReportModel):
    """Latest values of the training metrics, rounded."""

    train_loss: float | None = status_field("Training loss in nats per token.", example=1.234)
    eval_loss: float | None = status_field("Latest validation loss in nats per token.", example=1.301)
    best_eval_loss: float | None = status_field("Lowest validation loss so far in nats per token.", example=1.287)
    best_step: int | None = status_field("Optimizer step of the lowest validation loss.", example=400)
    learning_rate: float | None = status_field("Current learning rate.", example=0.0002)
    grad_norm: float | None = status_field("Gradient norm before clipping.", example=0.8)


class Checkpoint(ReportModel):
    """A checkpoint that is committed to storage."""

    step: int = status_field("Optimizer steps completed when the checkpoint was saved.", default=..., example=400)
    uri: str = status_field(
        "Folder with the checkpoint's files.", default=...,
        example="s3://models/ft/team-a/support-bot/UID/checkpoints/step-00000400/a1-1f3c9a2b",
    )  # fmt: skip
    sha256: str | None = status_field("sha256 (hex) of the checkpoint's manifest.")
    bytes: int | None = status_field("Size of all files, in bytes.", example=104857600)
    time: Time | None = status_field("When the checkpoint was committed.", example="2026-03-01T12:00:00Z")
    healthy: bool | None = status_field(
        "Whether loss and gradients stayed finite in the steps after the checkpoint.", example=True
    )
    eval_loss: float | None = status_field(
        "Validation loss at the checkpoint's step, in nats per token.", example=1.301
    )
    save_seconds: float | None = status_field("Seconds from the start of the upload to the commit.", example=3.2)


class Output(ReportModel):
    """The final artefact."""

    uri: str | None = status_field(
        "Folder with the final adapter or model.", example="s3://models/ft/team-a/support-bot/UID/model/a1-1f3c9a2b"
    )
    sha256: str | None = status_field("sha256 (hex) of the artefact's manifest.")
    kind: OutputKind | None = status_field("What the artefact is.", example="adapter")
    merged_uri: str | None = status_field("Folder of the base model with the adapter merged in, if requested.")
    published_uri: str | None = status_field("Folder of the copy below output.dir, if requested.")
    report_uri: str | None = status_field("Folder of the report of the run.")
    evaluation: dict[str, Any] | None = status_field(
        "Metrics measured after training, by name. For a test set: testRows, testLoss (nats per token), testTokenAccuracy "
        "and, depending on the data format, testAnswerAccuracy (multiple choice), testPreferenceAccuracy, testReward."
    )


class Failure(ReportModel):
    """Why the job, or its last attempt, failed."""

    class_: Annotated[FailureClass, Field(alias="class", description="Kind of the failure.")]
    code: str = status_field("Stable code of this failure, for programs.", default="", example="DatasetEmpty")
    message: str = status_field("What failed and why.", default="")
    hint: str | None = status_field("What the user or the platform team can do.")
    node: str | None = status_field("Node of the failed rank.", example="gpu-node-3")
    rank: int | None = status_field("Global rank that failed.", example=3)
    step: int | None = status_field("Optimizer step at which the job failed.", example=450)
    exit_code: int | None = status_field("Exit code of the trainer container.", example=65)


class Adaptation(ReportModel):
    """A change to the configuration that the operator made so that the job can continue."""

    time: Time = status_field("When the operator made the change.", default=..., example="2026-03-01T12:00:00Z")
    reason: str = status_field("Why the operator made the change.", default=..., example="OutOfMemory")
    change: str = status_field(
        "Old and new values as text.", default=...,
        example="batchSizePerDevice 4 -> 2, gradientAccumulationSteps 4 -> 8",
    )  # fmt: skip
    set: dict[str, Any] | None = status_field("New values by spec path.", example={"training.batchSizePerDevice": 2})


class Workers(ReportModel):
    """Pods of the current attempt."""

    ready: int = status_field("Pods that are ready.", default=0, example=2)
    total: int = status_field("Pods that the attempt needs.", default=0, example=2)
    display: str = status_field("Ready and needed pods as text.", default="0/0", example="2/2")


class Resolved(ReportModel):
    """The configuration that the run really uses, with defaults and with values that the operator and the trainer determined."""

    world_size: int | None = status_field("Number of ranks.", example=8)
    effective_batch: int | None = status_field(
        "Rows per optimizer step: batchSizePerDevice x gradientAccumulationSteps x ranks.", example=128
    )
    method: str | None = status_field("Fine-tuning method.", example="lora")
    model_name: str | None = status_field(
        "Short name of the base model, at most 28 characters.", example="SmolLM2-135M-Instruct"
    )
    strategy: str | None = status_field("Distributed strategy in use: single, ddp, fsdp or deepspeed.", example="ddp")
    attention: str | None = status_field("Attention implementation in use.", example="sdpa")
    device: str | None = status_field("Device that the model is trained on.", example="NVIDIA H100")
    trainable_parameters: int | None = status_field("Number of parameters that are trained.", example=4884480)
    total_parameters: int | None = status_field("Number of parameters of the model.", example=139399680)
    model_revision: str | None = status_field(
        "Commit (hub) or digest (storage) of the base model.", example="12fd25f77366fa6b3b4b768ec3050bf629380bac"
    )
    dataset_digest: str | None = status_field("sha256 (hex) of the training data.")
    dataset_rows: int | None = status_field("Number of rows trained on.", example=12000)
    dataset_format: str | None = status_field("Format of the rows, as given or as detected.", example="messages")
    image: str | None = status_field(
        "Trainer image that was requested.", example="ghcr.io/finetune-operator/trainer:0.2.0"
    )
    image_digest: str | None = status_field("Digest of the trainer image that runs.")
    node_pool: str | None = status_field("Node pool in use.", example="h100")
    config_sha256: str | None = status_field("sha256 (hex) of the current attempt's run.json.")
    spec_sha256: str | None = status_field(
        "sha256 (hex) of the spec of the first attempt, without the fields that may change after creation."
    )
    resume_exact: bool | None = status_field(
        "Whether a resumed run gives bit for bit the same result as an uninterrupted run.", example=True
    )
    resume_note: str | None = status_field("Why a resumed run is not exact, if it is not.")
    storage: dict[str, Any] | None = status_field("Capabilities of the storage, tested at start.")
    defaults: dict[str, Any] | None = status_field(
        "Every default that was filled in, by spec path.", example={"training.epochs": 3}
    )
    notes: list[str] | None = status_field(
        "Remarks on how the spec was understood.", example=["training.epochs 3 has no effect, because training.maxSteps is 40"]
    )


class FineTuneJobStatus(ReportModel):
    """What the operator has observed of a FineTuneJob."""

    observed_generation: int = status_field(
        "metadata.generation of the spec that this status describes; -1 until the operator has read the job.",
        default=-1, example=1, prompt=Prompt.VALUE,
    )  # fmt: skip
    phase: Phase | None = status_field(
        "State of the job in one word, for people. Programs should read conditions.", example="Running", prompt=Prompt.VALUE
    )
    reason: str | None = status_field(
        "One word: why the job waits, or why it failed. `-` if the phase says everything.",
        example="Unschedulable", prompt=Prompt.VALUE,
    )  # fmt: skip
    conditions: list[Condition] = status_field("Conditions, by type.", default_factory=list, prompt=Prompt.VALUE)
    attempt: int | None = status_field("Number of the current attempt.", example=1, prompt=Prompt.VALUE)
    restarts: int | None = status_field("Attempts after the first.", example=0, prompt=Prompt.VALUE)
    retries_used: int | None = status_field(
        "Consecutive attempts without progress that count against policy.retries.", example=0, prompt=Prompt.VALUE
    )
    active_seconds: int | None = status_field(
        "Running time of all ended attempts together, in seconds. Queued and suspended time does not count.",
        example=7200, prompt=Prompt.VALUE,
    )  # fmt: skip
    attempts: list[Attempt] = status_field("The newest ten attempts.", default_factory=list, prompt=Prompt.VALUE)
    progress: Progress | None = status_field("How far the run is.")
    metrics: Metrics | None = status_field("Latest values of the training metrics.")
    checkpoints: list[Checkpoint] = status_field(
        "The newest five committed checkpoints and the best one.", default_factory=list
    )
    latest_checkpoint: str | None = status_field(
        "Folder of the newest committed checkpoint.", prompt=Prompt.PRESENCE,
        example="s3://models/ft/team-a/support-bot/UID/checkpoints/step-00000400/a1-1f3c9a2b",
    )  # fmt: skip
    latest_checkpoint_step: int | None = status_field("Optimizer step of the newest committed checkpoint.", example=400)
    output: Output | None = status_field("The final artefact.", prompt=Prompt.VALUE)
    failure: Failure | None = status_field("Why the job, or its last attempt, failed.", prompt=Prompt.VALUE)
    adaptations: list[Adaptation] = status_field(
        "Changes to the configuration that the operator made so that the job can continue.",
        default_factory=list, prompt=Prompt.VALUE,
    )  # fmt: skip
    workers: Workers | None = status_field("Pods of the current attempt.")
    resolved: Resolved | None = status_field("The configuration that the run really uses.")
    start_time: Time | None = status_field(
        "When the first attempt's Job was created or, with a queue, admitted.",
        example="2026-03-01T12:00:00Z", prompt=Prompt.VALUE,
    )  # fmt: skip
    completion_time: Time | None = status_field(
        "When the job finished.", example="2026-03-01T14:03:00Z", prompt=Prompt.VALUE
    )
    duration: str | None = status_field("Time from start to end as text.", example="2h3m")

    def condition(self, kind: ConditionType) -> Condition | None:
        """Return the condition of type `kind`, or None."""
        return next((condition for condition in self.conditions if condition.type == kind), None)

    def holds(self, kind: ConditionType) -> bool:
        """Whether the condition of type `kind` is True."""
        condition = self.condition(kind)
        return condition is not None and condition.status == "True"

    def prompt_part(self) -> dict[str, Any]:
        """Return the prompt fields as JSON values. If they are equal in two statuses, the write of the newer status may wait."""
        present = {name: bool(getattr(self, name)) for name in _fields_marked(FineTuneJobStatus, Prompt.PRESENCE)}
        return self.model_dump(mode="json", include=_prompt_fields(FineTuneJobStatus)) | present

    @property
    def steps_done(self) -> int:
        """Return the last reported optimizer step; 0 before the first report."""
        return (self.progress.step if self.progress else None) or 0


def _fields_marked(model: type[BaseModel], mark: Prompt) -> Iterator[str]:
    for name, info in model.model_fields.items():
        if isinstance(info.json_schema_extra, dict) and info.json_schema_extra.get(PROMPT) == mark:
            yield name


@cache
def _prompt_fields(model: type[BaseModel]) -> dict[str, Any]:
    """Return the fields marked `Prompt.VALUE`, in the form of pydantic's `include`.

    If the items of a list have marked fields themselves, only these fields of each item are included.
    """
    include: dict[str, Any] = {}
    for name in _fields_marked(model, Prompt.VALUE):
        items = [
            argument
            for argument in get_args(model.model_fields[name].annotation)
            if isinstance(argument, type) and issubclass(argument, BaseModel)
        ]
        inner = _prompt_fields(items[0]) if items else {}
        include[name] = {"__all__": inner} if inner else True
    return include


class Stage(StrEnum):
    """What a pod is doing; finer than the phase."""

    STARTING = "starting"
    """The container has started and prepares the ranks."""
    DOWNLOADING = "downloading"
    """The model or the data are being downloaded."""
    CHECKING = "checking"
    """The spec, the model and the data are checked against each other."""
    LOADING = "loading"
    """The model is loaded onto the device."""
    RESTORING = "restoring"
    """A checkpoint is being restored."""
    TRAINING = "training"
    """Optimizer steps are running."""
    EVALUATING = "evaluating"
    """The model is being evaluated."""
    SAVING = "saving"
    """A checkpoint is being saved."""
    UPLOADING = "uploading"
    """The final artefact is being uploaded."""
    STOPPING = "stopping"
    """The pod has been asked to stop and saves a checkpoint."""
    DONE = "done"
    """The final artefact is committed."""
    FAILED = "failed"
    """The pod failed and is about to exit."""
