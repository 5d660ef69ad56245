"""The data in the report of a run. The supervisor reads these data from storage."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from finetune_api.base import LenientModel
from finetune_api.lineage import AttemptRecord
from finetune_api.pod import RunConfig
from finetune_api.status import EvaluationResult, Output
from pydantic import Field

from finetune_trainer.evaluation.predictions import Prediction
from finetune_trainer.results.log_entry import LogEntry
from finetune_trainer.results.model_comparison import ModelComparison


class DataRecord(LenientModel):
    """`run/data.json` in storage: what the supervisor counted when it checked the rows. A field is None if its check was not requested."""

    formats: list[str] = Field(default_factory=list, description="Formats of all sources.")
    rows: dict[str, int] = Field(default_factory=dict, description="Number of usable rows, by split.")
    bad_rows: int = Field(default=0, description="Number of rows that were left out because they cannot be used.")
    duplicates: int | None = Field(default=None, description="Number of duplicate rows that were left out.")
    personal_data: dict[str, int] | None = Field(
        default=None, description="Number of rows that may contain personal data, by kind of data."
    )
    share_of_top_answer: float | None = Field(default=None, description="Share of the most frequent answer.")


@dataclass(frozen=True)
class StoredCheckpoint:
    """One committed checkpoint."""

    step: int
    attempt: int
    sha256: str
    """sha256 (hex) of the checkpoint's manifest."""
    is_healthy: bool
    """Whether loss and gradients stayed finite in the steps after the checkpoint."""
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
    """Everything that the page shows. A value that is empty or None was not recorded."""

    run: RunConfig
    config_sha256: str
    written_at: datetime
    started_at: datetime | None = None
    attempts: tuple[AttemptRecord, ...] = ()
    """The attempts, oldest first. The last one is the attempt that writes the report."""
    log: tuple[LogEntry, ...] = ()
    """The log entries of the whole run. If an attempt repeated steps of an earlier attempt, only the later attempt's entries of these steps are included."""
    last_lines: dict[str, LogEntry] = field(default_factory=dict)
    """The last stored log entry of each attempt, by incarnation (attempt number and pod UID)."""
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
    """Results of stages such as `benchmarks`, by name. The page shows them as plain tables."""

    @property
    def last_attempt(self) -> AttemptRecord | None:
        """The last attempt, which writes the report."""
        return self.attempts[-1] if self.attempts else None
