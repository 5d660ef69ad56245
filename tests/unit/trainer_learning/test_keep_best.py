"""The best weights on a pod that resumed: there, or honestly not there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from finetune_trainer.best import FOLDER, PREFIX, KeepBest


@pytest.mark.parametrize(
    ("step", "files", "kept"),
    [
        (20, {"model.safetensors": "own", PREFIX + "model.safetensors": "older"}, "own"),
        (10, {"model.safetensors": "own", PREFIX + "model.safetensors": "older"}, "older"),
        (10, {"model.safetensors": "own"}, None),
    ],
    ids=["this one is the best", "an older one travels with it", "the best was never saved"],
)
def test_where_the_best_weights_are_after_a_resume(
    tmp_path: Path, step: int, files: dict[str, str], kept: str | None
) -> None:
    """A best that was measured between two checkpoints has no weights: the undisturbed run publishes the last ones, and so does this."""
    resumed = tmp_path / "checkpoint-20"
    resumed.mkdir()
    for name, text in files.items():
        (resumed / name).write_text(text)
    args: Any = SimpleNamespace(output_dir=str(tmp_path), local_process_index=0)
    state: Any = SimpleNamespace(best_global_step=step, global_step=20, best_model_checkpoint=None)
    KeepBest(resumed).on_train_begin(args, state, SimpleNamespace())  # type: ignore[arg-type] # nothing of it is read
    if kept is None:
        assert state.best_model_checkpoint is None
    else:
        assert Path(state.best_model_checkpoint) == tmp_path / FOLDER
        assert (tmp_path / FOLDER / "model.safetensors").read_text() == kept
