"""The log entries of a run, from which all metric files and the file `log.jsonl` are computed.

transformers logs four kinds of lines: training lines (`loss`), evaluations of the validation set (`eval_...`), the evaluation of the
test set (`test_...`; the metrics of TRL are `eval_...` in this line too) and one summary at the end (`train_runtime`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from finetune_trainer.results.json_values import replace_non_finite_numbers

NOT_FINITE_TEXTS = frozenset({"nan", "inf", "-inf"})
"""The texts that a rank sends instead of numbers that are not finite, because JSON cannot represent these numbers."""


class LineKind(StrEnum):
    """What a logged line measures."""

    TRAINING = "training"
    EVALUATION = "evaluation"
    TEST = "test"
    SUMMARY = "summary"
    OTHER = "other"


class LogEntry(BaseModel):
    """One logged line. Logged values for which this class has no field are kept under their logged names. Numbers that are not finite become None."""

    model_config = ConfigDict(extra="allow", frozen=True)

    step: int = Field(ge=0, description="Optimizer steps done when the line was logged.")
    epoch: float | None = Field(default=None, description="Passes over the training data done when the line was logged.")
    unix_time: float | None = Field(default=None, description="Time of the line in seconds since 1970, UTC.")
    training_seconds: float | None = Field(
        default=None, description="Seconds of training until the line, over all attempts. Evaluations during training are included."
    )
    loss: float | None = Field(default=None, description="Mean training loss of the steps since the last training line.")
    grad_norm: float | None = Field(default=None, description="Gradient norm of the step before clipping.")
    learning_rate: float | None = Field(default=None, description="Learning rate of the step.")
    peak_memory_gb: float | None = Field(
        default=None, description="Peak GPU memory of rank 0 in units of 1e9 bytes. Absent on CPUs."
    )
    eval_loss: float | None = Field(default=None, description="Loss on the validation set.")
    eval_mean_token_accuracy: float | None = Field(
        default=None, description="Share of tokens of the validation set that the model predicts correctly."
    )
    eval_precision: float | None = Field(default=None, description="Weighted precision on the validation set.")
    eval_recall: float | None = Field(default=None, description="Weighted recall on the validation set.")
    eval_f1: float | None = Field(default=None, description="Weighted F1 score on the validation set.")
    eval_runtime: float | None = Field(default=None, description="Duration of the evaluation in seconds.")

    @model_validator(mode="before")
    @classmethod
    def _replace_not_finite_numbers(cls, data: Any) -> Any:
        return {name: _read_value(value) for name, value in data.items()} if isinstance(data, Mapping) else data

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Read a line of `log.jsonl` or of the object `metrics/<incarnation>.jsonl`. Errors: ValidationError."""
        return cls.model_validate(json.loads(line))

    @property
    def kind(self) -> LineKind:
        """What the line measures, derived from the names of its values."""
        value_names = self.model_fields_set
        if any(name.startswith("test_") for name in value_names):
            return LineKind.TEST
        if any(name.startswith("eval_") for name in value_names):
            return LineKind.EVALUATION
        if "train_runtime" in value_names:
            return LineKind.SUMMARY
        return LineKind.TRAINING if "loss" in value_names else LineKind.OTHER

    def to_wire(self) -> dict[str, Any]:
        """Return the values of the line for JSON, without values that were not logged."""
        return self.model_dump(exclude_unset=True)


def log_to_jsonl(entries: Iterable[LogEntry]) -> str:
    """Return the contents of `log.jsonl`: each log entry as one JSON object, in order."""
    return "".join(json.dumps(entry.to_wire(), ensure_ascii=False, allow_nan=False) + "\n" for entry in entries)


def join_attempts(attempts: Iterable[Sequence[LogEntry]]) -> list[LogEntry]:
    """Join the log entries of consecutive attempts (oldest first) to the log of the whole run.

    An attempt resumes from a checkpoint and repeats the steps after it. Of each repeated step, only the entries of the later attempt are kept, with
    one exception: an attempt does not repeat the evaluation at the step of its checkpoint. So, at the first step that the later attempt logs, an entry
    of the earlier attempt is kept too if the later attempt logged no entry of the same kind at this step.
    """
    joined_entries: list[LogEntry] = []
    for attempt_entries in attempts:
        if not attempt_entries:
            continue
        first_step = attempt_entries[0].step
        repeated_kinds = {entry.kind for entry in attempt_entries if entry.step == first_step}
        joined_entries = [
            entry
            for entry in joined_entries
            if entry.step < first_step or (entry.step == first_step and entry.kind not in repeated_kinds)
        ]
        joined_entries += attempt_entries
    return joined_entries


def select_training_lines(entries: Iterable[LogEntry]) -> Iterator[LogEntry]:
    """Return the entries of training lines, in order."""
    return (entry for entry in entries if entry.kind is LineKind.TRAINING)


def _read_value(value: Any) -> Any:
    """Return a logged value with None instead of every number that is not finite, even if the number was sent as text."""
    return None if isinstance(value, str) and value in NOT_FINITE_TEXTS else replace_non_finite_numbers(value)
