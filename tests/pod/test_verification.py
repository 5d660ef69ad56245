"""Pods that verify their stored model: it is loaded by transformers and PEFT, and computes the values of the trained model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
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


def test_a_pod_proves_that_its_stored_model_computes_what_was_trained(model: Path, tmp_path: Path) -> None:
    spec = {"output": {"serving": ["vllm"], "dir": "results", "layout": "flat"}}
    with verifying_pod(tmp_path, model, spec) as pod:
        assert pod.end() == ExitCode.OK, pod.text[-6000:]
    found = verification_of(pod)
    assert (found.result, found.rows) == (VerificationOutcome.VERIFIED, TEST_ROWS)
    assert found.tokens == len(labelled_tokens(tmp_path))
    (artefact,) = found.artefacts
    assert (artefact.artefact, artefact.result, artefact.reason, artefact.tolerance) == ("adapter", VerificationOutcome.VERIFIED, None, 1e-3)
    assert artefact.difference is not None and artefact.difference <= 1e-5
    assert artefact.change_from_base is not None and artefact.change_from_base > 0.01
    assert stored(tmp_path, "run/stages/verifying.json").exists()
    deployment = next(yaml.safe_load_all(stored(tmp_path, "serving/vllm.yaml").read_text()))
    output = pod.termination_message().output
    assert output is not None and output.uri in deployment["spec"]["template"]["spec"]["initContainers"][0]["args"]
    assert (tmp_path / "store" / "results" / "vllm.yaml").exists()
    # The rows of the user's data are beside the model, not in the folder that is published.
    assert len(list(stored(tmp_path, "run").glob("reference-values-*.json"))) == 1
    assert not list(stored(tmp_path, "model").rglob("reference-values*"))


def labelled_tokens(folder: Path) -> list[float]:
    (file,) = stored(folder, "run").glob("reference-values-*.json")
    return [value for row in json.loads(file.read_text())["rows"] for value in row["values"]]


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
"""A `sitecustomize` module: the saved B matrices are 1.5 times those of the trained model, which no check of files can see."""


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
