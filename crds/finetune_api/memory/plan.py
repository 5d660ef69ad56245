"""The memory plan of a job: expected peak and upper bound for each rank, in parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune_api.memory.architecture import ModelShape
from finetune_api.memory.description import Description, Facts, describe_step
from finetune_api.memory.layers import TrainedWeights, build_decoder
from finetune_api.memory.replay import replay
from finetune_api.memory.tape import Meter, Tape
from finetune_api.rules import LORA_METHODS, batch_split, divisors
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import MethodType
from finetune_api.status import MemoryParts, MemoryPlan

CONTEXT_BYTES = 500 * 2**20
"""Memory of the CUDA context and the loaded kernels, outside torch's allocator."""
COMMUNICATION_BYTES = 700 * 2**20
"""Buffers of NCCL on each of several ranks."""
WORKSPACE_BYTES = 80 * 10**6
"""Workspaces of cuBLAS. Measured peaks on an H200 are so much above the replay (benchmarks/results/gpu_cells.json)."""
FRAGMENTATION = 0.03
"""Memory that torch reserves but does not use, as a share of what it uses. Replays of published runs: benchmarks/results/memory_published.json."""
UPPER_MARGIN = 0.07
"""By how much the upper bound exceeds the expected peak, for runs that were compared with measured peaks."""
UNCHECKED_MARGIN = 0.15
CHECKPOINTING_PATH = "training.gradientCheckpointing"
MICRO_BATCH_PATH, ACCUMULATION_PATH = "training.batchSizePerDevice", "training.gradientAccumulationSteps"
BATCH_PATHS = (MICRO_BATCH_PATH, ACCUMULATION_PATH)
STRATEGY_PATH, GPUS_PATH, POOL_PATH = "distributed.strategy", "resources.gpusPerNode", "resources.nodePool"
LARGEST_BATCH = 1024


@dataclass(frozen=True)
class JobPlan:
    """A memory plan with what it assumes."""

    memory: MemoryPlan
    assumptions: tuple[str, ...] = ()
    recomputed_layers: int = 0
    layers: int = 0

    def fits(self, memory_bytes: int) -> bool:
        """Whether the upper bound fits into so much memory."""
        return self.memory.upper_bytes <= memory_bytes


def plan_memory(spec: FineTuneJobSpec, shape: ModelShape, facts: Facts | None = None) -> JobPlan:
    """Plan the memory of a resolved spec. Errors: those of `describe_step`."""
    description = describe_step(spec, shape, facts)
    return JobPlan(_plan(description), description.assumptions, description.step.recomputed_layers, shape.layers)


def _plan(description: Description) -> MemoryPlan:
    step = description.step
    peak = replay(step)
    parts = {part.value: count for part, count in peak.parts.items()}
    if step.kernels.is_gpu:
        parts["buffers"] += WORKSPACE_BYTES
        parts["fragmentation"] = int(FRAGMENTATION * sum(parts.values()))
        parts["context"] = CONTEXT_BYTES + (COMMUNICATION_BYTES if step.has_gradient_buckets or step.optimizer_shards > 1 else 0)
    expected = sum(parts.values())
    margin = UPPER_MARGIN if description.is_checked else UNCHECKED_MARGIN
    return MemoryPlan(expected_bytes=expected, upper_bytes=int(expected * (1 + margin)), parts=MemoryParts(**parts))


def count_parameters(shape: ModelShape) -> int:
    """Number of values in the weights of a model."""
    return sum(one.values for one in build_decoder(Tape(Meter()), shape, TrainedWeights(1, 1, trains_base=False)).parameters())


def largest_batch(spec: FineTuneJobSpec, shape: ModelShape, memory_bytes: int, facts: Facts | None = None) -> int:
    """Return the largest `training.batchSizePerDevice` whose upper bound fits; 0 if none does. It divides `training.effectiveBatchSize`, if that is set."""

    def fits(rows: int) -> bool:
        return plan_memory(change_spec(spec, {"training.batchSizePerDevice": rows}), shape, facts).fits(memory_bytes)

    if spec.training.effective_batch_size is not None:
        micro_batch, accumulation = batch_split(spec)
        return max((rows for rows in divisors(micro_batch * accumulation) if rows <= LARGEST_BATCH and fits(rows)), default=0)
    if not fits(1):
        return 0
    fitting, too_large = 1, 2
    while too_large <= LARGEST_BATCH and fits(too_large):
        fitting, too_large = too_large, 2 * too_large
    while too_large - fitting > 1:
        middle = (fitting + too_large) // 2
        fitting, too_large = (middle, too_large) if fits(middle) else (fitting, middle)
    return fitting


def gigabytes(count: int) -> str:
    """Return a number of bytes as text with three digits."""
    return f"{count / 1e9:.2f} GB" if count < 10**10 else f"{count / 1e9:.1f} GB"


def batch_values(micro_batch: int, accumulation: int) -> dict[str, Any]:
    """Return micro-batch and accumulation by spec path."""
    return {MICRO_BATCH_PATH: micro_batch, ACCUMULATION_PATH: accumulation}


def change_spec(spec: FineTuneJobSpec, values: dict[str, Any]) -> FineTuneJobSpec:
    """Return a spec with some values changed, by spec path. A changed method loses the settings that it cannot have."""
    changed = spec.with_values(values)
    if "method.type" not in values:
        return changed
    content, method = changed.to_wire(), MethodType(values["method.type"])
    content["method"] = {"type": method, **({"lora": content["method"].get("lora") or {}} if method in LORA_METHODS else {})}
    if method is not MethodType.QLORA:
        content.get("model", {}).pop("quantization", None)
    return FineTuneJobSpec.model_validate(content)
