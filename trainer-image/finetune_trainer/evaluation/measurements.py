"""The measurements of one model: its metrics, and the values of each row from which the metrics are computed.

The stage `evaluating` stores the measurements of the trained model. So a later attempt can compare the stored measurements with those of the base
model, without measuring the trained model again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np
from finetune_api.base import LenientModel
from finetune_api.spec.enums import GateMetric
from pydantic import ConfigDict, Field

from finetune_trainer.evaluation.bootstrap import bleu_of_sums, perplexity_of_sums, ratio_of_sums
from finetune_trainer.evaluation.gates import PairedSums
from finetune_trainer.evaluation.values import MetricValue
from finetune_trainer.files import replace_file

GATE_METRICS = {GateMetric.ROUGE.value: "rougeL"}
"""The name of the measured metric, for each metric that has another name in gates. The F1 of BERTScore is called `bertscore` both in gates and in
measurements."""


class StoredMetric(LenientModel):
    """A `MetricValue` as it is stored in `evaluation/measurements.json`."""

    value: float | None = None
    reason: str | None = None
    rows: list[float | None] | None = Field(default=None, description="Score of each row; null for a row without a score.")


class Measurements(LenientModel):
    """The content of `evaluation/measurements.json`."""

    model_config = ConfigDict(ser_json_inf_nan="strings", allow_inf_nan=True)

    row_count: int = Field(default=0, description="Number of evaluated rows.")
    metrics: dict[str, StoredMetric] = Field(default_factory=dict)
    token_sums: list[list[float]] = Field(
        default_factory=list, description="For each row: negative log-likelihood, tokens, correct tokens, share of the precision, share of the F1."
    )
    bleu_sums: list[list[float]] = Field(default_factory=list, description="For each test question: the ten sums of `bleu_of_sums`.")
    answers: list[str] | None = Field(default=None, description="Answers to the prompts of the comparison or, without such prompts, to the test questions.")
    end_token_ids: list[int] = Field(default_factory=list, description="Ids of the tokens that end an answer.")

    def with_values(self, values: Mapping[str, MetricValue]) -> Self:
        """Return a copy of the measurements with `values` in place of the metrics."""
        stored_metrics = {name: StoredMetric(value=value.value, reason=value.reason, rows=value.rows) for name, value in values.items()}
        return self.model_copy(update={"metrics": stored_metrics})

    @property
    def values(self) -> dict[str, MetricValue]:
        """The metrics, by name."""
        return {name: MetricValue(stored_metric.value, stored_metric.reason, stored_metric.rows) for name, stored_metric in self.metrics.items()}

    @property
    def gate_values(self) -> dict[str, MetricValue]:
        """The metrics by name. A metric with a different name in gates is included under both names."""
        values = self.values
        return values | {gate: values[name] for gate, name in GATE_METRICS.items() if name in values}

    def write(self, path: Path) -> None:
        """Write the measurements to a file."""
        with replace_file(path) as partial_file:
            partial_file.write_text(self.model_dump_json(by_alias=True), "utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the measurements from a file. Errors: ValueError."""
        return cls.model_validate_json(path.read_bytes())


def paired_sums(base_measurements: Measurements, trained_measurements: Measurements) -> dict[str, PairedSums]:
    """Return the sums of each metric that is not the mean of its rows, by name. A metric is left out if the models have different numbers of rows."""
    sums_by_metric: dict[str, PairedSums] = {}
    if trained_measurements.token_sums and len(base_measurements.token_sums) == len(trained_measurements.token_sums):
        base_sums, trained_sums = np.array(base_measurements.token_sums), np.array(trained_measurements.token_sums)
        ones = np.ones((len(base_sums), 1))
        sums_by_metric["loss"] = PairedSums(base_sums[:, :2], trained_sums[:, :2], ratio_of_sums)
        sums_by_metric["perplexity"] = PairedSums(base_sums[:, :2], trained_sums[:, :2], perplexity_of_sums)
        for name in ("accuracy", "recall"):
            sums_by_metric[name] = PairedSums(base_sums[:, [2, 1]], trained_sums[:, [2, 1]], ratio_of_sums)
        for name, column in (("precision", 3), ("f1", 4)):
            base_shares, trained_shares = (np.hstack([sums[:, [column]], ones]) for sums in (base_sums, trained_sums))
            sums_by_metric[name] = PairedSums(base_shares, trained_shares, ratio_of_sums)
    if trained_measurements.bleu_sums and len(base_measurements.bleu_sums) == len(trained_measurements.bleu_sums):
        sums_by_metric["bleu"] = PairedSums(np.array(base_measurements.bleu_sums), np.array(trained_measurements.bleu_sums), bleu_of_sums)
    return sums_by_metric
