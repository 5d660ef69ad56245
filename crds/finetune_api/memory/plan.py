"""The memory plan of a job: expected peak and upper bound for each rank, in parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from finetune_api.defaults import ResolvedSpec
from finetune_api.memory.architecture import ModelShape
from finetune_api.memory.description import Description, Facts, describe_step
from finetune_api.memory.layers import TrainedWeights, build_decoder
from finetune_api.memory.replay import replay
from finetune_api.memory.tape import Meter, Tape
from finetune_api.rules import LORA_METHODS, base_bits, method_type_of, trains_base_weights
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import GradientCheckpointing, MethodType
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
BATCH_PATHS = ("training.batchSizePerDevice", "training.gradientAccumulationSteps")
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


def plan_for_gpu(resolved: ResolvedSpec, shape: ModelShape, memory_bytes: int, facts: Facts | None = None) -> JobPlan:
    """Plan a job for a GPU. If the spec leaves it open, activations are recomputed only if they do not fit.

    The trainer decides the same with the real length of the rows, and may recompute the activations of some layers only.
    Errors: those of `describe_step`.
    """
    if CHECKPOINTING_PATH in resolved.defaults:
        kept = plan_memory(resolved.spec, shape, replace(facts or Facts(), recomputed_layers=0))
        if kept.fits(memory_bytes):
            return kept
    return plan_memory(resolved.spec, shape, facts)


def largest_batch(spec: FineTuneJobSpec, shape: ModelShape, memory_bytes: int, facts: Facts | None = None) -> int:
    """Return the largest `training.batchSizePerDevice` whose upper bound fits; 0 if none does."""

    def fits(rows: int) -> bool:
        return plan_memory(change_spec(spec, {"training.batchSizePerDevice": rows}), shape, facts).fits(memory_bytes)

    if not fits(1):
        return 0
    fitting, too_large = 1, 2
    while too_large <= LARGEST_BATCH and fits(too_large):
        fitting, too_large = too_large, 2 * too_large
    while too_large - fitting > 1:
        middle = (fitting + too_large) // 2
        fitting, too_large = (middle, too_large) if fits(middle) else (fitting, middle)
    return fitting


@dataclass(frozen=True)
class Change:
    """Values that would make a job fit."""

    values: dict[str, Any]
    """By spec path."""
    plan: JobPlan


def changes_that_fit(spec: FineTuneJobSpec, shape: ModelShape, memory_bytes: int, facts: Facts | None = None) -> list[Change]:
    """Return at most three changes of a resolved spec, each of which would fit, those with the smallest consequences first."""
    found = []
    for values in _possible_changes(spec):
        changed = change_spec(spec, values)
        if "training.batchSizePerDevice" in values:
            rows = largest_batch(changed, shape, memory_bytes, facts)
            if rows == 0 or rows >= (spec.training.batch_size_per_device or 4):
                continue
            values = _keep_effective_batch(spec, rows) | {path: value for path, value in values.items() if path not in BATCH_PATHS}
            changed = change_spec(spec, values)
        plan = plan_memory(changed, shape, facts)
        if plan.fits(memory_bytes):
            found.append(Change(values, plan))
    return found[:3]


def _possible_changes(spec: FineTuneJobSpec) -> Iterator[dict[str, Any]]:
    """Changes from small to large consequences. The batch is a placeholder for the largest that fits."""
    method, length = method_type_of(spec), spec.dataset.max_sequence_length or 2048
    recompute = {CHECKPOINTING_PATH: "enabled"} if spec.training.gradient_checkpointing is GradientCheckpointing.DISABLED else {}
    if recompute:
        yield recompute
    yield {"training.batchSizePerDevice": 1, **recompute}
    if trains_base_weights(spec):
        yield {"training.optimizer": "adamw_8bit", **recompute}
        yield {"method.type": "lora", **recompute}
        yield {"method.type": "qlora", **recompute}
    elif method is MethodType.LORA and base_bits(spec) is None:
        yield {"method.type": "qlora", **recompute}
        yield {"method.type": "qlora", "training.batchSizePerDevice": 1, **recompute}
    yield {"dataset.maxSequenceLength": length // 2, **recompute}
    yield {"dataset.maxSequenceLength": length // 2, "training.batchSizePerDevice": 1, **recompute}


def _keep_effective_batch(spec: FineTuneJobSpec, rows: int) -> dict[str, Any]:
    """A smaller micro-batch with more accumulation, so that each optimizer step has at least as many rows."""
    before = (spec.training.batch_size_per_device or 4) * (spec.training.gradient_accumulation_steps or 4)
    return dict(zip(BATCH_PATHS, (rows, -(-before // rows)), strict=True))


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
