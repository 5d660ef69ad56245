"""Pods whose stored model differs from the trained model, or that are stopped during the verification. `test_stages.py` tests a correct model."""

from __future__ import annotations

import json
import os
import shutil
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


def make_verifying_pod(folder: Path, model: Path, spec: dict[str, Any], *, attempt: int = 1, uid: str = UID) -> Pod:
    folder.mkdir(parents=True, exist_ok=True)
    rows = write_rows(folder / "rows.jsonl")
    base_spec = {
        "model": {"source": f"file://{model}"}, "dataset": {"train": f"file://{rows}", "split": {"train": 28 / 36, "test": 8 / 36}},
        "training": {"maxSteps": 4, "batchSizePerDevice": 4, "gradientAccumulationSteps": 1, "learningRate": 1e-2},
        "checkpoint": {"steps": 4}, "tracking": {"loggingSteps": 1}, "output": {"verify": True},
    }  # fmt: skip
    target = StoreTarget(uri=f"file://{folder}/store/team/job/{uid}")
    run = run_config(merge(base_spec, spec), target, attempt=attempt)
    output_dir = run.spec.output.dir
    run = run.model_copy(update={"publish": f"file://{folder}/store/{output_dir}"}) if output_dir else run
    return Pod(run.model_copy(update={"uid": uid}), folder / f"pod-{uid[0]}-{attempt}")


def require_verification(pod: Pod) -> Verification:
    output = pod.termination_message().output
    assert output is not None and output.verification is not None, pod.text[-6000:]
    return output.verification


def stored_path(folder: Path, key: str, uid: str = UID) -> Path:
    """Return the path of an object in the job's storage folder."""
    return folder / "store" / "team" / "job" / uid / key


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below the folder, by relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_start_module(folder: Path, text: str) -> dict[str, str]:
    """Write a `sitecustomize` module with this text. Returns environment variables with which every Python process of a pod runs it first."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(text)
    return {"PYTHONPATH": f"{folder}{os.pathsep}{PYTHONPATH}"}


DAMAGE_SAVED_ADAPTER = """
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
"""A `sitecustomize` module that multiplies the saved B matrices by 1.5. No check of file hashes can detect this change."""


def test_a_stored_model_that_differs_from_the_trained_model_fails_the_job_and_is_not_published(model: Path, tmp_path: Path) -> None:
    spec = {"output": {"dir": "results", "layout": "flat"}}
    pod = make_verifying_pod(tmp_path, model, spec)
    pod.env = write_start_module(tmp_path / "sabotage", DAMAGE_SAVED_ADAPTER)
    with pod:
        assert pod.end() == ExitCode.VERIFICATION_FAILED, pod.text[-6000:]
    message, verification = pod.termination_message(), require_verification(pod)
    assert (message.code, message.stage, message.class_) == ("ValuesDiffer", Stage.VERIFYING, FailureClass.MODEL)
    assert "differ by" in (message.message or "") and message.output is not None and message.output.uri in (message.hint or "")
    assert (verification.result, verification.artefacts[0].code) == (VerificationOutcome.FAILED, "ValuesDiffer")
    assert verification.artefacts[0].difference is not None and verification.artefacts[0].difference > 1e-2
    assert message.output.uri is not None and Path(message.output.uri.removeprefix("file://")).exists()
    assert message.output.published_uri is None and not (tmp_path / "store" / "results").exists()
    # A failed verification is final: another attempt fails at once, without repeating the training or the verification.
    with make_verifying_pod(tmp_path, model, spec, attempt=2) as second_pod:
        assert second_pod.end() == ExitCode.VERIFICATION_FAILED, second_pod.text[-6000:]
    assert second_pod.termination_message().code == "ValuesDiffer"
    assert "step 1/4" not in second_pod.text and "Loading weights" not in second_pod.text


@pytest.mark.slow
def test_a_pod_that_is_stopped_during_its_verification_keeps_its_model_and_the_next_attempt_verifies(model: Path, tmp_path: Path) -> None:
    with make_verifying_pod(tmp_path, model, {}) as stopped_pod:
        stopped_pod.wait_until(lambda: (report := stopped_pod.report()) is not None and report.stage is Stage.VERIFYING)
        stopped_pod.terminate()
        assert stopped_pod.end() == ExitCode.PREEMPTED_SAVED, stopped_pod.text[-6000:]
    with make_verifying_pod(tmp_path, model, {}, attempt=2) as resumed_pod:
        assert resumed_pod.end() == ExitCode.OK, resumed_pod.text[-6000:]
    assert require_verification(resumed_pod).result is VerificationOutcome.VERIFIED
    assert "step 1/4" not in resumed_pod.text


EXHAUST_MEMORY = """
import sys

if "stage" in sys.argv:
    import finetune_trainer.stages.verify as verify

    def exhaust_memory(*arguments):
        raise MemoryError("no memory is left")

    verify.list_artefacts = exhaust_memory
"""
"""A `sitecustomize` module that makes the stage `verifying` run out of memory."""
OTHER_JOB_UID = "99999999-2222-3333-4444-555555555555"


