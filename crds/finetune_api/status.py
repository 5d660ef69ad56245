"""The status of a FineTuneJob: what the operator observed about the job. Users, kubectl, GitOps tools and the CLI read the status.

The operator writes a change of a field that is declared with `immediate` at once. Changes of all other fields, such as progress, metrics
and checkpoints, wait for the next periodic status write.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from functools import cache
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, Field, PlainSerializer

from finetune_api.base import IMMEDIATE_WRITE_KEY, ImmediateWrite, ReportModel, status_field
from finetune_api.names import Condition as ConditionType
from finetune_api.names import FailureClass, Phase, Reason
from finetune_api.spec.enums import OutputKind


def format_rfc3339(time: datetime) -> str:
    """Return a UTC time in the format of Kubernetes, such as `2026-03-01T12:00:00Z`."""
    return f"{time.isoformat(timespec='seconds')[:19]}Z"  # three times as fast as `strftime`


Time = Annotated[datetime, PlainSerializer(format_rfc3339, return_type=str, when_used="json")]


def round_to_six_digits(value: float) -> float:
    """Return the number rounded to six significant digits, which is easier to read and keeps the termination message small."""
    return float(f"{value:.6g}")


RoundedNumber = Annotated[float, AfterValidator(round_to_six_digits)]


class Condition(ReportModel):
    """A condition of the FineTuneJob, with the fields of any Kubernetes condition."""

    type: ConditionType = status_field("Name of the condition.", default=..., immediate=ImmediateWrite.WHEN_VALUE_CHANGES)
    status: Literal["True", "False", "Unknown"] = status_field(
        "Whether the condition is true. Values: `True`: the condition is true. `False`: the condition is false. `Unknown`: the operator does not know yet.",
        default=..., immediate=ImmediateWrite.WHEN_VALUE_CHANGES,
    )  # fmt: skip
    reason: str = status_field(
        "Reason for the condition's status, as one CamelCase word.", default="", example="Unschedulable", immediate=ImmediateWrite.WHEN_VALUE_CHANGES
    )
    message: str = status_field("Explanation of the condition's status in one sentence.", default="")
    last_transition_time: Time | None = status_field("Time of the last change of `status`.", example="2026-03-01T12:00:00Z")
    observed_generation: int | None = status_field(
        "metadata.generation of the spec for which the operator computed the condition.", example=1
    )


class Attempt(ReportModel):
    """One attempt to run the job. Each attempt is one Kubernetes Job."""

    number: int = status_field("Number of the attempt. The first attempt has number 1.", default=..., example=1, immediate=ImmediateWrite.WHEN_VALUE_CHANGES)
    start_time: Time | None = status_field(
        "Creation time of the attempt's Job. With a queue: time of the Job's admission.", example="2026-03-01T12:00:00Z"
    )
    end_time: Time | None = status_field(
        "End of the attempt's last pod.", example="2026-03-01T14:00:00Z", immediate=ImmediateWrite.WHEN_VALUE_CHANGES
    )
    reason: str | None = status_field("Reason for the end of the attempt, in one word.", example="OutOfMemory", immediate=ImmediateWrite.WHEN_VALUE_CHANGES)
    message: str | None = status_field("Error message of the failed rank.")
    exit_code: int | None = status_field(
        "Exit code of the trainer container whose end decided the attempt's reason. docs/reference/names.md lists all exit codes.", example=71
    )
    node: str | None = status_field("Node of the failed rank.", example="gpu-node-3")
    resumed_from_step: int | None = status_field(
        "Optimizer step from which the attempt resumed. Absent if the attempt started without a checkpoint.", example=400
    )
    last_step: int | None = status_field("Last optimizer step that the attempt completed.", example=450)
    steps_lost: int | None = status_field("Number of optimizer steps that the next attempt had to repeat.", example=50)
    config_sha256: str | None = status_field("sha256 (hex) of the attempt's run configuration (run.json).")
    committed_step: int | None = status_field(
        "Optimizer step of the newest checkpoint that the attempt committed to storage.", example=400
    )
    counted: bool | None = status_field("Whether the attempt counts against policy.retries.", example=True)


class Preparation(ReportModel):
    """The preparation of the job: a pod without GPUs checks storage, model and data before the first attempt."""

    number: int = status_field(
        "Number of the newest preparation. The name of its Job is `<name>-prepare<number>`.", default=1, example=1, immediate=ImmediateWrite.WHEN_VALUE_CHANGES
    )
    failures: int = status_field("Number of failed preparations. The limit is policy.retries.", default=0, example=1, immediate=ImmediateWrite.WHEN_VALUE_CHANGES)
    start_time: Time | None = status_field("Start of the first preparation.", example="2026-03-01T12:00:00Z")
    end_time: Time | None = status_field("End of the newest preparation that has ended.", example="2026-03-01T12:02:00Z", immediate=ImmediateWrite.WHEN_VALUE_CHANGES)
    reason: str | None = status_field(
        "Why no further preparation follows, in one word. Absent as long as another preparation may follow.", example="Prepared", immediate=ImmediateWrite.WHEN_VALUE_CHANGES
    )
    message: str | None = status_field("Why the last preparation failed or was skipped.", example="no node could take the pod within 300 s")
    stage: str | None = status_field("What the preparation pod is doing. Absent if no preparation pod is running.", example="checking")
    tokenised_rows: int | None = status_field(
        "Number of rows that the newest preparation has tokenised. 0: the rows of an earlier preparation of the same data are used.", example=120000
    )


class DataReport(ReportModel):
    """Counts of the rows and tokens, which are known before the first optimizer step, and the location of the prepared rows."""

    digest: str | None = status_field(
        "Hash of everything that determines the prepared rows: the content of the data, the options, the tokenizer, the chat template and the version of the code.",
        example="5f2b8c1d...",
    )  # fmt: skip
    prepared_uri: str | None = status_field(
        "Folder of the prepared rows, which the training pods download. Absent if no rows are stored.", example="s3://models/ft/team-a/_prepared/5f2b8c1d..."
    )
    prepared_sha256: str | None = status_field(
        "sha256 (hex) of the manifest of the prepared rows. If the manifest in storage has another sha256, a training pod does not use the rows, but prepares the data itself."
    )
    rows: dict[str, int] | None = status_field("Number of usable rows, by split.", example={"train": 900, "validation": 100})
    bad_rows: int | None = status_field("Number of rows that were left out because they cannot be used for training.", example=2)
    duplicates: int | None = status_field("Number of rows that were left out because they equal an earlier row. Absent without dataset.checks.", example=3)
    personal_data: dict[str, int] | None = status_field(
        "Number of rows with personal data, by kind of data. Absent without dataset.checks.", example={"email": 4}
    )
    tokens: int | None = status_field("Number of tokens in the training rows. For pairs of answers, each prompt counts twice.", example=412345)
    trained_tokens: int | None = status_field("Number of tokens in the training rows for which the loss is computed.", example=198765)
    median_length: int | None = status_field("Median length of the training rows, in tokens.", example=310)
    longest: int | None = status_field("Length of the longest training row, in tokens.", example=2048)
    tokenised_rows: int | None = status_field("Number of rows that the preparation tokenised. 0 if the preparation uses stored rows.", example=1000)
    truncated: int | None = status_field("Number of training rows that were cut at the maximum sequence length.", example=12)


class Progress(ReportModel):
    """Progress of training."""

    step: int | None = status_field("Number of completed optimizer steps.", example=120)
    total_steps: int | None = status_field("Number of optimizer steps of the whole training.", example=500)
    epoch: float | None = status_field("Completed passes over the training data.", example=0.72)
    percent: int | None = status_field("Completed optimizer steps, in whole percent.", example=24)
    display: str | None = status_field("Completed optimizer steps and percent, as text.", example="120/500 (24%)")
    seconds_remaining: int | None = status_field(
        "Estimated seconds to the end of training, computed from recent step durations.", example=4320
    )
    eta: str | None = status_field("Estimated time to the end of training as text.", example="1h12m")
    tokens_seen: int | None = status_field("Number of tokens on which the model was trained so far, without padding.", example=983040)
    tokens_per_second: float | None = status_field(
        "Recent training throughput of all ranks together, in tokens per second.", example=2730.7
    )
    update_time: Time | None = status_field("Time of the trainer's report that contains these values.", example="2026-03-01T12:00:00Z")


class Metrics(ReportModel):
    """Latest rounded values of the training metrics."""

    train_loss: float | None = status_field("Training loss in nats per token.", example=1.234)
    eval_loss: float | None = status_field("Latest validation loss in nats per token.", example=1.301)
    best_eval_loss: float | None = status_field("Lowest validation loss so far in nats per token.", example=1.287)
    best_step: int | None = status_field("Optimizer step with the lowest validation loss.", example=400)
    learning_rate: float | None = status_field("Current learning rate.", example=0.0002)
    grad_norm: float | None = status_field("Gradient norm before clipping.", example=0.8)


class Checkpoint(ReportModel):
    """A checkpoint that is committed to storage."""

    step: int = status_field("Number of optimizer steps that were completed when the checkpoint was saved.", default=..., example=400)
    uri: str = status_field(
        "Folder with the checkpoint's files.", default=...,
        example="s3://models/ft/team-a/support-bot/UID/checkpoints/step-00000400/a1-1f3c9a2b",
    )  # fmt: skip
    sha256: str | None = status_field("sha256 (hex) of the checkpoint's manifest.")
    bytes: int | None = status_field("Size of all files of the checkpoint, in bytes.", example=104857600)
    time: Time | None = status_field("Time at which the checkpoint was committed.", example="2026-03-01T12:00:00Z")
    healthy: bool | None = status_field(
        "Whether loss and gradients stayed finite in the steps after the checkpoint.", example=True
    )
    eval_loss: float | None = status_field(
        "Validation loss at the checkpoint's step, in nats per token.", example=1.301
    )
    save_seconds: float | None = status_field("Seconds from the start of the checkpoint's upload to its commit.", example=3.2)


class VerificationOutcome(StrEnum):
    """Result of a verification."""

    VERIFIED = "Verified"
    """The stored model computes the same values as the trained model."""
    NOT_VERIFIED = "NotVerified"
    """The values could not be compared, or rounding can explain their difference. The field `reason` says which of the two applies."""
    FAILED = "Failed"
    """The stored model is damaged, has no effect, or computes other values than the trained model."""


class ArtefactVerification(ReportModel):
    """Verification of one stored artefact: the adapter, the model, or the merged model."""

    artefact: str = status_field("Verified artefact: adapter, model or merged.", default=..., example="adapter")
    result: VerificationOutcome = status_field("Verified, NotVerified or Failed.", default=..., example="Verified")
    code: str | None = status_field("Code of the reason, for programs.", example="AdapterHasNoEffect")
    reason: str | None = status_field("Why the artefact failed or could not be verified.", example="all B matrices of the adapter are zero")
    difference: float | None = status_field(
        "Difference between the stored and the trained model in nats: the root mean square over all tokens or, for models in 32 bits, the largest difference of a token.",
        example=0.0000021,
    )
    tolerance: float | None = status_field("Largest accepted value of `difference`, in the same unit.", example=0.001)
    change_from_base: float | None = status_field(
        "Root mean square of the difference between the stored model and the base model, in nats per token. Absent if the base model cannot compute these values, for example without a score head.",
        example=0.83,
    )


class Verification(ReportModel):
    """Comparison of the stored final model with the trained model in memory."""

    result: VerificationOutcome = status_field("The worst result of all artefacts.", default=..., example="Verified")
    rows: int = status_field("Number of compared rows.", default=0, example=8)
    tokens: int = status_field("Number of compared values: tokens, or scores of a reward model.", default=0, example=412)
    artefacts: list[ArtefactVerification] = status_field(
        "Result for each artefact.", default_factory=list, example=[{"artefact": "adapter", "result": "Verified", "difference": 0.0000021, "tolerance": 0.001}]
    )


class Output(ReportModel):
    """The final model or adapter."""

    uri: str | None = status_field(
        "Folder with the final adapter or model.", example="s3://models/ft/team-a/support-bot/UID/model/a1-1f3c9a2b"
    )
    sha256: str | None = status_field("sha256 (hex) of the manifest of the final model.")
    kind: OutputKind | None = status_field("Whether the result is an adapter or a complete model.", example="adapter")
    merged_uri: str | None = status_field("Folder with the merged model. Present if output.mergeAdapter is true.")
    published_uri: str | None = status_field("Folder of the published copy. Present if output.dir is set.")
    hub_uri: str | None = status_field(
        "Address of the pushed commit on the model hub. Present if output.hub.push is true.",
        example="https://huggingface.co/org/my-model/tree/12fd25f77366fa6b3b4b768ec3050bf629380bac",
    )  # fmt: skip
    oci_digest: str | None = status_field(
        "Digest of the OCI artefact of the model, or of the merged model. Present if output.export contains `oci`. A registry to which the artefact is pushed shows the same digest.",
        example="sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    )
    report_uri: str | None = status_field(
        "The run's report, an HTML page.", example="s3://models/ft/team-a/support-bot/UID/report/index.html"
    )
    lineage_uri: str | None = status_field(
        "The lineage statement: base model, data, spec and library versions from which the final model was made. The statement is unsigned until you run `finetune sign`."
    )
    adopted_uid: str | None = status_field(
        "uid of the earlier FineTuneJob of the same name whose result this job adopted. The files of the earlier job are below `<storage.uri>/<namespace>/<name>/<uid>/`. Absent if this job trained.",
        example="5c3f0f5e-8f4e-4f0c-9a44-0d9f3a1c2b7e",
    )
    promoted: bool | None = status_field(
        "Whether the final model passed every gate of evaluation.gates and therefore has the marker `_PROMOTED`. Absent without gates.", example=True
    )
    verification: Verification | None = status_field(
        "Result of the check that the stored model computes the same values as the trained model. Absent if output.verify is false."
    )
    evaluation: dict[str, Any] | None = status_field(
        "Metrics measured after training, by name. With a test set: testRows, testLoss (nats per token), testTokenAccuracy. "
        "Depending on the data format, this field also contains testAnswerAccuracy (multiple choice), testPreferenceAccuracy, testReward."
    )


class MetricResult(ReportModel):
    """Values of one evaluation metric. A value that was not measured is absent."""

    value: RoundedNumber | None = status_field("Value of the trained model, in the metric's own unit.", example=0.83)
    base: RoundedNumber | None = status_field("Value of the base model on the same rows.", example=0.79)
    difference: RoundedNumber | None = status_field("Value of the trained model minus value of the base model.", example=0.04)
    low: RoundedNumber | None = status_field("Lower end of the 95 % confidence interval of the difference.", example=0.012)
    high: RoundedNumber | None = status_field("Upper end of the 95 % confidence interval of the difference.", example=0.068)
    reason: str | None = status_field(
        "Why the metric or its confidence interval could not be computed.", example="2 of 200 answers could not be scored by the judge"
    )


class GateResult(ReportModel):
    """Result of one gate of `evaluation.gates`."""

    metric: str = status_field("Metric of the gate.", default=..., example="accuracy")
    passed: bool = status_field("Whether the trained model passed the gate.", default=..., example=True)
    text: str | None = status_field(
        "The measured and the required value in one sentence.", example="accuracy is 0.83, and the gate requires at least 0.8"
    )


class BenchmarkResult(ReportModel):
    """The value of one metric of one task of a benchmark."""

    name: str = status_field("Benchmark of evaluation.benchmarks.", default=..., example="lm-eval")
    task: str = status_field("Task or domain.", default=..., example="hellaswag")
    metric: str = status_field("Metric of the task.", default=..., example="acc")
    value: RoundedNumber | None = status_field("Value of the trained model.", example=0.56)
    stderr: RoundedNumber | None = status_field("Standard error of the value.", example=0.005)
    base: RoundedNumber | None = status_field("Value of the base model. Present only with compareWithBase.", example=0.58)
    difference: RoundedNumber | None = status_field("Value of the trained model minus value of the base model.", example=-0.02)
    reason: str | None = status_field("Why the metric has no value.", example="the task reports no number for bypass")


class EvaluationResult(ReportModel):
    """Results of the evaluation after training."""

    headline: str | None = status_field(
        "Name and value of the most important metric: the metric of a failed gate, otherwise of the first gate, otherwise the first of evaluation.metrics. "
        "A completed job without gates and metrics shows its last validation loss or, without validation data, its last training loss.",
        example="accuracy 0.83",
    )
    rows: int | None = status_field("Number of evaluated rows.", example=200)
    metrics: dict[str, MetricResult] | None = status_field(
        "Metrics of evaluation.metrics, by name.", example={"accuracy": {"value": 0.83, "base": 0.79, "difference": 0.04, "low": 0.012, "high": 0.068}}
    )
    gates: list[GateResult] | None = status_field(
        "Results of evaluation.gates, in the order of the spec.", example=[{"metric": "accuracy", "passed": True}]
    )
    benchmarks: list[BenchmarkResult] | None = status_field(
        "Results of evaluation.benchmarks. For a group of tasks, only the metrics of the whole group are listed. The file evaluation/benchmark_results.json contains all results.",
        example=[{"name": "lm-eval", "task": "hellaswag", "metric": "acc", "value": 0.56, "stderr": 0.005, "base": 0.58, "difference": -0.02}],
    )
    comparison_uri: str | None = status_field(
        "File with the answers of the base model and the trained model to the same prompts.",
        example="s3://models/ft/team-a/support-bot/UID/evaluation/model_comparison.json",
    )
    predictions_uri: str | None = status_field(
        "File with the generated answer of each row.", example="s3://models/ft/team-a/support-bot/UID/evaluation/predictions.jsonl"
    )


class Failure(ReportModel):
    """Failure of the job or of its last attempt."""

    class_: Annotated[FailureClass, Field(alias="class", description="Kind of failure.")]
    code: str = status_field("Code of the failure, for programs.", default="", example="DatasetEmpty")
    message: str = status_field("Error message: what failed, and why.", default="")
    hint: str | None = status_field("Hint for the user or the platform team.")
    node: str | None = status_field("Node of the failed rank.", example="gpu-node-3")
    rank: int | None = status_field("Global rank number of the failed rank.", example=3)
    step: int | None = status_field("Optimizer step at which the failure happened.", example=450)
    exit_code: int | None = status_field("Exit code of the trainer container.", example=65)


class Adaptation(ReportModel):
    """A change that the operator made to the job's configuration, so that the job can continue."""

    time: Time = status_field("Time of the change.", default=..., example="2026-03-01T12:00:00Z")
    reason: str = status_field("Reason for the change.", default=..., example="OutOfMemory")
    change: str = status_field(
        "Old and new values as text.", default=...,
        example="batchSizePerDevice 4 -> 2, gradientAccumulationSteps 4 -> 8",
    )  # fmt: skip
    set: dict[str, Any] | None = status_field("New values by spec path.", example={"training.batchSizePerDevice": 2})
    explanation: str | None = status_field(
        "Why the operator chose the new values: what was planned, and what was measured. Since 0.2.0.",
        example="the attempt needed at least 81.2 GB of GPU memory, 79.6 GB were available, and the plan expected 70.1 GB; the new values need 47.2 GB, at most 50.5 GB",
    )  # fmt: skip


