"""Chooses the changes for the next attempt after memory ran out or the loss diverged.

Out of memory: the failed pod may have sent advice from the memory plan (`finetune_api.memory.ladder`). If it has, the next attempt uses the advised
micro-batch and recomputation. Without advice, the new micro-batch is the largest divisor of the old micro-batch that is at most half of the old micro-batch
and at least the objective's minimum. If the micro-batch cannot be reduced further, activation checkpointing is enabled. Gradient accumulation grows by the
factor by which the micro-batch shrinks, so the effective batch never changes. The evaluation batch is reduced to at most the training batch. A change that
violates a rule of the spec is skipped. If no change is left, the job fails, and the failure message contains the final values.

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

from finetune_api.names import Reason, parse_attempt_of_uri
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
"""Key of the newest step that an attempt may start from after a rollback. The key is stored with the adaptations, but is not a field of the spec."""
FIRST_ATTEMPT_KEY = "resume.firstAttempt"
"""Key of the number of the first attempt after the rollback. The rollback does not exclude checkpoints of this and later attempts."""
MAX_ROLLBACKS = 2
LEARNING_RATE_FACTOR = 0.5


@dataclass(frozen=True)
class AdaptationsExhausted:
    """No further adaptation is possible, so the job fails."""

    message: str
    hint: str


def apply_adaptations(spec: FineTuneJobSpec, adaptations: Iterable[Adaptation]) -> FineTuneJobSpec:
    """Return the resolved spec with all adaptations applied. A later adaptation replaces an earlier value of the same field."""
    try:
        return spec.with_values(_merge_adapted_spec_values(adaptations))
    except ValidationError as error:
        # Only a manual edit of the status can cause this error. The job continues with the unadapted spec.
        logger.warning("the adaptations in status cannot be applied and are ignored: %s", error)
        return spec


def get_original_values(spec: FineTuneJobSpec, adaptations: Iterable[Adaptation]) -> dict[str, Any]:
    """Return the original values of the adapted fields, by path. `spec` is the resolved spec before any adaptation was applied."""
    return {path: spec.value(path) for path in _merge_adapted_spec_values(adaptations)}


def _merge_adapted_spec_values(adaptations: Iterable[Adaptation]) -> dict[str, Any]:
    """Return the newest value of each adapted field of the spec, by path."""
    return {
        path: value for path, value in merge_adapted_values(adaptations).items() if path not in (MAX_STEP_KEY, FIRST_ATTEMPT_KEY)
    }


def merge_adapted_values(adaptations: Iterable[Adaptation]) -> dict[str, Any]:
    """Return the newest value of each adapted field and of the rollback fields, by path."""
    adapted_values: dict[str, Any] = {}
    for adaptation in adaptations:
        adapted_values |= adaptation.set or {}
    return adapted_values


def adapt_to_out_of_memory(
    spec: FineTuneJobSpec, now: datetime, advice: MemoryAdvice | None = None, earlier_adaptations: Iterable[Adaptation] = ()
) -> Adaptation | AdaptationsExhausted:
    """Return the change for the next attempt after an attempt with `spec` ran out of memory.

    `spec` is the resolved spec after `earlier_adaptations` were applied. `advice`: the memory plan's advice from the failed pod, or None if the pod
    sent no advice.
    """
    micro_batch_size = spec.training.batch_size_per_device or 1
    accumulation_steps = spec.training.gradient_accumulation_steps or 1
    if spec.policy.on_out_of_memory is OnOutOfMemory.FAIL:
        return AdaptationsExhausted("policy.onOutOfMemory is Fail", "write policy.onOutOfMemory: Adapt, or lower the batch")
    for changed_values in _yield_advised_changes(spec, micro_batch_size, accumulation_steps, advice, earlier_adaptations):
        if not new_problems(spec, spec.with_values(changed_values)):
            return _build_memory_adaptation(spec, changed_values, now, advice)
    for changed_values in _yield_possible_changes(spec, micro_batch_size, accumulation_steps):
        if not new_problems(spec, spec.with_values(changed_values)):
            return _build_memory_adaptation(spec, changed_values, now)
    return AdaptationsExhausted(
        f"memory ran out with batchSizePerDevice {micro_batch_size}, gradientAccumulationSteps {accumulation_steps} and activation "
        f"checkpointing {spec.training.gradient_checkpointing or 'unknown'}: no further reduction is possible",
        _choose_hint(advice),
    )


def _build_memory_adaptation(spec: FineTuneJobSpec, changed_values: dict[str, Any], now: datetime, advice: MemoryAdvice | None = None) -> Adaptation:
    changes = (
        f"{_shorten_path(path)} {spec.value(path)} -> {value}" if spec.value(path) != value else f"{_shorten_path(path)} {value} for all layers"
        for path, value in changed_values.items()
    )
    explanation = _explain_advice(advice) if advice is not None else None
    return Adaptation(time=now, reason=Reason.OUT_OF_MEMORY, change=", ".join(changes), set=changed_values, explanation=explanation)


def _yield_advised_changes(
    spec: FineTuneJobSpec, micro_batch_before: int, accumulation_steps: int, advice: MemoryAdvice | None, earlier_adaptations: Iterable[Adaptation]
) -> Iterator[dict[str, Any]]:
    """Yield the advised change if it reduces the memory: first with, then without a smaller evaluation batch.

    A pod's advice may be wrong, so it can neither change the effective batch nor be repeated forever.
    """
    micro_batch_size = advice.batch_size_per_device if advice is not None else None
    if advice is None or micro_batch_size is None:
        return
    if not min_batch_size_per_device(spec) <= micro_batch_size <= micro_batch_before or micro_batch_before % micro_batch_size:
        return
    changed_values: dict[str, Any] = {}
    if advice.gradient_checkpointing == GradientCheckpointing.ENABLED and GRADIENT_CHECKPOINTING_FIELD not in merge_adapted_values(earlier_adaptations):
        changed_values[GRADIENT_CHECKPOINTING_FIELD] = GradientCheckpointing.ENABLED.value
    new_accumulation_steps = accumulation_steps * (micro_batch_before // micro_batch_size)
    if micro_batch_size < micro_batch_before and new_accumulation_steps <= MAX_ACCUMULATION:
        changed_values |= {BATCH_FIELD: micro_batch_size, ACCUMULATION_FIELD: new_accumulation_steps}
    if not changed_values:
        return
    if _find_evaluation_batch(spec) > micro_batch_size:
        yield changed_values | {EVALUATION_BATCH_FIELD: micro_batch_size}
    yield changed_values


def _explain_advice(advice: MemoryAdvice) -> str:
    """Return a sentence with the amounts of memory that led to an advised change. The status shows this sentence."""
    needed_amount, available_amount, planned_amount, expected_amount, upper_amount = (
        f"{(count or 0) / 1e9:.1f} GB"
        for count in (advice.needed_bytes, advice.available_bytes, advice.planned_bytes, advice.expected_bytes, advice.upper_bytes)
    )
    correction_text = " corrected by these numbers," if advice.needed_bytes > advice.planned_bytes else ""
    doubt_text = "" if advice.fits else "; this may not fit, but no values need less"
    return (
        f"the attempt needed at least {needed_amount} of GPU memory, {available_amount} were available, and the plan expected {planned_amount};"
        f"{correction_text} the new values need {expected_amount}, at most {upper_amount}{doubt_text}"
    )


def _choose_hint(advice: MemoryAdvice | None) -> str:
    if advice is None or not advice.changes:
        return "use a larger GPU or resources.memory, a quantised base (method qlora), or a shorter dataset.maxSequenceLength"
    return f"create a job with one of these changes, which fit by the memory plan: {'; '.join(clean(change, 200) for change in advice.changes[:3])}"


def _find_evaluation_batch(spec: FineTuneJobSpec) -> int:
    """Return the batch size of the evaluations that the training process runs, or 0 if it runs none."""
    runs_evaluation = evaluates_during_training(spec) or has_test_set(spec)
    return (spec.evaluation.batch_size_per_device or 0) if runs_evaluation else 0


def _yield_possible_changes(spec: FineTuneJobSpec, micro_batch_before: int, accumulation_steps: int) -> Iterator[dict[str, Any]]:
    """Yield the changes that are possible without advice, the most effective change first."""
    evaluation_batch_size = _find_evaluation_batch(spec)
    smaller_sizes = range(micro_batch_before // 2, min_batch_size_per_device(spec) - 1, -1)
    micro_batch_size = next((size for size in smaller_sizes if micro_batch_before % size == 0), 0)
    new_accumulation_steps = accumulation_steps * (micro_batch_before // micro_batch_size) if micro_batch_size else 0
    if 0 < new_accumulation_steps <= MAX_ACCUMULATION:
        changed_values: dict[str, Any] = {BATCH_FIELD: micro_batch_size, ACCUMULATION_FIELD: new_accumulation_steps}
        if evaluation_batch_size > micro_batch_size:
            yield changed_values | {EVALUATION_BATCH_FIELD: micro_batch_size}
        yield changed_values
    if evaluation_batch_size > micro_batch_before:
        yield {EVALUATION_BATCH_FIELD: micro_batch_before}
    if spec.training.gradient_checkpointing is GradientCheckpointing.DISABLED:
        yield {GRADIENT_CHECKPOINTING_FIELD: GradientCheckpointing.ENABLED.value}


def _shorten_path(path: str) -> str:
    """Return the field's name for messages: without the prefix `training.`."""
    return path.removeprefix("training.")


