"""A job imports only the heavy libraries that it needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from finetune_api.spec.enums import OutputKind
from finetune_api.status import Stage
from finetune_trainer import imports
from finetune_trainer.channel import Channel
from finetune_trainer.stages import process
from finetune_trainer.stages.files import RESULT_FILE, TASK_FILE, StageResult, StageTask
from transformers import trainer_optimizer

from tests.support.learning import make_run


def test_every_bitsandbytes_optimizer_needs_bitsandbytes(tmp_path: Path) -> None:
    """bitsandbytes is hidden from jobs that do not need it. A job with an optimizer of bitsandbytes needs the package."""
    for optimizer in trainer_optimizer._BITSANDBYTES_OPTIMIZERS:
        run, _ = make_run(tmp_path, tmp_path / "model", {"training": {"optimizer": str(optimizer.value)}})
        assert imports.needs_bitsandbytes(run), optimizer
    run, _ = make_run(tmp_path, tmp_path / "model")
    assert not imports.needs_bitsandbytes(run)


def test_bitsandbytes_stays_visible_for_a_base_model_that_another_job_quantised(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, tmp_path / "model")
    program = (
        "import sys; from finetune_api.pod import RunConfig; from finetune_trainer import imports; "
        "run = RunConfig.model_validate_json(sys.stdin.read()); imports.hide_unneeded_libraries(run, keeps_bitsandbytes={}); "
        "print([name for name in ('bitsandbytes', 'wandb') if name in sys.modules])"
    )
    for keeps_bitsandbytes, hidden_names in ((True, ["wandb"]), (False, ["bitsandbytes", "wandb"])):
        command = [sys.executable, "-c", program.format(keeps_bitsandbytes)]
        completed_process = subprocess.run(command, input=run.model_dump_json(by_alias=True), capture_output=True, text=True)
        assert (completed_process.returncode, completed_process.stdout) == (0, f"{hidden_names}\n"), completed_process.stderr


def test_a_rank_imports_only_the_packages_that_its_job_needs(tmp_path: Path) -> None:
    """TRL imports wandb and mlflow if they are installed, which takes 0.6 s and 2 s.

    A rank needs neither wandb nor mlflow, because another process sends values to trackers.
    """
    tracking = {"reportTo": ["mlflow"], "mlflow": {"trackingUri": "http://mlflow.mlops:5000"}}
    run, _ = make_run(tmp_path, tmp_path / "model", {"tracking": tracking, "dataset": {"numProc": 3}})
    completed_process = subprocess.run([sys.executable, "-c", PRELOAD], input=run.model_dump_json(by_alias=True), capture_output=True, text=True)
    assert completed_process.returncode == 0, completed_process.stderr
    assert completed_process.stdout.splitlines()[-6:] == ["0 True 0", "[]", "False 3 1", "True", "1", "True"]


@pytest.mark.parametrize(
    ("stage", "expected_steps"),
    [
        (Stage.EVALUATING, ["preload", "finetune_trainer.stages.evaluate"]),
        (Stage.COMPARING, ["preload", "finetune_trainer.stages.compare"]),
        (Stage.MERGING, ["preload", "finetune_trainer.stages.merge"]),
        (Stage.BENCHMARKING, ["caches", "preload", "finetune_trainer.stages.benchmark"]),
        (Stage.VERIFYING, ["finetune_trainer.stages.verify"]),
    ],
)
def test_a_stage_hides_unneeded_libraries_before_its_module_imports_them(
    stage: Stage, expected_steps: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The modules of most stages import all libraries, which takes 1.5 s longer if bitsandbytes and scipy are not hidden."""
    run, inputs = make_run(tmp_path, tmp_path / "model")
    inputs.write(tmp_path)
    task = StageTask(stage=stage, model=tmp_path, kind=OutputKind.ADAPTER, uri="s3://models/job")
    (tmp_path / TASK_FILE).write_text(task.model_dump_json(by_alias=True))
    done_steps: list[str] = []

    def import_module(name: str) -> SimpleNamespace:
        done_steps.append(name)
        return SimpleNamespace(run_stage=lambda *arguments: StageResult(merged_uri="s3://models/merged"))

    monkeypatch.setattr(process, "load_run", lambda settings: (run, ""))
    monkeypatch.setattr(process, "importlib", SimpleNamespace(import_module=import_module))
    monkeypatch.setattr(process.train, "preload", lambda run: done_steps.append("preload"))
    monkeypatch.setattr(process.harness, "use_local_caches", lambda folder: done_steps.append("caches"))
    channel = SimpleNamespace(work_folder=tmp_path, report_stage=lambda stage: None)
    process.run_stage(tmp_path, cast(Channel, channel))
    assert done_steps == expected_steps
    assert StageResult.model_validate_json((tmp_path / RESULT_FILE).read_text()).merged_uri == "s3://models/merged"