class Workers(ReportModel):
    """Pods of the current attempt."""

    ready: int = status_field("Number of ready pods.", default=0, example=2)
    total: int = status_field("Number of pods of the attempt.", default=0, example=2)
    display: str = status_field("Number of ready pods and number of all pods, as text.", default="0/0", example="2/2")


class MemoryParts(ReportModel):
    """The planned memory at the moment of its peak, in bytes, by kind of use."""

    weights: int = status_field("Weights of the model and of the adapter.", default=0, example=16232153088)
    gradients: int = status_field("Gradients of the trained weights.", default=0, example=84017152)
    optimizer: int = status_field("State and temporary tensors of the optimizer.", default=0, example=336068608)
    activations: int = status_field("Activations that the backward pass needs, and temporary tensors of the backward pass.", default=0, example=37200000000)
    logits: int = status_field("Logits and the loss.", default=0, example=268435456)
    buffers: int = status_field("Inputs, masks, workspaces, and copies for communication between ranks.", default=0, example=80000000)
    context: int = status_field("CUDA context and NCCL, outside PyTorch's allocator.", default=0, example=524288000)
    fragmentation: int = status_field("Memory that PyTorch reserves but does not use.", default=0, example=1600000000)


class MemoryPlan(ReportModel):
    """Planned peak of GPU memory on each rank."""

    expected_bytes: int = status_field("Expected peak in bytes: the sum of all values in `parts`.", default=..., example=55400000000)
    upper_bytes: int = status_field("Upper bound of the peak in bytes.", default=..., example=59278000000)
    parts: MemoryParts = status_field("The expected peak, by what the memory is used for.", default_factory=MemoryParts)
    calibration_runs: int | None = status_field(
        "Number of runs on this type of GPU from which the upper bound was computed. Absent if there were too few runs. Since 0.2.0.", example=12
    )