def adapt_to_divergence(
    spec: FineTuneJobSpec, adaptations: Iterable[Adaptation], checkpoints: Iterable[Checkpoint], now: datetime,
    attempt: int = 1,
) -> Adaptation | AdaptationsExhausted:  # fmt: skip
    """Return the change for the next attempt after `attempt` diverged: its loss was not finite.

    `spec` is the spec after all earlier adaptations were applied.
    """
    if spec.policy.on_divergence is OnDivergence.FAIL:
        return AdaptationsExhausted("policy.onDivergence is Fail", "lower training.learningRate or training.maxGradNorm")
    earlier_divergences = [adaptation for adaptation in adaptations if adaptation.reason == Reason.DIVERGED]
    usable_steps = sorted((c.step for c in checkpoints if c.healthy is not False), reverse=True)
    if not earlier_divergences:
        start_text = f"step {usable_steps[0]}" if usable_steps else "the start"
        return Adaptation(time=now, reason=Reason.DIVERGED, change=f"replay from {start_text}, nothing changed", set={})
    if len(earlier_divergences) > MAX_ROLLBACKS:
        return AdaptationsExhausted(
            f"the loss was not finite again after one replay and {MAX_ROLLBACKS} rollbacks, "
            f"the last one with learningRate {spec.training.learning_rate:g}",
            "check the dataset rows that were used around the failed step; lower training.learningRate or training.maxGradNorm",
        )
    # The run and its replay diverged after the newest healthy checkpoint. So the first rollback skips one checkpoint, and the second skips two.
    rollback_step = usable_steps[min(len(earlier_divergences), len(usable_steps) - 1)] if len(usable_steps) > 1 else 0
    learning_rate = spec.training.learning_rate or 0.0
    lower_learning_rate = learning_rate * LEARNING_RATE_FACTOR
    change_text = f"rolled back to {f'step {rollback_step}' if rollback_step else 'the start'}, learningRate {learning_rate:g} -> {lower_learning_rate:g}"
    changed_values = {LEARNING_RATE_FIELD: lower_learning_rate, MAX_STEP_KEY: rollback_step, FIRST_ATTEMPT_KEY: attempt + 1}
    return Adaptation(time=now, reason=Reason.DIVERGED, change=change_text, set=changed_values)


