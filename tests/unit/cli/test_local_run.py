"""`finetune run --local`: attempt numbers and the last progress report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from finetune_cli.local_run import last_report, last_started_attempt


@pytest.mark.parametrize(
    ("message", "stage"),
    [
        ({"class": "Preempted", "code": "StoppedSaved", "message": "saved at step 12"}, "stopping"),
        ({"class": "Data", "code": "DatasetEmpty", "message": "no rows"}, "failed"),
        ({"output": {"uri": "file:///m/model"}}, "done"),
    ],
)
def test_last_report_shows_the_final_stage(message: dict[str, Any], stage: str, tmp_path: Path) -> None:
    (tmp_path / "termination-message.json").write_text(
        json.dumps({"progress": {"step": 12, "totalSteps": 100}, **message})
    )
    report = last_report(tmp_path / "termination-message.json")
    assert report is not None and report.stage == stage


def test_attempts_are_counted_from_storage(tmp_path: Path) -> None:
    assert last_started_attempt(tmp_path) == 0
    for name in ("attempt-9", "attempt-10", "attempt-x", "other"):
        (tmp_path / "run" / name).mkdir(parents=True)
    assert last_started_attempt(tmp_path) == 10
