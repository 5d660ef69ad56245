"""The memory plan: which memory it counts, how well it agrees with measured and published peaks, and which runs it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from finetune_api.defaults import ResolvedSpec, resolve_defaults
from finetune_api.errors import ConfigError, FineTuneError
from finetune_api.gpus import GPU_TYPES
from finetune_api.memory.architecture import ModelShape, parse_model_shape, read_model_shape, read_stored_bytes
from finetune_api.memory.changes import find_fitting_changes
from finetune_api.memory.description import RunFacts, describe_step
from finetune_api.memory.heads import LossHead
from finetune_api.memory.layers import Batch, Kernels, TrainedWeights
from finetune_api.memory.optimizers import ADAFACTOR, ADAMW_8BIT, ADAMW_FUSED, SGD, Optimizer
from finetune_api.memory.plan import (
    FRAGMENTATION,
    UPPER_MARGIN,
    WORKSPACE_BYTES,
    change_spec,
    count_parameters,
    find_largest_micro_batch,
    plan_memory,
)
from finetune_api.memory.replay import Step, replay
from finetune_api.memory.tape import Gradient, MemoryMeter, MemoryPart, Parameter, Tape, accumulate_gradient
from finetune_api.spec import FineTuneJobSpec

from benchmarks.lib.memory_runs import SmallRun, summarise_errors
from benchmarks.lib.published_runs import PUBLISHED_RUNS

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
TINY = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 100,
}  # fmt: skip
LLAMA_1B = parse_model_shape(TINY | {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "tie_word_embeddings": True,
})  # fmt: skip
LLAMA_8B = parse_model_shape(TINY | {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
})  # fmt: skip
H200_BYTES, H100_BYTES, L4_BYTES = (GPU_TYPES[name].memory_bytes for name in ("h200-141gb", "h100-80gb", "l4-24gb"))


def resolve(**groups: dict[str, Any]) -> ResolvedSpec:
    """Return a resolved spec. Unless `groups` change it, a micro-batch has two packed rows of 4,096 tokens, on one GPU."""
    spec: dict[str, Any] = {
        "model": {"source": "org/m"}, "dataset": {"train": "s3://d/t.jsonl", "packing": True, "maxSequenceLength": 4096},
        "resources": {"gpusPerNode": 1}, "training": {"batchSizePerDevice": 2, "gradientAccumulationSteps": 1},
    }  # fmt: skip
    for name, values in groups.items():
        spec[name] = spec.get(name, {}) | values
    return resolve_defaults(FineTuneJobSpec.model_validate(spec))


def test_a_tensor_counts_until_its_last_reference_is_deleted() -> None:
    meter = MemoryMeter()
    tape = Tape(meter)
    weight = Parameter((4, 8), 4, tape.allocate(128, MemoryPart.WEIGHTS), is_trained=True)
    hidden = tape.tensor((2, 8), 4)
    output = tape.record([hidden, weight], tape.tensor((2, 4), 4), [Gradient(16, 4), Gradient(32, 4)], [hidden.storage])
    assert meter.total_bytes == 128 + 64 + 32
    del hidden, output
    assert meter.total_bytes == 128 + 64  # the tape keeps the operation's input for the backward pass
    tape.backward()
    assert (meter.total_bytes, meter.bytes_by_part[MemoryPart.GRADIENTS], meter.bytes_by_part[MemoryPart.ACTIVATIONS]) == (256, 128, 0)
    assert weight.gradient is not None


def test_a_second_gradient_is_added_in_place_and_a_sharded_gradient_counts_only_in_part() -> None:
    meter = MemoryMeter()
    tape = Tape(meter)
    weight = Parameter((8,), 4, tape.allocate(32), is_trained=True, gradient_shards=4)
    accumulate_gradient(weight, tape.allocate(32))
    accumulate_gradient(weight, tape.allocate(32))
    assert meter.bytes_by_part[MemoryPart.GRADIENTS] == 8


def test_the_peak_falls_with_the_number_of_recomputed_layers() -> None:
    def compute_peak_bytes(layer_count: int) -> int:
        shape = parse_model_shape(TINY | {"num_hidden_layers": 8})
        step = Step(shape, TrainedWeights(4, 4, True), Batch(4, 256), SGD, Kernels(is_gpu=False), loss_head=LossHead.LOGITS, recomputed_layer_count=layer_count)
        return replay(step).total_bytes

    assert compute_peak_bytes(0) > compute_peak_bytes(4) > compute_peak_bytes(8)


def test_gradients_are_kept_from_one_micro_batch_to_the_next() -> None:
    def compute_peak_bytes(accumulation: int) -> int:
        return replay(Step(LLAMA_1B, TrainedWeights(2, 2, True), Batch(1, 512), ADAMW_FUSED, autocast_bytes=2, accumulation=accumulation)).total_bytes

    assert compute_peak_bytes(2) > compute_peak_bytes(1)
    assert compute_peak_bytes(2) == compute_peak_bytes(64)


@pytest.mark.parametrize(
    ("optimizer", "state_bytes", "temporary_bytes"),
    [
        (ADAMW_FUSED, 2 * 4 * 8192, 0), (SGD, 0, 0), (ADAMW_8BIT, 2 * (8192 + 128), 0), (ADAFACTOR, 4 * (64 + 128), 2 * 4 * 8192),
        (Optimizer(is_on_host=True), 0, 0),
    ],
)  # fmt: skip
def test_optimizers_need_memory_for_their_state_and_temporary_tensors(optimizer: Optimizer, state_bytes: int, temporary_bytes: int) -> None:
    weight = Parameter((64, 128), 4, Tape(MemoryMeter()).allocate(0), is_trained=True)
    assert sum(optimizer.state_bytes([weight], 1)) == state_bytes
    assert optimizer.temporary_bytes([weight], 1) == temporary_bytes


def test_estimates_agree_with_measured_peaks_on_a_cpu() -> None:
    figures = json.loads((RESULTS / "memory_peaks.json").read_text())["figures"]
    peaks = [peak | {"expectedBytes": replay(SmallRun.draw(peak["seed"]).as_step()).total_bytes} for peak in figures["peaks"]]
    errors = {peak["seed"]: peak["expectedBytes"] / peak["measuredBytes"] - 1 for peak in peaks}
    assert len(errors) == 100
    assert sum(abs(error) <= 0.05 for error in errors.values()) >= 95
    # Without this comparison, a plan that is a few percent worse than the recorded one would pass.
    assert summarise_errors(peaks) == {name: figures[name] for name in ("runs", "within5Percent", "medianError", "worstError")}


def test_estimates_agree_with_published_peaks() -> None:
    """The argument 720, a number of tokens, was fitted to these runs, and all methods use the same number. benchmarks/results/memory_published.json contains
    the errors for runs to which the number was not fitted.
    """
    errors = {run.name: replay(run.as_step(720)).total_bytes * (1 + FRAGMENTATION) / run.reserved_bytes - 1 for run in PUBLISHED_RUNS}
    assert max(map(abs, errors.values())) <= 0.06
    assert sorted(map(abs, errors.values()))[len(errors) // 2] <= 0.015
    assert all(1 <= (1 + error) * (1 + UPPER_MARGIN) <= 1.15 for error in errors.values())


@pytest.mark.parametrize(
    ("cell", "arm", "shape", "groups", "recomputed_count"),
    [
        ("speed-1b-lora-packed", "ours", LLAMA_1B, {}, 0),
        ("speed-8b-lora-packed", "ours", LLAMA_8B, {}, 0),
        ("speed-8b-qlora-packed", "ours", LLAMA_8B, {"method": {"type": "qlora"}}, 0),
        ("speed-1b-full-packed", "ours", LLAMA_1B, {"method": {"type": "full"}}, 0),
        ("speed-8b-full-packed", "ours", LLAMA_8B, {"method": {"type": "full"}}, 32),
        ("speed-8b-full-packed", "ours, 16-bit weights", LLAMA_8B, {"method": {"type": "full"}, "model": {"dtype": "bfloat16"}}, 32),
    ],
)
def test_plans_agree_with_measured_peaks_on_a_gpu(cell: str, arm: str, shape: ModelShape, groups: dict[str, Any], recomputed_count: int) -> None:
    cells = json.loads((RESULTS / "gpu_cells.json").read_text())["figures"]
    measured_bytes = cells[cell]["figures"]["arms"][arm]["peakMemoryGb"] * 1e9
    step = describe_step(resolve(**groups).spec, shape, RunFacts(recomputed_layer_count=recomputed_count)).step
    assert (replay(step).total_bytes + WORKSPACE_BYTES) / measured_bytes == pytest.approx(1, abs=0.01)


def test_the_sum_of_the_parts_is_the_expected_peak() -> None:
    plan = plan_memory(resolve().spec, LLAMA_8B).memory
    assert sum(value for _, value in plan.parts) == plan.expected_bytes
    assert plan.upper_bytes == int(plan.expected_bytes * 1.07)
    assert (plan.parts.context, plan.parts.gradients > 0) == (524288000, True)


def test_qlora_of_a_70b_model_fits_on_one_h100_by_the_plan() -> None:
    shape = parse_model_shape(TINY | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
    })  # fmt: skip
    assert count_parameters(shape) == 70_553_706_496
    assert plan_memory(resolve(method={"type": "qlora"}).spec, shape).fits(H100_BYTES)


@pytest.mark.parametrize(
    ("groups", "weight_shards", "optimizer_shards"),
    [
        ({"distributed": {"strategy": "fsdp"}}, 4, 4),
        ({"distributed": {"strategy": "fsdp", "fsdp": {"sharding": "noShard"}}}, 1, 1),
        ({"distributed": {"strategy": "deepspeed", "deepspeed": {"zeroStage": 1}}}, 1, 4),
        ({"distributed": {"strategy": "deepspeed", "deepspeed": {"zeroStage": 2}}}, 1, 4),
        ({"distributed": {"strategy": "deepspeed", "deepspeed": {"zeroStage": 3}}}, 4, 4),
        ({"distributed": {"strategy": "ddp"}}, 1, 1),
    ],
)
def test_strategies_shard_weights_and_optimizer_state(groups: dict[str, Any], weight_shards: int, optimizer_shards: int) -> None:
    unsharded = plan_memory(resolve(method={"type": "full"}).spec, LLAMA_1B).memory.parts
    sharded = plan_memory(resolve(method={"type": "full"}, resources={"gpusPerNode": 4}, **groups).spec, LLAMA_1B).memory.parts
    assert sharded.weights == pytest.approx(unsharded.weights / weight_shards, rel=1e-6)
    assert sharded.optimizer == pytest.approx(unsharded.optimizer / optimizer_shards, rel=1e-6)


def test_a_plan_that_was_not_compared_with_measured_peaks_has_a_wider_margin() -> None:
    spec = resolve(method={"type": "full"}, resources={"gpusPerNode": 4}, distributed={"strategy": "fsdp"}).spec
    plan = plan_memory(spec, LLAMA_1B)
    assert plan.memory.upper_bytes == int(plan.memory.expected_bytes * 1.15)
    assert plan.assumptions == ("the planned memory of fsdp with 4 ranks was not compared with measured peaks",)


def test_a_model_that_supports_only_eager_attention_is_planned_with_it() -> None:
    """transformers runs Gemma 2 only with eager attention, which stores a score for each pair of tokens."""
    gemma = parse_model_shape(TINY | {"model_type": "gemma2", "head_dim": 64})
    spec = resolve().spec
    assert plan_memory(spec, gemma).memory == plan_memory(spec, gemma, RunFacts(attention="eager")).memory
    assert plan_memory(spec, gemma).memory.expected_bytes > plan_memory(spec, gemma, RunFacts(attention="varlen")).memory.expected_bytes


def test_the_largest_micro_batch_divides_the_effective_batch() -> None:
    spec = FineTuneJobSpec.model_validate({
        "model": {"source": "org/name"}, "dataset": {"train": "s3://bucket/train.jsonl"},
        "training": {"effectiveBatchSize": 7, "gradientCheckpointing": "enabled"},
    })  # fmt: skip
    rows = find_largest_micro_batch(spec, LLAMA_1B, L4_BYTES)
    assert rows in (1, 7)
    assert find_largest_micro_batch(spec.with_values({"training.effectiveBatchSize": None}), LLAMA_1B, L4_BYTES) not in (1, 7)


def test_the_largest_micro_batch_fits_and_one_more_row_does_not() -> None:
    spec = resolve().spec
    rows = find_largest_micro_batch(spec, LLAMA_1B, L4_BYTES)
    assert plan_memory(change_spec(spec, {"training.batchSizePerDevice": rows}), LLAMA_1B).fits(L4_BYTES)
    assert not plan_memory(change_spec(spec, {"training.batchSizePerDevice": rows + 1}), LLAMA_1B).fits(L4_BYTES)
    assert find_largest_micro_batch(spec, LLAMA_1B, 10**9) == 0


def test_changes_that_fit_keep_the_effective_batch() -> None:
    spec = resolve(training={"batchSizePerDevice": 64}).spec
    changes = find_fitting_changes(spec, LLAMA_1B, 8 * 2**30)
    assert [change.values_by_path for change in changes] == [
        {"training.batchSizePerDevice": 4, "training.gradientAccumulationSteps": 16},
        {"method.type": "qlora", "training.batchSizePerDevice": 8, "training.gradientAccumulationSteps": 8},
        {"dataset.maxSequenceLength": 2048, "training.batchSizePerDevice": 8, "training.gradientAccumulationSteps": 8},
    ]
    assert all(change.plan.fits(8 * 2**30) for change in changes)
    assert find_fitting_changes(spec, LLAMA_1B, 10**9) == []


@pytest.mark.parametrize(
    ("groups", "code"),
    [
        ({"trainer": {"type": "grpo"}}, "ObjectiveNotPlanned"),
        ({"method": {"type": "spectrum"}}, "MethodNotPlanned"),
        ({"distributed": {"strategy": "deepspeed", "contextParallelSize": 2}, "resources": {"gpusPerNode": 4}}, "MethodNotPlanned"),
        ({"method": {"type": "lora", "lora": {"modulesToSave": ["embed_tokens"]}}}, "MethodNotPlanned"),
        ({"method": {"type": "lora", "lora": {"targetModules": ["c_attn"]}}}, "TargetNotPlanned"),
        ({"training": {"optimizer": "galore_adamw"}}, "OptimizerNotPlanned"),
    ],
)
def test_a_run_that_the_plan_cannot_compute_is_refused(groups: dict[str, Any], code: str) -> None:
    with pytest.raises(ConfigError) as refused:
        plan_memory(resolve(**groups).spec, LLAMA_1B)
    assert (refused.value.code, bool(refused.value.hint)) == (code, True)


@pytest.mark.parametrize(
    ("optimizer", "state_bytes_per_parameter"),
    [("rmsprop", 4), ("adagrad", 4), ("rmsprop_bnb", 4), ("rmsprop_bnb_8bit", 1 + 4 / 256), ("ademamix", 12), ("ademamix_8bit", 3 * (1 + 4 / 256))],
)
def test_rarer_optimizers_are_planned_with_a_wider_margin(optimizer: str, state_bytes_per_parameter: float) -> None:
    description = describe_step(resolve(method={"type": "full"}, training={"optimizer": optimizer}).spec, LLAMA_1B)
    weight = Parameter((64, 128), 4, Tape(MemoryMeter()).allocate(0), is_trained=True)
    assert sum(description.step.optimizer.state_bytes([weight], 1)) == 64 * 128 * state_bytes_per_parameter
    assert (description.is_checked, description.assumptions[-1]) == (
        False, f"the planned memory of training.optimizer {optimizer} was not compared with measured peaks"
    )  # fmt: skip
    assert describe_step(resolve(training={"optimizer": f"paged_{optimizer}" if optimizer == "ademamix_8bit" else "sgd"}).spec, LLAMA_1B).is_checked is (
        optimizer != "ademamix_8bit"
    )


def test_the_plan_of_a_run_with_backend_unsloth_names_its_assumption() -> None:
    plan = plan_memory(resolve(trainer={"backend": "unsloth"}).spec, LLAMA_1B)
    assert any("trainer.backend unsloth chooses" in assumption for assumption in plan.assumptions)


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"model_type": "falcon_mamba"}, "ModelTypeNotPlanned"),
        ({"model_type": "llava", "text_config": TINY}, "ModelTypeNotPlanned"),
        ({name: value for name, value in TINY.items() if name != "vocab_size"}, "ModelConfigIncomplete"),
        (TINY | {"hidden_size": "64"}, "ModelConfigIncomplete"),
    ],
)
def test_a_model_configuration_that_the_plan_cannot_read_is_refused(config: dict[str, Any], code: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_model_shape(config)
    assert refused.value.code == code


def test_configuration_and_stored_size_of_a_model_are_read_from_its_folder(tmp_path: Path) -> None:
    with pytest.raises(FineTuneError) as refused:
        read_model_shape(tmp_path)
    assert refused.value.code == "ModelConfigNotFound"
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FineTuneError) as refused:
        read_model_shape(tmp_path)
    assert refused.value.code == "ModelConfigUnreadable"
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"dtype": "float32"}))
    assert (read_model_shape(tmp_path).stored_value_bytes, read_stored_bytes(tmp_path)) == (4, None)
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {"total_size": 12}}')
    assert read_stored_bytes(tmp_path) == 12


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        ({"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
          "vocab_size": 151936, "tie_word_embeddings": True}, 494_032_768),
        ({"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
          "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True}, 596_049_920),
        ({"model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
          "head_dim": 256, "vocab_size": 256000}, 2_614_341_888),
        ({"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
          "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2}, 46_702_792_704),
        ({"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
          "vocab_size": 32064}, 3_821_079_552),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)  # fmt: skip
def test_the_counted_parameters_of_published_models_are_their_published_numbers(config: dict[str, Any], parameters: int) -> None:
    assert count_parameters(parse_model_shape(config)) == parameters
