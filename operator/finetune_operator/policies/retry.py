"""All retry rules: whether another attempt follows a failed attempt, whether the failed attempt counts, and how long the delay is.

`finetune_api.exits` defines the retry policy for each exit code of the trainer. This module defines the retry policy of attempts that end
without such an exit code (for example after an eviction), applies `policy.retries`, and computes the delays.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import NamedTuple

from finetune_api.exits import FailurePrecedence, RetryPolicy
from finetune_api.names import FailureClass, Reason
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import REASON_OF_STAGE, Adaptation, Attempt, Failure, FineTuneJobStatus, MemoryAdvice

from finetune_operator.policies.adaptations import AdaptationsExhausted, adapt_to_divergence, adapt_to_out_of_memory
from finetune_operator.settings import RetrySettings

DEFAULT_RETRIES = 3
"""Default of `policy.retries`, for a spec in which the defaults are not filled in yet."""
NO_BACKOFF_REASONS = (Reason.SUSPENDED, Reason.OUT_OF_MEMORY, Reason.DIVERGED)
"""If an attempt ends with one of these reasons, the next attempt starts without delay: the user suspended the job, or values were adapted."""
ALWAYS_BACKOFF_REASONS = (Reason.GANG_INCOMPLETE, Reason.TRAINER_TOO_OLD)
"""If an attempt ends with one of these reasons, the next attempt always starts after a delay.

After an uncounted attempt with another reason, the next attempt can start at once.
"""
SHORTEST_BLOCKED_RETRY_SECONDS, LONGEST_BLOCKED_RETRY_SECONDS = 15.0, 300.0


class EndPolicy(NamedTuple):
    """Retry policy and precedence for a pod that ended without one of the trainer's exit codes."""

    retry_policy: RetryPolicy
    precedence: FailurePrecedence


class PodEnd(Enum):
    """How a pod can end without one of the trainer's exit codes."""

    OUT_OF_HOST_MEMORY = EndPolicy(RetryPolicy.ADAPT_MEMORY, FailurePrecedence.NUMERIC_FAILURE)
    """The kernel killed the container at its memory limit."""
    EXCEEDED_LIMIT = EndPolicy(RetryPolicy.COUNTED, FailurePrecedence.REMOVED_BY_CLUSTER)
    """The kubelet evicted the pod because the pod used too much disk or memory. The next attempt will probably exceed the limit as well."""
    DISRUPTED = EndPolicy(RetryPolicy.NOT_COUNTED, FailurePrecedence.REMOVED_BY_CLUSTER)
    """The cluster removed the pod because of a preemption, or because its node was drained or lost."""
    DELETED_UNSAVED = EndPolicy(RetryPolicy.NOT_COUNTED, FailurePrecedence.STOPPED_ON_REQUEST)
    """The pod was deleted, and its container was killed before it had saved a checkpoint."""
    DELETED = EndPolicy(RetryPolicy.NOT_COUNTED, FailurePrecedence.STOPPED_ON_REQUEST)
    """The pod was deleted before any container ended."""
    UNKNOWN_EXIT = EndPolicy(RetryPolicy.COUNTED, FailurePrecedence.UNKNOWN_CAUSE)
    """The container ended with an exit code that the trainer never uses."""
    NOT_STARTED = EndPolicy(RetryPolicy.COUNTED, FailurePrecedence.REMOVED_BY_CLUSTER)
    """The kubelet rejected the pod, or an init container failed."""
    UNKNOWN = EndPolicy(RetryPolicy.COUNTED, FailurePrecedence.REMOVED_BY_CLUSTER)
    """The attempt failed, but the operator found no failed pod of the attempt."""


TERMINATION_RETRY: dict[Reason, RetryPolicy] = {
    Reason.STALLED: RetryPolicy.COUNTED,
    # Here Reason.PREEMPTED means that another client deleted the Job. The attempt is counted, because that client may delete the Job of each attempt.
    Reason.PREEMPTED: RetryPolicy.COUNTED,
}
"""Retry policy of an attempt whose Job was deleted, by termination reason. For all other reasons the policy is NOT_COUNTED."""


@dataclass(frozen=True)
class FailureCause:
    """Why an attempt ended without success."""

    reason: Reason
    failure: Failure
    retry_policy: RetryPolicy
    precedence: FailurePrecedence = FailurePrecedence.UNKNOWN_CAUSE
    advice: MemoryAdvice | None = None
    """The memory plan's advice from the pod whose GPU ran out of memory, or None."""


@dataclass(frozen=True)
class RetryDecision:
    """The decision to start another attempt."""

    is_counted: bool = False
    """Whether the failed attempt counts against `policy.retries`."""
    adaptation: Adaptation | None = None
    made_progress: bool = False


@dataclass(frozen=True)
class GiveUp:
    """The decision to start no further attempt, so that the job fails."""

    reason: Reason
    failure: Failure


