"""The names of the result files."""

from __future__ import annotations

from enum import StrEnum


class ResultFile(StrEnum):
    """The name of a result file, which is stored next to the final model."""

    STEP_METRICS = "step_metrics.json"
    """Training loss, learning rate and gradient norm of each logged step."""
    EPOCH_METRICS = "epoch_metrics.json"
    """Training loss and evaluation of each epoch."""
    FINAL_METRICS = "final_metrics.json"
    """Final and best values of the run, and its configuration."""
    TRAINING_METRICS = "training_metrics.json"
    """Losses, GPU memory and step durations as lists."""
    PERFORMANCE_SUMMARY = "performance_summary.json"
    """Training time and parameter counts."""
    LOG = "log.jsonl"
    """Every log entry, as JSON Lines."""
    TEST_SPLIT = "test_split.jsonl"
    """The raw rows of the test set."""
    MODEL_COMPARISON = "model_comparison.json"
    """Answers of the base model and of the trained model to the same prompts."""