class MeasuredRun(ReportModel):
    """Measured values of the run, to compare with the plan."""

    memory_bytes: int | None = status_field(
        "Peak of the memory in use on the first rank's GPU, in bytes, with the CUDA context. Absent without a GPU.", example=55100000000
    )
    seconds: float | None = status_field(
        "Seconds of the optimizer steps that no later attempt repeated, to compare with the planned time. Present after a successful training. Since 0.2.0.",
        example=861.4,
    )  # fmt: skip
    steps: int | None = status_field("Number of the optimizer steps that `seconds` covers. This number differs from the planned number if training stopped early. Since 0.2.0.", example=500)


class MemoryAdvice(ReportModel):
    """Advice of the memory plan after an attempt ran out of GPU memory.

    If the attempt needed more memory than planned, all planned peaks are raised in the same ratio.
    """

    needed_bytes: int = status_field("Memory in use when an allocation failed, plus the size of this allocation, in bytes.", default=..., example=81200000000)
    available_bytes: int = status_field("GPU memory that the rank could use, in bytes.", default=..., example=79600000000)
    planned_bytes: int = status_field("Peak that the plan expected for the failed attempt, in bytes.", default=..., example=70100000000)
    batch_size_per_device: int | None = status_field("Advised micro-batch. Absent if no smaller micro-batch or recomputation is left.", example=2)
    gradient_checkpointing: str | None = status_field("Advised value of training.gradientCheckpointing. Absent if the value does not change.", example="enabled")
    fits: bool = status_field("Whether the upper bound with the advised values is at most availableBytes.", default=False, example=True)
    expected_bytes: int | None = status_field("Expected peak with the advised values, in bytes.", example=47200000000)
    upper_bytes: int | None = status_field("Upper bound with the advised values, in bytes.", example=50500000000)
    changes: list[str] | None = status_field(
        "Up to three changes of the spec, each of which would let the job fit. Present if batchSizePerDevice is absent.", example=["dataset.maxSequenceLength: 1024"]
    )


