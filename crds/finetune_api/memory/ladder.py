"""Advises which values of a job should change after a GPU ran out of memory.

The memory in use when an allocation failed, plus the refused request, is a lower bound of the true peak. If this lower bound exceeds the planned
peak, the plan was too low, and all planned peaks are multiplied by lower bound / planned peak. The advice is the largest micro-batch whose corrected upper
bound fits. The effective batch does not change. If the plan or the trainer chose to keep activations, the advice first enables their recomputation. If
the user disabled recomputation, the advice enables it only if no micro-batch fits without it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune_api.gpus import GPU_TYPES
from finetune_api.memory.architecture import ModelShape
from finetune_api.memory.changes import MAX_CHANGES, find_fitting_changes, format_values_by_path
from finetune_api.memory.description import RunFacts
from finetune_api.memory.plan import (
    BATCH_PATHS,
    CHECKPOINTING_PATH,
    JobPlan,
    change_spec,
    make_batch_values,
    plan_memory,
)
from finetune_api.rules import MAX_ACCUMULATION, method_type_of, min_batch_size_per_device, new_problems
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import GradientCheckpointing, MethodType
from finetune_api.status import MemoryAdvice


@dataclass(frozen=True)
class RefusedAllocation:
    """The memory of a GPU in bytes at the moment when it refused an allocation."""

    needed_bytes: int
    """Memory in use by this process, plus the refused request."""
    available_bytes: int
    """Memory in use by this process, plus the free memory of the GPU."""


@dataclass(frozen=True)
class _CorrectedPlan:
    """Plans the memory of changed specs, and multiplies each planned peak by a factor from the failed attempt."""

    spec: FineTuneJobSpec
    shape: ModelShape
    facts: RunFacts
    correction_factor: float
    available_bytes: int

    def plan(self, values_by_path: dict[str, Any]) -> JobPlan:
        return plan_memory(change_spec(self.spec, values_by_path), self.shape, self.facts)

    def fits(self, values_by_path: dict[str, Any]) -> bool:
        return self.plan(values_by_path).memory.upper_bytes * self.correction_factor <= self.available_bytes


def advise_smaller_values(
    spec: FineTuneJobSpec, shape: ModelShape, facts: RunFacts, refused_allocation: RefusedAllocation, default_paths: Collection[str] = ()
) -> MemoryAdvice:
    """Return advice for the next attempt of a resolved spec that ran out of GPU memory. Errors: those of `describe_step`.

    `facts`: the facts of the failed attempt. `default_paths`: the spec paths that the user did not set. The next attempt recomputes the activations of
    all layers, unless the user disabled recomputation. If no smaller micro-batch is possible, the advice names changes of the spec that fit.
    """
    planned_bytes = plan_memory(spec, shape, facts).memory.expected_bytes
    correction_factor = max(1.0, refused_allocation.needed_bytes / planned_bytes)
    corrected_plan = _CorrectedPlan(spec, shape, replace(facts, recomputed_layer_count=None), correction_factor, refused_allocation.available_bytes)
    attempt_bytes = {"needed_bytes": refused_allocation.needed_bytes, "available_bytes": refused_allocation.available_bytes, "planned_bytes": planned_bytes}
    candidate_lists = _build_candidate_lists(
        spec, keeps_some_layers=facts.recomputed_layer_count is not None, is_recomputation_set_by_user=CHECKPOINTING_PATH not in default_paths
    )
    if not candidate_lists:
        return MemoryAdvice(**attempt_bytes, changes=_describe_fitting_changes(corrected_plan))
    first_fitting_candidates = (_find_first_fitting_candidate(candidates, corrected_plan) for candidates in candidate_lists)
    first_fitting_values = next((candidate for candidate in first_fitting_candidates if candidate is not None), None)
    advised_values = first_fitting_values or candidate_lists[-1][-1]
    memory_plan = corrected_plan.plan(advised_values).memory
    return MemoryAdvice(
        **attempt_bytes, batch_size_per_device=advised_values[BATCH_PATHS[0]], gradient_checkpointing=advised_values.get(CHECKPOINTING_PATH),
        fits=first_fitting_values is not None, expected_bytes=int(memory_plan.expected_bytes * correction_factor),
        upper_bytes=int(memory_plan.upper_bytes * correction_factor),
    )  # fmt: skip


def _build_candidate_lists(spec: FineTuneJobSpec, *, keeps_some_layers: bool, is_recomputation_set_by_user: bool) -> list[list[dict[str, Any]]]:
    """Return lists of candidates that need less memory. Each candidate maps spec paths to values. Each list begins with the largest micro-batch.

    If a candidate of the first list fits, the advice does not use the second list. `keeps_some_layers`: whether the failed attempt kept activations
    that the next attempt can recompute. `is_recomputation_set_by_user`: whether the user set `training.gradientCheckpointing`.
    """
    micro_batch, accumulation = spec.training.batch_size_per_device or 1, spec.training.gradient_accumulation_steps or 1
    micro_batches = [size for size in range(micro_batch, min_batch_size_per_device(spec) - 1, -1) if micro_batch % size == 0]
    batch_candidates: list[dict[str, Any]] = [make_batch_values(size, accumulation * (micro_batch // size)) for size in micro_batches]
    batch_candidates = [candidate for candidate in batch_candidates if candidate[BATCH_PATHS[1]] <= MAX_ACCUMULATION]
    recomputation_values: dict[str, Any] = {CHECKPOINTING_PATH: GradientCheckpointing.ENABLED.value}
    smaller_batch_candidates = [candidate for candidate in batch_candidates[1:] if _keeps_rules(spec, candidate)]
    candidates_with_recomputation = [candidate | recomputation_values for candidate in batch_candidates]
    recomputing_candidates = [candidate for candidate in candidates_with_recomputation if _keeps_rules(spec, candidate)]
    is_recomputation_disabled = spec.training.gradient_checkpointing is GradientCheckpointing.DISABLED
    # Prefix tuning disables recomputation by default.
    if is_recomputation_disabled and (is_recomputation_set_by_user or method_type_of(spec) is MethodType.PREFIX_TUNING):
        candidate_lists = [smaller_batch_candidates, recomputing_candidates]
    elif is_recomputation_disabled or keeps_some_layers:
        candidate_lists = [recomputing_candidates]
    else:
        candidate_lists = [smaller_batch_candidates]
    return [candidates for candidates in candidate_lists if candidates]


def _keeps_rules(spec: FineTuneJobSpec, values_by_path: dict[str, Any]) -> bool:
    return not new_problems(spec, change_spec(spec, values_by_path))


def _find_first_fitting_candidate(candidates: Sequence[dict[str, Any]], corrected_plan: _CorrectedPlan) -> dict[str, Any] | None:
    """Return the first candidate that fits; None if none fits. In `candidates`, each candidate must need less memory than the candidate before it."""
    start, end = 0, len(candidates)
    while start < end:
        middle = (start + end) // 2
        start, end = (start, middle) if corrected_plan.fits(candidates[middle]) else (middle + 1, end)
    return candidates[start] if start < len(candidates) else None


def _describe_fitting_changes(corrected_plan: _CorrectedPlan) -> list[str]:
    """Return up to three changes that let the job fit, as text for users. If a type of GPU has enough memory, the last change names it."""
    memory_bytes = int(corrected_plan.available_bytes / corrected_plan.correction_factor)
    fitting_changes = find_fitting_changes(corrected_plan.spec, corrected_plan.shape, memory_bytes, corrected_plan.facts)
    change_texts = [format_values_by_path(change.values_by_path) for change in fitting_changes]
    upper_bytes = corrected_plan.plan({}).memory.upper_bytes * corrected_plan.correction_factor
    large_enough_gpu_types = [name for name, gpu in sorted(GPU_TYPES.items(), key=lambda item: item[1].memory_bytes) if gpu.memory_bytes >= upper_bytes]
    if not large_enough_gpu_types:
        return change_texts
    return [*change_texts[: MAX_CHANGES - 1], f"a GPU with {math.ceil(upper_bytes / 1e9)} GB of memory, such as {large_enough_gpu_types[0]}"]
