"""The test set: held out until training is over, looked at once, with the model that is published."""

from __future__ import annotations

import math
from typing import Any

METRICS = {
    "loss": "testLoss",
    "mean_token_accuracy": "testTokenAccuracy",
    "answer_accuracy": "testAnswerAccuracy",
    "rewards/accuracies": "testPreferenceAccuracy",
    "accuracy": "testPreferenceAccuracy",
    "reward": "testReward",
}
"""Measures by the Trainers' names, and what the status calls them (`output.evaluation`)."""


def measure(trainer: Any, test: Any) -> dict[str, float]:
    """Loss and accuracies on the test rows, in nats per token and fractions; empty without a test set.

    All ranks take part. Values that are no finite numbers are left out.
    """
    if test is None:
        return {}
    from transformers import EarlyStoppingCallback

    trainer.remove_callback(EarlyStoppingCallback)  # it would look for a validation loss in vain
    before = len(trainer.state.log_history)
    trainer.evaluate(eval_dataset=test, metric_key_prefix="test")
    logged = {key: value for line in trainer.state.log_history[before:] for key, value in line.items()}
    found: dict[str, float] = {"testRows": len(test)}
    for name, shown in METRICS.items():
        # TRL's own measures are logged as "eval_", whatever set is looked at.
        value = logged.get(f"test_{name}", logged.get(f"eval_{name}"))
        if isinstance(value, int | float) and math.isfinite(value):
            found[shown] = round(float(value), 6)
    return found


def sentence(found: dict[str, float]) -> str:
    """For the status: `test: 12 rows, loss 1.2340, token accuracy 0.5000`."""
    words = {
        "testLoss": "loss", "testTokenAccuracy": "token accuracy", "testAnswerAccuracy": "answer accuracy",
        "testPreferenceAccuracy": "preference accuracy", "testReward": "reward",
    }  # fmt: skip
    measured = [f"{word} {found[name]:.4f}" for name, word in words.items() if name in found]
    return ", ".join([f"test: {found['testRows']:g} rows", *measured])
