"""Status fields whose changes the operator writes at once, and the width of the table of `kubectl get`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from finetune_api import status as status_module
from finetune_api.names import Phase, Reason
from finetune_api.schema import PRINTER_COLUMNS
from finetune_api.sources import MAX_MODEL_NAME_LENGTH
from finetune_api.status import FineTuneJobStatus

NOON = "2026-03-01T12:00:00Z"
STATUS: dict[str, Any] = {
    "observedGeneration": 1,
    "phase": "Running",
    "conditions": [
        {"type": "PodsReady", "status": "False", "reason": "PodsNotReady", "message": "1 of 2", "lastTransitionTime": NOON}
    ],
    "attempts": [{"number": 1, "startTime": NOON, "lastStep": 10}],
    "progress": {"step": 10},
    "startTime": NOON,
}  # fmt: skip


def select_prompt_fields(**changes: Any) -> dict[str, Any]:
    """Apply these changes to STATUS, and return the fields of the result whose changes the operator writes at once."""
    return status_module.select_immediate_fields(FineTuneJobStatus.model_validate(STATUS | changes).to_wire())


@pytest.mark.parametrize(
    "change",
    [
        {"observedGeneration": 2},
        {"phase": "Failed"},
        {"reason": "Unschedulable"},
        {"attempt": 2},
        {"restarts": 1},
        {"retriesUsed": 1},
        {"activeSeconds": 5},
        {"output": {"uri": "s3://b/m"}},
        {"evaluation": {"rows": 200}},
        {"failure": {"class": "Data", "code": "DatasetEmpty"}},
        {"adaptations": [{"time": NOON, "reason": "OutOfMemory", "change": "x"}]},
        {"startTime": "2026-03-01T12:00:01Z"},
        {"completionTime": NOON},
        {"conditions": [STATUS["conditions"][0] | {"status": "True"}]},
        {"conditions": [STATUS["conditions"][0] | {"reason": "Unschedulable"}]},
        {"conditions": []},
        {"attempts": [STATUS["attempts"][0] | {"endTime": NOON}]},
        {"attempts": [STATUS["attempts"][0] | {"reason": "Stalled"}]},
        {"attempts": []},
        {"latestCheckpoint": "s3://b/c"},
    ],
    ids=str,
)
def test_a_change_of_a_field_declared_with_prompt_is_written_at_once(change: dict[str, Any]) -> None:
    assert select_prompt_fields(**change) != select_prompt_fields()


@pytest.mark.parametrize(
    "change",
    [
        {"progress": {"step": 11}},
        {"metrics": {"trainLoss": 1.0}},
        {"workers": {"ready": 1, "total": 2, "display": "1/2"}},
        {"resolved": {"worldSize": 2}},
        {"checkpoints": [{"step": 5, "uri": "s3://b/c"}]},
        {"latestCheckpointStep": 5},
        {"duration": "1h"},
        {"conditions": [STATUS["conditions"][0] | {"message": "2 of 2", "lastTransitionTime": None}]},
        {"attempts": [STATUS["attempts"][0] | {"lastStep": 11, "node": "n"}]},
    ],
    ids=str,
)
def test_a_change_of_any_other_field_may_be_written_later(change: dict[str, Any]) -> None:
    assert select_prompt_fields(**change) == select_prompt_fields()


def test_numbers_of_the_evaluation_are_rounded_and_unreadable_numbers_are_dropped() -> None:
    metrics = {"bleu": {"value": 12.3456789, "base": 1e-9 / 3, "low": float("nan")}}
    evaluation = FineTuneJobStatus.model_validate({"evaluation": {"rows": 3, "metrics": metrics}}).to_wire()["evaluation"]
    assert evaluation == {"rows": 3, "metrics": {"bleu": {"value": 12.3457, "base": 3.33333e-10}}}


def test_a_newer_latest_checkpoint_may_be_written_later() -> None:
    assert select_prompt_fields(latestCheckpoint="s3://b/1") == select_prompt_fields(latestCheckpoint="s3://b/2")


def test_a_time_that_differs_by_less_than_a_second_may_be_written_later() -> None:
    status = FineTuneJobStatus.model_validate(STATUS)
    later_status = status.model_copy(update={"start_time": datetime(2026, 3, 1, 12, 0, 0, 999999, UTC)})
    assert status_module.select_immediate_fields(later_status.to_wire()) == select_prompt_fields()


LONGEST_VALUES = {
    "Status": max(map(len, Phase)),
    "Progress": len("50000/100000 (50%)"),
    "Loss": len("0.1234"),
    "ETA": len("12h34m"),
    "Workers": len("16/16"),
    "Restarts": len("12"),
    "Reason": max(len(reason) for reason in (Reason.UNSCHEDULABLE, Reason.RETRIES_EXHAUSTED, Reason.STORAGE_NOT_CONFIGURED)),
    "Age": len("2d13h"),
    "Model": MAX_MODEL_NAME_LENGTH,
    "Checkpoint": len("100000"),
    "Result": len("perplexity 12.34"),
    "Duration": len("12h34m"),
}
"""For each printer column, the length of the longest text that usually appears in it."""


def test_the_lines_of_the_wide_table_have_fewer_than_200_characters() -> None:
    name_width = len("team-a-support-bot-v12")
    widths = [max(len(column), LONGEST_VALUES[column]) for column, *_ in PRINTER_COLUMNS]
    assert sum(width + len("   ") for width in [name_width, *widths]) < 200


def test_the_default_table_ends_with_reason_and_age() -> None:
    assert [column for column, _, _, priority, _ in PRINTER_COLUMNS if priority == 0][-2:] == ["Reason", "Age"]