class WorkPlan(ReportModel):
    """The planned work of all optimizer steps, on all ranks together."""

    steps: int = status_field("Number of optimizer steps.", default=..., example=500)
    tokens: int = status_field("Number of tokens in all steps.", default=..., example=8192000)
    petaflop: float = status_field("Floating-point operations, in units of 1e15.", default=..., example=250)
    traffic_terabytes: float = status_field("Memory traffic of weights and optimizer states on the GPUs, in units of 1e12 bytes.", default=..., example=26)


class TimePlan(ReportModel):
    """Planned time of all optimizer steps. Start, evaluation, checkpoints and upload are not included."""

    expected_seconds: int = status_field("Expected time in seconds.", default=..., example=840)
    lower_seconds: int = status_field("Lower bound in seconds.", default=..., example=520)
    upper_seconds: int = status_field("Upper bound in seconds.", default=..., example=2700)
    calibrated: bool = status_field("Whether expected time and bounds were computed from runs on this type of GPU.", default=False, example=False)
    calibration_runs: int | None = status_field("Number of runs from which the time was computed. Absent if `calibrated` is false. Since 0.2.0.", example=12)


class CostPlan(ReportModel):
    """Planned cost of all optimizer steps. The bounds are computed from the bounds of the planned time."""

    gpu_hours: float = status_field("Expected GPU-hours.", default=..., example=1.87)
    expected: float = status_field("Expected cost.", default=..., example=5.6)
    lower: float = status_field("Lower bound of the cost.", default=..., example=3.47)
    upper: float = status_field("Upper bound of the cost.", default=..., example=18)
    currency: str = status_field("Currency of the costs.", default="", example="EUR")