PRELOAD = """
import gc, os, sys
from finetune_api.pod import RunConfig
from finetune_trainer import imports, train
run = RunConfig.model_validate_json(sys.stdin.read())
opened = []
sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
collections = gc.get_stats()[2]["collections"]
imports.preload(run, "finetune_trainer.objective.grpo")
print(gc.get_stats()[2]["collections"] - collections, gc.isenabled(), gc.get_freeze_count())
train.preload(run)
imported = {name.partition(".")[0] for name, module in sys.modules.items() if module is not None}
print(sorted(imported & {"bitsandbytes", "boto3", "deepspeed", "mlflow", "scipy", "torchvision", "wandb"}))
from peft.import_utils import is_bnb_available
from transformers.utils import is_scipy_available
print(is_bnb_available(), os.environ["RAYON_NUM_THREADS"], os.environ["HF_HUB_DISABLE_TELEMETRY"])
import boto3, scipy.optimize
print(is_scipy_available())
print(sum(name.endswith("/models/zamba/modeling_zamba.py") for name in opened))
gc.freeze()
frozen_objects = gc.get_freeze_count()
train.preload(run)
print(gc.get_freeze_count() == frozen_objects > 100_000)
"""
"""A program that prints six lines about the imports:

1. how many garbage collections ran, whether the collector is enabled, and how many objects it has frozen
2. the imported packages that the job does not need
3. whether PEFT finds bitsandbytes, and the values of two environment variables
4. whether transformers finds scipy, which was hidden during the imports
5. how often transformers has read the file of a model that the job does not use
6. whether the objects that a rank freezes after its imports stay frozen when `train.main` imports the same libraries again
"""


def test_a_job_with_a_quantised_base_model_needs_bitsandbytes(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, tmp_path / "model", {"method": {"type": "qlora"}})
    assert imports.needs_bitsandbytes(run) and not imports.needs_deepspeed(run)


def test_transformers_reads_its_model_files_once() -> None:
    """Without `reuse_list_of_models`, transformers would read the files of its models twice. The reused list equals the list that transformers would make."""
    program = (
        "import transformers; from transformers.utils import import_utils as lists; from finetune_trainer import imports; "
        "imports.reuse_list_of_models(); models = transformers.models; print(lists.define_import_structure.cache_info().misses); "
        "expected = lists._LazyModule(models.__name__, models.__file__, lists.define_import_structure(models.__file__)); "
        "print([vars(models)[name] == vars(expected)[name] for name in ('_class_to_module', '_object_missing_backend', '_modules')]); "
        "print(len(models._class_to_module) > 3000)"
    )
    completed_process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (completed_process.returncode, completed_process.stdout.splitlines()) == (0, ["1", "[True, True, True]", "True"]), completed_process.stderr


def test_rouge_imports_nltk_without_scipy_and_scikit_learn() -> None:
    """nltk would import scipy and scikit-learn for functions that no metric uses, which takes two seconds. Later code can import both packages."""
    program = (
        "import sys; from finetune_trainer.evaluation import text_metrics as metrics; from finetune_trainer.evaluation.predictions import Prediction; "
        "answer = Prediction(system_prompt=None, user_prompt='2 + 2?', assistant_response='It is running', ground_truth='It runs'); "
        "print(metrics.rouge([answer])['rouge1'].value, sys.modules.get('scipy'), sys.modules.get('sklearn')); import scipy.stats, sklearn"
    )
    completed_process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (completed_process.returncode, completed_process.stdout) == (0, "0.8 None None\n"), completed_process.stderr
