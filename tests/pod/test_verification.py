"""Pods whose stored model differs from the trained model, or that are stopped while they verify it. `test_stages.py` tests a model that is equal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from finetune_api.names import ExitCode, FailureClass
from finetune_api.pod import StoreTarget
from finetune_api.status import Stage, Verification, VerificationOutcome
from pod_harness import PYTHONPATH, UID, Pod, merge, run_config, write_rows

from tests.support.tiny import make_tiny_model

TEST_ROWS = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def verifying_pod(folder: Path, model: Path, spec: dict[str, Any], *, attempt: int = 1) -> Pod:
    folder.mkdir(parents=True, exist_ok=True)
    rows = write_rows(folder / "rows.jsonl")
    base = {
        "model": {"source": f"file://{model}"}, "dataset": {"train": f"file://{rows}", "split": {"train": 28 / 36, "test": 8 / 36}},
        "training": {"maxSteps": 4, "batchSizePerDevice": 4, "gradientAccumulationSteps": 1, "learningRate": 1e-2},
        "checkpoint": {"steps": 4}, "tracking": {"loggingSteps": 1}, "output": {"verify": True},
    }  # fmt: skip
    target = StoreTarget(uri=f"file://{folder}/store/team/job/{UID}")
    run = run_config(merge(base, spec), target, attempt=attempt)
    directory = run.spec.output.dir
    run = run.model_copy(update={"publish": f"file://{folder}/store/{directory}"}) if directory else run
    return Pod(run, folder / f"pod-{attempt}")


def verification_of(pod: Pod) -> Verification:
    output = pod.termination_message().output
    assert output is not None and output.verification is not None, pod.text[-6000:]
    return output.verification


def stored(folder: Path, key: str) -> Path:
    return folder / "store" / "team" / "job" / UID / key


SABOTAGE = """
import sys

if "train" in sys.argv:  # only the ranks, which save the model
    import finetune_trainer.train as train

    name_base = train._name_base_by_source

    def name_base_and_damage(folder, run):
        name_base(folder, run)
        from safetensors.torch import load_file, save_file

        path = folder / "adapter_model.safetensors"
        save_file({name: value * 1.5 if "lora_B" in name else value for name, value in load_file(path).items()}, path)

    train._name_base_by_source = name_base_and_damage
"""
"""A `sitecustomize` module: the saved B matrices are 1.5 times those of the trained model, which no check of the files can detect."""


def test_a_stored_model_that_differs_from_the_trained_one_fails_the_job_for_good_and_is_not_published(model: Path, tmp_path: Path) -> None:
    (tmp_path / "sabotage").mkdir()
    (tmp_path / "sabotage" / "sitecustomize.py").write_text(SABOTAGE)
    path = {"PYTHONPATH": f"{tmp_path / 'sabotage'}{os.pathsep}{PYTHONPATH}"}
    spec = {"output": {"dir": "results", "layout": "flat"}}
    pod = verifying_pod(tmp_path, model, spec)
    pod.env = path
    with pod:
        assert pod.end() == ExitCode.VERIFICATION_FAILED, pod.text[-6000:]
    message, found = pod.termination_message(), verification_of(pod)
    assert (message.code, message.stage, message.class_) == ("ValuesDiffer", Stage.VERIFYING, FailureClass.MODEL)
    assert "differ by" in (message.message or "") and message.output is not None and message.output.uri in (message.hint or "")
    assert (found.result, found.artefacts[0].code) == (VerificationOutcome.FAILED, "ValuesDiffer")
    assert found.artefacts[0].difference is not None and found.artefacts[0].difference > 1e-2
    assert message.output.uri is not None and Path(message.output.uri.removeprefix("file://")).exists()
    assert message.output.published_uri is None and not (tmp_path / "store" / "results").exists()
    # The finding is final: another attempt repeats neither the training nor the verification.
    with verifying_pod(tmp_path, model, spec, attempt=2) as again:
        assert again.end() == ExitCode.VERIFICATION_FAILED, again.text[-6000:]
    assert again.termination_message().code == "ValuesDiffer"
    assert "step 1/4" not in again.text and "Loading weights" not in again.text


@pytest.mark.slow
def test_a_pod_that_is_stopped_while_it_verifies_keeps_its_model_and_the_next_one_verifies(model: Path, tmp_path: Path) -> None:
    with verifying_pod(tmp_path, model, {}) as stopped:
        stopped.wait_until(lambda: (report := stopped.report()) is not None and report.stage is Stage.VERIFYING)
        stopped.terminate()
        assert stopped.end() == ExitCode.PREEMPTED_SAVED, stopped.text[-6000:]
    with verifying_pod(tmp_path, model, {}, attempt=2) as resumed:
        assert resumed.end() == ExitCode.OK, resumed.text[-6000:]
    assert verification_of(resumed).result is VerificationOutcome.VERIFIED
    assert "step 1/4" not in resumed.text
