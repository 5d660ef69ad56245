"""Which failed attempts are retried, and the backoff before the next attempt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from finetune_api.exits import FailurePrecedence, RetryPolicy
from finetune_api.names import FailureClass, Reason
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import Adaptation, Attempt, Failure, FineTuneJobStatus
from finetune_operator.policies.cause import find_pod_cause
from finetune_operator.policies.retry import (
    FailureCause,
    GiveUp,
    RetryDecision,
    compute_backoff_seconds,
    compute_blocked_retry_seconds,
    retry_or_give_up,
)
from finetune_operator.settings import RetrySettings

from tests.unit.operator.samples import T0, accept_spec, end_pod, pod, spec

INTERNAL_ERROR_CAUSE = FailureCause(Reason.INTERNAL_ERROR, find_pod_cause(end_pod(pod(), 70)).failure, RetryPolicy.COUNTED, FailurePrecedence.UNKNOWN_CAUSE)  # type: ignore[union-attr] # it fails


def make_attempts(*attempt_values: tuple[str, bool, int]) -> list[Attempt]:
    return [
        Attempt(number=n, reason=reason, counted=counted, committed_step=step or None, end_time=T0)
        for n, (reason, counted, step) in enumerate(attempt_values, 1)
    ]


@pytest.mark.parametrize(
    ("retries_used", "retries", "made_progress", "gives_up", "is_counted"),
    [(0, 3, False, False, True), (2, 3, False, False, True), (3, 3, False, True, None), (3, 3, True, False, False), (0, 0, False, True, None)],
)  # fmt: skip
def test_job_fails_when_attempts_without_progress_exceed_the_retries(
    retries_used: int, retries: int, made_progress: bool, gives_up: bool, is_counted: bool | None
) -> None:
    decision = retry_or_give_up(
        INTERNAL_ERROR_CAUSE, accept_spec(spec(policy={"retries": retries})).spec, FineTuneJobStatus(retries_used=retries_used),
        made_progress=made_progress, now=T0,
    )  # fmt: skip
    assert isinstance(decision, GiveUp) == gives_up
    if isinstance(decision, RetryDecision):
        assert decision.is_counted == is_counted
    else:
        assert decision.reason is Reason.RETRIES_EXHAUSTED


@pytest.mark.parametrize(
    ("attempt_values", "seconds"),
    [
        ([], 0.0),
        ([("InternalError", True, 0)], 10.0),
        ([("InternalError", True, 0), ("InternalError", True, 0)], 20.0),
        ([("InternalError", True, 0)] * 3, 40.0),
        ([("InternalError", True, 0)] * 6, 320.0),
        ([("InternalError", True, 0)] * 9, 600.0),
        ([("InternalError", True, 0), ("InternalError", True, 5), ("InternalError", True, 0)], 10.0),
        ([("InternalError", True, 0), ("Preempted", False, 0)], 10.0),
        ([("Preempted", False, 0), ("InternalError", True, 0)], 20.0),
        ([("DataError", True, 0)], 10.0),
        ([("TrainerTooOld", False, 0)], 10.0),
        ([("TrainerTooOld", False, 0), ("TrainerTooOld", False, 0)], 20.0),
        ([("Preempted", False, 0)], 0.0),
        ([("Preempted", False, 0), ("Preempted", False, 0)], 10.0),
        ([("InternalError", True, 0), ("Suspended", False, 0)], 0.0),
        ([("InternalError", True, 0), ("OutOfMemory", False, 0)], 0.0),
        ([("InternalError", True, 5)], 0.0),
    ],
)
def test_backoff_doubles_with_attempts_without_progress(attempt_values: list[tuple[str, bool, int]], seconds: float) -> None:
    settings = RetrySettings(base_seconds=10, max_seconds=600)
    assert compute_backoff_seconds(make_attempts(*attempt_values), settings) == seconds


def test_backoff_stops_doubling_after_21_attempts() -> None:
    settings = RetrySettings(base_seconds=0.001, max_seconds=86400)
    delays_seconds = [compute_backoff_seconds(make_attempts(*[("InternalError", True, 0)] * count), settings) for count in (20, 21, 22, 50)]
    assert delays_seconds == pytest.approx([524.288, 1048.576, 1048.576, 1048.576])


@pytest.mark.parametrize(
    ("committed_step", "resumed_from_step", "seconds"),
    [(None, None, 10.0), (0, None, 10.0), (1, None, 0.0), (5, 5, 10.0), (6, 5, 0.0), (4, 5, 10.0)],
)
def test_backoff_ends_when_an_attempt_commits_a_newer_step_than_it_resumed_from(
    committed_step: int | None, resumed_from_step: int | None, seconds: float
) -> None:
    failed_attempt = Attempt(number=1, reason="InternalError", counted=True, committed_step=committed_step, resumed_from_step=resumed_from_step)
    assert compute_backoff_seconds([failed_attempt], RetrySettings(base_seconds=10, max_seconds=600)) == seconds


def test_backoff_after_an_incomplete_gang_is_random_for_each_job_and_attempt() -> None:
    settings, gang = RetrySettings(base_seconds=10, max_seconds=600), ("GangIncomplete", False, 0)
    delays_seconds = [
        compute_backoff_seconds(make_attempts(*attempt_values), settings, seed)
        for attempt_values, seed in (([gang], "a"), ([gang], "b"), ([gang, gang], "a"), ([gang, ("InternalError", True, 0)], "a"))
    ]
    assert delays_seconds == pytest.approx([8.319, 14.193, 19.026, 20.0], abs=0.001)


@pytest.mark.parametrize(
    ("blocked_seconds", "delay_seconds"),
    [(0.0, 15.0), (30.0, 15.0), (31.0, 15.5), (599.0, 299.5), (600.0, 300.0), (602.0, 300.0), (86400.0, 300.0)],
)
def test_refused_request_is_repeated_after_half_of_the_blocked_time(blocked_seconds: float, delay_seconds: float) -> None:
    assert compute_blocked_retry_seconds(blocked_seconds) == delay_seconds


def make_cause(policy: RetryPolicy, message: str = "it failed") -> FailureCause:
    failure = Failure(class_=FailureClass.INTERNAL, code="C", message=message)
    return FailureCause(Reason.INTERNAL_ERROR, failure, policy)


@pytest.mark.parametrize(("retries_used", "retries", "gives_up"), [(None, 0, True), (None, 1, False), (2, None, False), (3, None, True)])
def test_three_retries_are_allowed_by_default(retries_used: int | None, retries: int | None, gives_up: bool) -> None:
    unresolved_spec = FineTuneJobSpec.model_validate(spec(policy={"retries": retries}))
    decision = retry_or_give_up(
        make_cause(RetryPolicy.COUNTED), unresolved_spec, FineTuneJobStatus(retries_used=retries_used), made_progress=False, now=T0
    )
    if not gives_up:
        assert decision == RetryDecision(is_counted=True)
        return
    expected_retries = retries_used or 0
    message = f"{expected_retries + 1} attempts in a row made no progress, but policy.retries is {expected_retries}; last failure: it failed"
    failure = Failure(class_=FailureClass.INTERNAL, code="C", message=message)
    assert decision == GiveUp(Reason.RETRIES_EXHAUSTED, failure)


def test_stage_that_fails_in_every_attempt_is_the_reason_of_the_jobs_failure() -> None:
    cause = replace(make_cause(RetryPolicy.COUNTED), reason=Reason.EVALUATION_FAILED)
    unresolved_spec = FineTuneJobSpec.model_validate(spec(policy={"retries": 0}))
    decision = retry_or_give_up(cause, unresolved_spec, FineTuneJobStatus(), made_progress=False, now=T0)
    assert isinstance(decision, GiveUp) and decision.reason is Reason.EVALUATION_FAILED


@pytest.mark.parametrize("made_progress", [True, False])
@pytest.mark.parametrize("policy", [RetryPolicy.NOT_COUNTED, RetryPolicy.WAIT, RetryPolicy.COUNTED, RetryPolicy.ROLL_BACK])
def test_uncounted_retry_needs_no_budget(policy: RetryPolicy, made_progress: bool) -> None:
    """While the operator cannot read the spec, failures after which another attempt is permitted do not count as retries."""
    is_spec_readable = policy in (RetryPolicy.NOT_COUNTED, RetryPolicy.WAIT)
    decision = retry_or_give_up(
        make_cause(policy), accept_spec(spec(policy={"retries": 0})).spec, FineTuneJobStatus(retries_used=9),
        made_progress=made_progress, now=T0, is_spec_readable=is_spec_readable,
    )  # fmt: skip
    assert decision == RetryDecision(is_counted=False, adaptation=None, made_progress=made_progress)


@pytest.mark.parametrize("is_spec_readable", [True, False])
def test_final_failure_is_not_retried(is_spec_readable: bool) -> None:
    cause = make_cause(RetryPolicy.NEVER)
    decision = retry_or_give_up(
        cause, accept_spec().spec, FineTuneJobStatus(), made_progress=True, now=T0, is_spec_readable=is_spec_readable
    )
    assert decision == GiveUp(cause.reason, cause.failure)


@pytest.mark.parametrize("made_progress", [True, False])
def test_adapted_retry_is_not_counted(made_progress: bool) -> None:
    for policy, changed_path in ((RetryPolicy.ADAPT_MEMORY, "training.batchSizePerDevice"), (RetryPolicy.ROLL_BACK, "resume.maxStep")):
        replay = Adaptation(time=T0, reason=Reason.DIVERGED, change="")
        decision = retry_or_give_up(
            make_cause(policy), accept_spec(spec(training={"batchSizePerDevice": 4})).spec, FineTuneJobStatus(adaptations=[replay]),
            made_progress=made_progress, now=T0,
        )  # fmt: skip
        assert isinstance(decision, RetryDecision) and decision.adaptation is not None
        set_fields: dict[str, Any] = decision.adaptation.set or {}
        assert changed_path in set_fields and set_fields.get("resume.firstAttempt", 2) == 2
        assert (decision.is_counted, decision.made_progress) == (False, made_progress)


@pytest.mark.parametrize(("message", "full_message"), [("it failed", "it failed; policy.onOutOfMemory is Fail"), ("", "policy.onOutOfMemory is Fail")])
def test_failure_after_the_last_adaptation_says_why_no_other_is_possible(message: str, full_message: str) -> None:
    unadaptable_spec = accept_spec(spec(policy={"onOutOfMemory": "Fail"})).spec
    cause = make_cause(RetryPolicy.ADAPT_MEMORY, message)
    decision = retry_or_give_up(cause, unadaptable_spec, FineTuneJobStatus(), made_progress=True, now=T0)
    hint = "write policy.onOutOfMemory: Adapt, or lower the batch"
    assert decision == GiveUp(cause.reason, Failure(class_=FailureClass.INTERNAL, code="C", message=full_message, hint=hint))
