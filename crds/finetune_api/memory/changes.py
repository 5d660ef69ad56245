"""Finds changes of a spec that let a job fit on its GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_api.memory.architecture import ModelShape
from finetune_api.memory.description import RunFacts
from finetune_api.memory.plan import (
    BATCH_PATHS,
    CHECKPOINTING_PATH,
    GPUS_PATH,
    MICRO_BATCH_PATH,
    STRATEGY_PATH,
    JobPlan,
    change_spec,
    format_gigabytes,
    make_batch_values,
    plan_memory,
)
from finetune_api.rules import (
    MAX_ACCUMULATION,
    base_bits,
    compute_batch_split,
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
NO_CHANGE_HINT = (
    "no change of method, micro-batch, sequence length or recomputation makes the job fit: use larger GPUs, or more GPUs with "
    "`distributed: {strategy: fsdp}`"
)


@dataclass(frozen=True)
class Change:
    """A change of a spec that lets the job fit on its GPUs."""

    values_by_path: dict[str, Any]
    """The new values by spec path."""
    plan: JobPlan
    """The memory plan of the changed spec."""


def find_fitting_changes(spec: FineTuneJobSpec, shape: ModelShape, memory_bytes: int, facts: RunFacts | None = None) -> list[Change]:
    """Return at most three changes of a resolved spec. Each change alone lets the job fit. The change with the smallest consequences comes first.

    No change alters the effective batch.
    """
    fitting_changes: list[Change] = []
    for values_by_path in _iterate_possible_changes(spec):
        changed_spec = change_spec(spec, values_by_path | _match_process_count(values_by_path))
        if MICRO_BATCH_PATH in values_by_path and GPUS_PATH not in values_by_path:
            fitting_batch_values = _find_largest_fitting_batch(changed_spec, spec, shape, memory_bytes, facts)
            if fitting_batch_values is None:
                continue
            values_by_path = {path: value for path, value in values_by_path.items() if path not in BATCH_PATHS} | fitting_batch_values
            changed_spec = change_spec(spec, values_by_path | _match_process_count(values_by_path))
        if new_problems(spec, changed_spec):
            continue
        plan = plan_memory(changed_spec, shape, facts)
        if plan.fits(memory_bytes):
            fitting_changes.append(Change(values_by_path, plan))
        if len(fitting_changes) == MAX_CHANGES:
            break
    return fitting_changes


def format_changes_hint(changes: Sequence[Change]) -> str:
    """Return the hint of an error: the changes, each with the upper bound of its planned memory."""
    if not changes:
        return NO_CHANGE_HINT
    return f"write {'; or '.join(map(format_change, changes))}"


def format_change(change: Change) -> str:
    """Return a change as text: its values and the upper bound of its planned memory."""
    return f"{format_values_by_path(change.values_by_path)} ({format_gigabytes(change.plan.memory.upper_bytes)} at most)"


def format_values_by_path(values_by_path: Mapping[str, Any]) -> str:
    """Return values by spec path as text, such as `method.type: lora, training.batchSizePerDevice: 1`."""
    return ", ".join(f"{path}: {value}" for path, value in values_by_path.items())


def _iterate_possible_changes(spec: FineTuneJobSpec) -> Iterator[dict[str, Any]]:
    """Yield the changes to try, those with the smallest consequences first.

    In a change, a micro-batch of 1 is a placeholder for the largest micro-batch that fits.
    """
    method, max_sequence_length = method_type_of(spec), spec.dataset.max_sequence_length or 2048
    recomputation_values = {CHECKPOINTING_PATH: "enabled"} if spec.training.gradient_checkpointing is GradientCheckpointing.DISABLED else {}
    if recomputation_values:
        yield recomputation_values
    yield {MICRO_BATCH_PATH: 1, **recomputation_values}
    if world_size(spec) > 1 and spec.distributed.strategy is StrategyType.DDP:
        yield {STRATEGY_PATH: "fsdp", **recomputation_values}
    if trains_base_weights(spec):
        yield {"training.optimizer": "adamw_8bit", **recomputation_values}
        yield {"method.type": "lora", **recomputation_values}
        yield {"method.type": "qlora", **recomputation_values}
    elif method is MethodType.LORA and base_bits(spec) is None:
        yield {"method.type": "qlora", **recomputation_values}
        yield {"method.type": "qlora", MICRO_BATCH_PATH: 1, **recomputation_values}
    yield {"dataset.maxSequenceLength": max_sequence_length // 2, **recomputation_values}
    yield {"dataset.maxSequenceLength": max_sequence_length // 2, MICRO_BATCH_PATH: 1, **recomputation_values}
    yield from _iterate_changes_with_more_gpus(spec)


def _iterate_changes_with_more_gpus(spec: FineTuneJobSpec) -> Iterator[dict[str, Any]]:
    """Yield changes that shard the weights over more GPUs of each node. Yields nothing if a node has more or fewer processes than GPUs."""
    node_count, rows_per_step = spec.resources.nodes or 1, effective_batch(spec)
    if (spec.resources.processes_per_node or 1) != max(1, gpus_per_node(spec)):
        return
    for gpu_count in (2, 4, 8):
        if gpu_count > gpus_per_node(spec) and rows_per_step % (gpu_count * node_count) == 0:
            batch_split_values = _split_batch(rows_per_step // (gpu_count * node_count), compute_batch_split(spec)[0])
            if batch_split_values[BATCH_PATHS[1]] <= MAX_ACCUMULATION:
                yield {GPUS_PATH: gpu_count, STRATEGY_PATH: "fsdp", **batch_split_values}


def _match_process_count(values_by_path: dict[str, Any]) -> dict[str, Any]:
    """If a change sets the number of GPUs, return the same number for `resources.processesPerNode`.

    The resolved spec contains the number of processes for the number of GPUs before the change.
    """
    return {"resources.processesPerNode": values_by_path[GPUS_PATH]} if GPUS_PATH in values_by_path else {}


def _split_batch(rows_per_rank: int, max_micro_batch: int) -> dict[str, Any]:
    """Split the rows of one rank in an optimizer step into equal micro-batches.

    The micro-batches are as large as possible, but have at most `max_micro_batch` rows. Returns values by spec path.
    """
    micro_batch = max(divisor for divisor in divisors(rows_per_rank) if divisor <= max(1, max_micro_batch))
    return make_batch_values(micro_batch, rows_per_rank // micro_batch)


def _find_largest_fitting_batch(
    changed_spec: FineTuneJobSpec, spec: FineTuneJobSpec, shape: ModelShape, memory_bytes: int, facts: RunFacts | None
) -> dict[str, Any] | None:
    """Return the largest micro-batch with which `changed_spec` fits, and the accumulation that keeps the effective batch, by spec path.

    Only micro-batches smaller than that of `spec` are tried. None: no micro-batch fits.
    """
    micro_batch, accumulation = compute_batch_split(spec)
    rows_per_rank = micro_batch * accumulation
    smaller_micro_batches = [
        size for size in divisors(rows_per_rank)
        if min_batch_size_per_device(spec) <= size < micro_batch and rows_per_rank // size <= MAX_ACCUMULATION
    ]  # fmt: skip
    for size in reversed(smaller_micro_batches):
        batch_split_values = make_batch_values(size, rows_per_rank // size)
        if plan_memory(change_spec(changed_spec, batch_split_values), shape, facts).fits(memory_bytes):
            return batch_split_values
    return None
