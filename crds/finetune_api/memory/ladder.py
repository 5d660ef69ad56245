"""What a job should change after a GPU had no memory left, from the memory plan and from what the attempt needed.

The memory that was in use when an allocation failed, with the refused request, is a lower bound of the true peak. If it exceeds the planned
peak, the plan was too low, and all planned peaks are multiplied by needed / planned. The advice is the largest micro-batch whose upper bound
then fits. The effective batch does not change. The recomputation that the spec asks for is kept as long as a micro-batch fits with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune_api.gpus import GPU_TYPES
from finetune_api.memory.architecture import ModelShape
from finetune_api.memory.changes import MAX_CHANGES, changes_that_fit
from finetune_api.memory.description import Facts
from finetune_api.memory.plan import BATCH_PATHS, CHECKPOINTING_PATH, JobPlan, change_spec, plan_memory
from finetune_api.rules import min_batch_size_per_device, new_problems
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import GradientCheckpointing
from finetune_api.status import MemoryAdvice

MAX_ACCUMULATION = 65536
"""Maximum of `training.gradientAccumulationSteps` in the CRD."""


@dataclass(frozen=True)
class RefusedAllocation:
    """The memory of a GPU when it refused an allocation, in bytes."""

    needed_bytes: int
    """Memory of this process, with the refused request."""
    available_bytes: int
    """Memory of this process, with the free memory of the GPU."""


@dataclass(frozen=True)
class _Scaled:
    """Planned peaks, corrected by what the failed attempt needed."""

    spec: FineTuneJobSpec
    shape: ModelShape
    facts: Facts
    factor: float
    available_bytes: int

    def plan(self, values: dict[str, Any]) -> JobPlan:
        return plan_memory(change_spec(self.spec, values), self.shape, self.facts)

    def fits(self, values: dict[str, Any]) -> bool:
        return self.plan(values).memory.upper_bytes * self.factor <= self.available_bytes


def advise(spec: FineTuneJobSpec, shape: ModelShape, facts: Facts, refused: RefusedAllocation) -> MemoryAdvice:
    """Return the next values for a resolved spec that ran out of GPU memory. Errors: those of `describe_step`.

    `facts`: those of the failed attempt. The next attempt recomputes the activations of all layers, unless the spec disables it. Without
    smaller values, the advice names changes of the spec that would fit.
    """
    planned = plan_memory(spec, shape, facts).memory.expected_bytes
    factor = max(1.0, refused.needed_bytes / planned)
    scaled = _Scaled(spec, shape, replace(facts, recomputed_layers=None), factor, refused.available_bytes)
    measured = {"needed_bytes": refused.needed_bytes, "available_bytes": refused.available_bytes, "planned_bytes": planned}
    steps = _smaller_values(spec, keeps_some_layers=facts.recomputed_layers is not None)
    if not steps:
        return MemoryAdvice(**measured, changes=_changes(scaled))
    chosen = next((found for values in steps if (found := _first_that_fits(values, scaled)) is not None), None)
    values = chosen or steps[-1][-1]
    memory = scaled.plan(values).memory
    return MemoryAdvice(
        **measured, batch_size_per_device=values[BATCH_PATHS[0]], gradient_checkpointing=values.get(CHECKPOINTING_PATH), fits=chosen is not None,
        expected_bytes=int(memory.expected_bytes * factor), upper_bytes=int(memory.upper_bytes * factor),
    )  # fmt: skip


def _smaller_values(spec: FineTuneJobSpec, *, keeps_some_layers: bool) -> list[list[dict[str, Any]]]:
    """Return the values that need less memory: lists in the order of preference, each from the largest micro-batch to the smallest.

    `keeps_some_layers`: the failed attempt kept activations that the next attempt can recompute.
    """
    batch, accumulation = spec.training.batch_size_per_device or 1, spec.training.gradient_accumulation_steps or 1
    parts = [part for part in range(batch, min_batch_size_per_device(spec) - 1, -1) if batch % part == 0]
    batches: list[dict[str, Any]] = [dict(zip(BATCH_PATHS, (part, accumulation * (batch // part)), strict=True)) for part in parts]
    batches = [values for values in batches if values[BATCH_PATHS[1]] <= MAX_ACCUMULATION]
    recompute: dict[str, Any] = {CHECKPOINTING_PATH: GradientCheckpointing.ENABLED.value}
    steps: list[list[dict[str, Any]]]
    if spec.training.gradient_checkpointing is GradientCheckpointing.DISABLED:
        steps = [batches[1:], [values | recompute for values in batches]]
    elif keeps_some_layers:
        steps = [[values | recompute for values in batches]]
    else:
        steps = [batches[1:]]
    allowed = ([values for values in one if not new_problems(spec, change_spec(spec, values))] for one in steps)
    return [one for one in allowed if one]


def _first_that_fits(candidates: Sequence[dict[str, Any]], scaled: _Scaled) -> dict[str, Any] | None:
    """Return the first of the values that fits, None if none does. The planned peak falls from the first to the last."""
    start, end = 0, len(candidates)
    while start < end:
        middle = (start + end) // 2
        start, end = (start, middle) if scaled.fits(candidates[middle]) else (middle + 1, end)
    return candidates[start] if start < len(candidates) else None


def _changes(scaled: _Scaled) -> list[str]:
    """Return up to three changes that would fit, as text for users. A GPU with more memory comes last."""
    found = changes_that_fit(scaled.spec, scaled.shape, int(scaled.available_bytes / scaled.factor), scaled.facts)
    texts = [", ".join(f"{path}: {value}" for path, value in change.values.items()) for change in found]
    upper_bytes = scaled.plan({}).memory.upper_bytes * scaled.factor
    larger = [name for name, gpu in sorted(GPU_TYPES.items(), key=lambda item: item[1].memory_bytes) if gpu.memory_bytes >= upper_bytes]
    if not larger:
        return texts
    return [*texts[: MAX_CHANGES - 1], f"a GPU with {math.ceil(upper_bytes / 1e9)} GB of memory, such as {larger[0]}"]
