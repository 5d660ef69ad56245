"""What a job should change after a GPU had no memory left, from the memory plan and from what the attempt needed.

The memory that was in use when an allocation failed, with the refused request, is a lower bound of the true peak. If it exceeds the planned
peak, the plan was too low, and all planned peaks are multiplied by needed / planned. The advice is the largest micro-batch whose upper bound
then fits. The effective batch does not change. Recomputation that the user disables stays disabled as long as a micro-batch fits without it. If the
plan or the trainer chose to keep activations, they are recomputed first.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune_api.gpus import GPU_TYPES
from finetune_api.memory.architecture import ModelShape
from finetune_api.memory.changes import MAX_CHANGES, changes_that_fit, values_text
from finetune_api.memory.description import Facts
from finetune_api.memory.plan import BATCH_PATHS, CHECKPOINTING_PATH, JobPlan, batch_values, change_spec, plan_memory
from finetune_api.rules import MAX_ACCUMULATION, method_type_of, min_batch_size_per_device, new_problems
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import GradientCheckpointing, MethodType
from finetune_api.status import MemoryAdvice


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


def advise(
    spec: FineTuneJobSpec, shape: ModelShape, facts: Facts, refused: RefusedAllocation, defaults: Collection[str] = ()
) -> MemoryAdvice:
    """Return the next values for a resolved spec that ran out of GPU memory. Errors: those of `describe_step`.

    `facts`: those of the failed attempt. `defaults`: paths that the user has left out. The next attempt recomputes the activations of all
    layers, unless the user disables it. Without smaller values, the advice names changes of the spec that would fit.
    """
    planned = plan_memory(spec, shape, facts).memory.expected_bytes
    factor = max(1.0, refused.needed_bytes / planned)
    scaled = _Scaled(spec, shape, replace(facts, recomputed_layers=None), factor, refused.available_bytes)
    measured = {"needed_bytes": refused.needed_bytes, "available_bytes": refused.available_bytes, "planned_bytes": planned}
    steps = _smaller_values(spec, keeps_some_layers=facts.recomputed_layers is not None, has_users_recomputation=CHECKPOINTING_PATH not in defaults)
    if not steps:
        return MemoryAdvice(**measured, changes=_changes(scaled))
    chosen = next((found for values in steps if (found := _first_that_fits(values, scaled)) is not None), None)
    values = chosen or steps[-1][-1]
    memory = scaled.plan(values).memory
    return MemoryAdvice(
        **measured, batch_size_per_device=values[BATCH_PATHS[0]], gradient_checkpointing=values.get(CHECKPOINTING_PATH), fits=chosen is not None,
        expected_bytes=int(memory.expected_bytes * factor), upper_bytes=int(memory.upper_bytes * factor),
    )  # fmt: skip


def _smaller_values(spec: FineTuneJobSpec, *, keeps_some_layers: bool, has_users_recomputation: bool) -> list[list[dict[str, Any]]]:
    """Return the values that need less memory: lists in the order of preference, each from the largest micro-batch to the smallest.

    `keeps_some_layers`: the failed attempt kept activations that the next attempt can recompute. `has_users_recomputation`: whether the user
    wrote `training.gradientCheckpointing`, so that the plan did not choose it.
    """
    batch, accumulation = spec.training.batch_size_per_device or 1, spec.training.gradient_accumulation_steps or 1
    parts = [part for part in range(batch, min_batch_size_per_device(spec) - 1, -1) if batch % part == 0]
    batches: list[dict[str, Any]] = [batch_values(part, accumulation * (batch // part)) for part in parts]
    batches = [values for values in batches if values[BATCH_PATHS[1]] <= MAX_ACCUMULATION]
    recompute: dict[str, Any] = {CHECKPOINTING_PATH: GradientCheckpointing.ENABLED.value}
    smaller = [values for values in batches[1:] if _keeps_rules(spec, values)]
    recomputing = [values | recompute for values in batches if _keeps_rules(spec, values | recompute)]
    is_disabled = spec.training.gradient_checkpointing is GradientCheckpointing.DISABLED
    if is_disabled and (has_users_recomputation or method_type_of(spec) is MethodType.PREFIX_TUNING):  # its default is disabled
        steps = [smaller, recomputing]
    elif is_disabled or keeps_some_layers:
        steps = [recomputing]
    else:
        steps = [smaller]
    return [one for one in steps if one]


def _keeps_rules(spec: FineTuneJobSpec, values: dict[str, Any]) -> bool:
    return not new_problems(spec, change_spec(spec, values))


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
    texts = [values_text(change.values) for change in found]
    upper_bytes = scaled.plan({}).memory.upper_bytes * scaled.factor
    larger = [name for name, gpu in sorted(GPU_TYPES.items(), key=lambda item: item[1].memory_bytes) if gpu.memory_bytes >= upper_bytes]
    if not larger:
        return texts
    return [*texts[: MAX_CHANGES - 1], f"a GPU with {math.ceil(upper_bytes / 1e9)} GB of memory, such as {larger[0]}"]