class Choice(ReportModel):
    """A value that the plan chose, because the spec leaves it out."""

    field: str = status_field("Path of the field in the spec.", default=..., example="training.batchSizePerDevice")
    value: Annotated[int | str, Field(json_schema_extra={"x-kubernetes-int-or-string": True})] = status_field("The chosen value.", default=..., example=16)
    reason: str = status_field("Why this value was chosen.", default=..., example="the micro-batch that fits with the least expected time: at most 31.2 GB of 85.5 GB on each GPU")


class RunPlan(ReportModel):
    """The memory, work, time and cost that the plan expects for the run, and the measured values."""

    choices: list[Choice] | None = status_field("Values that the plan chose before the first attempt. All attempts use these values.")
    no_choices: str | None = status_field(
        "Why the plan chose no values. If the plan chose no values, fields that the spec leaves out have their defaults.", example="the job uses no GPU"
    )

    memory: MemoryPlan | None = status_field("Planned GPU memory of each rank. Absent if the plan cannot compute the memory of this run.")
    work: WorkPlan | None = status_field("Planned work. Absent if the plan cannot compute the work of this run.")
    time: TimePlan | None = status_field("Planned time. Absent if the type of GPU is not known.")
    cost: CostPlan | None = status_field("Planned cost. Absent if the node pool has no price.")
    measured: MeasuredRun | None = status_field("Measured values of the newest attempt.")
    out_of_memory: MemoryAdvice | None = status_field("Advice of the plan after the newest attempt that ran out of GPU memory. Since 0.2.0.")


