"""`finetune validate`."""

from __future__ import annotations

import json

import pytest

from tests.unit.cli.conftest import JOB, RunCommand, WriteFile


def test_valid_manifest_is_ok(run_command: RunCommand, write_file: WriteFile) -> None:
    path = write_file("job.yaml", JOB)
    assert run_command("validate", path) == (0, f"{path}: bot: ok\n", "")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: bot", "name: Bot_1",
         "job.yaml:3: metadata.name: 'Bot_1' cannot be the name of a FineTuneJob; "
         "write at most 40 characters a-z, 0-9 and -, beginning with a letter, for example bot-1 [NameInvalid]"),
        ("v1alpha1", "v1",
         "job.yaml:1: apiVersion: finetune-operator.io/v1 is not finetune-operator.io/v1alpha1; write apiVersion: finetune-operator.io/v1alpha1 [ApiVersion]"),
        ("source: org/m", "sorce: org/m", "job.yaml:5: spec.model.sorce: unknown field; did you mean spec.model.source? [UnknownField]"),
        ("org/m}", "org/m}\n  training: {warmupSteps: 1, warmupRatio: 0.1}",
         "job.yaml:6: spec.training.warmupRatio: warmupSteps 1 and warmupRatio 0.1 exclude each other; remove warmupSteps or warmupRatio [WarmupTwice]"),
        ("org/m}", "org/m}\n  training: {learningRate: '2e-4'}", None),
        ("org/m}", "org/m}\n  training: {device: mps}",
         "job.yaml:6: spec.training.device: mps, but cluster nodes have no MPS devices; "
         "remove device, or use `finetune run --local` on an Apple machine [DeviceOfAnotherMachine]"),
    ],
)  # fmt: skip
def test_one_problem_is_reported_with_its_line(
    run_command: RunCommand, write_file: WriteFile, old: str, new: str, message: str | None
) -> None:
    path = write_file("job.yaml", JOB.replace(old, new))
    code, _, stderr = run_command("validate", path)
    errors = [line.removeprefix("error: ").replace(str(path.parent) + "/", "") for line in stderr.splitlines()]
    if message is None:
        assert code in (0, 1)
        return
    assert code == 1
    assert message in errors


def test_all_problems_of_several_documents_are_reported(run_command: RunCommand, write_file: WriteFile) -> None:
    two_manifests = JOB.replace("org/m", "./m") + "---\n" + JOB.replace("name: bot", "name: other").replace("train:", "trian:")
    code, out, stderr = run_command("validate", write_file("jobs.yaml", two_manifests))
    assert (code, out) == (1, "")
    assert "jobs.yaml:5: spec.model.source:" in stderr
    assert "jobs.yaml:13: spec.dataset.trian: unknown field; did you mean spec.dataset.train?" in stderr
    assert "the spec names no training data" not in stderr  # the misspelled field `trian` names the data


def test_duplicate_name_is_refused(run_command: RunCommand, write_file: WriteFile) -> None:
    assert "metadata.name: bot is used twice, first in" in run_command("validate", write_file("jobs.yaml", JOB + "---\n" + JOB))[2]


def test_local_accepts_files_and_devices_of_this_machine(run_command: RunCommand, write_file: WriteFile) -> None:
    path = write_file("job.yaml", JOB.replace("org/m", "file://tiny") + "  training: {device: mps}\n")
    assert run_command("validate", "--local", path)[0] == 0
    assert run_command("validate", path)[0] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "invalid YAML"),
        ("- a\n", "this is not a manifest, because it is not a mapping"),
        ("kind: Pod\n", "there is no FineTuneJob in the input"),
        ("a: 1\n", "kind: this required field is missing; write kind: FineTuneJob"),
        (JOB + "spec: {}\n", "the key occurs twice"),
        (JOB.partition("spec:")[0], "spec: the spec is missing; write `spec:` followed by its fields"),
    ],
)
def test_input_without_a_manifest_is_refused(run_command: RunCommand, write_file: WriteFile, text: str, message: str) -> None:
    code, _, stderr = run_command("validate", write_file("job.yaml", text))
    assert code == 1
    assert message in stderr


def test_strict_refuses_other_kinds(run_command: RunCommand, write_file: WriteFile) -> None:
    path = write_file("job.yaml", JOB + "---\nkind: Service\n")
    assert run_command("validate", path)[0] == 0
    assert "kind: Service is not a FineTuneJob" in run_command("validate", "--strict", path)[2]


MODEL_CONFIG = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 32000, "tie_word_embeddings": True, "dtype": "bfloat16",
}  # fmt: skip
GPU_JOB = JOB + "  resources: {gpusPerNode: 1}\n  training: {batchSizePerDevice: 8}\n"


@pytest.mark.parametrize(
    ("memory", "code", "message"),
    [
        ("8Gi", 0, ""),
        ("3Gi", 0, "3.13 GB are expected on each GPU and at most 3.35 GB are possible, but the GPU has 3.22 GB; write training.batchSizePerDevice: 4"),
        ("2Gi", 1, "at least 3.13 GB on each GPU, but no pool that it may use has so much GPU memory: the GPU (2.15 GB); write training.batchSizePer"),
    ],
)
def test_a_job_that_does_not_fit_is_refused(run_command: RunCommand, write_file: WriteFile, memory: str, code: int, message: str) -> None:
    model = write_file("model/config.json", json.dumps(MODEL_CONFIG)).parent
    job = write_file("job.yaml", GPU_JOB)
    exit_code, _, stderr = run_command("validate", "--gpu-memory", memory, "--model-config", model, job)
    assert (exit_code, message in stderr, stderr == "") == (code, True, not message), stderr
    assert run_command("validate", "--strict", "--gpu-memory", memory, "--model-config", model, job)[0] == (1 if message else 0)


def test_a_job_without_a_plan_gets_a_warning(run_command: RunCommand, write_file: WriteFile) -> None:
    job = write_file("job.yaml", GPU_JOB)
    code, _, stderr = run_command("validate", "--gpu", "l4-24gb", job)
    assert (code, "the memory of the job is not planned, because model.source org/m is no folder on this machine" in stderr) == (0, True)
    assert run_command("validate", "--gpu", "l4-24gb", write_file("cpu.yaml", JOB + "  resources: {gpusPerNode: 0}\n"))[2] == ""
    code, _, stderr = run_command("validate", "--model-config", "x", job)
    assert (code, stderr) == (1, "error: --model-config has no effect without the memory of a GPU: add --gpu NAME or --gpu-memory SIZE\n")
