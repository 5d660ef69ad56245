"""What a queue, a lost node or somebody's hand takes away: no time is counted that nobody ran, and nothing is missed that was told to go."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from finetune_api.names import Condition, Phase, Reason
from finetune_api.pod import TerminationMessage
from finetune_operator.decide import decide
from finetune_operator.plan import ActionResult, Situation
from finetune_operator.report import report as make_report

from tests.unit.operator.samples import at, ended, facts, job, pod, report, spec, status

BEGUN: dict[str, Any] = {"number": 1, "startTime": at(0).isoformat()}
QUEUED = spec(placement={"queueName": "q"}, policy={"activeDeadlineSeconds": 1800})


def told(kind: Condition, value: str, seconds: float) -> dict[str, str]:
    return {"type": kind, "status": value, "reason": "Progressing", "message": "", "lastTransitionTime": at(seconds).isoformat()}


def test_time_that_a_queue_took_while_nobody_looked_is_not_running_time() -> None:
    known = status(attempt=1, attempts=[BEGUN], conditions=[told(Condition.QUOTA_RESERVED, "True", 100)])
    taken = job(queue="q", is_suspended=True, suspended_since=at(1000), started_at=None)
    found = facts(written=QUEUED, known=known, jobs=[taken], now=at(5000))
    plan = decide(found)
    assert plan.termination is None
    assert make_report(found, plan, ActionResult()).active_seconds == 900


def test_a_reservation_that_was_lost_and_given_again_unseen_begins_anew() -> None:
    known = status(attempt=1, attempts=[BEGUN], conditions=[told(Condition.QUOTA_RESERVED, "True", 100)])
    found = facts(written=QUEUED, known=known, jobs=[job(queue="q", started_at=at(4000))], now=at(4100))
    new = make_report(found, decide(found), ActionResult())
    quota = next(one for one in new.conditions if one.type == Condition.QUOTA_RESERVED)
    assert quota.last_transition_time == at(4000)
    gone = facts(written=QUEUED, known=new, now=at(4200))
    assert decide(gone).finish is None


def test_a_job_that_went_while_nobody_looked_ran_until_it_last_spoke() -> None:
    """Suspended by its user; the operator comes back hours later: the deadline has not passed meanwhile."""
    begun = {**BEGUN, "reason": "Suspended", "message": "spec.suspend is true"}
    known = status(attempt=1, attempts=[begun], progress={"step": 7, "updateTime": at(500).isoformat()})
    written = spec(suspend=True, policy={"activeDeadlineSeconds": 1800})
    found = facts(written=written, known=known, now=at(9000))
    plan = decide(found)
    assert plan.finish is None
    assert plan.attempt_end is not None and (plan.attempt_end.reason, plan.attempt_end.time) == (Reason.SUSPENDED, at(500))
    assert make_report(found, plan, ActionResult()).active_seconds == 500


def test_a_job_that_went_ended_when_its_pods_did() -> None:
    known = status(attempt=1, attempts=[{**BEGUN, "reason": "Suspended"}])
    over = ended(pod(is_deleted=True), 75)  # at 60 s
    found = facts(written=spec(suspend=True, policy={"activeDeadlineSeconds": 1800}), known=known, pods=[over], now=at(9000))
    plan = decide(found)
    assert plan.finish is None
    assert plan.attempt_end is not None and plan.attempt_end.time == at(60)


def test_a_pod_of_a_readmitted_job_is_not_missed_for_the_time_in_the_queue() -> None:
    conditions = [told(Condition.QUOTA_RESERVED, "True", 5000), told(Condition.PODS_READY, "False", 600)]
    progress = {"step": 7, "updateTime": at(590).isoformat()}
    known = status(attempt=1, attempts=[BEGUN], progress=progress, conditions=conditions)
    new = pod(uid="new", created_at=at(5000), phase="Pending", is_ready=False, ip="")
    found = facts(
        written=spec(placement={"queueName": "q"}), known=known, jobs=[job(queue="q", started_at=at(5000))], pods=[new],
        now=at(5001),
    )  # fmt: skip
    assert decide(found).termination is None


def test_a_pod_of_a_lost_node_is_lost_and_has_not_stalled() -> None:
    """The cluster evicts it after 340 s; 300 s of grace and 60 s more are longer than the time after which a silent pod is missed."""
    known = status(attempt=1, attempts=[BEGUN], conditions=[told(Condition.PODS_READY, "False", 40)])
    said = report(stage="training", health={"secondsSinceStep": 1.0})
    evicted = pod(is_ready=False, deletion_timestamp=at(640), disruption="DeletionByTaintManager")
    for now, reason in ((650, None), (701, Reason.NODE_LOST)):
        found = facts(known=known, jobs=[job()], pods=[evicted], last_report=said, reported_at=at(0), now=at(now))
        condemn = decide(found).termination
        assert (condemn.reason if condemn else None) is reason


def test_readiness_that_flaps_behind_a_wall_ends_no_run() -> None:
    """Nobody could ask the pod for an hour, which a network policy may bring about; the kubelet found it ready until now."""
    said = report(stage="training", health={"secondsSinceStep": 1.0})
    flapping = pod(is_ready=False)
    known = status(attempt=1, attempts=[BEGUN], conditions=[told(Condition.PODS_READY, "True", 10)])
    found = facts(known=known, jobs=[job()], pods=[flapping], last_report=said, reported_at=at(0), now=at(3600))
    assert decide(found).termination is None
    known = make_report(found, decide(found), ActionResult())
    later = facts(known=known, jobs=[job()], pods=[flapping], last_report=said, reported_at=at(0), now=at(3660))
    wake = decide(later).reconcile_at
    assert wake is not None and wake == at(3600 + 600 + 1)
    late = facts(known=known, jobs=[job()], pods=[flapping], last_report=said, reported_at=at(0), now=wake)
    condemn = decide(late).termination
    assert condemn is not None and condemn.reason is Reason.STALLED


def test_pods_without_a_job_go_when_the_time_of_their_job_has_come() -> None:
    done = [told(Condition.FINISHED, "True", 100)]
    known = status(attempt=1, phase=Phase.SUCCEEDED, conditions=done, completionTime=at(100).isoformat())
    written = spec(policy={"ttlSecondsAfterFinished": 60})
    left, runs = ended(pod(), 0), pod(uid="runs", index=1)
    early = decide(facts(written=written, known=known, pods=[left, runs], now=at(120)))
    assert (early.situation, early.delete_pods, early.is_clean) == (Situation.FINISHED, (runs,), False)
    due = decide(facts(written=written, known=known, pods=[left], now=at(161)))
    assert (due.delete_pods, due.is_clean) == ((left,), False)
    with_job = decide(facts(written=written, known=known, jobs=[job(completed_at=at(90))], pods=[left], now=at(161)))
    assert (with_job.delete_pods, len(with_job.delete_jobs)) == ((), 1)


def test_checkpoints_of_a_pod_that_a_queue_replaced_are_recorded() -> None:
    """The operator restarted before it scraped step 20: only the termination message of the preempted pod lists it."""
    uri = "s3://models/test/checkpoints/step-{0:08d}/a1-00000000"
    listed = [{"step": step, "uri": uri.format(step)} for step in (10, 20)]
    message = TerminationMessage.model_validate({"step": 29, "resumedFromStep": 0, "checkpoints": listed})
    preempted = replace(ended(pod(), 75, message), is_deleted=True)
    replacement = ended(pod(uid="new", created_at=at(300)), 75, TerminationMessage(code="Code"))
    known = status(attempt=1, attempts=[BEGUN])
    found = facts(written=QUEUED, known=known, jobs=[job(queue="q", failed_at=at(400))], pods=[preempted, replacement], now=at(400))
    plan = decide(found)
    assert plan.attempt_end is not None
    assert (plan.attempt_end.committed_step, plan.attempt_end.progressed) == (20, True)
    assert [one.step for one in make_report(found, plan, ActionResult()).checkpoints] == [10, 20]


def test_the_message_of_a_replaced_pod_does_not_bring_back_checkpoints_that_retention_removed() -> None:
    uri = "s3://models/test/checkpoints/step-{0:08d}/a1-00000000"
    listed = [{"step": step, "uri": uri.format(step)} for step in (10, 20)]
    message = TerminationMessage.model_validate({"checkpoints": listed})
    preempted = replace(ended(pod(), 75, message), is_deleted=True)
    newer = [{"step": step, "uri": uri.format(step)} for step in (20, 30)]
    known = status(attempt=1, attempts=[BEGUN], checkpoints=newer)
    found = facts(known=known, jobs=[job()], pods=[preempted, pod(uid="new", created_at=at(300))], now=at(400))
    assert [one.step for one in make_report(found, decide(found), ActionResult()).checkpoints] == [20, 30]
