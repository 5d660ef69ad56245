"""The heavy libraries that a job imports."""

from __future__ import annotations

from pathlib import Path

from finetune_trainer import imports
from transformers import trainer_optimizer

from tests.support.learning import make_run


def test_every_bitsandbytes_optimizer_imports_bitsandbytes(tmp_path: Path) -> None:
    """bitsandbytes is hidden from jobs that do not need the package. A job with an optimizer of bitsandbytes needs it."""
    for optimizer in trainer_optimizer._BITSANDBYTES_OPTIMIZERS:
        run, _ = make_run(tmp_path, tmp_path / "model", {"training": {"optimizer": str(optimizer.value)}})
        assert imports.needs_bitsandbytes(run), optimizer
    run, _ = make_run(tmp_path, tmp_path / "model")
    assert not imports.needs_bitsandbytes(run)