class TimeUse(ReportModel):
    """What the time was used for, in seconds. A field is absent if no time was used for it."""

    waiting: float | None = status_field("Time in which the job waited for its backoff, for the end of earlier pods, or for the operator.", example=12)
    suspended: float | None = status_field("Time in which the job was suspended.")
    queued: float | None = status_field("Time in which the attempt's Job waited for its queue.")
    preparation: float | None = status_field("Time of the preparation in a pod without GPUs.", example=95)
    scheduling: float | None = status_field("Time in which rank 0's pod waited for a node.", example=4)
    pod_start: float | None = status_field("Time for pulling the image, mounting volumes and starting the container.", example=21)
    starting: float | None = status_field("Time for starting the processes in the container.", example=3.2)
    download: float | None = status_field("Time for downloading model and data.", example=40.5)
    checking: float | None = status_field("Time for checking spec, model and rows.", example=2.1)
    loading: float | None = status_field("Time for tokenising rows, and for loading the model or a checkpoint.", example=31)
    first_step: float | None = status_field("Time of the pod's first optimizer step, in which kernels are compiled.", example=9.4)
    steps: float | None = status_field("Time of optimizer steps that no later attempt repeated.", example=5120)
    lost_steps: float | None = status_field("Time of optimizer steps that a later attempt repeated.", example=61.5)
    saving: float | None = status_field("Time in which training waited until a checkpoint or the final model was written.", example=8.8)
    evaluation: float | None = status_field("Time of evaluations during and after training.", example=120)
    upload: float | None = status_field("Time for uploading the final model.", example=14)
    finishing: float | None = status_field("Time for merging and verifying the model and for writing the report.", example=25)
    stopping: float | None = status_field("Time from a stop request to the end of the pod.")
    other: float | None = status_field("Time that belongs to no other part.", example=0.9)

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each use that took time, by the JSON name of its field."""
        return {name: value for name, value in self.to_wire().items() if value}


class AttemptTime(ReportModel):
    """What the time of one attempt was used for.

    The time of an attempt begins when the previous attempt ends or, for the first attempt, when the job is created.
    """

    number: int = status_field("Number of the attempt.", default=..., example=1)
    wall_seconds: float = status_field("Seconds of the attempt: the sum of all values in `parts`.", default=..., example=5560.4)
    parts: dict[str, float] = status_field("What the time was used for, in seconds. The keys are names of fields of status.goodput.parts.", default_factory=dict, example={"steps": 5120})


class Goodput(ReportModel):
    """What the time of the job was used for, until the newest report of a pod or the end of the newest attempt."""

    wall_seconds: float = status_field("Seconds from the creation of the job to the newest report or the end of the newest attempt: the sum of all values in `parts`.", default=..., example=5560.4)
    percent: float | None = status_field(
        "Percentage of the pods' time on nodes that was used for optimizer steps that no later attempt repeated.", example=92.1
    )
    parts: TimeUse = status_field("What the time was used for, in seconds, for all attempts together.", default_factory=TimeUse)
    attempts: list[AttemptTime] = status_field("Times of the newest ten attempts.", default_factory=list)
    earlier: dict[str, float] | None = status_field("What the time was used for, in seconds, for all older attempts together.", example={"steps": 310})


class JobCost(ReportModel):
    """GPU time of the job, and its cost."""

    gpu_hours: float = status_field("GPU-hours of all pods while they were on nodes, until the newest report or the end of the newest attempt.", default=0.0, example=4.2)
    amount: float = status_field("Cost of the GPU-hours.", default=0.0, example=12.6)
    currency: str = status_field("Currency of the cost.", default="", example="EUR")
    display: str = status_field("Cost and currency as text.", default="", example="12.60 EUR")
    price_per_gpu_hour: float = status_field("Price of one GPU-hour when the job started.", default=0.0, example=3)
    ended_gpu_seconds: float = status_field("GPU-seconds of ended attempts.", default=0.0, example=7200)


class ModelOrigin(StrEnum):
    """Source from which a pod got the base model: a cache, or a download."""

    CACHE = "cache"
    """The pod read the model from the cache."""
    DOWNLOAD = "download"
    """The pod downloaded the model, and stored it in the cache if possible. If the cache was not used, status.resolved.notes says why."""


class ResolvedConfig(ReportModel):
    """The configuration in use: filled-in defaults, and values that the operator and the trainer computed or measured."""

    world_size: int | None = status_field("Number of ranks.", example=8)
    effective_batch: int | None = status_field(
        "Rows per optimizer step: batchSizePerDevice x gradientAccumulationSteps x ranks.", example=128
    )
    method: str | None = status_field("Fine-tuning method.", example="lora")
    model_name: str | None = status_field(
        "Short name of the base model, at most 24 characters.", example="SmolLM2-135M-Instruct"
    )
    strategy: str | None = status_field("Distributed strategy in use: single, ddp, fsdp or deepspeed.", example="ddp")
    attention: str | None = status_field("Attention implementation in use.", example="sdpa")
    device: str | None = status_field("Name of the training device.", example="NVIDIA H100")
    trainable_parameters: int | None = status_field("Number of trained parameters.", example=4884480)
    total_parameters: int | None = status_field("Number of parameters of the model.", example=139399680)
    model_revision: str | None = status_field(
        "Commit (hub) or digest (storage) of the base model.", example="12fd25f77366fa6b3b4b768ec3050bf629380bac"
    )
    model_source: ModelOrigin | None = status_field("Where the pod of rank 0 got the base model from. Only for jobs with a cache of models.", example="cache")
    model_bytes_saved: int | None = status_field(
        "Bytes of the base model that the pod of rank 0 did not download, because the cache had them. Only for jobs with a cache of models.", example=2200119864
    )
    dataset_digest: str | None = status_field("sha256 (hex) of the training data.")
    dataset_rows: int | None = status_field("Number of training rows.", example=12000)
    dataset_format: str | None = status_field("Data format of the rows, from the spec or detected.", example="messages")
    image: str | None = status_field(
        "Trainer image, as in the pod's spec.", example="ghcr.io/finetune-operator/trainer:0.2.0"
    )
    image_digest: str | None = status_field("Digest of the running trainer image.")
    node_pool: str | None = status_field("Node pool in use.", example="h100")
    config_sha256: str | None = status_field("sha256 (hex) of the current attempt's run configuration (run.json).")
    spec_sha256: str | None = status_field(
        "sha256 (hex) of the first attempt's spec, without mutable fields."
    )
    max_duration_seconds: int | None = status_field(
        "The platform's limit on the running time of the job in seconds: policy.maxDurationSeconds of the chart's values when the job was accepted.", example=604800
    )
    resume_exact: bool | None = status_field(
        "Whether a resumed run and an uninterrupted run have bitwise identical results.", example=True
    )
    resume_note: str | None = status_field("Why a resumed run can differ from an uninterrupted run. Absent if it cannot.")
    storage: dict[str, Any] | None = status_field("Features of the store that the trainer detected at its start.")
    defaults: dict[str, Any] | None = status_field(
        "All filled-in defaults, by spec path.", example={"training.epochs": 3}
    )
    notes: list[str] | None = status_field(
        "Notes and warnings about the spec.", example=["training.epochs 3 has no effect, because training.maxSteps is 40"]
    )


class FineTuneJobStatus(ReportModel):
    """What the operator observed about a FineTuneJob."""

    observed_generation: int = status_field(
        "metadata.generation of the spec that this status describes. -1 until the operator has read the job.",
        default=-1, example=1, immediate=ImmediateWrite.WHEN_VALUE_CHANGES,
    )  # fmt: skip
    phase: Phase | None = status_field(
        "Summary of the conditions in one word, for people. Programs should read the conditions.", example="Running", immediate=ImmediateWrite.WHEN_VALUE_CHANGES
    )
    reason: str | None = status_field(
        "Why the job waits, failed, or succeeded without training, in one word. `-` if the phase needs no reason.",
        example="Unschedulable", immediate=ImmediateWrite.WHEN_VALUE_CHANGES,
    )  # fmt: skip
    conditions: list[Condition] = status_field("Conditions, by type.", default_factory=list, immediate=ImmediateWrite.WHEN_VALUE_CHANGES)
    attempt: int | None = status_field("Number of the current attempt.", example=1, immediate=ImmediateWrite.WHEN_VALUE_CHANGES)
    restarts: int | None = status_field("Number of attempts after the first attempt.", example=0, immediate=ImmediateWrite.WHEN_VALUE_CHANGES)
    retries_used: int | None = status_field(
        "Number of consecutive failed attempts without progress. The limit is policy.retries.", example=0, immediate=ImmediateWrite.WHEN_VALUE_CHANGES
    )
    active_seconds: int | None = status_field(
        "Running time of all ended attempts together, in seconds. Time in the queue and suspended time do not count.",
        example=7200, immediate=ImmediateWrite.WHEN_VALUE_CHANGES,
    )  # fmt: skip
    attempts: list[Attempt] = status_field("The newest ten attempts.", default_factory=list, immediate=ImmediateWrite.WHEN_VALUE_CHANGES)
    preparation: Preparation | None = status_field(
        "The preparation of the job in a pod without GPUs. Absent for jobs without a preparation.", immediate=ImmediateWrite.WHEN_VALUE_CHANGES
    )
    data: DataReport | None = status_field("Counts of the rows and tokens. Present after a preparation.", immediate=ImmediateWrite.WHEN_VALUE_CHANGES)
    progress: Progress | None = status_field("Progress of training.")
    metrics: Metrics | None = status_field("Latest values of the training metrics.")
    checkpoints: list[Checkpoint] = status_field(
        "The newest five committed checkpoints, and the best checkpoint.", default_factory=list
    )
    latest_checkpoint: str | None = status_field(
        "Folder of the newest committed checkpoint.", immediate=ImmediateWrite.WHEN_PRESENCE_CHANGES,
        example="s3://models/ft/team-a/support-bot/UID/checkpoints/step-00000400/a1-1f3c9a2b",
    )  # fmt: skip
    latest_checkpoint_step: int | None = status_field("Optimizer step of the newest committed checkpoint.", example=400)
    output: Output | None = status_field("The final model or adapter.", immediate=ImmediateWrite.WHEN_VALUE_CHANGES)
    evaluation: EvaluationResult | None = status_field("Results of the evaluation after training.", immediate=ImmediateWrite.WHEN_VALUE_CHANGES)
    failure: Failure | None = status_field("Failure of the job or of its last attempt.", immediate=ImmediateWrite.WHEN_VALUE_CHANGES)
    adaptations: list[Adaptation] = status_field(
        "Changes that the operator made to the job's configuration, so that the job can continue.",
        default_factory=list, immediate=ImmediateWrite.WHEN_VALUE_CHANGES,
    )  # fmt: skip
    workers: Workers | None = status_field("Pods of the current attempt.")
    resolved: ResolvedConfig | None = status_field("The configuration in use.")
    plan: RunPlan | None = status_field("Planned memory, work, time and cost of the run. Since 0.2.0.")
    cost: JobCost | None = status_field("GPU-hours and cost of the job. Absent if the node pool has no price. Since 0.2.0.")
    goodput: Goodput | None = status_field("What the time of the job was used for. Since 0.2.0.")
    start_time: Time | None = status_field(
        "Creation time of the first attempt's Job. With a queue: time of the Job's admission.",
        example="2026-03-01T12:00:00Z", immediate=ImmediateWrite.WHEN_VALUE_CHANGES,
    )  # fmt: skip
    completion_time: Time | None = status_field(
        "Time at which the job ended.", example="2026-03-01T14:03:00Z", immediate=ImmediateWrite.WHEN_VALUE_CHANGES
    )
    duration: str | None = status_field("Time from the start to the end of the job, as text.", example="2h3m")

    def condition(self, condition_type: ConditionType) -> Condition | None:
        """Return the condition of this type, or None if the status does not contain it."""
        return next((condition for condition in self.conditions if condition.type == condition_type), None)

    def is_true(self, condition_type: ConditionType) -> bool:
        """Whether the status contains the condition of this type with status True."""
        condition = self.condition(condition_type)
        return condition is not None and condition.status == "True"

    @property
    def steps_done(self) -> int:
        """The last reported optimizer step, or 0 before the first report."""
        return (self.progress.step if self.progress else None) or 0


def select_immediate_fields(status_json: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a status whose changes the operator writes at once. If two statuses agree in these fields, the newer status can be written later."""
    presence_by_name = {name: bool(status_json.get(name)) for name in _list_fields_with_immediate_write(FineTuneJobStatus, ImmediateWrite.WHEN_PRESENCE_CHANGES)}
    selected_fields: dict[str, Any] = _select_fields(status_json, _build_immediate_field_tree(FineTuneJobStatus))
    return selected_fields | presence_by_name


