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


def test_bitsandbytes_stays_visible_for_a_base_model_that_another_job_quantised(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, tmp_path / "model")
    program = (
        "import sys; from finetune_api.pod import RunConfig; from finetune_trainer import imports; "
        "run = RunConfig.model_validate_json(sys.stdin.read()); imports.hide_unneeded(run, keeps_bitsandbytes={}); "
        "print([name for name in ('bitsandbytes', 'wandb') if name in sys.modules])"
    )
    for keeps, hidden in ((True, ["wandb"]), (False, ["bitsandbytes", "wandb"])):
        command = [sys.executable, "-c", program.format(keeps)]
        done = subprocess.run(command, input=run.model_dump_json(by_alias=True), capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, f"{hidden}\n"), done.stderr


def test_ranks_never_import_trackers_and_no_garbage_is_collected_during_imports(tmp_path: Path) -> None:
    """TRL imports wandb and mlflow if they are installed, which takes 0.6 s and 2 s. Another process sends values to trackers."""
    run, _ = make_run(tmp_path, tmp_path / "model", {"tracking": {"reportTo": ["mlflow"], "mlflow": {"trackingUri": "http://mlflow.mlops:5000"}}})
    program = (
        "import gc, sys; from finetune_api.pod import RunConfig; from finetune_trainer import imports; "
        "run = RunConfig.model_validate_json(sys.stdin.read()); collections = gc.get_stats()[2]['collections']; "
        "imports.preload(run, 'finetune_trainer.objective.grpo'); "
        "found = gc.get_stats()[2]['collections'] - collections, gc.isenabled(), gc.get_freeze_count(); "
        "print([sys.modules.get(name) for name in ('wandb', 'mlflow')], *found)"
    )
    done = subprocess.run([sys.executable, "-c", program], input=run.model_dump_json(by_alias=True), capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["[None, None] 0 True 0"]), done.stderr


def test_rouge_imports_nltk_without_scipy_and_scikit_learn() -> None:
    """nltk would import both for functions that no metric uses, which takes two seconds. Both can be imported later."""
    program = (
        "import sys; from finetune_trainer.evaluation import text_metrics as metrics; from finetune_trainer.evaluation.predictions import Prediction; "
        "answer = Prediction(system_prompt=None, user_prompt='2 + 2?', assistant_response='It is running', ground_truth='It runs'); "
        "print(metrics.rouge([answer])['rouge1'].value, sys.modules.get('scipy'), sys.modules.get('sklearn')); import scipy.stats, sklearn"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "0.8 None None\n"), done.stderr
