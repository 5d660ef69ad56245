"""The heavy libraries that a job imports."""

from __future__ import annotations

import subprocess
import sys
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


def test_ranks_never_import_trackers(tmp_path: Path) -> None:
    """TRL imports wandb and mlflow if they are installed, which takes 0.6 s and 2 s. Another process sends values to trackers."""
    run, _ = make_run(tmp_path, tmp_path / "model", {"tracking": {"reportTo": ["mlflow"], "mlflow": {"trackingUri": "http://mlflow.mlops:5000"}}})
    program = (
        "import sys; from pathlib import Path; from finetune_api.pod import RunConfig; from finetune_trainer import imports; "
        "imports.preload(RunConfig.model_validate_json(sys.stdin.read()), 'finetune_trainer.objective.grpo'); "
        "print([sys.modules.get(name) for name in ('wandb', 'mlflow')])"
    )
    done = subprocess.run([sys.executable, "-c", program], input=run.model_dump_json(by_alias=True), capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["[None, None]"]), done.stderr
