"""What the user's wishes do to a job, wherever it stands."""

from __future__ import annotations

import pytest
from finetune_api.names import Condition, Reason
from finetune_api.status import FineTuneJobStatus
from finetune_operator.decide import decide
from finetune_operator.plan import Outcome, Plan, Situation

from tests.unit.operator.samples import at, ended, facts, job, pod, spec, status

BEGUN = {"number": 1, "startTime": "2026-11-21T12:00:00Z"}
OVER = {**BEGUN, "endTime": "2026-11-21T12:01:00Z", "reason": "InternalError", "counted": True}
RUNNING = status(attempt=1, attempts=[BEGUN])
RECOVERING = status(attempt=2, attempts=[OVER])
PENDING, STARTING = pod(phase="Pending", ready=False, node=""), pod(ready=False)
PLACES = {
    "not looked at yet": (None, [], []),
    "starting, no pod": (RUNNING, [job()], []),
    "starting, pod waits": (RUNNING, [job()], [PENDING]),
    "queued": (RUNNING, [job(suspended=True, started=None)], []),
    "running": (RUNNING, [job()], [pod()]),
    "recovering": (RECOVERING, [job(failed=at(60), failed_reason="BackoffLimitExceeded")], [ended(pod(), 70)]),
}
"""(status, Jobs, pods) of a job at that place."""


def plan_of(place: str, **wish: bool) -> Plan:
    known, jobs, pods = PLACES[place]
    return decide(facts(written=spec(**wish), known=known, jobs=jobs, pods=pods, now=at(61)))


@pytest.mark.parametrize("place", PLACES)
def test_suspend_starts_nothing_and_ends_what_runs(place: str) -> None:
    plan = plan_of(place, suspend=True)
    assert plan.create is None
    if place in ("not looked at yet", "recovering"):
        assert plan.situation is Situation.SUSPENDED
    else:
        assert plan.condemn is not None
        assert plan.condemn.reason is Reason.SUSPENDED


@pytest.mark.parametrize("place", PLACES)
def test_cancel_ends_everything_for_good(place: str) -> None:
    plan = plan_of(place, cancel=True)
    assert plan.create is None
    if place in ("not looked at yet", "recovering"):
        assert plan.finish is not None
        assert plan.finish.outcome is Outcome.CANCELLED
    else:
        assert plan.condemn is not None
        assert plan.condemn.reason is Reason.CANCELLED


@pytest.mark.parametrize("place", PLACES)
def test_cancel_wins_over_suspend(place: str) -> None:
    both, alone = plan_of(place, cancel=True, suspend=True), plan_of(place, cancel=True)
    assert (both.finish, both.condemn and both.condemn.reason) == (alone.finish, alone.condemn and alone.condemn.reason)


@pytest.mark.parametrize("place", PLACES)
def test_a_finished_job_is_never_started_again(place: str) -> None:
    known, jobs, pods = PLACES[place]
    when = "2026-11-21T12:01:00Z"
    truth = {"type": Condition.FINISHED, "status": "True", "reason": "Succeeded", "message": "", "lastTransitionTime": when}
    finished = FineTuneJobStatus.model_validate({**(known.wire() if known else {}), "conditions": [truth]})
    for wish in ({}, {"suspend": False}, {"suspend": True}, {"cancel": True}):
        plan = decide(facts(written=spec(**wish), known=finished, jobs=jobs, pods=pods, now=at(4000)))
        assert plan.situation is Situation.FINISHED
        assert (plan.create, plan.finish, plan.condemn) == (None, None, None)


def test_pauses_end_with_the_next_attempt() -> None:
    assert plan_of("recovering").situation is Situation.PAUSING
    known, jobs, pods = PLACES["recovering"]
    plan = decide(facts(known=known, jobs=jobs, pods=pods, now=at(71)))
    assert (plan.situation, plan.create) == (Situation.STARTING, 2)
