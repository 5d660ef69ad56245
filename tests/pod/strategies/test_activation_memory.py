"""When a run keeps its activations instead of recomputing them.

A run keeps them only if they fit into GPU memory according to a cautious estimate, and if a retry after a lack of memory could use less memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_trainer.activation_memory import (
    ESTIMATED_MODEL_TYPES,
    USABLE_GPU_MEMORY_SHARE,
    ActivationChoice,
    choose_kept_activations,
    estimate_memory,
)
from finetune_trainer.hardware import Hardware
from finetune_trainer.recomputation import count_kept_layers
from transformers import FalconH1Config, LlamaConfig, MixtralConfig, Qwen3Config

from tests.support.learning import make_run, merge_mappings

MODEL_1B = LlamaConfig(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
    tie_word_embeddings=True,
)  # fmt: skip
MODEL_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256
)
H100_BYTES, H200_BYTES = 84_000_000_000, 149_000_000_000
GPU_SPEC: dict[str, Any] = {
    "resources": {"gpusPerNode": 1, "processesPerNode": 1}, "dataset": {"packing": True, "maxSequenceLength": 4096},
    "training": {"batchSizePerDevice": 2},
}  # fmt: skip


def make_gpu(dtype: torch.dtype = torch.bfloat16) -> Hardware:
    return Hardware(torch.device("cuda", 0), "NVIDIA H200", dtype, True, False, "varlen")


def choose_activations(
    folder: Path, spec: dict[str, Any], config: Any = MODEL_8B, *, gpu_bytes: int = H200_BYTES, batch_tokens: int = 2 * 4096, **changes: Any
) -> ActivationChoice | None:
    """Return which activations the trainer keeps in a run on a GPU. None means that all activations are recomputed."""
    run, _ = make_run(folder, Path("/models/tiny"), merge_mappings(GPU_SPEC, spec))
    hardware = changes.pop("hardware", make_gpu())
    strategy = changes.pop("strategy", "single")
    run = run.model_copy(update=changes)
    return choose_kept_activations(run, hardware, strategy, config, batch_tokens=batch_tokens, gpu_bytes=gpu_bytes, uses_liger=True)


@pytest.mark.parametrize(
    ("config", "spec", "dtype", "measured_gb"),
    [
        (MODEL_1B, {}, torch.bfloat16, 13.08),
        (MODEL_8B, {}, torch.bfloat16, 53.86),
        (MODEL_8B, {"method": {"type": "qlora"}}, torch.bfloat16, 43.5),
        (MODEL_1B, {"method": {"type": "full"}}, torch.float32, 31.29),
        (MODEL_1B, {"method": {"type": "full"}, "model": {"dtype": "bfloat16"}}, torch.bfloat16, 19.45),
    ],
)
def test_the_estimate_is_above_the_peak_that_was_measured_on_a_gpu(
    config: Any, spec: dict[str, Any], dtype: torch.dtype, measured_gb: float, tmp_path: Path
) -> None:
    """`measured_gb` is a peak in benchmarks/results/gpu_cells*.json: two packed sequences of 4096 tokens with Liger's kernels on an H200."""
    merged_spec = merge_mappings(merge_mappings(GPU_SPEC, {"training": {"gradientAccumulationSteps": 1}}), spec)
    run, _ = make_run(tmp_path, Path("/models/tiny"), merged_spec)
    estimate = estimate_memory(run, make_gpu(dtype), "single", config, 2 * 4096, uses_liger=True)
    assert measured_gb < estimate.total_bytes / 1e9 < 1.51 * measured_gb


@pytest.mark.parametrize(
    ("spec", "changes"),
    [
        pytest.param({}, {}, id="lora"),
        pytest.param({}, {"strategy": "ddp"}, id="ddp"),
        pytest.param({"dataset": {"packing": False}}, {}, id="unpacked"),
        pytest.param({"method": {"type": "qlora"}}, {}, id="qlora"),
        pytest.param({"method": {"type": "full"}}, {"config": MODEL_1B, "hardware": make_gpu(torch.float32)}, id="full"),
        pytest.param({}, {"config": Qwen3Config()}, id="qwen3"),
    ],
)
def test_a_run_that_fits_keeps_its_activations_and_adds_a_note(spec: dict[str, Any], changes: dict[str, Any], tmp_path: Path) -> None:
    choice = choose_activations(tmp_path, spec, **changes)
    assert choice is not None and choice.kept_layer_tokens is None
    assert choice.note.startswith("activations are not recomputed, because the run needs an estimated ")
    assert " of 149 GB of GPU memory" in choice.note


