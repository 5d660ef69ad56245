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
from finetune_api.memory.layers import linear_layer_sizes
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
    training, limit = spec.training, spec.dataset.max_sequence_length or 2048
    ranks, accumulation = world_size(spec), training.gradient_accumulation_steps or 4
    rows_per_step = (training.batch_size_per_device or 4) * accumulation * ranks // (spec.distributed.context_parallel_size or 1)
    objective, facts = trainer_type_of(spec), OBJECTIVES[trainer_type_of(spec)]
    if data_size.row_count < 1 or data_size.token_count < 1 or objective is TrainerType.GRPO:
        return None
    rows = max(1, math.ceil(data_size.token_count / limit)) if spec.dataset.packing else data_size.row_count
    row_tokens = data_size.token_count / rows
    steps = training.max_steps if training.max_steps and training.max_steps > 0 else math.ceil((training.epochs or 3) * rows / rows_per_step)
    tokens = steps * rows_per_step * row_tokens
    parameters, document_length = count_matrix_parameters(shape), data_size.token_count / data_size.row_count / facts.sequences_per_row
    if objective is TrainerType.REWARD:  # the head has one output instead of one for each entry of the vocabulary
        parameters -= shape.vocabulary_size * shape.hidden_size
    is_full_training = trains_base_weights(spec)
    extra_forward_passes = recomputed_share + facts.passes_without_gradients
    flops = tokens * _flops_per_token(shape, parameters, document_length, extra_forward_passes, is_full_training=is_full_training)
    weight_bytes = parameters * {4: 0.55, 8: 1.0}.get(base_bits(spec) or 0, 2.0)
    trained = parameters if is_full_training else trained_parameters
    passes = accumulation * (PASSES_OVER_WEIGHTS + facts.passes_without_gradients)
    traffic = steps * ranks * (passes * weight_bytes + OPTIMIZER_STEP_BYTES_PER_PARAMETER * trained)
    return WorkPlan(steps=steps, tokens=round(tokens), petaflop=_round_to_four_digits(flops / PETA), traffic_terabytes=_round_to_four_digits(traffic / TERA))


def flops_per_token(shape: ModelShape, document_length: float, *, is_full_training: bool, recomputed_share: float = 0.0) -> float:
    """Return the FLOPs of training per token.

    `document_length`: mean number of tokens of a document. On average, a token attends to half of the document's tokens.
    """
    return _flops_per_token(shape, count_matrix_parameters(shape), document_length, recomputed_share, is_full_training=is_full_training)


def _flops_per_token(shape: ModelShape, parameters: int, document_length: float, extra_forward_passes: float, *, is_full_training: bool) -> float:
    """Return the FLOPs per token.

    `parameters`: number of parameters in matrix products. `extra_forward_passes`: number of forward passes in addition to that of training.
    """
    attention = 4 * shape.layer_count * shape.head_count * shape.head_size * document_length / 2
    matrix = 2 * parameters
    return (3 if is_full_training else 2) * matrix + 3 * attention + extra_forward_passes * (matrix + attention)


def count_matrix_parameters(shape: ModelShape) -> int:
    """Return the number of parameters in the matrix products of one token, with the head."""
    total = shape.vocabulary_size * shape.hidden_size
    for layer in range(shape.layer_count):
        total += sum(outputs * inputs for outputs, inputs in linear_layer_sizes(shape, layer).values())
    return total + shape.expert_layer_count * shape.hidden_size * (shape.expert_count + 3 * shape.experts_per_token * shape.expert_feed_forward_size)


def plan_time(work: WorkPlan, gpu: GpuType, gpus: int, table: CalibrationTable = calibration_table.TIME) -> TimePlan:
    """Return the planned time on `gpus` GPUs of one type. `table`: ratios of measured to planned time in earlier runs."""

    def seconds(efficiency: Efficiency) -> int:
        return math.ceil(_gpu_seconds(work, gpu, gpus, efficiency) / gpus)

    expected, lower, upper = seconds(EXPECTED_EFFICIENCY), seconds(HIGHEST_EFFICIENCY), seconds(LOWEST_EFFICIENCY)
    calibration = find_calibration(table, gpu, has_several_gpus=gpus > 1)
    if calibration is None:
        return TimePlan(expected_seconds=expected, lower_seconds=lower, upper_seconds=upper)
    return TimePlan(
        expected_seconds=math.ceil(expected * calibration.median_ratio),
        lower_seconds=math.ceil(expected * calibration.lowest_ratio / calibration.widening_factor),
        upper_seconds=math.ceil(expected * calibration.highest_ratio * calibration.widening_factor),
        calibrated=True, calibration_runs=calibration.run_count,
    )  # fmt: skip


def expected_gpu_seconds(work: WorkPlan, gpu: GpuType, gpus: int) -> float:
    """Return the expected GPU-seconds: the expected time, summed over all GPUs."""
    return _gpu_seconds(work, gpu, gpus, EXPECTED_EFFICIENCY)


def _gpu_seconds(work: WorkPlan, gpu: GpuType, gpus: int, efficiency: Efficiency) -> float:
    compute = work.petaflop * PETA / (gpu.peak_flops * efficiency.compute_share)
    memory = work.traffic_terabytes * TERA / (gpu.bandwidth_bytes_per_second * efficiency.bandwidth_share)
    return (compute + memory) * (efficiency.communication_factor if gpus > 1 else 1.0)


def plan_cost(time: TimePlan, gpus: int, price_per_gpu_hour: float, currency: str) -> CostPlan:
    """Return the planned cost of the optimizer steps. `price_per_gpu_hour`: price of one GPU-hour in `currency`."""

    def cost(seconds: int) -> float:
        return round(gpus * seconds / 3600 * price_per_gpu_hour, 2)

    return CostPlan(
        gpu_hours=round(gpus * time.expected_seconds / 3600, 3), expected=cost(time.expected_seconds), lower=cost(time.lower_seconds),
        upper=cost(time.upper_seconds), currency=currency,
    )  # fmt: skip


def _round_to_four_digits(value: float) -> float:
    return float(f"{value:.4g}")
