"""The planned work, time and cost of a run."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
from finetune_api.defaults import resolve_defaults
from finetune_api.gpus import GPU_TYPES, find_gpu_type
from finetune_api.memory.architecture import ModelShape, parse_model_shape
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import TimePlan, WorkPlan
from finetune_api.time_plan import DataSize, count_matrix_parameters, flops_per_token, plan_cost, plan_time, plan_work


def make_llama_shape(hidden: int, feed_forward: int, layers: int, *, heads: int = 32, head_size: int = 128) -> ModelShape:
    return parse_model_shape({
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": feed_forward, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": 8, "head_dim": head_size, "vocab_size": 128256,
    })  # fmt: skip


LLAMA_1B, LLAMA_3B, LLAMA_8B = make_llama_shape(2048, 8192, 16, head_size=64), make_llama_shape(3072, 8192, 28, heads=24), make_llama_shape(4096, 14336, 32)
TINY = parse_model_shape({
    "model_type": "llama", "hidden_size": 10, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "vocab_size": 100,
})  # fmt: skip
TINY_PARAMETERS = 100 * 10 + 2 * (10 * 10 + 2 * 5 * 10 + 10 * 10 + 3 * 10 * 20)


def resolve_spec(**groups: Any) -> FineTuneJobSpec:
    """Return a resolved spec on one GPU with 10 rows in each optimizer step and 3 epochs, unless `groups` change this."""
    defaults: dict[str, Any] = {
        "model": {"source": "org/m"}, "dataset": {"train": "s3://b/d.jsonl", "maxSequenceLength": 64}, "resources": {"gpusPerNode": 1},
        "training": {"batchSizePerDevice": 2, "gradientAccumulationSteps": 5, "epochs": 3},
    }  # fmt: skip
    return resolve_defaults(FineTuneJobSpec.model_validate({name: {**defaults.get(name, {}), **groups.get(name, {})} for name in {**defaults, **groups}})).spec


@pytest.mark.parametrize(
    ("groups", "steps", "tokens"),
    [
        ({}, 30, 30 * 10 * 40), ({"training": {"maxSteps": 7}}, 7, 7 * 10 * 40), ({"resources": {"nodes": 2, "gpusPerNode": 2}}, 8, 8 * 40 * 40),
        ({"dataset": {"packing": True}}, 19, 19 * 10 * 4000 / 63), ({"training": {"epochs": 0.5}}, 5, 5 * 10 * 40),
    ],
)  # fmt: skip
def test_steps_and_tokens_are_computed_from_the_data(groups: dict[str, Any], steps: int, tokens: float) -> None:
    work = plan_work(resolve_spec(**groups), TINY, DataSize(100, 4000))
    assert work is not None and (work.steps, work.tokens) == (steps, round(tokens))


def round_to_four_digits(value: float) -> float:
    return float(f"{value:.4g}")


def test_operations_and_memory_traffic_follow_the_documented_formulas() -> None:
    assert count_matrix_parameters(TINY) == TINY_PARAMETERS
    attention = 4 * 2 * 2 * 5 * 40 / 2
    assert flops_per_token(TINY, 40, is_full_training=True) == 3 * (2 * TINY_PARAMETERS + attention)
    assert flops_per_token(TINY, 40, is_full_training=False) == 4 * TINY_PARAMETERS + 3 * attention
    assert flops_per_token(TINY, 40, is_full_training=False, recomputed_share=0.5) == 5 * TINY_PARAMETERS + 3.5 * attention
    full_work = plan_work(resolve_spec(method={"type": "full"}), TINY, DataSize(100, 4000))
    assert full_work is not None and full_work.traffic_terabytes == round_to_four_digits(30 * (5 * 3 * 2 + 30) * TINY_PARAMETERS / 1e12)
    adapter_work = plan_work(resolve_spec(), TINY, DataSize(100, 4000), trained_parameters=10)
    assert adapter_work is not None and adapter_work.traffic_terabytes == round_to_four_digits(30 * (5 * 3 * 2 * TINY_PARAMETERS + 300) / 1e12)


def test_only_experts_to_which_a_token_is_routed_count() -> None:
    config = {
        "model_type": "qwen3_moe", "hidden_size": 10, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "vocab_size": 100, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 6,
    }  # fmt: skip
    assert count_matrix_parameters(parse_model_shape(config)) == 1000 + (10 * 10 + 2 * 5 * 10 + 10 * 10) + 10 * 8 + 2 * 3 * 10 * 6


@pytest.mark.parametrize("data", [DataSize(0, 10), DataSize(10, 0)])
def test_no_work_is_planned_without_rows_or_for_grpo(data: DataSize) -> None:
    assert plan_work(resolve_spec(), TINY, data) is None
    assert plan_work(resolve_spec(trainer={"type": "grpo"}), TINY, DataSize(10, 10)) is None


@pytest.mark.parametrize(
    ("objective", "sequences", "extra_passes", "parameters"),
    [("dpo", 2, 1, TINY_PARAMETERS), ("orpo", 2, 0, TINY_PARAMETERS), ("kto", 1, 3, TINY_PARAMETERS), ("reward", 2, 0, TINY_PARAMETERS - 100 * 10)],
)
def test_preference_objectives_read_pairs_and_make_forward_passes_without_gradients(
    objective: str, sequences: int, extra_passes: int, parameters: int
) -> None:
    work = plan_work(resolve_spec(trainer={"type": objective}), TINY, DataSize(100, 100 * sequences * 40), trained_parameters=10)
    assert work is not None and (work.steps, work.tokens) == (30, 30 * 10 * sequences * 40)
    attention = 4 * 2 * 2 * 5 * 40 / 2
    flops = 4 * parameters + 3 * attention + extra_passes * (2 * parameters + attention)
    assert work.petaflop == round_to_four_digits(work.tokens * flops / 1e15)
    assert work.traffic_terabytes == round_to_four_digits(30 * (5 * (3 + extra_passes) * 2 * parameters + 300) / 1e12)


@pytest.mark.parametrize(
    ("device_name", "gpu_type"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb"), ("NVIDIA H200", "h200-141gb"), ("NVIDIA GH200 480GB", "gh200-96gb"), ("NVIDIA L40S", "l40s-48gb"),
        ("NVIDIA L4", "l4-24gb"), ("NVIDIA A10", "a10-24gb"), ("NVIDIA A10G", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"), ("NVIDIA A100 80GB PCIe", "a100-80gb"), ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"), ("Tesla V100-SXM2-16GB", "v100-16gb"),
        ("cpu", None),
    ],
)  # fmt: skip
def test_the_type_of_a_gpu_is_recognised_by_the_drivers_device_name(device_name: str, gpu_type: str | None) -> None:
    assert find_gpu_type(device_name) is (None if gpu_type is None else GPU_TYPES[gpu_type])


MEASURED_RUNS: tuple[tuple[str, str, ModelShape, str, float, int, float], ...] = (
    # type of GPU, method, model, name of the run, tokens, optimizer steps, seconds of these steps
    *(("l40s-48gb", method, LLAMA_3B, name, 4_250_000, 5000, seconds) for method, name, seconds in (
        ("full", "full, lr 0.00001", 1813), ("lora", "rank 32", 585), ("lora", "rank 64", 595), ("lora", "rank 10, feed-forward", 665),
        ("lora", "DoRA", 707), ("lora", "LoRA-FA", 776), ("ia3", "IA3", 581), ("ia3", "IA3, all layers", 658), ("prompt", "prompt tuning", 940),
        ("prefix", "prefix tuning", 561),
    )),
    *(("h200-141gb", method, model, name, 8_192_000, 1000, 8_192_000 / tokens_per_second) for method, model, name, tokens_per_second in (
        ("lora", LLAMA_8B, "packed", 15272), ("lora", LLAMA_8B, "chat", 15319), ("qlora", LLAMA_8B, "packed", 14229), ("full", LLAMA_8B, "packed", 8465),
        ("full", LLAMA_8B, "16-bit weights", 11564), ("lora", LLAMA_1B, "packed", 66740), ("lora", LLAMA_1B, "chat", 55075),
        ("full", LLAMA_1B, "packed", 53737), ("full", LLAMA_1B, "chat", 46827),
    )),
)  # fmt: skip
"""Measured runs: published runs on an L40S (PEFT's comparison of methods, commit 5d602fd), and runs of this trainer on an H200
(benchmarks/results/gpu_cells.json).
"""


def plan_work_of_run(method: str, model: ModelShape, tokens: float, steps: int) -> WorkPlan:
    training_options = {"batchSizePerDevice": 4 if model is LLAMA_3B else 2, "gradientAccumulationSteps": 1, "maxSteps": steps}
    method_type = {"prompt": "promptTuning", "prefix": "prefixTuning"}.get(method, method)
    row_count = steps * training_options["batchSizePerDevice"]
    spec = resolve_spec(method={"type": method_type}, training=training_options, dataset={"maxSequenceLength": 4096})
    work = plan_work(spec, model, DataSize(row_count, int(tokens)))
    assert work is not None and work.steps == steps and work.tokens == pytest.approx(tokens, rel=1e-3)
    return work


def test_the_time_of_measured_runs_is_within_the_planned_bounds() -> None:
    ratios = []
    for gpu, method, model, name, tokens, steps, seconds in MEASURED_RUNS:
        time = plan_time(plan_work_of_run(method, model, tokens, steps), GPU_TYPES[gpu], 1)
        assert time.lower_seconds < seconds < time.upper_seconds, (gpu, method, name, seconds, time)
        ratios.append(seconds / time.expected_seconds)
    assert (round(min(ratios), 2), round(statistics.median(ratios), 2), round(max(ratios), 2)) == (0.59, 1.0, 1.61)


def test_time_and_cost_are_planned_for_one_and_for_several_gpus() -> None:
    work = WorkPlan(steps=1, tokens=1, petaflop=0.989 * 360, traffic_terabytes=0)
    one_gpu, eight_gpus = (plan_time(work, GPU_TYPES["h100-80gb"], count) for count in (1, 8))
    assert one_gpu == TimePlan(expected_seconds=1000, lower_seconds=581, upper_seconds=3000)
    assert eight_gpus == TimePlan(expected_seconds=138, lower_seconds=73, upper_seconds=600)
    cost = plan_cost(eight_gpus, 8, 2.5, "EUR")
    assert (cost.gpu_hours, cost.lower, cost.expected, cost.upper, cost.currency) == (0.307, 0.41, 0.77, 3.33, "EUR")