def _select_fields(json_value: Any, field_tree: dict[str, Any] | None) -> Any:
    """Return the fields of a JSON value that `field_tree` contains. None selects the whole value."""
    if field_tree is None:
        return json_value
    if isinstance(json_value, list):
        return [_select_fields(item, field_tree) for item in json_value]
    return {name: _select_fields(json_value[name], field_subtree) for name, field_subtree in field_tree.items() if name in json_value}


@cache
def _list_fields_with_immediate_write(model: type[BaseModel], immediate: ImmediateWrite) -> tuple[str, ...]:
    """Return the JSON names of the model's fields that are declared with this value of `immediate`."""
    return tuple(
        info.alias or name
        for name, info in model.model_fields.items()
        if isinstance(info.json_schema_extra, dict) and info.json_schema_extra.get(IMMEDIATE_WRITE_KEY) == immediate
    )


@cache
def _build_immediate_field_tree(model: type[BaseModel]) -> dict[str, Any]:
    """Return the fields that are declared with `ImmediateWrite.WHEN_VALUE_CHANGES`, as a tree of JSON names for `_select_fields`.

    A name maps to None if the whole field is selected. If the value of the field is an object or a list of objects with such fields, the name maps to
    the tree of these fields.
    """
    field_tree: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        wire_name = info.alias or name
        if wire_name in _list_fields_with_immediate_write(model, ImmediateWrite.WHEN_VALUE_CHANGES):
            nested_models = [argument for argument in get_args(info.annotation) if isinstance(argument, type) and issubclass(argument, BaseModel)]
            field_tree[wire_name] = (_build_immediate_field_tree(nested_models[0]) if nested_models else None) or None
    return field_tree