UNPACKED: dict[str, Any] = {"dataset": {"packing": False, "maxSequenceLength": 2048}, "training": {"batchSizePerDevice": 16}}
TOKENS_OF_LONGEST_ROWS = 16 * 2048


@pytest.mark.parametrize("strategy", ["single", "ddp"])
@pytest.mark.parametrize(
    ("config", "gpu_bytes"), [(MODEL_8B, H200_BYTES), (MODEL_8B, H100_BYTES), (MODEL_1B, 24_000_000_000)], ids=["8b-h200", "8b-h100", "1b-24gb"]
)
def test_as_many_activations_are_kept_as_fit(config: Any, gpu_bytes: int, strategy: str, tmp_path: Path) -> None:
    choice = choose_activations(tmp_path, UNPACKED, config, gpu_bytes=gpu_bytes, strategy=strategy, batch_tokens=TOKENS_OF_LONGEST_ROWS)
    assert choice is not None and choice.kept_layer_tokens is not None
    run, _ = make_run(tmp_path, Path("/models/tiny"), merge_mappings(GPU_SPEC, UNPACKED))
    layers = config.num_hidden_layers
    limit = choice.kept_layer_tokens // layers
    bytes_at_limit, bytes_above_limit = (
        estimate_memory(run, make_gpu(), strategy, config, tokens, uses_liger=True).total_bytes for tokens in (limit, limit + 1)
    )
    assert bytes_at_limit <= USABLE_GPU_MEMORY_SHARE * gpu_bytes < bytes_above_limit
    recomputed_count = layers - count_kept_layers(layers, TOKENS_OF_LONGEST_ROWS, choice.kept_layer_tokens)
    assert choice.note.startswith(f"{recomputed_count} of {layers} layers recompute their activations in the largest micro-batch (no layer does in ")
    assert f" in micro-batches of up to {limit} tokens), because " in choice.note
    # The token limit does not depend on the lengths of the rows.
    choice_of_longer_rows = choose_activations(tmp_path, UNPACKED, config, gpu_bytes=gpu_bytes, strategy=strategy, batch_tokens=2 * TOKENS_OF_LONGEST_ROWS)
    assert choice_of_longer_rows is not None and choice_of_longer_rows.kept_layer_tokens == choice.kept_layer_tokens


def test_sixteen_conversations_of_500_tokens_keep_their_activations_on_an_h200(tmp_path: Path) -> None:
    """The micro-batches have the size of the chat data in benchmarks/gpu_throughput.py."""
    choice = choose_activations(tmp_path, UNPACKED, MODEL_8B, gpu_bytes=H200_BYTES, batch_tokens=TOKENS_OF_LONGEST_ROWS)
    assert choice is not None and choice.kept_layer_tokens is not None
    assert 16 * 500 < choice.kept_layer_tokens // 32 < TOKENS_OF_LONGEST_ROWS


@pytest.mark.parametrize(("rows", "kept_count"), [(3, 22), (4, 16), (8, 7)])
def test_some_layers_keep_the_activations_of_packed_micro_batches_that_do_not_fit(rows: int, kept_count: int, tmp_path: Path) -> None:
    """The run trains an 8B model with LoRA on one H100. Its data are packed."""
    choice = choose_activations(tmp_path, {"training": {"batchSizePerDevice": rows}}, gpu_bytes=H100_BYTES, batch_tokens=rows * 4096)
    assert choice is not None and choice.kept_layer_tokens is not None
    assert count_kept_layers(32, rows * 4096, choice.kept_layer_tokens) == kept_count
    assert choice.note.startswith(f"{32 - kept_count} of 32 layers recompute their activations, because ")


def test_packed_micro_batches_that_leave_no_memory_for_two_layers_are_recomputed(tmp_path: Path) -> None:
    assert choose_activations(tmp_path, {}, gpu_bytes=H100_BYTES, batch_tokens=60 * 4096) is None


@pytest.mark.parametrize(("accumulation", "strategy", "kept_count"), [(1, "single", 9), (2, "single", None), (1, "ddp", None)])
def test_full_training_without_accumulation_has_no_gradients_during_the_forward_pass(
    accumulation: int, strategy: str, kept_count: int | None, tmp_path: Path
) -> None:
    """The run trains an 8B model with 32-bit weights on an H200."""
    spec = {"method": {"type": "full"}, "training": {"gradientAccumulationSteps": accumulation}}
    choice = choose_activations(tmp_path, spec, gpu_bytes=150_100_000_000, hardware=make_gpu(torch.float32), strategy=strategy)
    assert (None if choice is None else count_kept_layers(32, 2 * 4096, choice.kept_layer_tokens or 0)) == kept_count


