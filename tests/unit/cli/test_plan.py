"""`finetune plan`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from finetune_api.status import TimePlan

from tests.unit.cli.conftest import JOB, RunCommand, WriteFile

MODEL_CONFIG = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "tie_word_embeddings": True, "dtype": "bfloat16",
}  # fmt: skip
GPU_JOB = JOB + "  resources: {gpusPerNode: 1}\n  training: {batchSizePerDevice: 4}\n"


@pytest.fixture
def job(write_file: WriteFile) -> Path:
    return write_file("job.yaml", GPU_JOB)


@pytest.fixture
def model(write_file: WriteFile) -> Path:
    return write_file("model/config.json", json.dumps(MODEL_CONFIG)).parent


def test_the_table_shows_parts_and_bounds(run_command: RunCommand, job: Path, model: Path) -> None:
    code, stdout, stderr = run_command("plan", "-f", job, "--model-config", model, "--gpu", "l4-24gb")
    lines = stdout.splitlines()
    assert code == 0
    assert lines[0] == "bot: llama with 1.24 billion parameters, 1 rank, micro-batches of 4 x 2048 tokens"
    assert [line.split("  ")[0] for line in lines[3:-4]] == [
        "weights", "gradients", "optimizer", "activations", "logits", "buffers", "context", "fragmentation", "expected peak", "upper bound",
        "memory of l4-24gb", "fits", "recomputed layers",
    ]  # fmt: skip
    last_cells = {line[: line.index("  ")]: line.split("  ")[-1].strip() for line in lines[3:-4]}
    assert last_cells["weights"] == "2.52 GB"
    assert (last_cells["expected peak"], last_cells["fits"], last_cells["recomputed layers"]) == ("14.1 GB", "yes", "0 of 16")
    assert stderr == "note: each row of the largest micro-batch has 2048 tokens (dataset.maxSequenceLength); shorter rows need less\n"


def test_methods_are_compared(run_command: RunCommand, job: Path, model: Path) -> None:
    code, stdout, _ = run_command("plan", "-f", job, "--model-config", model, "--compare", "lora,qlora,full", "-o", "json", "--longest-row", 512)
    plans = json.loads(stdout)["plans"]
    assert (code, [plan["method"] for plan in plans]) == (0, ["lora", "qlora", "full"])
    expected_bytes = [plan["memory"]["expectedBytes"] for plan in plans]
    assert expected_bytes[1] < expected_bytes[0] < expected_bytes[2]
    assert all(plan["assumptions"] == [] for plan in plans)
    assert all(sum(plan["memory"]["parts"].values()) == plan["memory"]["expectedBytes"] for plan in plans)


def test_a_job_that_does_not_fit_gets_proposals(run_command: RunCommand, write_file: WriteFile, model: Path) -> None:
    job = write_file("job.yaml", GPU_JOB.replace("batchSizePerDevice: 4", "batchSizePerDevice: 64"))
    code, stdout, _ = run_command("plan", "-f", job, "--model-config", model, "--gpu-memory", "6Gi", "--fit")
    proposals = stdout.split("changes that make the job fit:\n")[1].splitlines()
    assert code == 1
    assert proposals[0].startswith("  training.batchSizePerDevice: ")
    assert len(proposals) == 3


def test_a_job_that_fits_gets_the_largest_batch(run_command: RunCommand, job: Path, model: Path) -> None:
    code, stdout, _ = run_command("plan", "-f", job, "--model-config", model, "--gpu", "l4-24gb", "--fit")
    assert (code, stdout.splitlines()[-1].startswith("largest micro-batch that fits: training.batchSizePerDevice: ")) == (0, True)


def test_an_index_that_contradicts_the_plan_is_named(run_command: RunCommand, job: Path, model: Path, write_file: WriteFile) -> None:
    write_file("model/model.safetensors.index.json", '{"metadata": {"total_size": 2471628800}}')
    assert "weight files" not in run_command("plan", "-f", job, "--model-config", model)[2]
    write_file("model/model.safetensors.index.json", '{"metadata": {"total_size": 3000000000}}')
    assert "note: the weight files have 3.00 GB, but the plan assumes 2.47 GB" in run_command("plan", "-f", job, "--model-config", model)[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "model.source is org/m, which is no folder on this machine: add --model-config FOLDER with the config.json of this model"),
        (("--gpu", "h100"), "--gpu h100: this type is not known; write one of t4-16gb"),
        (("--gpu", "l4-24gb", "--gpu-memory", "24Gi"), "--gpu and --gpu-memory exclude each other: remove one of the two"),
        (("--gpu-memory", "24"), "--gpu-memory: 24 means 24 bytes; write 24Gi"),
        (("--fit",), "--fit needs the memory of a GPU: add --gpu NAME or --gpu-memory SIZE"),
        (("-o", "wide"), "-o wide: unknown output format; write one of json, yaml"),
        (("--compare", "lora,galore", "--model-config", "."), "--compare lora,galore: write one or more of lora, qlora, dora, ia3"),
        (("--model-config", "/nonexistent"), "/nonexistent has no config.json; give the folder that holds the config.json of the base model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_refusals_say_what_to_write(
    run_command: RunCommand, job: Path, model: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(model)
    code, stdout, stderr = run_command("plan", "-f", job, *words)
    assert (code, stdout, message in stderr) == (1, "", True), stderr


def test_a_manifest_with_errors_is_refused(run_command: RunCommand, write_file: WriteFile, model: Path) -> None:
    job = write_file("job.yaml", GPU_JOB.replace("batchSizePerDevice: 4", "batchSizePerDevice: 0"))
    code, _, stderr = run_command("plan", "-f", job, "--model-config", model)
    assert (code, "spec.training.batchSizePerDevice" in stderr) == (1, True)


def test_time_and_cost_are_planned(run_command: RunCommand, job: Path, model: Path) -> None:
    options = ("--gpu", "h100-80gb", "--rows", 50_000, "--mean-row", 300, "--price", 2.5)
    code, stdout, stderr = run_command("plan", "-f", job, "--model-config", model, *options)
    last_cells = {line[: line.index("  ")]: line.split("   ")[-1].strip() for line in stdout.split("\n\n")[1].splitlines()[1:]}
    assert code == 0
    assert (last_cells["expected time"], last_cells["time, bounds"]) == ("0h13m", "0h08m - 0h36m")
    assert (last_cells["expected cost"], last_cells["cost, bounds"]) == ("0.52", "0.32 - 1.48")
    assert "its bounds are not calibrated for this GPU" in stderr

    code, stdout, _ = run_command("plan", "-f", job, "--model-config", model, *options, "--compare", "lora,full", "-o", "json")
    lora_plan, full_plan = json.loads(stdout)["plans"]
    assert (code, lora_plan["time"]["calibrated"], lora_plan["cost"]["expected"]) == (0, False, 0.52)
    assert lora_plan["time"]["expectedSeconds"] < full_plan["time"]["expectedSeconds"]


def test_calibrated_bounds_are_not_called_uncalibrated(run_command: RunCommand, job: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrated = (TimePlan(expected_seconds=60, lower_seconds=50, upper_seconds=70, calibrated=True, calibration_runs=5), None)
    monkeypatch.setattr("finetune_cli.commands.plan._plan_times", lambda shape, plans, *_: dict.fromkeys(plans, calibrated))
    _, _, stderr = run_command("plan", "-f", job, "--model-config", model, "--gpu", "h100-80gb", "--rows", 500, "--mean-row", 300)
    assert "its bounds are calibrated with 5 runs on this type of GPU" in stderr and "not calibrated" not in stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rows", 5), "the planned time needs both --rows and --mean-row: write both, or neither"),
        (("--rows", 5, "--mean-row", 5), "--rows and --mean-row need the type of the GPUs: add --gpu NAME"),
        (("--price", 5), "--price needs the planned time: add --gpu, --rows and --mean-row"),
    ],
)
def test_options_of_the_time_depend_on_each_other(
    run_command: RunCommand, job: Path, model: Path, options: tuple[object, ...], message: str
) -> None:
    code, _, stderr = run_command("plan", "-f", job, "--model-config", model, *options)
    assert code != 0 and message in stderr


def test_a_job_with_an_objective_without_a_plan_is_refused(run_command: RunCommand, write_file: WriteFile, model: Path) -> None:
    job = write_file("job.yaml", GPU_JOB + "  trainer: {type: grpo, rewards: [{builtin: regex, parameters: {pattern: a}}]}\n")
    code, _, stderr = run_command("plan", "-f", job, "--model-config", model, "--gpu", "l4-24gb", "--rows", 50, "--mean-row", 5)
    assert code == 1 and "trainer.type is grpo" in stderr, stderr


def test_a_pair_has_the_memory_and_time_of_two_sequences(run_command: RunCommand, write_file: WriteFile, model: Path) -> None:
    options = ("--model-config", model, "--gpu", "h100-80gb", "--rows", 50_000, "--mean-row", 300)
    sft_job, orpo_job = (write_file(f"{name}.yaml", GPU_JOB + f"  trainer: {{type: {name}}}\n") for name in ("sft", "orpo"))
    code, stdout, stderr = run_command("plan", "-f", orpo_job, *options)
    assert (code, stdout.splitlines()[0].split(", ")[-1]) == (0, "micro-batches of 4 pairs (8 sequences) x 2048 tokens"), stderr
    assert "in the largest micro-batch, a prompt and one of its answers together have 2048 tokens" in stderr
    seconds = [json.loads(run_command("plan", "-f", job, *options, "-o", "json")[1])["plans"][0]["time"]["expectedSeconds"] for job in (sft_job, orpo_job)]
    assert 1.8 < seconds[1] / seconds[0] < 2


OPEN_JOB = JOB + "  resources: {gpusPerNode: 1}\n  training: {effectiveBatchSize: 24}\n"


def test_the_choices_of_the_plan_are_shown_with_their_reasons(run_command: RunCommand, write_file: WriteFile, model: Path) -> None:
    job = write_file("open.yaml", OPEN_JOB)
    code, stdout, _ = run_command("plan", "-f", job, "--model-config", model, "--gpu", "l4-24gb")
    needed_memory = "at most 20.6 GB of 24.2 GB on each GPU"
    assert (code, stdout.splitlines()[0].split(", ")[-1]) == (0, "micro-batches of 6 x 2048 tokens")
    assert stdout.split("values that the plan chooses:\n")[1].splitlines() == [
        f"  training.batchSizePerDevice: 6  # the micro-batch that fits with the least expected time: {needed_memory}",
        "  training.gradientAccumulationSteps: 4  # keeps the effective batch of 24 rows",
        f"  training.gradientCheckpointing: disabled  # the activations fit: {needed_memory}",
    ]
    plan = json.loads(run_command("plan", "-f", job, "--model-config", model, "--gpu", "l4-24gb", "-o", "json")[1])["plans"][0]
    assert [choice["value"] for choice in plan["choices"]] == [6, 4, "disabled"]


def test_the_number_of_gpus_is_chosen_if_the_node_has_several(run_command: RunCommand, write_file: WriteFile, model: Path) -> None:
    job = write_file("full.yaml", JOB.replace("dataset:", "method: {type: full}\n  dataset:"))
    code, stdout, _ = run_command("plan", "-f", job, "--model-config", model, "--gpu-memory", "16Gi", "--gpus-per-node", 8)
    lines = stdout.split("values that the plan chooses:\n")[1].splitlines()
    assert (code, [line.split("  #")[0] for line in lines[:2]]) == (0, ["  resources.gpusPerNode: 2", "  distributed.strategy: fsdp"])
    code, stdout, stderr = run_command("plan", "-f", job, "--model-config", model, "--gpu-memory", "16Gi")
    assert (code, "values that the plan chooses" in stdout) == (1, False)
    assert stderr.splitlines()[-1].startswith("error: the job is expected to need at least ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rows", 0, "--mean-row", 5), "--rows 0: write a number of at least 1"),
        (("--rows", 5, "--mean-row", 0), "--mean-row 0: write a number of at least 1"),
        (("--longest-row", -1), "--longest-row -1: write a number of at least 1"),
        (("--price", -1), "--price -1: write a number of at least 0"),
        (("--gpus-per-node", 0), "--gpus-per-node 0: write a number of at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused(run_command: RunCommand, job: Path, model: Path, words: tuple[object, ...], message: str) -> None:
    code, stdout, stderr = run_command("plan", "-f", job, "--model-config", model, "--gpu", "l4-24gb", *words)
    assert (code, stdout, stderr) == (1, "", f"error: {message}\n"), stderr
