"""A whole pod in the built trainer image: its process 1 is the supervisor. If the image is broken, the first attempt ends the job."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from finetune_api.exits import EXIT_POLICIES, RetryPolicy
from finetune_api.names import Env, ExitCode
from finetune_api.pod import RunConfig, StoreTarget, TerminationMessage

from tests.pod.pod_harness import UID, merge, run_config, write_rows
from tests.support.tiny import make_tiny_model
from tests.support.trainer_image import TrainerImage, open_broken_trainer_image

pytestmark = pytest.mark.image
DEEPSPEED_SPEC = {"method": {"type": "lora"}, "distributed": {"strategy": "deepspeed", "deepspeed": {"zeroStage": 3, "offloadOptimizer": True}}}


@dataclass(frozen=True)
class EndedPod:
    """A pod that has ended, with its exit code, its log and its termination message."""

    exit_code: int
    log: str
    termination_message: TerminationMessage


def run_pod(image: TrainerImage, folder: Path, spec: dict[str, Any], *, processes: int = 2, gpus: int = 0) -> EndedPod:
    """Run one pod until it ends. `folder` contains its model, its data and its results."""
    model, rows = make_tiny_model(folder / "model"), write_rows(folder / "rows.jsonl")
    (folder / "work").mkdir()
    base_spec: dict[str, Any] = {
        "model": {"source": f"file://{model}"}, "dataset": {"train": f"file://{rows}"},
        "training": {"maxSteps": 2, "batchSizePerDevice": 2}, "checkpoint": {"strategy": "no"},
    }  # fmt: skip
    run = run_config(merge(base_spec, spec), StoreTarget(uri=f"file://{folder}/store/team/job/{UID}"), processes=processes, gpus=gpus)
    run_bytes = run.to_bytes()
    (folder / "run.json").write_bytes(run_bytes)
    environment = {
        Env.RUN_FILE: str(folder / "run.json"), Env.RUN_SHA256: RunConfig.sha256(run_bytes), Env.WORK_DIR: str(folder / "work"),
        Env.TERMINATION_LOG: str(folder / "termination-message"), Env.NODE_RANK: "0", Env.POD_UID: UID,
    }  # fmt: skip
    command = ["python", "-m", "finetune_trainer", "supervise"]
    with (folder / "log").open("wb") as output:
        exit_code = image.run(command, folder, output, environment=environment)
    log = (folder / "log").read_text(errors="replace")
    message_file = folder / "termination-message"
    assert message_file.exists(), f"exit code {exit_code}, no termination message:\n{log[-6000:]}"
    return EndedPod(exit_code, log, TerminationMessage.model_validate_json(message_file.read_text()))


@pytest.mark.slow  # `make test` runs pods with two ranks in tests/e2e/jobs/test_resume.py, and offloads in test_matrix.py
def test_a_pod_with_two_deepspeed_ranks_trains_with_offloading(trainer_image: TrainerImage, tmp_path: Path) -> None:
    pod = run_pod(trainer_image, tmp_path, DEEPSPEED_SPEC)
    assert pod.exit_code == ExitCode.OK, pod.log[-6000:]
    assert pod.termination_message.resolved is not None and pod.termination_message.resolved.strategy == "deepspeed"
    assert list(tmp_path.rglob("adapter_model.safetensors"))


def test_a_pod_evaluates_its_model(trainer_image: TrainerImage, tmp_path: Path) -> None:
    """The metrics that need no judge model work without a network and with a read-only root file system."""
    metrics = ["perplexity", "accuracy", "f1", "bleu", "rouge", "bertscore", "semanticSimilarity"]
    source = f"file://{tmp_path}/model"
    evaluation = {
        "metrics": metrics, "maxRows": 2, "metricModels": {"bertscore": source, "semanticSimilarity": source},
        "comparison": {"generation": {"maxNewTokens": 4}},
    }  # fmt: skip
    pod = run_pod(trainer_image, tmp_path, {"evaluation": evaluation, "dataset": {"split": {"test": 0.2}}, "phases": {"infer": True}}, processes=1)
    assert pod.exit_code == ExitCode.OK, pod.log[-6000:]
    result = pod.termination_message.evaluation
    assert result is not None and result.metrics is not None
    assert [name for name, metric in result.metrics.items() if metric.value is None] == []
    assert {"perplexity", "f1", "bleu", "rougeL", "bertscore", "semanticSimilarity", "exactMatch"} <= result.metrics.keys()
    assert {path.name for path in tmp_path.rglob("evaluation_*")} == {"evaluation_results.json", "evaluation_summary.json", "evaluation_detailed.xlsx"}


@pytest.mark.parametrize(
    ("removed_folder", "spec", "processes", "missing_part"),
    [
        ("torch", {}, 2, "a part that the torchelastic agent needs"),
        pytest.param("torch", {}, 1, "the Python package torch", marks=pytest.mark.slow),
        ("nvidia/nccl/lib", {}, 1, "the library libnccl.so.2"),
        pytest.param("deepspeed", DEEPSPEED_SPEC, 2, "the Python package deepspeed", marks=pytest.mark.slow),
        pytest.param("bitsandbytes", {"method": {"type": "qlora"}}, 1, "the Python package bitsandbytes", marks=pytest.mark.slow),
        pytest.param("pyarrow", {}, 1, "the Python package pyarrow", marks=pytest.mark.slow),
    ],
)
def test_an_image_that_lacks_a_library_ends_the_job(
    removed_folder: str, spec: dict[str, Any], processes: int, missing_part: str, trainer_image: TrainerImage, tmp_path: Path
) -> None:
    with open_broken_trainer_image(removed_folder) as image:
        pod = run_pod(image, tmp_path, spec, processes=processes)
    assert pod.exit_code == ExitCode.INSTALLATION_BROKEN, pod.log[-6000:]
    assert pod.termination_message.code == "InstallationBroken"
    assert f"the trainer image lacks {missing_part}" in str(pod.termination_message.message)
    assert EXIT_POLICIES[pod.exit_code].retry_policy is RetryPolicy.NEVER


@pytest.mark.slow
def test_a_pod_that_requests_a_gpu_and_has_no_driver_ends_the_job(trainer_image: TrainerImage, tmp_path: Path) -> None:
    pod = run_pod(trainer_image, tmp_path, {}, processes=1, gpus=1)
    assert (pod.exit_code, pod.termination_message.code) == (ExitCode.INSTALLATION_BROKEN, "GpuDriverMissing"), pod.log[-6000:]
    assert "the pod has no GPU driver: Found no NVIDIA driver" in str(pod.termination_message.message)
