"""The retry budget and the backoff."""

from __future__ import annotations

import pytest
from finetune_api.exits import FailurePrecedence, RetryPolicy
from finetune_api.names import Reason
from finetune_api.status import Attempt, FineTuneJobStatus
from finetune_operator.policies.cause import pod_cause
from finetune_operator.policies.retry import FailureCause, GiveUp, RetryDecision, backoff_seconds, retry_or_give_up
from finetune_operator.settings import RetrySettings

from tests.unit.operator.samples import T0, accept_spec, end_pod, pod, spec

INTERNAL_ERROR_CAUSE = FailureCause(Reason.INTERNAL_ERROR, pod_cause(end_pod(pod(), 70)).failure, RetryPolicy.COUNTED, FailurePrecedence.UNKNOWN_CAUSE)  # type: ignore[union-attr] # it fails


def attempts(*rows: tuple[str, bool, int]) -> list[Attempt]:
    return [
        Attempt(number=n, reason=reason, counted=counted, committed_step=step or None, end_time=T0)
        for n, (reason, counted, step) in enumerate(rows, 1)
    ]


@pytest.mark.parametrize(
    ("used", "retries", "made_progress", "gives_up", "counted"),
    [(0, 3, False, False, True), (2, 3, False, False, True), (3, 3, False, True, None), (3, 3, True, False, False), (0, 0, False, True, None)],
)  # fmt: skip
def test_job_fails_when_attempts_without_progress_exceed_the_retries(
    used: int, retries: int, made_progress: bool, gives_up: bool, counted: bool | None
) -> None:
    decision = retry_or_give_up(
        INTERNAL_ERROR_CAUSE, accept_spec(spec(policy={"retries": retries})).spec, FineTuneJobStatus(retries_used=used),
        made_progress=made_progress, now=T0,
    )  # fmt: skip
    assert isinstance(decision, GiveUp) == gives_up
    if isinstance(decision, RetryDecision):
        assert decision.is_counted == counted
    else:
        assert decision.reason is Reason.RETRIES_EXHAUSTED


@pytest.mark.parametrize(
    ("rows", "seconds"),
    [
        ([], 0.0),
        ([("InternalError", True, 0)], 10.0),
        ([("InternalError", True, 0), ("InternalError", True, 0)], 20.0),
        ([("InternalError", True, 0)] * 9, 600.0),
        ([("Preempted", False, 0)], 0.0),
        ([("Preempted", False, 0), ("Preempted", False, 0)], 10.0),
        ([("InternalError", True, 0), ("Suspended", False, 0)], 0.0),
        ([("InternalError", True, 0), ("OutOfMemory", False, 0)], 0.0),
        ([("InternalError", True, 5)], 0.0),
    ],
)
def test_backoff_doubles_with_attempts_without_progress(rows: list[tuple[str, bool, int]], seconds: float) -> None:
    settings = RetrySettings(base_seconds=10, max_seconds=600)
    assert backoff_seconds(attempts(*rows), settings) == seconds
