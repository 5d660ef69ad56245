"""Chooses the changes for the next attempt after memory ran out or the loss diverged.

Out of memory: the effective batch never changes. If the failed pod has sent advice of the memory plan (`finetune_api.memory.ladder`), its
micro-batch and recomputation are used. Without advice, the new micro-batch is the largest divisor of the old micro-batch that is at most half
of it, but not below the objective's minimum, and activation checkpointing is enabled if the micro-batch cannot be reduced further. Gradient
accumulation is multiplied by the same factor. The evaluation batch is reduced to at most the training batch. If memory runs out again
after that, the job fails, and the failure message contains the final values. A change that violates a rule of the spec is skipped.

Divergence: the next attempt replays the run unchanged from the newest healthy checkpoint, because a hardware fault probably does not
repeat. If the loss diverges again, each of the next two attempts starts from an earlier healthy checkpoint with half the learning rate.
If the loss still diverges, the job fails.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from finetune_api.names import Reason, attempt_of_uri
from finetune_api.rules import (
    MAX_ACCUMULATION,
    evaluates_during_training,
    has_test_set,
    min_batch_size_per_device,
    new_problems,
)
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import GradientCheckpointing, OnDivergence, OnOutOfMemory
from finetune_api.status import Adaptation, Checkpoint, MemoryAdvice
from pydantic import ValidationError

from finetune_operator.text import clean

logger = logging.getLogger(__name__)

BATCH_FIELD = "training.batchSizePerDevice"
ACCUMULATION_FIELD = "training.gradientAccumulationSteps"
EVALUATION_BATCH_FIELD = "evaluation.batchSizePerDevice"
GRADIENT_CHECKPOINTING_FIELD = "training.gradientCheckpointing"
LEARNING_RATE_FIELD = "training.learningRate"
MAX_STEP_KEY = "resume.maxStep"
"""Step of the newest checkpoint that an attempt may start from. This is not a field of the spec, but is stored with the adaptations."""
FIRST_ATTEMPT_KEY = "resume.firstAttempt"
"""Number of the first attempt after the rollback. Checkpoints of this and later attempts are not affected by the rollback."""
MAX_ROLLBACKS = 2
RATE_FACTOR = 0.5


@dataclass(frozen=True)
class AdaptationsExhausted:
    """No further adaptation is possible, so the job fails."""

    message: str
    hint: str


def apply_adaptations(spec: FineTuneJobSpec, adaptations: Iterable[Adaptation]) -> FineTuneJobSpec:
    """Return the resolved spec with all adaptations applied. A later adaptation replaces an earlier value of the same field."""
    try:
        return spec.with_values(_spec_values(adaptations))
    except ValidationError as error:
        # Only a manual edit of the status can cause this error. The job continues with the unadapted spec.
        logger.warning("the adaptations in status cannot be applied and are ignored: %s", error)
        return spec


def original_values(spec: FineTuneJobSpec, adaptations: Iterable[Adaptation]) -> dict[str, Any]:
    """Return the original values of the adapted fields, by path. `spec` is resolved, without adaptations."""
    return {path: spec.value(path) for path in _spec_values(adaptations)}


def _spec_values(adaptations: Iterable[Adaptation]) -> dict[str, Any]:
    """Return the newest value of each adapted field of the spec, by path."""
    return {
        path: value for path, value in adapted_values(adaptations).items() if path not in (MAX_STEP_KEY, FIRST_ATTEMPT_KEY)
    }


def adapted_values(adaptations: Iterable[Adaptation]) -> dict[str, Any]:
    """Return the newest value of each adapted field and of the rollback fields, by path."""
    result: dict[str, Any] = {}
    for adaptation in adaptations:
        result |= adaptation.set or {}
    return result


def adapt_to_out_of_memory(
    spec: FineTuneJobSpec, now: datetime, advice: MemoryAdvice | None = None, earlier: Iterable[Adaptation] = ()
) -> Adaptation | AdaptationsExhausted:
    """Return the next change after an attempt with `spec` ran out of memory.

    `spec` is resolved and has all `earlier` adaptations. `advice`: of the memory plan, from the failed pod; None if it sent none.
    """
    batch = spec.training.batch_size_per_device or 1
    accumulation = spec.training.gradient_accumulation_steps or 1
    if spec.policy.on_out_of_memory is OnOutOfMemory.FAIL:
        return AdaptationsExhausted("policy.onOutOfMemory is Fail", "write policy.onOutOfMemory: Adapt, or lower the batch")
    for values in _advised_changes(spec, batch, accumulation, advice, earlier):
        if not new_problems(spec, spec.with_values(values)):
            return _memory_adaptation(spec, values, now, advice)
    for values in _possible_changes(spec, batch, accumulation):
        if not new_problems(spec, spec.with_values(values)):
            return _memory_adaptation(spec, values, now)
    return AdaptationsExhausted(
        f"memory ran out with batchSizePerDevice {batch}, gradientAccumulationSteps {accumulation} and activation "
        f"checkpointing {spec.training.gradient_checkpointing or 'unknown'}: no further reduction is possible",
        _hint_of_exhausted(advice),
    )


def _memory_adaptation(spec: FineTuneJobSpec, values: dict[str, Any], now: datetime, advice: MemoryAdvice | None = None) -> Adaptation:
    changes = (
        f"{_display_path(path)} {spec.value(path)} -> {value}" if spec.value(path) != value else f"{_display_path(path)} {value} for all layers"
        for path, value in values.items()
    )
    explanation = _explain(advice) if advice is not None else None
    return Adaptation(time=now, reason=Reason.OUT_OF_MEMORY, change=", ".join(changes), set=values, explanation=explanation)


def _advised_changes(
    spec: FineTuneJobSpec, batch: int, accumulation: int, advice: MemoryAdvice | None, earlier: Iterable[Adaptation]
) -> Iterator[dict[str, Any]]:
    """Yield the advised change, if it needs less memory. A pod's advice cannot change the effective batch, and cannot be repeated forever."""
    micro_batch = advice.batch_size_per_device if advice is not None else None
    if advice is None or micro_batch is None or not min_batch_size_per_device(spec) <= micro_batch <= batch or batch % micro_batch:
        return
    values: dict[str, Any] = {}
    if advice.gradient_checkpointing == GradientCheckpointing.ENABLED and GRADIENT_CHECKPOINTING_FIELD not in adapted_values(earlier):
        values[GRADIENT_CHECKPOINTING_FIELD] = GradientCheckpointing.ENABLED.value
    new_accumulation = accumulation * (batch // micro_batch)
    if micro_batch < batch and new_accumulation <= MAX_ACCUMULATION:
        values |= {BATCH_FIELD: micro_batch, ACCUMULATION_FIELD: new_accumulation}
    if not values:
        return
    if _evaluation_batch(spec) > micro_batch:
        yield values | {EVALUATION_BATCH_FIELD: micro_batch}
    yield values


def _explain(advice: MemoryAdvice) -> str:
    """Return the numbers behind an advised change, for the status."""
    needed, available, planned, expected, upper = (
        f"{(count or 0) / 1e9:.1f} GB"
        for count in (advice.needed_bytes, advice.available_bytes, advice.planned_bytes, advice.expected_bytes, advice.upper_bytes)
    )
    corrected = " corrected by these numbers," if advice.needed_bytes > advice.planned_bytes else ""
    smallest = "" if advice.fits else "; this may not fit, but no values need less"
    return (
        f"the attempt needed at least {needed} of GPU memory, {available} were available, and the plan expected {planned};{corrected} the new "
        f"values need {expected}, at most {upper}{smallest}"
    )


def _hint_of_exhausted(advice: MemoryAdvice | None) -> str:
    if advice is None or not advice.changes:
        return "use a larger GPU or resources.memory, a quantised base (method qlora), or a shorter dataset.maxSequenceLength"
    return f"create a job with one of these changes, which fit by the memory plan: {'; '.join(clean(change, 200) for change in advice.changes[:3])}"


def _evaluation_batch(spec: FineTuneJobSpec) -> int:
    """Return the batch of evaluations in the training process, or 0 if there are none."""
    runs_evaluation = evaluates_during_training(spec) or has_test_set(spec)
    return (spec.evaluation.batch_size_per_device or 0) if runs_evaluation else 0


def _possible_changes(spec: FineTuneJobSpec, batch: int, accumulation: int) -> Iterator[dict[str, Any]]:
    """Yield the possible next changes without advice. The most effective change comes first."""
    evaluation_batch = _evaluation_batch(spec)
    micro_batch = next((part for part in range(batch // 2, min_batch_size_per_device(spec) - 1, -1) if batch % part == 0), 0)
    new_accumulation = accumulation * (batch // micro_batch) if micro_batch else 0
    if 0 < new_accumulation <= MAX_ACCUMULATION:
        values: dict[str, Any] = {BATCH_FIELD: micro_batch, ACCUMULATION_FIELD: new_accumulation}
        if evaluation_batch > micro_batch:
            yield values | {EVALUATION_BATCH_FIELD: micro_batch}
        yield values
    if evaluation_batch > batch:
        yield {EVALUATION_BATCH_FIELD: batch}
    if spec.training.gradient_checkpointing is GradientCheckpointing.DISABLED:
        yield {GRADIENT_CHECKPOINTING_FIELD: GradientCheckpointing.ENABLED.value}


def _display_path(path: str) -> str:
    """Return the field's name for messages: without the prefix `training.`."""
    return path.removeprefix("training.")


def adapt_to_divergence(
    spec: FineTuneJobSpec, adaptations: Iterable[Adaptation], checkpoints: Iterable[Checkpoint], now: datetime,
    attempt: int = 1,
) -> Adaptation | AdaptationsExhausted:  # fmt: skip
    """Return the next change for a run that diverged: the loss of `attempt` was not finite. `spec` has all earlier adaptations."""
    if spec.policy.on_divergence is OnDivergence.FAIL:
        return AdaptationsExhausted("policy.onDivergence is Fail", "lower training.learningRate or training.maxGradNorm")
    earlier_divergences = [adaptation for adaptation in adaptations if adaptation.reason == Reason.DIVERGED]
    steps = sorted((c.step for c in checkpoints if c.healthy is not False), reverse=True)
    if not earlier_divergences:
        start = f"step {steps[0]}" if steps else "the start"
        return Adaptation(time=now, reason=Reason.DIVERGED, change=f"replay from {start}, nothing changed", set={})
    if len(earlier_divergences) > MAX_ROLLBACKS:
        return AdaptationsExhausted(
            f"the loss was not finite again after one replay and {MAX_ROLLBACKS} rollbacks, "
            f"the last one with learningRate {spec.training.learning_rate:g}",
            "check the dataset rows that were used around the failed step; lower training.learningRate or training.maxGradNorm",
        )
    # The run diverged twice after the newest healthy checkpoint. So the first rollback skips one checkpoint, and the second skips two.
    rollback_step = steps[min(len(earlier_divergences), len(steps) - 1)] if len(steps) > 1 else 0
    rate = spec.training.learning_rate or 0.0
    lower_rate = rate * RATE_FACTOR
    change_text = f"rolled back to {f'step {rollback_step}' if rollback_step else 'the start'}, learningRate {rate:g} -> {lower_rate:g}"
    changed_values = {LEARNING_RATE_FIELD: lower_rate, MAX_STEP_KEY: rollback_step, FIRST_ATTEMPT_KEY: attempt + 1}
    return Adaptation(time=now, reason=Reason.DIVERGED, change=change_text, set=changed_values)


def rolled_back_attempt(adaptations: Iterable[Adaptation]) -> int | None:
    """Return the number of the first attempt after the last rollback, or None if there was no rollback."""
    first_attempt = adapted_values(adaptations).get(FIRST_ATTEMPT_KEY)
    return first_attempt if isinstance(first_attempt, int) else None


def max_start_step(adaptations: Iterable[Adaptation], checkpoints: Iterable[Checkpoint]) -> int | None:
    """Return the newest step that the next attempt may start from, or None if there is no limit.

    After a rollback, an attempt must not continue from later checkpoints of the attempts before the rollback. It may continue from
    checkpoints of the attempts after the rollback. If these checkpoints are newer than all others, the limit is no longer needed.
    """
    values = adapted_values(adaptations)
    limit, first_attempt = values.get(MAX_STEP_KEY), values.get(FIRST_ATTEMPT_KEY)
    if not isinstance(limit, int) or not isinstance(first_attempt, int):
        return limit if isinstance(limit, int) else None
    steps_before, steps_after = [0], [0]
    for checkpoint in checkpoints:
        is_after = (attempt_of_uri(checkpoint.uri) or 0) >= first_attempt
        (steps_after if is_after else steps_before).append(checkpoint.step)
    return None if max(steps_after) > max(steps_before) else max(limit, *steps_after)
