"""The planned time and cost of a run's optimizer steps, from its floating-point operations and memory traffic.

    time of a step = operations / (peak * efficiency) + traffic / (bandwidth * efficiency)

FLOPs per token, with N: parameters in matrix products (with the head, without the embedding lookup, only the experts to which a token is routed), and
A: FLOPs of the causal attention. Full training: 3 * (2N + A). Adapters: 4N + 3A. Recomputed activations: 2N + A more.

The efficiencies were compared with runs of this trainer on an H200 and with published runs on an L40S (tests/unit/api/test_time_plan.py). They
were not measured with each type of GPU, so the bounds are wide. If the table of `finetune_api.calibration` has enough runs of a type of GPU, the
expected time and the bounds follow from these runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune_api import calibration_table
from finetune_api.calibration import Table, find_calibration
from finetune_api.gpus import GpuType
from finetune_api.memory.architecture import ModelShape
from finetune_api.memory.layers import linear_sizes
from finetune_api.rules import base_bits, trainer_type_of, trains_base_weights, world_size
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import TrainerType
from finetune_api.status import CostPlan, TimePlan, WorkPlan

PETA, TERA = 1e15, 1e12
BYTES_OF_OPTIMIZER_STEP = 30
"""Bytes that AdamW reads and writes for each trained parameter: weight, gradient and two moments."""
PASSES_OVER_WEIGHTS = 3
"""How often a micro-batch reads the weights: forward pass, gradients of activations, gradients of weights or recomputation."""


@dataclass(frozen=True)
class Efficiency:
    """Share of the peak of matrix products, and of the memory bandwidth, that a run reaches."""

    compute: float
    memory: float
    gang: float
    """Factor on the time with several GPUs, for communication."""


EXPECTED, FASTEST, SLOWEST = Efficiency(0.36, 0.7, 1.1), Efficiency(0.62, 0.95, 1.0), Efficiency(0.12, 0.35, 1.6)


@dataclass(frozen=True)
class DataSize:
    """The training rows after tokenisation."""

    rows: int
    tokens: int


def plan_work(spec: FineTuneJobSpec, shape: ModelShape, data: DataSize, recomputed_share: float = 0.0, trained_parameters: int = 0) -> WorkPlan | None:
    """Plan the work of a resolved spec. None: the objective is not supervised fine-tuning, or there are no rows.

    `recomputed_share`: share of the layers that recompute their activations. `trained_parameters`: those of adapters.
    """
    training, limit = spec.training, spec.dataset.max_sequence_length or 2048
    ranks, accumulation = world_size(spec), training.gradient_accumulation_steps or 4
    rows_per_step = (training.batch_size_per_device or 4) * accumulation * ranks // (spec.distributed.context_parallel_size or 1)
    if data.rows < 1 or data.tokens < 1 or trainer_type_of(spec) is not TrainerType.SFT:
        return None
    rows = max(1, math.ceil(data.tokens / limit)) if spec.dataset.packing else data.rows
    row_tokens = data.tokens / rows
    steps = training.max_steps if training.max_steps and training.max_steps > 0 else math.ceil((training.epochs or 3) * rows / rows_per_step)
    tokens = steps * rows_per_step * row_tokens
    parameters, document_length = matrix_parameters(shape), data.tokens / data.rows
    is_full = trains_base_weights(spec)
    flops = tokens * flops_per_token(shape, document_length, is_full=is_full, recomputed_share=recomputed_share)
    weight_bytes = parameters * {4: 0.55, 8: 1.0}.get(base_bits(spec) or 0, 2.0)
    trained = parameters if is_full else trained_parameters
    traffic = steps * ranks * (accumulation * PASSES_OVER_WEIGHTS * weight_bytes + BYTES_OF_OPTIMIZER_STEP * trained)
    return WorkPlan(steps=steps, tokens=round(tokens), petaflop=_four_digits(flops / PETA), traffic_terabytes=_four_digits(traffic / TERA))


def flops_per_token(shape: ModelShape, document_length: float, *, is_full: bool, recomputed_share: float = 0.0) -> float:
    """Return the FLOPs of training per token. `document_length`: mean tokens of a document; a token attends to half of them on average."""
    attention = 4 * shape.layers * shape.heads * shape.head_size * document_length / 2
    matrix = 2 * matrix_parameters(shape)
    recomputed = recomputed_share * (matrix + attention)
    return (3 if is_full else 2) * matrix + 3 * attention + recomputed


def matrix_parameters(shape: ModelShape) -> int:
    """Return the parameters in the matrix products of one token, with the head."""
    total = shape.vocabulary * shape.hidden
    for layer in range(shape.layers):
        total += sum(outputs * inputs for outputs, inputs in linear_sizes(shape, layer).values())
    return total + shape.expert_layers * shape.hidden * (shape.experts + 3 * shape.experts_per_token * shape.expert_feed_forward)


def plan_time(work: WorkPlan, gpu: GpuType, gpus: int, table: Table = calibration_table.TIME) -> TimePlan:
    """Return the planned time on `gpus` GPUs of one type. `table`: measured / planned time of earlier runs."""

    def seconds(efficiency: Efficiency) -> int:
        return math.ceil(_gpu_seconds(work, gpu, gpus, efficiency) / gpus)

    expected, lower, upper = seconds(EXPECTED), seconds(FASTEST), seconds(SLOWEST)
    known = find_calibration(table, gpu, has_several_gpus=gpus > 1)
    if known is None:
        return TimePlan(expected_seconds=expected, lower_seconds=lower, upper_seconds=upper)
    return TimePlan(
        expected_seconds=math.ceil(expected * known.median), lower_seconds=math.ceil(expected * known.lowest / known.margin),
        upper_seconds=math.ceil(expected * known.highest * known.margin), calibrated=True, calibration_runs=known.runs,
    )  # fmt: skip


def expected_gpu_seconds(work: WorkPlan, gpu: GpuType, gpus: int) -> float:
    """Return the expected seconds of all GPUs together."""
    return _gpu_seconds(work, gpu, gpus, EXPECTED)


def _gpu_seconds(work: WorkPlan, gpu: GpuType, gpus: int, efficiency: Efficiency) -> float:
    compute = work.petaflop * PETA / (gpu.peak_flops * efficiency.compute)
    memory = work.traffic_terabytes * TERA / (gpu.bandwidth * efficiency.memory)
    return (compute + memory) * (efficiency.gang if gpus > 1 else 1.0)


def plan_cost(time: TimePlan, gpus: int, price_per_gpu_hour: float, currency: str) -> CostPlan:
    """Return the planned cost. `price_per_gpu_hour`: in `currency`."""

    def cost(seconds: int) -> float:
        return round(gpus * seconds / 3600 * price_per_gpu_hour, 2)

    return CostPlan(
        gpu_hours=round(gpus * time.expected_seconds / 3600, 3), expected=cost(time.expected_seconds), lower=cost(time.lower_seconds),
        upper=cost(time.upper_seconds), currency=currency,
    )  # fmt: skip


def _four_digits(value: float) -> float:
    return float(f"{value:.4g}")