class Stage(StrEnum):
    """What a pod is doing. A phase of the job can consist of several stages."""

    STARTING = "starting"
    """The container has started and is preparing the ranks."""
    DOWNLOADING = "downloading"
    """The pod is downloading the model or the data."""
    CHECKING = "checking"
    """The pod is checking whether spec, model and data fit together."""
    LOADING = "loading"
    """The pod is loading the model onto the device."""
    RESTORING = "restoring"
    """The pod is restoring a checkpoint."""
    TRAINING = "training"
    """The pod is training."""
    SAVING = "saving"
    """The pod is saving a checkpoint."""
    MERGING = "merging"
    """The pod is merging the adapter into the base model."""
    EVALUATING = "evaluating"
    """The pod is evaluating the model."""
    COMPARING = "comparing"
    """The pod is evaluating the base model, to compare it with the trained model."""
    BENCHMARKING = "benchmarking"
    """The pod is running the benchmarks of `evaluation.benchmarks`."""
    VERIFYING = "verifying"
    """The pod is checking that the stored final model computes the same values as the trained model."""
    UPLOADING = "uploading"
    """The pod is uploading the final model."""
    REPORTING = "reporting"
    """The pod is writing the run's report."""
    STOPPING = "stopping"
    """The pod has received SIGTERM and is saving a checkpoint."""
    DONE = "done"
    """The final model is committed to storage."""
    FAILED = "failed"
    """The pod has failed and is about to exit."""


REASON_OF_STAGE = {
    Stage.MERGING: Reason.MERGE_FAILED, Stage.EVALUATING: Reason.EVALUATION_FAILED, Stage.COMPARING: Reason.COMPARISON_FAILED,
    Stage.BENCHMARKING: Reason.BENCHMARK_FAILED, Stage.VERIFYING: Reason.VERIFICATION_FAILED, Stage.REPORTING: Reason.REPORT_FAILED,
}  # fmt: skip
"""For each stage after training: the reason of an attempt that failed in this stage."""

TIME_USE_OF_STAGE = {
    Stage.STARTING: "starting", Stage.DOWNLOADING: "download", Stage.CHECKING: "checking", Stage.LOADING: "loading", Stage.RESTORING: "loading",
    Stage.TRAINING: "steps", Stage.SAVING: "saving", Stage.MERGING: "finishing", Stage.EVALUATING: "evaluation", Stage.COMPARING: "evaluation",
    Stage.BENCHMARKING: "evaluation", Stage.VERIFYING: "finishing", Stage.UPLOADING: "upload", Stage.REPORTING: "finishing",
    Stage.STOPPING: "stopping", Stage.DONE: "other", Stage.FAILED: "other",
}  # fmt: skip
"""For each stage: the field of `TimeUse` (in camelCase) to which the time of the stage is added.

The times of the first step, of saving and of evaluations during training are first added to `steps`, and later moved to their own fields.
"""
