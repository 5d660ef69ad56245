"""What the next attempt changes after memory ran out or the loss diverged.

Out of memory: the effective batch stays exactly the same. The micro-batch becomes its largest divisor at or below half, and
gradient accumulation grows by the same factor, down to the smallest micro-batch that the objective can use. The evaluation batch
is never larger than the training batch. The last change is to enable activation checkpointing; then the job fails and its message
names the final values. A change that the rules would refuse is skipped.

Divergence: the first further attempt replays the run unchanged from the newest healthy checkpoint, because a hardware fault does
not repeat. The next two go back to an earlier healthy checkpoint, each with half the learning rate. Then the job fails.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from finetune_api.names import Reason, attempt_of_uri
from finetune_api.rules import evaluates_during_training, has_test_set, min_batch_size_per_device, new_problems
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import GradientCheckpointing, OnDivergence, OnOutOfMemory
from finetune_api.status import Adaptation, Checkpoint
from pydantic import ValidationError

logger = logging.getLogger(__name__)

BATCH = "training.batchSizePerDevice"
ACCUMULATION = "training.gradientAccumulationSteps"
EVALUATION_BATCH = "evaluation.batchSizePerDevice"
CHECKPOINTING = "training.gradientCheckpointing"
RATE = "training.learningRate"
MAX_STEP = "resume.maxStep"
"""Step of the newest checkpoint that an attempt may start from. Stored with the adaptations, but not a path of the spec."""
FIRST_ATTEMPT = "resume.firstAttempt"
"""Number of the first attempt after the rollback. Checkpoints of this and later attempts are not affected by the rollback."""
MAX_ACCUMULATION = 65536
"""Upper bound of training.gradientAccumulationSteps in the API."""
ROLLBACKS = 2
RATE_FACTOR = 0.5


@dataclass(frozen=True)
class AdaptationsExhausted:
    """No further change can help."""

    message: str
    hint: str


def apply_adaptations(spec: FineTuneJobSpec, adaptations: Iterable[Adaptation]) -> FineTuneJobSpec:
    """Return the resolved spec with all adaptations applied; a later value replaces an earlier one."""
    try:
        return spec.with_values(_spec_values(adaptations))
    except ValidationError as error:
        # Only a manual edit of the status can lead here; the job goes on with the spec as written.
        logger.warning("the adaptations in status cannot be applied and are ignored: %s", error)
        return spec


def original_values(spec: FineTuneJobSpec, adaptations: Iterable[Adaptation]) -> dict[str, Any]:
    """Return the resolved spec's own values at the paths that adaptations have changed."""
    return {path: spec.value(path) for path in _spec_values(adaptations)}


def _spec_values(adaptations: Iterable[Adaptation]) -> dict[str, Any]:
    """Current value of every adapted path of the spec."""
    return {
        path: found for path, found in adapted_values(adaptations).items() if path not in (MAX_STEP, FIRST_ATTEMPT)
    }


def adapted_values(adaptations: Iterable[Adaptation]) -> dict[str, Any]:
    """Current value of every adapted path."""
    result: dict[str, Any] = {}
    for one in adaptations:
        result |= one.set or {}
    return result


def adapt_to_out_of_memory(spec: FineTuneJobSpec, now: datetime) -> Adaptation | AdaptationsExhausted:
    """Return the next change after memory ran out with `spec` (resolved, with earlier adaptations applied)."""
    batch = spec.training.batch_size_per_device or 1
    accumulation = spec.training.gradient_accumulation_steps or 1
    if spec.policy.on_out_of_memory is OnOutOfMemory.FAIL:
        return AdaptationsExhausted("policy.onOutOfMemory is Fail", "write policy.onOutOfMemory: Adapt, or lower the batch")
    for values in _possible_changes(spec, batch, accumulation):
        if not new_problems(spec, spec.with_values(values)):
            change = ", ".join(f"{_shown(path)} {spec.value(path)} -> {value}" for path, value in values.items())
            return Adaptation(time=now, reason=Reason.OUT_OF_MEMORY, change=change, set=values)
    return AdaptationsExhausted(
        f"memory ran out with batchSizePerDevice {batch}, gradientAccumulationSteps {accumulation} and activation "
        f"checkpointing {spec.training.gradient_checkpointing or 'unknown'}: nothing is left to reduce",
        "use a larger GPU or resources.memory, a quantised base (method qlora), or a shorter dataset.maxSequenceLength",
    )


