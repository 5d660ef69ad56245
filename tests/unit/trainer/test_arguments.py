"""A note reports a warm-up that the schedule ignores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from finetune_trainer.arguments import unused_warmup_notes

from tests.support.learning import make_run


@pytest.mark.parametrize(
    ("training", "expected_notes"),
    [
        ({"scheduler": "constant", "warmupSteps": 10}, ["training.warmupSteps 10 has no effect"]),
        ({"scheduler": "constant", "warmupRatio": 0.1}, ["training.warmupRatio 0.1 has no effect"]),
        ({"scheduler": "constant", "warmupSteps": 10, "optimizer": "schedule_free_adamw"}, []),
        ({"scheduler": "constant", "warmupSteps": 0}, []),
        ({"scheduler": "constantWithWarmup", "warmupSteps": 10}, []),
    ],
)
def test_an_ignored_warmup_is_reported(tmp_path: Path, training: dict[str, Any], expected_notes: list[str]) -> None:
    run, _ = make_run(tmp_path, tmp_path / "model", {"training": training})
    run = run.model_copy(
        update={"defaults": [*run.defaults, *({"training.warmupRatio"} - {f"training.{name}" for name in training})]}
    )
    assert [note.split(" with ")[0] for note in unused_warmup_notes(run)] == expected_notes
