"""What to change after memory ran out or the loss diverged, so that another attempt can do better.

Memory: the same effective batch exactly. The micro-batch goes to its largest divisor at or below half, accumulation takes the
factor, down to the smallest that the objective can do, and an evaluation's batch is never larger; then activation checkpointing; then
the job fails with its numbers. No rung is taken that the rules would refuse.
Divergence: once the same again from the last healthy checkpoint (a bit flip does not repeat); then, at most twice, back to the
healthy checkpoint before with half the learning rate; then it fails.
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
"""Not a path of the spec: the newest checkpoint an attempt may start from."""
FIRST_ATTEMPT = "resume.firstAttempt"
"""Nor is this: the attempt that was rolled back first. What it and later ones commit is not what the rollback left behind."""
MAX_ACCUMULATION = 65536
"""The largest that the API allows."""
ROLLBACKS = 2
RATE_FACTOR = 0.5


@dataclass(frozen=True)
class LadderExhausted:
    """The ladder has no further rung."""

    message: str
    hint: str


def apply_adaptations(spec: FineTuneJobSpec, adaptations: Iterable[Adaptation]) -> FineTuneJobSpec:
    """The resolved spec with every adaptation applied, the later over the earlier."""
    try:
        return spec.with_values(_of_spec(adaptations))
    except ValidationError as error:
        # Only somebody who edits the status can bring this about; the job goes on as it was written.
        logger.warning("the adaptations in status cannot be applied and are ignored: %s", error)
        return spec


def original_values(spec: FineTuneJobSpec, adaptations: Iterable[Adaptation]) -> dict[str, Any]:
    """What the resolved spec says at the paths of it that adaptations have changed."""
    return {path: spec.value(path) for path in _of_spec(adaptations)}


def _of_spec(adaptations: Iterable[Adaptation]) -> dict[str, Any]:
    """Values that now hold, of those that are the spec's."""
    return {
        path: found for path, found in adapted_values(adaptations).items() if path not in (MAX_STEP, FIRST_ATTEMPT)
    }


def adapted_values(adaptations: Iterable[Adaptation]) -> dict[str, Any]:
    """Values that now hold, by spec path."""
    result: dict[str, Any] = {}
    for one in adaptations:
        result |= one.set or {}
    return result


def adapt_to_out_of_memory(spec: FineTuneJobSpec, now: datetime) -> Adaptation | LadderExhausted:
    """The next rung after memory ran out with `spec` (resolved, earlier adaptations applied)."""
    batch = spec.training.batch_size_per_device or 1
    accumulation = spec.training.gradient_accumulation_steps or 1
    if spec.policy.on_out_of_memory is OnOutOfMemory.FAIL:
        return LadderExhausted("policy.onOutOfMemory is Fail", "write policy.onOutOfMemory: Adapt, or lower the batch")
    for values in _rungs(spec, batch, accumulation):
        if not new_problems(spec, spec.with_values(values)):  # nobody is to be refused for what we wrote
            change = ", ".join(f"{_shown(path)} {spec.value(path)} -> {value}" for path, value in values.items())
            return Adaptation(time=now, reason=Reason.OUT_OF_MEMORY, change=change, set=values)
    return LadderExhausted(
        f"memory ran out with batchSizePerDevice {batch}, gradientAccumulationSteps {accumulation} and activation "
        f"checkpointing {spec.training.gradient_checkpointing or 'unknown'}: nothing is left to reduce",
        "use a larger GPU or resources.memory, a quantised base (method qlora), or a shorter dataset.maxSequenceLength",
    )


def _rungs(spec: FineTuneJobSpec, batch: int, accumulation: int) -> Iterator[dict[str, Any]]:
    """What could be changed next, the best first. An evaluation never takes larger batches than training then does."""
    looks = evaluates_during_training(spec) or has_test_set(spec)
    rows = (spec.evaluation.batch_size_per_device or 0) if looks else 0
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
    """As it is called in a sentence: training's fields by their own name."""
    return path.removeprefix("training.")


def adapt_to_divergence(
    spec: FineTuneJobSpec, adaptations: Iterable[Adaptation], checkpoints: Iterable[Checkpoint], now: datetime,
    attempt: int = 1,
) -> Adaptation | LadderExhausted:  # fmt: skip
    """The next rung after the loss of `attempt` was not finite; `spec` has earlier adaptations applied."""
    if spec.policy.on_divergence is OnDivergence.FAIL:
        return LadderExhausted("policy.onDivergence is Fail", "lower training.learningRate or training.maxGradNorm")
    earlier = [one for one in adaptations if one.reason == Reason.DIVERGED]
    steps = sorted((c.step for c in checkpoints if c.healthy is not False), reverse=True)
    if not earlier:
        start = f"step {steps[0]}" if steps else "the start"
        return Adaptation(time=now, reason=Reason.DIVERGED, change=f"replay from {start}, nothing changed", set={})
    if len(earlier) > ROLLBACKS:
        return LadderExhausted(
            f"the loss was not finite again after one replay and {ROLLBACKS} rollbacks, "
            f"at last with learningRate {spec.training.learning_rate:g}",
            "look at the rows around the step named here; lower training.learningRate or training.maxGradNorm",
        )
    back = steps[min(len(earlier), len(steps) - 1)] if len(steps) > 1 else 0
    rate = spec.training.learning_rate or 0.0
    slower = rate * RATE_FACTOR
    change = f"rolled back to {f'step {back}' if back else 'the start'}, learningRate {rate:g} -> {slower:g}"
    changed = {RATE: slower, MAX_STEP: back, FIRST_ATTEMPT: attempt + 1}
    return Adaptation(time=now, reason=Reason.DIVERGED, change=change, set=changed)


def max_start_step(adaptations: Iterable[Adaptation], checkpoints: Iterable[Checkpoint]) -> int | None:
    """The newest step that the next attempt may start from; None: the newest there is.

    A rollback leaves checkpoints behind, not the run: once the attempts after it have come further than those before, it is over.
    """
    values = adapted_values(adaptations)
    limit, first = values.get(MAX_STEP), values.get(FIRST_ATTEMPT)
    if not isinstance(limit, int) or not isinstance(first, int):
        return limit if isinstance(limit, int) else None
    left, since = [0], [0]
    for one in checkpoints:
        (since if (attempt_of_uri(one.uri) or 0) >= first else left).append(one.step)
    return None if max(since) > max(left) else max(limit, *since)
