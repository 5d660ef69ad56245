"""Plans the memory of a job: the expected peak of each rank, its parts, and its upper bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune_api.memory.architecture import ModelShape
from finetune_api.memory.description import RunFacts, StepDescription, describe_step
from finetune_api.memory.layers import TrainedWeights, build_decoder
from finetune_api.memory.replay import replay
from finetune_api.memory.tape import MemoryMeter, Tape
from finetune_api.rules import LORA_METHODS, compute_batch_split, divisors, min_batch_size_per_device
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import MethodType
from finetune_api.status import MemoryParts, MemoryPlan

CONTEXT_BYTES = 500 * 2**20
"""Memory of the CUDA context and the loaded kernels. Torch's allocator does not count this memory."""
COMMUNICATION_BYTES = 700 * 2**20
"""Memory of NCCL's buffers on each rank of a job with several ranks."""
WORKSPACE_BYTES = 80 * 10**6
"""Memory of cuBLAS' workspaces. Peaks measured on an H200 exceed the replay by this amount (benchmarks/results/gpu_cells.json)."""
FRAGMENTATION = 0.03
"""Share of memory that torch reserves in addition to what it uses. Source: replays of published runs (benchmarks/results/memory_published.json)."""
UPPER_MARGIN = 0.07
"""Share by which the upper bound exceeds the expected peak, for steps that were compared with measured peaks."""
UNCHECKED_MARGIN = 0.15
"""Share by which the upper bound exceeds the expected peak, for steps that were not compared with measured peaks."""
CHECKPOINTING_PATH = "training.gradientCheckpointing"
MICRO_BATCH_PATH, ACCUMULATION_PATH = "training.batchSizePerDevice", "training.gradientAccumulationSteps"
BATCH_PATHS = (MICRO_BATCH_PATH, ACCUMULATION_PATH)
STRATEGY_PATH, GPUS_PATH, POOL_PATH = "distributed.strategy", "resources.gpusPerNode", "resources.nodePool"
MAX_MICRO_BATCH = 1024


@dataclass(frozen=True)
class JobPlan:
    """The memory plan of a job, with its assumptions."""

    memory: MemoryPlan
    assumptions: tuple[str, ...] = ()
    recomputed_layer_count: int = 0
    layer_count: int = 0

    def fits(self, memory_bytes: int) -> bool:
        """Whether the upper bound is at most `memory_bytes`."""
        return self.memory.upper_bytes <= memory_bytes


def plan_memory(spec: FineTuneJobSpec, shape: ModelShape, facts: RunFacts | None = None) -> JobPlan:
    """Plan the memory of a resolved spec. Errors: those of `describe_step`."""
    description = describe_step(spec, shape, facts)
    return JobPlan(_plan_step(description), description.assumptions, description.step.recomputed_layer_count, shape.layer_count)


def _plan_step(description: StepDescription) -> MemoryPlan:
    step = description.step
    peak = replay(step)
    bytes_by_part = {part.value: byte_count for part, byte_count in peak.bytes_by_part.items()}
    if step.kernels.is_gpu:
        bytes_by_part["buffers"] += WORKSPACE_BYTES
        bytes_by_part["fragmentation"] = int(FRAGMENTATION * sum(bytes_by_part.values()))
        bytes_by_part["context"] = CONTEXT_BYTES + (COMMUNICATION_BYTES if step.has_gradient_buckets or step.optimizer_shards > 1 else 0)
    expected_bytes = sum(bytes_by_part.values())
    margin = UPPER_MARGIN if description.is_checked else UNCHECKED_MARGIN
    return MemoryPlan(expected_bytes=expected_bytes, upper_bytes=int(expected_bytes * (1 + margin)), parts=MemoryParts(**bytes_by_part))


def count_parameters(shape: ModelShape) -> int:
    """Return the number of parameters of a model."""
    return sum(parameter.numel for parameter in build_decoder(Tape(MemoryMeter()), shape, TrainedWeights(1, 1, trains_base_weights=False)).parameters())


def find_largest_micro_batch(spec: FineTuneJobSpec, shape: ModelShape, memory_bytes: int, facts: RunFacts | None = None) -> int:
    """Return the largest `training.batchSizePerDevice` with which the upper bound of the memory fits, at most MAX_MICRO_BATCH; 0 if none fits.

    If `training.effectiveBatchSize` is set, the result divides the rows that one rank processes in an optimizer step.
    """

    def fits(size: int) -> bool:
        return plan_memory(change_spec(spec, {"training.batchSizePerDevice": size}), shape, facts).fits(memory_bytes)

    min_micro_batch = min_batch_size_per_device(spec)
    if spec.training.effective_batch_size is not None:
        micro_batch, accumulation = compute_batch_split(spec)
        return max((size for size in divisors(micro_batch * accumulation) if min_micro_batch <= size <= MAX_MICRO_BATCH and fits(size)), default=0)
    if not fits(min_micro_batch):
        return 0
    fitting_micro_batch, too_large_micro_batch = min_micro_batch, 2 * min_micro_batch
    while too_large_micro_batch <= MAX_MICRO_BATCH and fits(too_large_micro_batch):
        fitting_micro_batch, too_large_micro_batch = too_large_micro_batch, 2 * too_large_micro_batch
    while too_large_micro_batch - fitting_micro_batch > 1:
        middle = (fitting_micro_batch + too_large_micro_batch) // 2
        fitting_micro_batch, too_large_micro_batch = (middle, too_large_micro_batch) if fits(middle) else (fitting_micro_batch, middle)
    return fitting_micro_batch


def format_gigabytes(byte_count: int) -> str:
    """Return a number of bytes as text in GB, with two decimals below 10 GB and one decimal otherwise."""
    return f"{byte_count / 1e9:.2f} GB" if byte_count < 10**10 else f"{byte_count / 1e9:.1f} GB"


def make_batch_values(micro_batch: int, accumulation: int) -> dict[str, Any]:
    """Return the values of `training.batchSizePerDevice` and `training.gradientAccumulationSteps` by spec path."""
    return {MICRO_BATCH_PATH: micro_batch, ACCUMULATION_PATH: accumulation}


def change_spec(spec: FineTuneJobSpec, values_by_path: dict[str, Any]) -> FineTuneJobSpec:
    """Return a copy of a spec with some values changed, by spec path. If `method.type` changes, settings that the new method cannot have are removed."""
    changed_spec = spec.with_values(values_by_path)
    if "method.type" not in values_by_path:
        return changed_spec
    spec_values, method = changed_spec.to_wire(), MethodType(values_by_path["method.type"])
    spec_values["method"] = {"type": method, **({"lora": spec_values["method"].get("lora") or {}} if method in LORA_METHODS else {})}
    if method is not MethodType.QLORA:
        spec_values.get("model", {}).pop("quantization", None)
    return FineTuneJobSpec.model_validate(spec_values)
