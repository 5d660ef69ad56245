"""Pods whose stored model differs from the trained model, or that are stopped while they verify it. `test_stages.py` tests a model that is equal."""

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


def verifying_pod(folder: Path, model: Path, spec: dict[str, Any], *, attempt: int = 1, uid: str = UID) -> Pod:
    folder.mkdir(parents=True, exist_ok=True)
    rows = write_rows(folder / "rows.jsonl")
    base = {
        "model": {"source": f"file://{model}"}, "dataset": {"train": f"file://{rows}", "split": {"train": 28 / 36, "test": 8 / 36}},
        "training": {"maxSteps": 4, "batchSizePerDevice": 4, "gradientAccumulationSteps": 1, "learningRate": 1e-2},
        "checkpoint": {"steps": 4}, "tracking": {"loggingSteps": 1}, "output": {"verify": True},
    }  # fmt: skip
    target = StoreTarget(uri=f"file://{folder}/store/team/job/{uid}")
    run = run_config(merge(base, spec), target, attempt=attempt)
    directory = run.spec.output.dir
    run = run.model_copy(update={"publish": f"file://{folder}/store/{directory}"}) if directory else run
    return Pod(run.model_copy(update={"uid": uid}), folder / f"pod-{uid[0]}-{attempt}")


def verification_of(pod: Pod) -> Verification:
    output = pod.termination_message().output
    assert output is not None and output.verification is not None, pod.text[-6000:]
    return output.verification


def stored(folder: Path, key: str, uid: str = UID) -> Path:
    return folder / "store" / "team" / "job" / uid / key


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def with_module(folder: Path, text: str) -> dict[str, str]:
    """The environment of a pod whose processes first run `text`."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(text)
    return {"PYTHONPATH": f"{folder}{os.pathsep}{PYTHONPATH}"}


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
    spec = {"output": {"dir": "results", "layout": "flat"}}
    pod = verifying_pod(tmp_path, model, spec)
    pod.env = with_module(tmp_path / "sabotage", SABOTAGE)
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


EXHAUSTED_MEMORY = """
import sys

if "stage" in sys.argv:
    import finetune_trainer.stages.verify as verify

    def exhaust_memory(*arguments):
        raise MemoryError("no memory is left")

    verify.artefacts_of = exhaust_memory
"""
"""A `sitecustomize` module: the stage `verifying` needs more memory than the pod has."""
OTHER_JOB = "99999999-2222-3333-4444-555555555555"


@pytest.fixture(scope="module")
def unverified(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a job whose stage `verifying` failed because its memory was exhausted, and the address of its model."""
    folder = tmp_path_factory.mktemp("unverified")
    pod = verifying_pod(folder, model, {}, uid=OTHER_JOB)
    pod.env = with_module(folder / "exhausted", EXHAUSTED_MEMORY)
    with pod:
        assert pod.end() == ExitCode.OUT_OF_MEMORY, pod.text[-6000:]
        message = pod.termination_message()
    assert (message.stage, message.class_) == (Stage.VERIFYING, FailureClass.OUT_OF_MEMORY)
    assert message.output is not None and message.output.uri is not None and message.output.verification is None
    return folder, message.output.uri


def repeating(uri: str, **changes: Any) -> dict[str, Any]:
    """A job that repeats only the verification. It needs no data."""
    return merge({"phases": {"train": False, "from": uri}, "dataset": {"train": None, "split": None}}, changes)


@pytest.mark.slow
def test_a_job_without_training_repeats_the_verification_of_another_job(unverified: tuple[Path, str], model: Path) -> None:
    folder, uri = unverified
    other_files = files_of(stored(folder, "", OTHER_JOB))
    with verifying_pod(folder, model, repeating(uri)) as pod:
        assert pod.end() == ExitCode.OK, pod.text[-6000:]
    found, output = verification_of(pod), pod.termination_message().output
    assert output is not None and output.uri == uri
    assert (found.result, found.rows, [artefact.artefact for artefact in found.artefacts]) == (VerificationOutcome.VERIFIED, TEST_ROWS, ["adapter"])
    assert found.artefacts[0].tolerance == 1e-3 and (found.artefacts[0].difference or 0) <= 1e-4 < (found.artefacts[0].change_from_base or 0)
    assert files_of(stored(folder, "", OTHER_JOB)) == other_files
    assert {path.name for path in stored(folder, "run/stages").iterdir()} == {"verifying.json"}
    assert "step 1/4" not in pod.text


@pytest.mark.slow
def test_the_verification_of_a_changed_model_of_another_job_fails_and_without_recorded_values_it_says_so(
    unverified: tuple[Path, str], model: Path, tmp_path: Path
) -> None:
    """The merged model of this job is verified, too."""
    folder, uri = unverified
    shutil.copytree(stored(folder, "", OTHER_JOB), stored(tmp_path, "", OTHER_JOB))
    uri = uri.replace(str(folder), str(tmp_path))
    values = next(stored(tmp_path, "run", OTHER_JOB).glob("reference-values-*.json"))
    values.rename(values.with_name("kept"))
    with verifying_pod(tmp_path, model, repeating(uri)) as pod:
        assert pod.end() == ExitCode.OK, pod.text[-6000:]
    found = verification_of(pod)
    assert (found.result, found.artefacts[0].code) == (VerificationOutcome.NOT_VERIFIED, "NoReferenceValues")
    assert found.artefacts[0].reason == f"the reference values file://{values} are missing"

    values.with_name("kept").rename(values)
    changed = uid_of(2)
    pod = verifying_pod(tmp_path, model, repeating(uri, output={"mergeAdapter": True}), uid=changed)
    pod.env = with_module(tmp_path / "changed", CHANGED_AFTER_DOWNLOAD)
    with pod:
        assert pod.end() == ExitCode.VERIFICATION_FAILED, pod.text[-6000:]
    found, message = verification_of(pod), pod.termination_message()
    assert [(one.artefact, one.result, one.code) for one in found.artefacts] == [
        ("adapter", VerificationOutcome.FAILED, "ValuesDiffer"), ("merged", VerificationOutcome.FAILED, "ValuesDiffer"),
    ]  # fmt: skip
    assert (message.code, message.stage) == ("ValuesDiffer", Stage.VERIFYING)
    record = json.loads(stored(tmp_path, "run/stages/verifying.json", changed).read_text())
    assert record["result"]["verification"]["result"] == "Failed"


def uid_of(number: int) -> str:
    return UID.replace("1", str(number))


CHANGED_AFTER_DOWNLOAD = """
import finetune_trainer.supervisor.prepare as prepare

download = prepare.download_existing_model

def download_and_change(existing, folder, **options):
    download(existing, folder, **options)
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file({name: value * 1.5 if "lora_B" in name else value for name, value in load_file(path).items()}, path)

prepare.download_existing_model = download_and_change
"""
"""A `sitecustomize` module: the B matrices of the downloaded adapter are 1.5 times the stored ones."""
