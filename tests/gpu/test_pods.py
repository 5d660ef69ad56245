"""Whole pods on a GPU: every strategy trains, a killed run resumes exactly, and a lack of GPU memory is reported.

`make test-gpu` runs the tests one at a time, because the last test takes nearly all memory of the GPU.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from finetune_api.names import ExitCode
from finetune_api.pod import StoreTarget

from tests.support.gpu import GPU_COUNT, IS_REHEARSAL, require_gpu

sys.path.insert(0, str(Path(__file__).parents[1] / "pod"))

from pod_harness import UID, Pod, merge, run_config, write_rows  # noqa: E402 - the path comes first

pytestmark = pytest.mark.gpu
STEPS, CHECKPOINT_STEPS = 300, 30
STRATEGIES: dict[str, dict[str, Any]] = {
    "none": {},
    "fsdp": {"strategy": "fsdp"},
    "zero1": {"strategy": "deepspeed", "deepspeed": {"zeroStage": 1}},
    "zero2": {"strategy": "deepspeed", "deepspeed": {"zeroStage": 2}},
    "zero3": {"strategy": "deepspeed", "deepspeed": {"zeroStage": 3}},
}
EXPECTED_STRATEGIES = {"none": "single", "fsdp": "fsdp", "zero1": "deepspeed", "zero2": "deepspeed", "zero3": "deepspeed"}
"""For each strategy of the tests: the strategy that the pod reports."""
RESUMED_SPECS: dict[str, dict[str, Any]] = {
    "lora": {"method": {"type": "lora", "lora": {"dropout": 0.1}}},
    "full": {"method": {"type": "full"}},
    "qlora": {"method": {"type": "qlora"}},
    "packed": {"method": {"type": "lora"}, "dataset": {"packing": True, "maxSequenceLength": 128}},
    "fp16": {"method": {"type": "lora"}, "training": {"mixedPrecision": "fp16"}},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose sizes the kernels support. Without a CUDA device, the tests of this file are skipped."""
    require_gpu()
    from tests.support.tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("models") / "gpu", hidden=256)


def make_gpu_pod(folder: Path, model: Path, spec: dict[str, Any], *, attempt: int = 1, store: Path | None = None) -> Pod:
    """Create a pod with one GPU that stores its results below `store` (default: `folder`)."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = write_rows(folder / "rows.jsonl")
    base_spec = {
        "model": {"source": f"file://{model}"}, "dataset": {"train": f"file://{rows}"},
        "training": {"maxSteps": STEPS, "batchSizePerDevice": 2, "gradientAccumulationSteps": 2, "learningRate": 1e-3},
        "checkpoint": {"steps": CHECKPOINT_STEPS}, "tracking": {"loggingSteps": 5},
    }  # fmt: skip
    target = StoreTarget(uri=f"file://{store or folder}/store/team/job/{UID}")
    return Pod(run_config(merge(base_spec, spec), target, attempt=attempt, gpus=GPU_COUNT), folder / f"pod-{attempt}")


def read_final_weights(pod: Pod) -> dict[str, bytes]:
    """Return the content of each weight file of the pod's final model, by file name."""
    output = pod.termination_message().output
    assert output is not None and output.uri is not None
    return {path.name: path.read_bytes() for path in Path(output.uri.removeprefix("file://")).rglob("*.safetensors")}


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_trains_on_one_gpu(strategy: str, method: str, model: Path, tmp_path: Path) -> None:
    spec = {"method": {"type": method}, "distributed": STRATEGIES[strategy], "training": {"maxSteps": 4}}
    with make_gpu_pod(tmp_path, model, spec) as pod:
        assert pod.end() == ExitCode.OK, pod.text[-6000:]
        assert read_final_weights(pod)
        resolved_config = pod.termination_message().resolved
    assert resolved_config is not None and resolved_config.strategy == EXPECTED_STRATEGIES[strategy]
    assert (resolved_config.device == "cpu") is IS_REHEARSAL


