"""`finetune explain`."""

from __future__ import annotations

from tests.unit.cli.conftest import Call


def test_fields_are_explained_and_searched(call: Call) -> None:
    assert call("explain", "training.learningRate")[1].startswith(
        "spec.training.learningRate <number > 0, <= 10>\n  Peak learning rate."
    )
    assert "rank" in call("explain", "method.lora")[1]
    assert "spec.trainer.rewards[].weight" in call("explain", "trainer.rewards.weight")[1]
    assert "spec.training.warmupSteps" in call("explain", "--search", "warmup")[1]
    assert call("explain", "training.learnRate") == (
        1, "", "error: training.learnRate is not a field of a FineTuneJob; did you mean spec.training.learningRate?\n",
    )  # fmt: skip
    assert call("explain", "--search", "zebra")[0] == 1
