"""Log entries recognise the kind of their line, replace numbers that are not finite, and are joined over several attempts."""

from __future__ import annotations

import json
from typing import Any

import pytest
from finetune_trainer.results.log_entry import LineKind, LogEntry, join_attempts, log_to_jsonl
from pydantic import ValidationError


def make_entries(*lines: dict[str, Any]) -> list[LogEntry]:
    return [LogEntry.model_validate(line) for line in lines]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"loss": 1.0, "grad_norm": 2.0, "epoch": 0.5}, LineKind.TRAINING),
        ({"loss": float("nan")}, LineKind.TRAINING),
        ({"eval_loss": 1.0, "eval_runtime": 0.1}, LineKind.EVALUATION),
        ({"test_loss": 1.0, "test_runtime": 0.1, "eval_entropy": 2.0}, LineKind.TEST),
        ({"train_runtime": 9.0, "train_loss": 1.0}, LineKind.SUMMARY),
        ({"epoch": 1.0}, LineKind.OTHER),
    ],
)
def test_the_names_of_the_values_show_the_kind_of_a_line(values: dict[str, Any], kind: LineKind) -> None:
    assert LogEntry(step=1, **values).kind is kind


def test_log_jsonl_has_every_value_in_order_and_null_for_numbers_that_are_not_finite() -> None:
    lines = [
        {"step": 1, "loss": float("nan"), "grad_norm": "inf", "rewards/length/mean": 0.5, "learning_rate": 3e-4},
        {"step": 1, "eval_loss": float("-inf"), "nested": {"values": [1, float("inf")]}, "note": "héllo"},
    ]
    # Declared fields come first, then the other values of the line.
    assert log_to_jsonl(make_entries(*lines)) == (
        '{"step": 1, "loss": null, "grad_norm": null, "learning_rate": 0.0003, "rewards/length/mean": 0.5}\n'
        '{"step": 1, "eval_loss": null, "nested": {"values": [1, null]}, "note": "héllo"}\n'
    )


def test_log_jsonl_can_be_read_back() -> None:
    log = make_entries({"step": 1, "loss": 0.5, "other": 2}, {"step": 2, "eval_loss": 1.5, "unix_time": 1.7e9})
    text = log_to_jsonl(log)
    assert [LogEntry.from_json(line) for line in text.splitlines()] == log
    assert json.loads(text.splitlines()[0]) == {"step": 1, "loss": 0.5, "other": 2}
    assert log_to_jsonl([]) == ""


def test_a_line_without_a_step_is_refused() -> None:
    with pytest.raises(ValidationError):
        LogEntry.model_validate({"loss": 1.0})


def list_steps_and_attempts(log: list[LogEntry]) -> list[tuple[int, str]]:
    return [(entry.step, entry.model_extra["attempt"] if entry.model_extra else "") for entry in log]


def test_of_a_repeated_step_only_the_lines_of_the_later_attempt_are_kept() -> None:
    first_attempt = make_entries(*({"step": step, "loss": 1.0, "attempt": "a1"} for step in (10, 20, 30, 40)))
    # Resumed from a checkpoint of step 25.
    second_attempt = make_entries(*({"step": step, "loss": 1.0, "attempt": "a2"} for step in (30, 40, 50)))
    expected_steps = [(10, "a1"), (20, "a1"), (30, "a2"), (40, "a2"), (50, "a2")]
    assert list_steps_and_attempts(join_attempts([first_attempt, second_attempt])) == expected_steps
    assert list_steps_and_attempts(join_attempts([first_attempt, [], second_attempt])) == expected_steps
    restarted_attempt = make_entries({"step": 1, "loss": 1.0, "attempt": "a3"})
    assert list_steps_and_attempts(join_attempts([first_attempt, second_attempt, restarted_attempt])) == [(1, "a3")]
    assert join_attempts([]) == []


def test_a_line_of_another_kind_at_the_step_of_the_checkpoint_is_kept() -> None:
    """An attempt that resumes from the last step logs only the summary at this step."""
    first_attempt = make_entries(
        {"step": 8, "loss": 1.0, "attempt": "a1"}, {"step": 8, "eval_loss": 1.0, "attempt": "a1"},
        {"step": 8, "train_runtime": 9.0, "attempt": "a1"}, {"step": 8, "test_loss": 9.0, "attempt": "a1"},
    )  # fmt: skip
    second_attempt = make_entries({"step": 8, "train_runtime": 0.1, "attempt": "a2"}, {"step": 8, "test_loss": 9.0, "attempt": "a2"})
    joined_log = join_attempts([first_attempt, second_attempt])
    assert [(entry.kind, (entry.model_extra or {})["attempt"]) for entry in joined_log] == [
        (LineKind.TRAINING, "a1"), (LineKind.EVALUATION, "a1"), (LineKind.SUMMARY, "a2"), (LineKind.TEST, "a2"),
    ]  # fmt: skip