@pytest.mark.parametrize("name", RESUMED_SPECS)
def test_a_killed_run_resumes_to_the_weights_of_an_uninterrupted_run(name: str, model: Path, tmp_path: Path) -> None:
    with make_gpu_pod(tmp_path / "whole", model, RESUMED_SPECS[name]) as uninterrupted_pod:
        assert uninterrupted_pod.end() == ExitCode.OK, uninterrupted_pod.text[-6000:]
    with make_gpu_pod(tmp_path / "killed", model, RESUMED_SPECS[name]) as killed_pod:
        killed_pod.wait_committed(CHECKPOINT_STEPS)
        killed_pod.kill()
    with make_gpu_pod(tmp_path / "again", model, RESUMED_SPECS[name], attempt=2, store=tmp_path / "killed") as resumed_pod:
        assert resumed_pod.end() == ExitCode.OK, resumed_pod.text[-6000:]
    assert resumed_pod.termination_message().resumed_from_step in range(CHECKPOINT_STEPS, STEPS)
    assert read_final_weights(resumed_pod) == read_final_weights(uninterrupted_pod)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_pod_evaluates_its_model_on_the_gpu(method: str, model: Path, tmp_path: Path) -> None:
    spec = {
        "method": {"type": method}, "training": {"maxSteps": 4}, "dataset": {"split": {"train": 0.75, "test": 0.25}}, "phases": {"infer": True},
        "evaluation": {"metrics": ["perplexity", "accuracy", "f1"], "comparison": {"generation": {"maxNewTokens": 8}}},
    }  # fmt: skip
    with make_gpu_pod(tmp_path, model, spec) as pod:
        assert pod.end() == ExitCode.OK, pod.text[-6000:]
        message = pod.termination_message()
    assert message.output is not None and message.output.evaluation is not None and message.evaluation is not None
    metric_values = {name: metric.value for name, metric in (message.evaluation.metrics or {}).items()}
    # The trainer has measured the same rows in its own process, but in batches of another size.
    assert metric_values["loss"] == pytest.approx(message.output.evaluation["testLoss"], rel=1e-2)
    assert metric_values["accuracy"] == pytest.approx(message.output.evaluation["testTokenAccuracy"], abs=0.02)
    assert len(list((tmp_path / "store").rglob("predictions.jsonl"))) == 1


@pytest.mark.parametrize("uses_advice", [False, True], ids=["halved", "advice of the memory plan"])
def test_a_batch_that_does_not_fit_is_reduced_until_it_fits(model: Path, tmp_path: Path, uses_advice: bool) -> None:
    """This process occupies the GPU's memory except for two GiB. Each attempt that runs out of memory is followed by one with a smaller batch."""
    import torch
    from finetune_operator.policies.adaptations import adapt_to_out_of_memory, apply_adaptations, get_original_values

    text = "The quick brown fox jumps over the lazy dog. " * 40
    rows = write_rows(tmp_path / "long.jsonl", [{"text": text} for _ in range(512)])
    spec = {
        "method": {"type": "full"}, "dataset": {"train": f"file://{rows}", "maxSequenceLength": 512},
        "training": {"maxSteps": 1, "batchSizePerDevice": 512, "gradientAccumulationSteps": 1, "gradientCheckpointing": "disabled"},
    }  # fmt: skip
    pod, exit_codes, batches = make_gpu_pod(tmp_path, model, spec), [], []
    free_bytes, _ = torch.cuda.mem_get_info()
    occupied_memory = torch.empty(max(0, free_bytes - 2 * 2**30), dtype=torch.uint8, device="cuda")
    while not exit_codes or exit_codes[-1] == ExitCode.OUT_OF_MEMORY:
        with pod:
            exit_codes.append(pod.end())
            message, training = pod.termination_message(), pod.run.spec.training
        batches.append((training.batch_size_per_device, training.gradient_accumulation_steps))
        if exit_codes[-1] == ExitCode.OUT_OF_MEMORY:
            assert (message.code, message.rank) == ("GpuOutOfMemory", 0)
            advice = message.plan.out_of_memory if message.plan is not None and uses_advice else None
            assert (advice is not None) == uses_advice
            adaptation = adapt_to_out_of_memory(pod.run.spec, datetime.now(UTC), advice)
            adapted_spec = apply_adaptations(pod.run.spec, [adaptation])
            attempt = pod.run.attempt + 1
            changes = {"spec": adapted_spec, "attempt": attempt, "before_adaptation": get_original_values(pod.run.spec, [adaptation])}
            pod = Pod(pod.run.model_copy(update=changes), tmp_path / f"pod-{attempt}")
    del occupied_memory
    torch.cuda.empty_cache()
    assert exit_codes[-1] == ExitCode.OK, pod.text[-6000:]
    assert len(exit_codes) > 1, "the first batch already fits into the memory"
    assert len(exit_codes) == 2 if uses_advice else batches == [(512 >> step, 1 << step) for step in range(len(exit_codes))]
    assert all(rows * steps == 512 for rows, steps in batches)
