"""A run that resumes restores the best weights from its checkpoint."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from finetune_trainer.best import BEST_FOLDER, BEST_PREFIX, KeepBest


@pytest.mark.parametrize(
    ("best_step", "files", "restored_text"),
    [
        (20, {"model.safetensors": "own", BEST_PREFIX + "model.safetensors": "older"}, "own"),
        (10, {"model.safetensors": "own", BEST_PREFIX + "model.safetensors": "older"}, "older"),
        (10, {"model.safetensors": "own"}, None),
    ],
    ids=["this checkpoint is the best", "this checkpoint contains older best weights", "the best was never saved"],
)
def test_best_weights_are_restored_if_a_checkpoint_holds_them(
    tmp_path: Path, best_step: int, files: dict[str, str], restored_text: str | None
) -> None:
    """The weights of steps between two checkpoints are not saved. If the best loss was measured at such a step, nothing is restored."""
    checkpoint_folder = tmp_path / "checkpoint-20"
    checkpoint_folder.mkdir()
    for name, text in files.items():
        (checkpoint_folder / name).write_text(text)
    args: Any = SimpleNamespace(output_dir=str(tmp_path), local_process_index=0)
    state: Any = SimpleNamespace(best_global_step=best_step, global_step=20, best_model_checkpoint=None)
    KeepBest(checkpoint_folder).on_train_begin(args, state, SimpleNamespace())  # type: ignore[arg-type] # not read
    if restored_text is None:
        assert state.best_model_checkpoint is None
    else:
        assert Path(state.best_model_checkpoint) == tmp_path / BEST_FOLDER
        assert (tmp_path / BEST_FOLDER / "model.safetensors").read_text() == restored_text