def _possible_changes(spec: FineTuneJobSpec, batch: int, accumulation: int) -> Iterator[dict[str, Any]]:
    """Possible next changes, the most effective first."""
    evaluates = evaluates_during_training(spec) or has_test_set(spec)
    rows = (spec.evaluation.batch_size_per_device or 0) if evaluates else 0
    smaller = next((part for part in range(batch // 2, min_batch_size_per_device(spec) - 1, -1) if batch % part == 0), 0)
    more = accumulation * (batch // smaller) if smaller else 0
    if 0 < more <= MAX_ACCUMULATION:
        values: dict[str, Any] = {BATCH: smaller, ACCUMULATION: more}
        if rows > smaller:
            yield values | {EVALUATION_BATCH: smaller}
        yield values
    if rows > batch:
        yield {EVALUATION_BATCH: batch}
    if spec.training.gradient_checkpointing is GradientCheckpointing.DISABLED:
        yield {CHECKPOINTING: GradientCheckpointing.ENABLED.value}


def _shown(path: str) -> str:
    """Name of a path in messages: fields of `training` go without their group."""
    return path.removeprefix("training.")


def adapt_to_divergence(
    spec: FineTuneJobSpec, adaptations: Iterable[Adaptation], checkpoints: Iterable[Checkpoint], now: datetime,
    attempt: int = 1,
) -> Adaptation | AdaptationsExhausted:  # fmt: skip
    """Return the next change after the loss of `attempt` was not finite; `spec` has earlier adaptations applied."""
    if spec.policy.on_divergence is OnDivergence.FAIL:
        return AdaptationsExhausted("policy.onDivergence is Fail", "lower training.learningRate or training.maxGradNorm")
    earlier = [one for one in adaptations if one.reason == Reason.DIVERGED]
    steps = sorted((c.step for c in checkpoints if c.healthy is not False), reverse=True)
    if not earlier:
        start = f"step {steps[0]}" if steps else "the start"
        return Adaptation(time=now, reason=Reason.DIVERGED, change=f"replay from {start}, nothing changed", set={})
    if len(earlier) > ROLLBACKS:
        return AdaptationsExhausted(
            f"the loss was not finite again after one replay and {ROLLBACKS} rollbacks, "
            f"at last with learningRate {spec.training.learning_rate:g}",
            "look at the rows around the step named here; lower training.learningRate or training.maxGradNorm",
        )
    # The newest healthy checkpoint has led into the divergence twice: each rollback goes one checkpoint further back.
    back = steps[min(len(earlier), len(steps) - 1)] if len(steps) > 1 else 0
    rate = spec.training.learning_rate or 0.0
    slower = rate * RATE_FACTOR
    change = f"rolled back to {f'step {back}' if back else 'the start'}, learningRate {rate:g} -> {slower:g}"
    changed = {RATE: slower, MAX_STEP: back, FIRST_ATTEMPT: attempt + 1}
    return Adaptation(time=now, reason=Reason.DIVERGED, change=change, set=changed)


def max_start_step(adaptations: Iterable[Adaptation], checkpoints: Iterable[Checkpoint]) -> int | None:
    """Return the newest step that the next attempt may start from; None: any.

    After a rollback the attempts before it must not be continued. Checkpoints that attempts after the rollback committed may be;
    once these are newer than all others, the limit is no longer needed.
    """
    values = adapted_values(adaptations)
    limit, first_attempt = values.get(MAX_STEP), values.get(FIRST_ATTEMPT)
    if not isinstance(limit, int) or not isinstance(first_attempt, int):
        return limit if isinstance(limit, int) else None
    steps_before, steps_after = [0], [0]
    for one in checkpoints:
        is_after = (attempt_of_uri(one.uri) or 0) >= first_attempt
        (steps_after if is_after else steps_before).append(one.step)
    return None if max(steps_after) > max(steps_before) else max(limit, *steps_after)
