"""`finetune explain`."""

from __future__ import annotations

import pytest

from tests.unit.cli.conftest import RunCommand


def test_fields_are_explained_and_searched(run_command: RunCommand) -> None:
    assert run_command("explain", "training.learningRate")[1].startswith(
        "spec.training.learningRate <number > 0, <= 10>\n  Peak learning rate."
    )
    assert "rank" in run_command("explain", "method.lora")[1]
    assert "spec.trainer.rewards[].weight" in run_command("explain", "trainer.rewards.weight")[1]
    assert "spec.training.warmupSteps" in run_command("explain", "--search", "warmup")[1]
    assert run_command("explain", "training.learnRate") == (
        1, "", "error: training.learnRate is not a field of a FineTuneJob; did you mean spec.training.learningRate?\n",
    )  # fmt: skip
    assert run_command("explain", "--search", "zebra")[0] == 1


def test_unsupported_fields_are_marked(run_command: RunCommand) -> None:
    assert "[some values are not supported yet: write 4, because " in run_command("explain", "method.lora.loftq.bits")[1]
    assert "not supported yet" not in run_command("explain", "method.vision")[1]
    assert "not supported yet" not in run_command("explain", "training")[1]


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("lr", "did you mean spec.training.learningRate?"),
        ("gpus", "did you mean spec.resources.gpusPerNode?"),
        ("Kueue", "these fields mention the word: spec.placement.queueName"),
        ("zebra", "search the descriptions with --search WORD"),
    ],
)
def test_unknown_word_suggests_fields(run_command: RunCommand, word: str, hint: str) -> None:
    code, _, stderr = run_command("explain", word)
    assert (code, f"{word} is not a field of a FineTuneJob; {hint}" in stderr) == (1, True)
