"""Pods on a GPU verify their stored model: in 16 bits, it differs from the trained model no more than the trainer's own batch layouts differ."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from finetune_api.names import ExitCode
from finetune_api.pod import StoreTarget
from finetune_api.status import VerificationOutcome

from tests.support.gpu import GPU_COUNT, require_gpu

sys.path.insert(0, str(Path(__file__).parents[1] / "pod"))

from pod_harness import UID, Pod, merge, run_config, write_rows  # noqa: E402 - the path comes first

pytestmark = pytest.mark.gpu
LORA_SPEC: dict[str, Any] = {"method": {"type": "lora", "lora": {"dropout": 0}}}
FULL_SPEC: dict[str, Any] = {"method": {"type": "full"}}
ZERO3_SPEC: dict[str, Any] = {"distributed": {"strategy": "deepspeed", "deepspeed": {"zeroStage": 3}}}
FSDP_SPEC: dict[str, Any] = {"distributed": {"strategy": "fsdp"}}
RUNS: dict[str, dict[str, Any]] = {
    "lora": LORA_SPEC,
    "full": FULL_SPEC,
    "qlora": {"method": {"type": "qlora"}},
    "dora": {"method": {"type": "dora"}},
    "8 bits": {**LORA_SPEC, "model": {"quantization": {"bits": 8}}},
    "fp16": {**LORA_SPEC, "training": {"mixedPrecision": "fp16"}},
    "fp32": {**LORA_SPEC, "training": {"mixedPrecision": "no"}},
    "spectrum": {"method": {"type": "spectrum"}},
    "eager": {**LORA_SPEC, "model": {"attention": "eager"}},
    "liger": {**FULL_SPEC, "model": {"ligerKernels": True}},
    "fsdp lora": {**LORA_SPEC, **FSDP_SPEC},
    "fsdp full": {**FULL_SPEC, **FSDP_SPEC},
    "zero3 lora": {**LORA_SPEC, **ZERO3_SPEC},
    "zero3 full": {**FULL_SPEC, **ZERO3_SPEC},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 100 million parameters, because rounding differences grow with depth and width."""
    require_gpu()
    from tests.support.tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("models") / "gpu", hidden=1024, layers=12)


@pytest.mark.parametrize("name", RUNS)
def test_a_pod_verifies_its_model_on_the_gpu(name: str, model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    base_spec = {
        "model": {"source": f"file://{model}"}, "dataset": {"train": f"file://{rows}", "split": {"train": 0.75, "test": 0.25}},
        "training": {"maxSteps": 20, "batchSizePerDevice": 4, "gradientAccumulationSteps": 1, "learningRate": 1e-4 if "full" in name else 1e-3},
        "checkpoint": {"steps": 20}, "tracking": {"loggingSteps": 10}, "output": {"verify": True},
    }  # fmt: skip
    target = StoreTarget(uri=f"file://{tmp_path}/store/team/job/{UID}")
    with Pod(run_config(merge(base_spec, RUNS[name]), target, gpus=GPU_COUNT), tmp_path / "pod") as pod:
        assert pod.end() == ExitCode.OK, pod.text[-6000:]
        output = pod.termination_message().output
    assert output is not None and output.verification is not None
    (artefact,) = output.verification.artefacts
    print(f"{name}: {artefact.model_dump_json(exclude_none=True)}")
    assert artefact.result is VerificationOutcome.VERIFIED, artefact
    assert artefact.difference is not None and artefact.tolerance is not None and artefact.change_from_base is not None
    assert artefact.difference <= artefact.tolerance < artefact.change_from_base
