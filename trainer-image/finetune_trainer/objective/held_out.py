"""Measures the final model on the test set, once after training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from finetune_trainer.objective.base import HeldOutMetric

ROW_COUNT_KEY = "testRows"


def measure_test_set(trainer: Any, test_rows: Any, metrics: Sequence[HeldOutMetric]) -> dict[str, float]:
    """Return the number of test rows and the value of each metric, by status name. This is a collective operation: every rank must call this function.

    Without a test set (`test_rows` is None), the result is empty. The loss is in nats per token; accuracies are fractions from 0 to 1.
    Values that are not finite are left out.
    """
    if test_rows is None:
        return {}
    from transformers import EarlyStoppingCallback

    trainer.remove_callback(EarlyStoppingCallback)  # EarlyStoppingCallback requires a validation loss, but this evaluation logs a test loss
    line_count_before = len(trainer.state.log_history)
    trainer.evaluate(eval_dataset=test_rows, metric_key_prefix="test")
    logged_values = {key: value for line in trainer.state.log_history[line_count_before:] for key, value in line.items()}
    measured_values: dict[str, float] = {ROW_COUNT_KEY: len(test_rows)}
    for metric in metrics:
        # TRL logs its own metrics with the prefix "eval_" for every data set.
        value = logged_values.get(f"test_{metric.logged_as}", logged_values.get(f"eval_{metric.logged_as}"))
        if isinstance(value, int | float) and math.isfinite(value):
            measured_values[metric.status_name] = round(float(value), 6)
    return measured_values


def format_note(measured_values: dict[str, float], metrics: Sequence[HeldOutMetric]) -> str:
    """Return a note for the status, such as `test: 12 rows, loss 1.2340, token accuracy 0.5000`."""
    value_texts = [
        f"{metric.label} {measured_values[metric.status_name]:.4f}" for metric in metrics if metric.status_name in measured_values
    ]
    return ", ".join([f"test: {measured_values[ROW_COUNT_KEY]:g} rows", *value_texts])