def retry_or_give_up(
    cause: FailureCause, spec: FineTuneJobSpec, status: FineTuneJobStatus, *, made_progress: bool, now: datetime, attempt: int = 1,
    is_spec_readable: bool = True,
) -> RetryDecision | GiveUp:  # fmt: skip
    """Decide whether another attempt follows after `attempt` failed.

    `spec` is the resolved spec after all earlier adaptations were applied. `made_progress`: whether the attempt committed a newer step than all
    earlier attempts.
    If the spec is not readable, the next attempt must wait for a newer operator, and this operator neither adapts values nor counts attempts.
    """
    match cause.retry_policy:
        case RetryPolicy.NEVER:
            return GiveUp(cause.reason, cause.failure)
        case RetryPolicy.NOT_COUNTED | RetryPolicy.WAIT:
            return RetryDecision(made_progress=made_progress)
        case _ if not is_spec_readable:
            return RetryDecision(made_progress=made_progress)
        case RetryPolicy.ADAPT_MEMORY:
            adaptation = adapt_to_out_of_memory(spec, now, cause.advice, status.adaptations)
        case RetryPolicy.ROLL_BACK:
            adaptation = adapt_to_divergence(spec, status.adaptations, status.checkpoints, now, attempt)
        case RetryPolicy.COUNTED:
            return _retry_if_allowed(cause, spec, status.retries_used or 0, made_progress)
    if isinstance(adaptation, AdaptationsExhausted):
        message = f"{cause.failure.message}; {adaptation.message}" if cause.failure.message else adaptation.message
        return GiveUp(cause.reason, cause.failure.model_copy(update={"message": message, "hint": adaptation.hint}))
    return RetryDecision(adaptation=adaptation, made_progress=made_progress)


def _retry_if_allowed(cause: FailureCause, spec: FineTuneJobSpec, retries_used: int, made_progress: bool) -> RetryDecision | GiveUp:
    if made_progress:
        return RetryDecision(made_progress=True)
    allowed_retries = spec.policy.retries if spec.policy.retries is not None else DEFAULT_RETRIES
    if retries_used >= allowed_retries:
        message = f"{retries_used + 1} attempts in a row made no progress, but policy.retries is {allowed_retries}; last failure: "
        failure = cause.failure.model_copy(update={"message": message + cause.failure.message})
        return GiveUp(cause.reason if cause.reason in REASON_OF_STAGE.values() else Reason.RETRIES_EXHAUSTED, failure)
    return RetryDecision(is_counted=True)


def build_deadline_failure(limit_seconds: int, source: str) -> Failure:
    """Return the failure of a job that exceeded its time limit. `source`: name of the setting that contains the limit."""
    return Failure(
        class_=FailureClass.USER, code=Reason.DEADLINE_EXCEEDED, message=f"{source} {limit_seconds} passed",
        hint="the newest checkpoint is kept: create a new FineTuneJob with a longer deadline that resumes from this checkpoint",
    )  # fmt: skip


def compute_backoff_seconds(attempts: Sequence[Attempt], settings: RetrySettings, seed: str = "") -> float:
    """Return the seconds between the end of the last of `attempts` and the start of the next attempt.

    The delay doubles with each attempt in a row without progress. If the last attempt is not counted, for example after a preemption, this
    attempt does not increase the delay. After GangIncomplete, the delay is multiplied by a random factor from 0.5 to 1.5, so that two gangs
    that blocked each other do not start at the same time again. The factor depends on `seed` (the job's uid) and the attempt's number.
    """
    attempts_without_progress = 0
    for attempt in reversed(attempts):
        if attempt.reason in NO_BACKOFF_REASONS or _has_made_progress(attempt):
            break
        attempts_without_progress += 1
    if attempts_without_progress and not attempts[-1].counted and attempts[-1].reason not in ALWAYS_BACKOFF_REASONS:
        attempts_without_progress -= 1
    if not attempts_without_progress:
        return 0.0
    delay_seconds = compute_pause_seconds(attempts_without_progress, settings)
    if attempts[-1].reason == Reason.GANG_INCOMPLETE:
        delay_seconds *= random.Random(f"{seed}/{attempts[-1].number}").uniform(0.5, 1.5)  # noqa: S311 -- spreads retries, no secret
    return delay_seconds


def compute_pause_seconds(failure_count: int, settings: RetrySettings) -> float:
    """Return the pause in seconds after this many failures in a row (at least 1). The pause doubles with each failure, up to `settings.max_seconds`."""
    doubled_seconds = settings.base_seconds * 2.0 ** min(failure_count - 1, 20)
    return min(doubled_seconds, settings.max_seconds)


def _has_made_progress(attempt: Attempt) -> bool:
    return attempt.committed_step is not None and attempt.committed_step > (attempt.resumed_from_step or 0)


def compute_blocked_retry_seconds(blocked_seconds: float) -> float:
    """Return the seconds until the operator repeats a refused create request of a job that has been blocked for `blocked_seconds`."""
    return min(max(blocked_seconds / 2, SHORTEST_BLOCKED_RETRY_SECONDS), LONGEST_BLOCKED_RETRY_SECONDS)