def test_no_activations_are_kept_if_the_weights_do_not_fit(tmp_path: Path) -> None:
    assert choose_activations(tmp_path, UNPACKED, MODEL_8B, gpu_bytes=16_000_000_000, batch_tokens=TOKENS_OF_LONGEST_ROWS) is None


@pytest.mark.parametrize("model_type", sorted(ESTIMATED_MODEL_TYPES))
def test_the_layers_of_estimated_models_read_the_flag_in_each_forward_pass(model_type: str) -> None:
    """The layers must read the flag `gradient_checkpointing` in each forward pass: `RecomputationPerBatch` changes it between two micro-batches."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_layers import GradientCheckpointingLayer

    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 32, "pad_token_id": 0}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **heads, **sizes))
    assert sum(isinstance(module, GradientCheckpointingLayer) for module in model.modules()) == 2


def test_ddp_needs_memory_for_a_second_copy_of_the_gradients(tmp_path: Path) -> None:
    spec = {"method": {"type": "full"}, "training": {"gradientAccumulationSteps": 2}}
    run, _ = make_run(tmp_path, Path("/models/tiny"), merge_mappings(GPU_SPEC, spec))
    single_estimate, ddp_estimate = (estimate_memory(run, make_gpu(torch.float32), name, MODEL_1B, 4096, uses_liger=True) for name in ("single", "ddp"))
    assert ddp_estimate.state_bytes - single_estimate.state_bytes == 4 * (single_estimate.state_bytes // 18)
    assert ddp_estimate.activation_bytes == single_estimate.activation_bytes


@pytest.mark.parametrize(
    ("spec", "changes"),
    [
        pytest.param({}, {"gpu_bytes": 16_000_000_000}, id="memory too small"),
        pytest.param({"training": {"gradientCheckpointing": "enabled"}}, {}, id="recomputing requested"),
        pytest.param({"training": {"gradientCheckpointing": "disabled"}}, {}, id="already disabled"),
        pytest.param({"training": {"gradientCheckpointing": "unsloth"}}, {}, id="activations in host memory"),
        pytest.param({"training": {"batchSizePerDevice": 1}}, {}, id="micro-batch cannot be reduced"),
        pytest.param({}, {"before_adaptation": {"training.batchSizePerDevice": 4}}, id="memory ran out before"),
        pytest.param({}, {"strategy": "fsdp"}, id="sharded"),
        pytest.param({"training": {"checkpointEveryNLayers": 2}}, {}, id="every second layer requested"),
        pytest.param({"policy": {"onOutOfMemory": "Fail"}}, {}, id="no attempt after memory ran out"),
        pytest.param({"trainer": {"type": "dpo"}, "dataset": {"packing": False}}, {}, id="other objective"),
        pytest.param({"method": {"type": "dora"}}, {}, id="dora"),
        pytest.param({"method": {"lora": {"useDora": True}}}, {}, id="lora with dora"),
        pytest.param({"method": {"type": "ia3"}}, {}, id="ia3"),
        pytest.param({"model": {"newTokens": ["<new>"]}}, {}, id="new tokens"),
        pytest.param({}, {"hardware": Hardware(torch.device("cuda", 0), "NVIDIA H200", torch.bfloat16, True, False, "eager")}, id="eager"),
        pytest.param({}, {"config": FalconH1Config()}, id="state-space layers"),
        pytest.param({"method": {"lora": {"modulesToSave": ["lm_head"]}}}, {}, id="head trained in full"),
        pytest.param({"trainer": {"backend": "unsloth"}}, {}, id="backend that saves memory"),
        pytest.param({}, {"config": MixtralConfig()}, id="experts"),
        pytest.param({}, {"hardware": Hardware(torch.device("cpu"), "cpu", torch.float32, False, False, "sdpa")}, id="cpu"),
    ],
)
def test_all_activations_are_recomputed_in_every_other_case(spec: dict[str, Any], changes: dict[str, Any], tmp_path: Path) -> None:
    assert choose_activations(tmp_path, spec, **changes) is None
    assert choose_activations(tmp_path, merge_mappings(UNPACKED, spec), batch_tokens=TOKENS_OF_LONGEST_ROWS, **changes) is None
