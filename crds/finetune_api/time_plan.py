"""The planned time and cost of a run's optimizer steps, from its floating-point operations and memory traffic.

    time of a step = operations / (peak * efficiency) + traffic / (bandwidth * efficiency)

FLOPs per token: 3 * (2N + A) for full training, and 4N + 3A for adapters. The recomputation of activations needs 2N + A more. Each forward
pass without gradients also needs 2N + A more: dpo has one such pass, for its reference model. kto has three such passes, because the trained model and the
reference model also read mismatched answers. Here, A is the FLOPs of the causal attention, and N is the number of parameters in matrix products: with
the head, without the embedding lookup, and with only those experts to which a token is routed.

The efficiencies were compared with runs of this trainer on an H200 and with published runs on an L40S (tests/unit/api/test_time_plan.py). The efficiencies of
other types of GPUs were not measured, so the bounds are wide. If the table of `finetune_api.calibration` contains enough runs on a type of
GPU, the expected time and the bounds are computed from these runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune_api import calibration_table
from finetune_api.calibration import CalibrationTable, find_calibration
from finetune_api.gpus import GpuType
from finetune_api.memory.architecture import ModelShape
from finetune_api.memory.layers import map_linear_layer_sizes
from finetune_api.objectives import OBJECTIVES
from finetune_api.rules import base_bits, trainer_type_of, trains_base_weights, world_size
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import TrainerType
from finetune_api.status import CostPlan, TimePlan, WorkPlan

PETA, TERA = 1e15, 1e12
OPTIMIZER_STEP_BYTES_PER_PARAMETER = 30
"""Bytes that AdamW reads and writes in one step for each trained parameter: weight, gradient and two moments."""
PASSES_OVER_WEIGHTS = 3
"""How often the weights are read for one micro-batch: in the forward pass, for the gradients of activations, and for the gradients of weights or the
recomputation."""


@dataclass(frozen=True)
class Efficiency:
    """The shares of a GPU's peak speed and memory bandwidth that a run reaches, and the cost of communication."""

    compute_share: float
    """Reached share of the peak speed of matrix products."""
    bandwidth_share: float
    """Reached share of the memory bandwidth."""
    communication_factor: float
    """Factor by which communication between several GPUs extends the time."""


EXPECTED_EFFICIENCY, HIGHEST_EFFICIENCY, LOWEST_EFFICIENCY = Efficiency(0.36, 0.7, 1.1), Efficiency(0.62, 0.95, 1.0), Efficiency(0.12, 0.35, 1.6)


@dataclass(frozen=True)
class DataSize:
    """Number of training rows, and of their tokens after tokenisation."""

    row_count: int
    token_count: int
    """Tokens of all sequences that the model reads. A pair of answers is two sequences, each with the prompt."""


def plan_work(spec: FineTuneJobSpec, shape: ModelShape, data_size: DataSize, recomputed_share: float = 0.0, trained_parameters: int = 0) -> WorkPlan | None:
    """Return the planned work of a resolved spec, or None if there are no rows or the objective is grpo.

    `recomputed_share`: share of the layers that recompute their activations. `trained_parameters`: number of adapter parameters; not used if
    all weights are trained.
    """
    training, max_sequence_length = spec.training, spec.dataset.max_sequence_length or 2048
    rank_count, accumulation = world_size(spec), training.gradient_accumulation_steps or 4
    rows_per_step = (training.batch_size_per_device or 4) * accumulation * rank_count // (spec.distributed.context_parallel_size or 1)
    objective, objective_facts = trainer_type_of(spec), OBJECTIVES[trainer_type_of(spec)]
    if data_size.row_count < 1 or data_size.token_count < 1 or objective is TrainerType.GRPO:
        return None
    row_count = max(1, math.ceil(data_size.token_count / max_sequence_length)) if spec.dataset.packing else data_size.row_count
    tokens_per_row = data_size.token_count / row_count
    step_count = training.max_steps if training.max_steps and training.max_steps > 0 else math.ceil((training.epochs or 3) * row_count / rows_per_step)
    token_count = step_count * rows_per_step * tokens_per_row
    parameter_count, document_length = count_matrix_parameters(shape), data_size.token_count / data_size.row_count / objective_facts.sequences_per_row
    if objective is TrainerType.REWARD:  # the head has one output instead of one for each entry of the vocabulary
        parameter_count -= shape.vocabulary_size * shape.hidden_size
    is_full_training = trains_base_weights(spec)
    extra_forward_passes = recomputed_share + objective_facts.passes_without_gradients
    flops = token_count * _compute_flops_per_token(shape, parameter_count, document_length, extra_forward_passes, is_full_training=is_full_training)
    weight_bytes = parameter_count * {4: 0.55, 8: 1.0}.get(base_bits(spec) or 0, 2.0)
    trained_parameter_count = parameter_count if is_full_training else trained_parameters
    weight_passes_per_step = accumulation * (PASSES_OVER_WEIGHTS + objective_facts.passes_without_gradients)
    traffic_bytes = step_count * rank_count * (weight_passes_per_step * weight_bytes + OPTIMIZER_STEP_BYTES_PER_PARAMETER * trained_parameter_count)
    return WorkPlan(
        steps=step_count, tokens=round(token_count), petaflop=_round_to_four_digits(flops / PETA),
        traffic_terabytes=_round_to_four_digits(traffic_bytes / TERA),
    )  # fmt: skip


