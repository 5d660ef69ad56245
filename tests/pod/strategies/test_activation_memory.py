"""Activations are kept instead of recomputed only if all of them certainly fit, and if a run that fails could be repeated with less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_trainer.activation_memory import estimate_memory, keeps_all_activations
from finetune_trainer.hardware import Hardware
from transformers import LlamaConfig, MixtralConfig

from tests.support.learning import make_run, merge_mappings

ONE_B = LlamaConfig(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
    tie_word_embeddings=True,
)  # fmt: skip
EIGHT_B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256
)
H100, H200 = 84_000_000_000, 149_000_000_000
GPU_SPEC: dict[str, Any] = {
    "resources": {"gpusPerNode": 1, "processesPerNode": 1}, "dataset": {"packing": True, "maxSequenceLength": 4096},
    "training": {"batchSizePerDevice": 2},
}  # fmt: skip


def bf16_gpu(dtype: torch.dtype = torch.bfloat16) -> Hardware:
    return Hardware(torch.device("cuda", 0), "NVIDIA H200", dtype, True, False, "varlen")


def note_for(folder: Path, spec: dict[str, Any], config: Any = EIGHT_B, *, gpu_bytes: int = H200, **changes: Any) -> str | None:
    run, _ = make_run(folder, Path("/models/tiny"), merge_mappings(GPU_SPEC, spec))
    hardware = changes.pop("hardware", bf16_gpu())
    strategy = changes.pop("strategy", "single")
    run = run.model_copy(update=changes)
    return keeps_all_activations(run, hardware, strategy, config, batch_tokens=2 * 4096, gpu_bytes=gpu_bytes)


@pytest.mark.parametrize(
    ("config", "spec", "dtype", "measured_gb"),
    [
        (ONE_B, {"method": {"lora": {"dropout": 0}}}, torch.bfloat16, 18.62),
        (ONE_B, {"method": {"lora": {"dropout": 0.05}}}, torch.bfloat16, 18.2),
        (EIGHT_B, {"method": {"lora": {"dropout": 0}}}, torch.bfloat16, 62.87),
        (ONE_B, {"method": {"type": "full"}}, torch.float32, 31.29),
        (ONE_B, {"method": {"type": "full"}, "model": {"dtype": "bfloat16"}}, torch.bfloat16, 23.81),
    ],
)
def test_the_estimate_is_above_the_peak_that_was_measured_on_a_gpu(
    config: Any, spec: dict[str, Any], dtype: torch.dtype, measured_gb: float, tmp_path: Path
) -> None:
    """Peaks of benchmarks/gpu_throughput.py with two packed sequences of 4096 tokens on an H200."""
    run, _ = make_run(tmp_path, Path("/models/tiny"), merge_mappings(GPU_SPEC, spec))
    estimate = estimate_memory(run, bf16_gpu(dtype), config, 2 * 4096)
    assert estimate is not None
    assert measured_gb < estimate.total_bytes / 1e9 < 1.6 * measured_gb


def test_a_run_that_fits_keeps_its_activations_and_says_so(tmp_path: Path) -> None:
    note = note_for(tmp_path, {})
    assert note is not None and note.startswith("activations are not recomputed, because the run needs at most ")
    assert " of 149 GB of GPU memory" in note


@pytest.mark.parametrize(
    ("spec", "changes"),
    [
        pytest.param({}, {"gpu_bytes": H100}, id="memory too small"),
        pytest.param({"training": {"gradientCheckpointing": "enabled"}}, {}, id="recomputing requested"),
        pytest.param({"training": {"gradientCheckpointing": "disabled"}}, {}, id="already disabled"),
        pytest.param({"training": {"gradientCheckpointing": "unsloth"}}, {}, id="activations in host memory"),
        pytest.param({"training": {"batchSizePerDevice": 1}}, {}, id="micro-batch cannot be reduced"),
        pytest.param({}, {"before_adaptation": {"training.batchSizePerDevice": 4}}, id="memory ran out before"),
        pytest.param({}, {"strategy": "fsdp"}, id="sharded"),
        pytest.param({"trainer": {"type": "dpo"}, "dataset": {"packing": False}}, {}, id="other objective"),
        pytest.param({"method": {"lora": {"modulesToSave": ["lm_head"]}}}, {}, id="head trained in full"),
        pytest.param({"trainer": {"backend": "unsloth"}}, {}, id="backend that saves memory"),
        pytest.param({}, {"config": MixtralConfig()}, id="experts"),
        pytest.param({}, {"hardware": Hardware(torch.device("cpu"), "cpu", torch.float32, False, False, "sdpa")}, id="cpu"),
    ],
)
def test_activations_are_recomputed_otherwise(spec: dict[str, Any], changes: dict[str, Any], tmp_path: Path) -> None:
    assert note_for(tmp_path, spec, **changes) is None