def find_rolled_back_attempt(adaptations: Iterable[Adaptation]) -> int | None:
    """Return the number of the first attempt after the last rollback, or None if there was no rollback."""
    first_attempt = merge_adapted_values(adaptations).get(FIRST_ATTEMPT_KEY)
    return first_attempt if isinstance(first_attempt, int) else None


def find_max_start_step(adaptations: Iterable[Adaptation], checkpoints: Iterable[Checkpoint]) -> int | None:
    """Return the newest step that the next attempt may start from, or None if there is no limit.

    After a rollback, an attempt must not continue from a checkpoint of an attempt before the rollback if the checkpoint's step is after the limit.
    An attempt may continue from all checkpoints of attempts after the rollback. There is no limit if one of these has a higher step than all checkpoints
    before the rollback, because an attempt resumes from the highest step.
    """
    adapted_values = merge_adapted_values(adaptations)
    max_step, first_attempt = adapted_values.get(MAX_STEP_KEY), adapted_values.get(FIRST_ATTEMPT_KEY)
    if not isinstance(max_step, int) or not isinstance(first_attempt, int):
        return max_step if isinstance(max_step, int) else None
    steps_before, steps_after = [0], [0]
    for checkpoint in checkpoints:
        is_after_rollback = (parse_attempt_of_uri(checkpoint.uri) or 0) >= first_attempt
        (steps_after if is_after_rollback else steps_before).append(checkpoint.step)
    return None if max(steps_after) > max(steps_before) else max(max_step, *steps_after)
