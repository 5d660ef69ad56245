"""The data from which the report of a run is made. The supervisor reads the data from storage."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from finetune_api.base import LenientModel
from finetune_api.pod import RunConfig
from finetune_api.status import EvaluationResult, Output, ResolvedConfig
from pydantic import Field

from finetune_trainer.evaluation.predictions import Prediction
from finetune_trainer.results.log_entry import LogEntry
from finetune_trainer.results.model_comparison import ModelComparison


class AttemptRecord(LenientModel):
    """`run/records/<incarnation>.json` in storage: when one incarnation of an attempt began, and how it ended.

    A pod writes the record at its start and at its end. The record of a pod that was killed has no end.
    """

    attempt: int = Field(description="Number of the attempt.")
    incarnation: str = Field(description="Name of the folders in storage that the incarnation wrote.")
    started_at: datetime = Field(description="Start of rank 0's pod.")
    ended_at: datetime | None = Field(default=None, description="End of rank 0's pod.")
    gpus: int = Field(default=0, description="GPUs of all pods of the attempt. 0: training on CPUs.")
    pods: int = Field(default=1, description="Pods of the attempt.")
    start_step: int | None = Field(default=None, description="Optimizer step from which the training started. Absent if nothing was trained.")
    last_step: int | None = Field(default=None, description="Last optimizer step that the incarnation completed.")
    exit_code: int | None = Field(default=None, description="Exit code of rank 0's pod.")
    code: str | None = Field(default=None, description="Code of the failure or of the stop. Absent after a success.")
    message: str | None = Field(default=None, description="What failed, and why.")
    hint: str | None = Field(default=None, description="What the user can do.")
    timings: dict[str, float] = Field(default_factory=dict, description="Seconds by name of the stage.")
    notes: list[str] = Field(default_factory=list, description="Notes of `status.resolved.notes`.")
    resolved: ResolvedConfig = Field(default_factory=ResolvedConfig, description="The configuration in use.")


class DataRecord(LenientModel):
    """`run/data.json` in storage: what the supervisor counted when it checked the rows. A field is None if its check was not requested."""

    formats: list[str] = Field(default_factory=list, description="Formats of all sources.")
    rows: dict[str, int] = Field(default_factory=dict, description="Usable rows by split.")
    bad_rows: int = Field(default=0, description="Rows that cannot be used and were left out.")
    duplicates: int | None = Field(default=None, description="Duplicate rows that were left out.")
    personal_data: dict[str, int] | None = Field(default=None, description="Rows that may hold personal data, by kind.")
    share_of_top_answer: float | None = Field(default=None, description="Share of the most frequent answer.")


@dataclass(frozen=True)
class StoredCheckpoint:
    """One committed checkpoint."""

    step: int
    attempt: int
    sha256: str
    """sha256 (hex) of its manifest."""
    healthy: bool
    bytes: int | None = None
    eval_loss: float | None = None


@dataclass(frozen=True)
class ModelFile:
    """One file of the committed model."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class CompletedStage:
    """A stage after training that has a record in storage."""

    name: str
    attempt: int
    time: str


@dataclass(frozen=True)
class RunReport:
    """Everything that the page shows. Empty or None: not recorded."""

    run: RunConfig
    config_sha256: str
    written_at: datetime
    started_at: datetime | None = None
    attempts: tuple[AttemptRecord, ...] = ()
    """Oldest first. The last one is the attempt that writes the report."""
    log: tuple[LogEntry, ...] = ()
    """The logged lines of the whole run. Of repeated steps, only the lines of the later attempt are included."""
    last_lines: dict[str, LogEntry] = field(default_factory=dict)
    """The last stored log line of each incarnation."""
    output: Output | None = None
    evaluation: EvaluationResult | None = None
    data: DataRecord | None = None
    token_counts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`TokenReport` of each split, from the manifest of the committed model."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the packages that trained the model."""
    checkpoints: tuple[StoredCheckpoint, ...] = ()
    model_files: tuple[ModelFile, ...] = ()
    stages: tuple[CompletedStage, ...] = ()
    predictions: tuple[Prediction, ...] = ()
    """The first answers of the evaluation."""
    prediction_count: int = 0
    """Number of all answers of the evaluation."""
    comparison: ModelComparison | None = None
    further_results: dict[str, Any] = field(default_factory=dict)
    """Results that have a section of their own only by their name, such as `benchmarks`."""

    @property
    def last_attempt(self) -> AttemptRecord | None:
        """The attempt that writes the report."""
        return self.attempts[-1] if self.attempts else None
