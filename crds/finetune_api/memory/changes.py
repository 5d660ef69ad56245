"""Finds changes of a spec with which a job would fit on its GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_api.memory.architecture import ModelShape
from finetune_api.memory.description import Facts
from finetune_api.memory.plan import (
    BATCH_PATHS,
    CHECKPOINTING_PATH,
    GPUS_PATH,
    MICRO_BATCH_PATH,
    STRATEGY_PATH,
    JobPlan,
    batch_values,
    change_spec,
    gigabytes,
    plan_memory,
)
from finetune_api.rules import (
    MAX_ACCUMULATION,
    base_bits,
    batch_split,
    divisors,
    effective_batch,
    gpus_per_node,
    method_type_of,
    min_batch_size_per_device,
    new_problems,
    trains_base_weights,
    world_size,
)
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import GradientCheckpointing, MethodType, StrategyType

MAX_CHANGES = 3
NO_CHANGE = (
    "no change of method, micro-batch, sequence length or recomputation makes the job fit: use larger GPUs, or more GPUs with "
    "`distributed: {strategy: fsdp}`"
)


@dataclass(frozen=True)
class Change:
    """Values that would make a job fit."""

    values: dict[str, Any]
    """By spec path."""
    plan: JobPlan


def changes_that_fit(spec: FineTuneJobSpec, shape: ModelShape, memory_bytes: int, facts: Facts | None = None) -> list[Change]:
    """Return at most three changes of a resolved spec, each of which would fit, those with the smallest consequences first.

    The effective batch stays the same.
    """
    found: list[Change] = []
    for values in _possible_changes(spec):
        changed = change_spec(spec, values | _process_count(values))
        if MICRO_BATCH_PATH in values and GPUS_PATH not in values:
            smaller = _largest_fitting_batch(changed, spec, shape, memory_bytes, facts)
            if smaller is None:
                continue
            values = {path: value for path, value in values.items() if path not in BATCH_PATHS} | smaller
            changed = change_spec(spec, values | _process_count(values))
        if new_problems(spec, changed):
            continue
        plan = plan_memory(changed, shape, facts)
        if plan.fits(memory_bytes):
            found.append(Change(values, plan))
        if len(found) == MAX_CHANGES:
            break
    return found


def describe_changes(changes: Sequence[Change]) -> str:
    """Return a hint that names the changes, with the upper bound of their planned memory."""
    if not changes:
        return NO_CHANGE
    return f"write {'; or '.join(map(change_text, changes))}"


def change_text(change: Change) -> str:
    """Return the values of a change with the upper bound of its planned memory."""
    return f"{values_text(change.values)} ({gigabytes(change.plan.memory.upper_bytes)} at most)"


def values_text(values: Mapping[str, Any]) -> str:
    """Return values by spec path as text."""
    return ", ".join(f"{path}: {value}" for path, value in values.items())


def _possible_changes(spec: FineTuneJobSpec) -> Iterator[dict[str, Any]]:
    """Yield changes in the order of their consequences, the smallest first. A micro-batch of 1 stands for the largest micro-batch that fits."""
    method, length = method_type_of(spec), spec.dataset.max_sequence_length or 2048
    recompute = {CHECKPOINTING_PATH: "enabled"} if spec.training.gradient_checkpointing is GradientCheckpointing.DISABLED else {}
    if recompute:
        yield recompute
    yield {MICRO_BATCH_PATH: 1, **recompute}
    if world_size(spec) > 1 and spec.distributed.strategy is StrategyType.DDP:
        yield {STRATEGY_PATH: "fsdp", **recompute}
    if trains_base_weights(spec):
        yield {"training.optimizer": "adamw_8bit", **recompute}
        yield {"method.type": "lora", **recompute}
        yield {"method.type": "qlora", **recompute}
    elif method is MethodType.LORA and base_bits(spec) is None:
        yield {"method.type": "qlora", **recompute}
        yield {"method.type": "qlora", MICRO_BATCH_PATH: 1, **recompute}
    yield {"dataset.maxSequenceLength": length // 2, **recompute}
    yield {"dataset.maxSequenceLength": length // 2, MICRO_BATCH_PATH: 1, **recompute}
    yield from _more_gpus(spec)


def _more_gpus(spec: FineTuneJobSpec) -> Iterator[dict[str, Any]]:
    """Yield changes that shard the weights over more GPUs of each node. None if the user set another number of processes than of GPUs."""
    nodes, rows = spec.resources.nodes or 1, effective_batch(spec)
    if (spec.resources.processes_per_node or 1) != max(1, gpus_per_node(spec)):
        return
    for gpus in (2, 4, 8):
        if gpus > gpus_per_node(spec) and rows % (gpus * nodes) == 0:
            split = _split(rows // (gpus * nodes), batch_split(spec)[0])
            if split[BATCH_PATHS[1]] <= MAX_ACCUMULATION:
                yield {GPUS_PATH: gpus, STRATEGY_PATH: "fsdp", **split}


def _process_count(values: dict[str, Any]) -> dict[str, Any]:
    """Return `resources.processesPerNode` for a changed number of GPUs: the resolved spec contains the old number."""
    return {"resources.processesPerNode": values[GPUS_PATH]} if GPUS_PATH in values else {}


def _split(rows: int, limit: int) -> dict[str, Any]:
    micro_batch = max(part for part in divisors(rows) if part <= max(1, limit))
    return batch_values(micro_batch, rows // micro_batch)


def _largest_fitting_batch(
    changed: FineTuneJobSpec, spec: FineTuneJobSpec, shape: ModelShape, memory_bytes: int, facts: Facts | None
) -> dict[str, Any] | None:
    """Return micro-batch and accumulation of `changed` for the largest micro-batch that fits and is smaller than that of `spec`. None if none fits."""
    micro_batch, accumulation = batch_split(spec)
    rows = micro_batch * accumulation
    smaller = [part for part in divisors(rows) if min_batch_size_per_device(spec) <= part < micro_batch and rows // part <= MAX_ACCUMULATION]
    for part in reversed(smaller):
        split = batch_values(part, rows // part)
        if plan_memory(change_spec(changed, split), shape, facts).fits(memory_bytes):
            return split
    return None
