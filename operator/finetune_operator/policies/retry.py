"""What comes after an attempt that did not succeed: the end, or another attempt, changed or not, counted or not."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from finetune_api.exits import RetryPolicy
from finetune_api.names import FailureClass, Reason
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import Adaptation, Failure, FineTuneJobStatus

from finetune_operator.policies.adaptations import LadderExhausted, adapt_to_divergence, adapt_to_out_of_memory
from finetune_operator.policies.cause import Cause


@dataclass(frozen=True)
class Retry:
    """Another attempt."""

    counted: bool = False
    adaptation: Adaptation | None = None
    progressed: bool = False


@dataclass(frozen=True)
class GiveUp:
    """No further attempt."""

    reason: Reason
    failure: Failure


def retry_or_give_up(
    cause: Cause, spec: FineTuneJobSpec, status: FineTuneJobStatus, *, progressed: bool, now: datetime, attempt: int = 1,
) -> Retry | GiveUp:  # fmt: skip
    """What follows `attempt`, which failed.

    `spec` is resolved, with earlier adaptations applied; `progressed`: it committed a step newer than all before it.
    """
    match cause.retry:
        case RetryPolicy.NEVER:
            return GiveUp(cause.reason, cause.failure)
        case RetryPolicy.FREE | RetryPolicy.WAIT:
            return Retry(progressed=progressed)
        case RetryPolicy.ADAPT_MEMORY:
            rung = adapt_to_out_of_memory(spec, now)
        case RetryPolicy.ROLL_BACK:
            rung = adapt_to_divergence(spec, status.adaptations, status.checkpoints, now, attempt)
        case RetryPolicy.COUNTED:
            return _counted(cause, spec, status.retries_used or 0, progressed)
    if isinstance(rung, LadderExhausted):
        message = f"{cause.failure.message}; {rung.message}" if cause.failure.message else rung.message
        return GiveUp(cause.reason, cause.failure.model_copy(update={"message": message, "hint": rung.hint}))
    return Retry(adaptation=rung, progressed=progressed)


def _counted(cause: Cause, spec: FineTuneJobSpec, used: int, progressed: bool) -> Retry | GiveUp:
    if progressed:
        return Retry(progressed=True)
    allowed = spec.policy.retries if spec.policy.retries is not None else 3
    if used >= allowed:
        message = f"{used + 1} attempts in a row made no progress, policy.retries allows {allowed}; the last: "
        failure = cause.failure.model_copy(update={"message": message + cause.failure.message})
        return GiveUp(Reason.RETRIES_EXHAUSTED, failure)
    return Retry(counted=True)


def deadline_failure(limit: int) -> Failure:
    """The failure of a job whose running time is used up."""
    return Failure(
        class_=FailureClass.USER, code=Reason.DEADLINE_EXCEEDED, message=f"policy.activeDeadlineSeconds {limit} passed",
        hint="the newest checkpoint is kept; raise the deadline in a new FineTuneJob that resumes from it",
    )  # fmt: skip