def flops_per_token(shape: ModelShape, document_length: float, *, is_full_training: bool, recomputed_share: float = 0.0) -> float:
    """Return the FLOPs of training per token.

    `document_length`: mean number of tokens of a document. On average, a token attends to half of the document's tokens.
    """
    return _compute_flops_per_token(shape, count_matrix_parameters(shape), document_length, recomputed_share, is_full_training=is_full_training)


def _compute_flops_per_token(shape: ModelShape, parameter_count: int, document_length: float, extra_forward_passes: float, *, is_full_training: bool) -> float:
    """Return the FLOPs per token.

    `parameter_count`: number of parameters in matrix products. `extra_forward_passes`: number of forward passes in addition to that of training.
    """
    attention_flops = 4 * shape.layer_count * shape.head_count * shape.head_size * document_length / 2
    matrix_flops = 2 * parameter_count
    return (3 if is_full_training else 2) * matrix_flops + 3 * attention_flops + extra_forward_passes * (matrix_flops + attention_flops)


def count_matrix_parameters(shape: ModelShape) -> int:
    """Return the number of parameters in the matrix products of one token, with the head."""
    parameter_count = shape.vocabulary_size * shape.hidden_size
    for layer_index in range(shape.layer_count):
        parameter_count += sum(output_count * input_count for output_count, input_count in map_linear_layer_sizes(shape, layer_index).values())
    return parameter_count + shape.expert_layer_count * shape.hidden_size * (shape.expert_count + 3 * shape.experts_per_token * shape.expert_feed_forward_size)


def plan_time(work: WorkPlan, gpu: GpuType, gpu_count: int, table: CalibrationTable = calibration_table.TIME) -> TimePlan:
    """Return the planned time on `gpu_count` GPUs of one type. `table`: ratios of measured to planned time in earlier runs."""

    def estimate_seconds(efficiency: Efficiency) -> int:
        return math.ceil(_compute_gpu_seconds(work, gpu, gpu_count, efficiency) / gpu_count)

    expected_seconds = estimate_seconds(EXPECTED_EFFICIENCY)
    lower_seconds, upper_seconds = estimate_seconds(HIGHEST_EFFICIENCY), estimate_seconds(LOWEST_EFFICIENCY)
    calibration = find_calibration(table, gpu, has_several_gpus=gpu_count > 1)
    if calibration is None:
        return TimePlan(expected_seconds=expected_seconds, lower_seconds=lower_seconds, upper_seconds=upper_seconds)
    return TimePlan(
        expected_seconds=math.ceil(expected_seconds * calibration.median_ratio),
        lower_seconds=math.ceil(expected_seconds * calibration.lowest_ratio / calibration.widening_factor),
        upper_seconds=math.ceil(expected_seconds * calibration.highest_ratio * calibration.widening_factor),
        calibrated=True, calibration_runs=calibration.run_count,
    )  # fmt: skip


def estimate_gpu_seconds(work: WorkPlan, gpu: GpuType, gpu_count: int) -> float:
    """Return the expected GPU-seconds: the expected time, summed over all GPUs."""
    return _compute_gpu_seconds(work, gpu, gpu_count, EXPECTED_EFFICIENCY)


def _compute_gpu_seconds(work: WorkPlan, gpu: GpuType, gpu_count: int, efficiency: Efficiency) -> float:
    compute_seconds = work.petaflop * PETA / (gpu.peak_flops * efficiency.compute_share)
    memory_traffic_seconds = work.traffic_terabytes * TERA / (gpu.bandwidth_bytes_per_second * efficiency.bandwidth_share)
    return (compute_seconds + memory_traffic_seconds) * (efficiency.communication_factor if gpu_count > 1 else 1.0)


def plan_cost(time_plan: TimePlan, gpu_count: int, price_per_gpu_hour: float, currency: str) -> CostPlan:
    """Return the planned cost of the optimizer steps. `price_per_gpu_hour`: price of one GPU-hour in `currency`."""

    def compute_cost(seconds: int) -> float:
        return round(gpu_count * seconds / 3600 * price_per_gpu_hour, 2)

    return CostPlan(
        gpu_hours=round(gpu_count * time_plan.expected_seconds / 3600, 3),
        expected=compute_cost(time_plan.expected_seconds), lower=compute_cost(time_plan.lower_seconds),
        upper=compute_cost(time_plan.upper_seconds), currency=currency,
    )  # fmt: skip


def _round_to_four_digits(value: float) -> float:
    return float(f"{value:.4g}")