@pytest.fixture(scope="module")
def unverified_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run a job whose stage `verifying` runs out of memory. Returns the folder of its files, and the address of its model."""
    folder = tmp_path_factory.mktemp("unverified")
    pod = make_verifying_pod(folder, model, {}, uid=OTHER_JOB_UID)
    pod.env = write_start_module(folder / "exhausted", EXHAUST_MEMORY)
    with pod:
        assert pod.end() == ExitCode.OUT_OF_MEMORY, pod.text[-6000:]
        message = pod.termination_message()
    assert (message.stage, message.class_) == (Stage.VERIFYING, FailureClass.OUT_OF_MEMORY)
    assert message.output is not None and message.output.uri is not None and message.output.verification is None
    return folder, message.output.uri


def repetition_spec(uri: str, **changes: Any) -> dict[str, Any]:
    """Return the spec of a job that only verifies the stored model of another job again. A job without training needs no data."""
    return merge({"phases": {"train": False, "from": uri}, "dataset": {"train": None, "split": None}}, changes)


@pytest.mark.slow
def test_a_job_without_training_repeats_the_verification_of_another_job(unverified_model: tuple[Path, str], model: Path) -> None:
    folder, uri = unverified_model
    other_files = read_files(stored_path(folder, "", OTHER_JOB_UID))
    with make_verifying_pod(folder, model, repetition_spec(uri)) as pod:
        assert pod.end() == ExitCode.OK, pod.text[-6000:]
    verification, output = require_verification(pod), pod.termination_message().output
    assert output is not None and output.uri == uri
    (artefact,) = verification.artefacts
    assert (verification.result, verification.rows, artefact.artefact) == (VerificationOutcome.VERIFIED, TEST_ROWS, "adapter")
    assert artefact.tolerance == 1e-3 and (artefact.difference or 0) <= 1e-4 < (artefact.change_from_base or 0)
    assert read_files(stored_path(folder, "", OTHER_JOB_UID)) == other_files
    assert {path.name for path in stored_path(folder, "run/stages").iterdir()} == {"verifying.json"}
    assert "step 1/4" not in pod.text


@pytest.mark.slow
def test_a_changed_model_of_another_job_fails_and_a_model_without_reference_values_is_not_verified(
    unverified_model: tuple[Path, str], model: Path, tmp_path: Path
) -> None:
    """The job that verifies the changed adapter also merges it, and the merged model fails the verification, too."""
    folder, uri = unverified_model
    shutil.copytree(stored_path(folder, "", OTHER_JOB_UID), stored_path(tmp_path, "", OTHER_JOB_UID))
    uri = uri.replace(str(folder), str(tmp_path))
    reference_file = next(stored_path(tmp_path, "run", OTHER_JOB_UID).glob("reference-values-*.json"))
    reference_file.rename(reference_file.with_name("kept"))
    with make_verifying_pod(tmp_path, model, repetition_spec(uri)) as pod:
        assert pod.end() == ExitCode.OK, pod.text[-6000:]
    verification = require_verification(pod)
    assert (verification.result, verification.artefacts[0].code) == (VerificationOutcome.NOT_VERIFIED, "NoReferenceValues")
    assert verification.artefacts[0].reason == f"the reference values file://{reference_file} are missing"

    reference_file.with_name("kept").rename(reference_file)
    verifying_uid = make_uid(2)
    pod = make_verifying_pod(tmp_path, model, repetition_spec(uri, output={"mergeAdapter": True}), uid=verifying_uid)
    pod.env = write_start_module(tmp_path / "changed", CHANGE_DOWNLOADED_ADAPTER)
    with pod:
        assert pod.end() == ExitCode.VERIFICATION_FAILED, pod.text[-6000:]
    verification, message = require_verification(pod), pod.termination_message()
    assert [(artefact.artefact, artefact.result, artefact.code) for artefact in verification.artefacts] == [
        ("adapter", VerificationOutcome.FAILED, "ValuesDiffer"), ("merged", VerificationOutcome.FAILED, "ValuesDiffer"),
    ]  # fmt: skip
    assert (message.code, message.stage) == ("ValuesDiffer", Stage.VERIFYING)
    record = json.loads(stored_path(tmp_path, "run/stages/verifying.json", verifying_uid).read_text())
    assert record["result"]["verification"]["result"] == "Failed"


def make_uid(number: int) -> str:
    return UID.replace("1", str(number))


CHANGE_DOWNLOADED_ADAPTER = """
import finetune_trainer.supervisor.prepare as prepare

download = prepare.download_existing_model

def download_and_change(existing, folder, **options):
    download(existing, folder, **options)
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file({name: value * 1.5 if "lora_B" in name else value for name, value in load_file(path).items()}, path)

prepare.download_existing_model = download_and_change
"""
"""A `sitecustomize` module that multiplies the B matrices of the downloaded adapter by 1.5."""
