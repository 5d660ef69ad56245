"""What holds although nobody looked for a while, or the ladder is at its end: limits, stalls, and checkpoints that are gone."""

from __future__ import annotations

from typing import Any

import pytest
from finetune_api.names import Condition, Reason
from finetune_api.pod import TerminationMessage
from finetune_api.rules import check
from finetune_api.status import Adaptation, FineTuneJobStatus
from finetune_operator.decide import decide
from finetune_operator.facts import Facts
from finetune_operator.plan import ActionResult, Situation
from finetune_operator.policies import timeouts
from finetune_operator.policies.acceptance import Accepted, FirstAttempt, Refused, accept
from finetune_operator.policies.adaptations import (
    LadderExhausted,
    adapt_to_divergence,
    adapt_to_out_of_memory,
    apply_adaptations,
)
from finetune_operator.policies.blocking import BlockingCondition
from finetune_operator.report import report as make_report

from tests.unit.operator.samples import CONFIG, T0, accepted, at, ended, facts, job, pod, report, spec, status


def iso(seconds: float) -> str:
    return at(seconds).isoformat().replace("+00:00", "Z")


BEGUN = {"number": 1, "startTime": iso(0)}
QUEUED = spec(placement={"queueName": "q"}, policy={"activeDeadlineSeconds": 1800})
CHECKPOINTS = [
    {"step": step, "uri": f"s3://m/checkpoints/step-{step:08d}/a1-aaaaaaaa", "healthy": True} for step in (100, 200, 300, 400, 500)
]  # fmt: skip


def told(kind: Condition, value: str, reason: str, seconds: float) -> dict[str, str]:
    return {"type": kind, "status": value, "reason": reason, "message": "", "lastTransitionTime": iso(seconds)}


def stalled(found: Facts, acted: ActionResult | None = None) -> bool:
    new = make_report(found, decide(found), acted or ActionResult())
    return any(one.type == Condition.STALLED and one.status == "True" for one in new.conditions)


# -- running time -----------------------------------------------------------------------------------------------------


def test_time_in_a_queue_ends_when_the_queue_says_so_and_not_when_somebody_looks() -> None:
    known = status(attempt=1, attempts=[BEGUN], conditions=[told(Condition.QUOTA_RESERVED, "False", Reason.QUEUED, 0)])
    found = facts(written=QUEUED, known=known, jobs=[job(queue="q", started_at=at(100))], pods=[pod()], now=at(3700))
    assert found.running_since == at(100)
    plan = decide(found)
    assert plan.termination is not None and plan.termination.reason is Reason.DEADLINE_EXCEEDED


def test_an_attempt_that_was_never_written_runs_since_its_job_was_made() -> None:
    found = facts(jobs=[job(created_at=at(7))], pods=[pod()], now=at(100))
    assert (found.attempt_record, found.running_since) == (None, at(7))
    over = facts(jobs=[job(created_at=at(7), failed_at=at(40), failed_reason="x")], pods=[ended(pod(), 70)], now=at(41))
    assert make_report(over, decide(over), ActionResult()).active_seconds == 33


def test_an_attempt_that_was_never_written_runs_since_its_queue_let_it() -> None:
    waiting = facts(written=QUEUED, jobs=[job(queue="q", is_suspended=True, started_at=None)], now=at(100))
    assert (waiting.attempt_record, waiting.running_since) == (None, None)
    running = facts(written=QUEUED, jobs=[job(queue="q", started_at=at(60))], pods=[pod()], now=at(100))
    assert (running.attempt_record, running.running_since) == (None, at(60))


def test_pods_that_were_ready_until_now_are_not_late() -> None:
    begun = status(attempt=1, attempts=[BEGUN], conditions=[told(Condition.PODS_READY, "True", Reason.PODS_READY, 5)])
    found = facts(known=begun, jobs=[job()], pods=[pod(is_ready=False)], now=at(7200))
    assert not stalled(found)
    lost = status(attempt=1, attempts=[BEGUN], conditions=[told(Condition.PODS_READY, "False", Reason.PODS_NOT_READY, 7200)])
    assert stalled(facts(known=lost, jobs=[job()], pods=[pod(is_ready=False)], now=at(9001)))


def test_an_attempt_that_began_and_failed_unseen_has_used_its_time() -> None:
    known = status(attempt=1, attempts=[BEGUN], conditions=[told(Condition.QUOTA_RESERVED, "False", Reason.QUEUED, 0)])
    over = job(queue="q", started_at=at(100), failed_at=at(1700), failed_reason="x")
    found = facts(written=QUEUED, known=known, jobs=[over], pods=[ended(pod(), 70)], now=at(3700))
    assert make_report(found, decide(found), ActionResult()).active_seconds == 1600


def test_the_start_before_a_queue_took_the_job_is_not_the_start_after() -> None:
    """A Job keeps its start time while it is held, and until its controller has seen that it no longer is."""
    for value, reason, since in (("False", Reason.QUEUED, 1800), ("True", Reason.PROGRESSING, 7201)):
        taken = told(Condition.QUOTA_RESERVED, value, reason, since)
        known = status(attempt=1, attempts=[BEGUN], activeSeconds=1700, conditions=[taken])
        for one in (job(queue="q", started_at=at(100), suspended_since=at(1800)), job(queue="q", started_at=at(7200))):
            found = facts(written=QUEUED, known=known, jobs=[one], now=at(7202))
            assert decide(found).termination is None
            assert found.running_since in (None, at(7200), at(7201))


def test_quota_is_dated_by_the_start_that_it_allowed() -> None:
    known = status(attempt=1, attempts=[BEGUN], conditions=[told(Condition.QUOTA_RESERVED, "False", Reason.QUEUED, 0)])
    queued = spec(placement={"queueName": "q"}, policy={"activeDeadlineSeconds": 7200})
    found = facts(written=queued, known=known, jobs=[job(queue="q", started_at=at(100))], pods=[pod()], now=at(3700))
    seen = make_report(found, decide(found), ActionResult())
    assert [one.last_transition_time for one in seen.conditions if one.type is Condition.QUOTA_RESERVED] == [at(100)]
    lost = facts(written=queued, known=seen, jobs=[job(queue="q", is_suspended=True, started_at=at(100))], now=at(3800))
    assert make_report(lost, decide(lost), ActionResult()).active_seconds == 3700


def test_no_attempt_is_made_that_would_have_no_time_left() -> None:
    over = job(failed_at=at(300), failed_reason="BackoffLimitExceeded")
    found = facts(
        written=spec(policy={"activeDeadlineSeconds": 100}), known=status(attempt=1, attempts=[BEGUN]), jobs=[over],
        pods=[ended(pod(), 70)], now=at(301),
    )  # fmt: skip
    plan = decide(found)
    assert plan.finish is not None and plan.finish.reason is Reason.DEADLINE_EXCEEDED


# -- stalls -----------------------------------------------------------------------------------------------------------


def silent(ready_since: float) -> FineTuneJobStatus:
    return status(
        attempt=1, attempts=[{**BEGUN, "lastStep": 500}], progress={"step": 500, "updateTime": iso(100)},
        conditions=[told(Condition.PODS_READY, "False", Reason.PODS_NOT_READY, ready_since)],
    )  # fmt: skip


def test_a_pod_that_went_silent_before_this_operator_began_is_ended_all_the_same() -> None:
    found = facts(known=silent(200), jobs=[job()], pods=[pod(is_ready=False)], now=at(900))
    plan = decide(found)
    assert plan.termination is not None and plan.termination.reason is Reason.STALLED


@pytest.mark.parametrize(
    ("known", "ready"),
    [
        (silent(200), True),
        (silent(500), False),
        (status(attempt=1, attempts=[BEGUN], conditions=[told(Condition.PODS_READY, "False", Reason.PODS_NOT_READY, 0)]), False),
        (silent(200).model_copy(update={"attempts": status(attempts=[{"number": 1, "startTime": iso(150)}]).attempts}), False),
    ],
    ids=["ready", "not yet", "never spoke", "another attempt spoke"],
)  # fmt: skip
def test_a_pod_that_nobody_heard_is_left_alone(known: FineTuneJobStatus, ready: bool) -> None:
    plan = decide(facts(known=known, jobs=[job()], pods=[pod(is_ready=ready)], now=at(900)))
    assert plan.termination is None and plan.reconcile_at is not None


def test_an_old_answer_does_not_make_a_ready_pod_late() -> None:
    """A network policy between us and a pod must not end it in the last minutes before the limit."""
    said = report(health={"secondsSinceStep": 30.0, "medianStepSeconds": 1.0})
    assert timeouts.stall_message(accepted().spec, said, T0, [pod()], at(580)) == ""


@pytest.mark.parametrize(("sign", "late"), [(3.0, False), (690.0, True), (None, True)])
def test_a_batch_of_an_evaluation_is_as_good_as_a_step(sign: float | None, late: bool) -> None:
    said = report(health={"secondsSinceStep": 700.0, "secondsSinceHeartbeat": sign, "medianStepSeconds": 1.0})
    assert bool(timeouts.stall_message(accepted().spec, said, T0, [pod()], at(5))) is (late and (sign is None or sign + 5 > 600))


def test_a_pod_that_a_queue_made_anew_is_given_its_time() -> None:
    """The quota went at 120 and came back at 7200: what spoke is gone, and the new pod has only just been made."""
    known = status(
        attempt=1, attempts=[{**BEGUN, "lastStep": 50}], progress={"step": 50, "updateTime": iso(100)},
        conditions=[told(Condition.QUOTA_RESERVED, "True", Reason.PROGRESSING, 7200), told(Condition.PODS_READY, "False", Reason.PODS_NOT_READY, 120)],
    )  # fmt: skip
    again = job(queue="q", started_at=at(7200))
    waits = pod(uid="new", phase="Pending", is_ready=False, created_at=at(7200))
    runs = pod(uid="new", is_ready=False, created_at=at(7200), running_since=at(7300))
    queued = spec(placement={"queueName": "q"})
    for new, now, ends in ((waits, 9000, False), (runs, 7400, False), (runs, 7899, False), (runs, 7905, True)):
        found = facts(written=queued, known=known, jobs=[again], pods=[new], now=at(now))
        assert (decide(found).termination is not None) is ends, (new.phase, now)


def test_a_clock_that_is_ahead_makes_no_attempt_speak_that_has_not_begun() -> None:
    known = status(
        attempt=2, attempts=[{**BEGUN, "lastStep": 50, "endTime": iso(102), "reason": "PodFailed"}, {"number": 2, "startTime": iso(112)}],
        progress={"step": 50, "updateTime": iso(130)}, conditions=[told(Condition.PODS_READY, "False", "PodsNotReady", 102)],
    )  # fmt: skip
    new = pod(uid="new", attempt=2, phase="Pending", is_ready=False, created_at=at(112), node="", unschedulable="0/3 nodes")
    assert decide(facts(known=known, jobs=[job(2, created_at=at(112))], pods=[new], now=at(800))).termination is None


# -- waiting ----------------------------------------------------------------------------------------------------------


def test_a_job_that_may_not_be_created_needs_a_person_at_last() -> None:
    known = status(
        conditions=[
            told(Condition.ACCEPTED, "True", "Accepted", 0),
            told(Condition.PODS_READY, "False", "QuotaExceeded", 0),
        ]
    )
    refused = ActionResult(blocking=BlockingCondition(Reason.QUOTA_EXCEEDED, "exceeded quota"))
    assert not stalled(facts(known=known, now=at(1700)), refused)
    assert stalled(facts(known=known, now=at(1900)), refused)
    assert not stalled(facts(known=known, now=at(1900)))


def test_a_name_that_is_taken_needs_a_person_at_last() -> None:
    known = status(
        conditions=[
            told(Condition.ACCEPTED, "True", "Accepted", 0),
            told(Condition.PODS_READY, "False", "ChildrenConflict", 0),
        ]
    )
    early = facts(known=known, jobs=[job(owner_uid="other")], now=at(100))
    assert decide(early).situation is Situation.BLOCKED and decide(early).reconcile_at == at(1800)
    assert stalled(facts(known=known, jobs=[job(owner_uid="other")], now=at(1900)))


@pytest.mark.parametrize(
    ("suspended", "ready", "now"),
    [
        (told(Condition.SUSPENDED, "False", "Resumed", 9000), "QuotaExceeded", 9100),
        (told(Condition.SUSPENDED, "True", "Suspended", 100), "PodsNotReady", 9000),
    ],
    ids=["resumed a while ago", "resumed in this look"],
)
def test_the_time_before_a_resume_is_no_waiting(suspended: dict[str, str], ready: str, now: float) -> None:
    conditions = [told(Condition.PODS_READY, "False", ready, 0), suspended]
    refused = ActionResult(blocking=BlockingCondition(Reason.QUOTA_EXCEEDED, "exceeded quota"))
    assert not stalled(facts(known=status(conditions=conditions), now=at(now)), refused)


def test_a_pool_whose_nodes_lack_the_resource_is_refused_with_the_pools() -> None:
    found = accept(spec(resources={"gpusPerNode": 2, "nodePool": "h100", "gpuResource": "amd.com/gpu"}), CONFIG)
    assert isinstance(found, Refused) and found.reason is Reason.POOL_LACKS_RESOURCE
    assert (
        "amd.com/gpu, and nodes of pool h100 have nvidia.com/gpu; pools are: h100 (8 x nvidia.com/gpu" in found.message
    )


# -- the ladder -------------------------------------------------------------------------------------------------------


def rungs(**groups: Any) -> list[str]:
    """Changes of the whole ladder."""
    current, changes = accepted(spec(**groups)).spec, []
    while isinstance(rung := adapt_to_out_of_memory(current, T0), Adaptation):
        changes.append(rung.change)
        current = apply_adaptations(current, [rung])
        assert not check(current), rung
    return changes


def test_no_rung_is_taken_that_the_rules_refuse() -> None:
    assert rungs(method={"type": "prefixTuning"}, training={"batchSizePerDevice": 2}) == [
        "batchSizePerDevice 2 -> 1, gradientAccumulationSteps 4 -> 8"
    ]


def test_an_evaluation_that_does_not_fit_becomes_smaller_too() -> None:
    held_out = {"split": {"validation": 0.1}}
    assert rungs(dataset={"train": "s3://data/a.jsonl", **held_out}, evaluation={"batchSizePerDevice": 32}, training={"batchSizePerDevice": 2}) == [
        "batchSizePerDevice 2 -> 1, gradientAccumulationSteps 4 -> 8, evaluation.batchSizePerDevice 32 -> 1",
        "gradientCheckpointing disabled -> enabled",
    ]  # fmt: skip
    assert rungs(dataset={"train": "s3://data/a.jsonl", **held_out}, evaluation={"batchSizePerDevice": 8}, training={"batchSizePerDevice": 1})[0] == (
        "evaluation.batchSizePerDevice 8 -> 1"
    )  # fmt: skip
    assert "evaluation" not in " ".join(rungs(evaluation={"batchSizePerDevice": 32}))


# -- checkpoints ------------------------------------------------------------------------------------------------------


def kept(told_steps: list[int], known_steps: list[int]) -> list[int]:
    """Steps in status after a pod told of some, where status knew of others."""
    known = status(attempt=1, attempts=[BEGUN], checkpoints=[one for one in CHECKPOINTS if one["step"] in known_steps])
    said = report(checkpoints=[one for one in CHECKPOINTS if one["step"] in told_steps], progress={"step": 510})
    found = facts(known=known, jobs=[job()], pods=[pod()], last_report=said)
    return [one.step for one in make_report(found, decide(found), ActionResult()).checkpoints]


def test_what_retention_removed_leaves_the_status() -> None:
    assert kept([400, 500], [100, 200, 300, 400, 500]) == [400, 500]


def test_how_long_a_checkpoint_took_is_not_forgotten_by_the_next_attempt() -> None:
    known = status(attempt=1, attempts=[BEGUN], checkpoints=[CHECKPOINTS[3] | {"saveSeconds": 400.0}])
    found = facts(known=known, jobs=[job()], pods=[pod()], last_report=report(checkpoints=[CHECKPOINTS[3]]))
    assert make_report(found, decide(found), ActionResult()).checkpoints[0].save_seconds == 400.0


def test_what_lies_behind_a_rollback_stays_known_until_it_is_overtaken() -> None:
    assert kept([100, 200], [100, 200, 300, 400]) == [100, 200, 300, 400]
    assert kept([], [100, 200]) == [100, 200]


def test_a_second_rollback_goes_to_a_checkpoint_that_is_still_there() -> None:
    written = spec(checkpoint={"keep": 2})
    known = status(attempt=1, attempts=[BEGUN], checkpoints=CHECKPOINTS)
    said = report(checkpoints=CHECKPOINTS[-2:], progress={"step": 510})
    found = facts(written=written, known=known, jobs=[job()], pods=[pod()], last_report=said)
    left = make_report(found, decide(found), ActionResult()).checkpoints
    adaptations: list[Adaptation] = []
    for attempt in (1, 2, 3):
        rung = adapt_to_divergence(accepted(written).spec, adaptations, left, T0, attempt)
        assert not isinstance(rung, LadderExhausted)
        adaptations.append(rung)
    assert (adaptations[-1].set or {})["resume.maxStep"] == 400


def test_our_own_pause_is_no_waiting() -> None:
    attempts = [
        {"number": n, "startTime": iso(n), "endTime": iso(n + 1), "reason": "PodFailed", "counted": True} for n in range(1, 6)
    ]  # fmt: skip
    ready = told(Condition.PODS_READY, "False", "PodsNotReady", 5)
    known, pause = status(attempt=6, attempts=attempts, conditions=[ready]), 160
    refused = ActionResult(blocking=BlockingCondition(Reason.QUOTA_EXCEEDED, "exceeded quota"))
    for now, late in ((6 + pause + 1, False), (6 + pause + 61, True)):
        found = facts(written=spec(policy={"startTimeoutSeconds": 60}), known=known, now=at(now))
        assert stalled(found, refused) is late


# -- what was there before --------------------------------------------------------------------------------------------


def test_the_last_words_tell_what_retention_took_in_the_end() -> None:
    known = status(attempt=1, attempts=[BEGUN], checkpoints=CHECKPOINTS[-2:])
    words = TerminationMessage.model_validate({"step": 500, "checkpoints": CHECKPOINTS[-1:], "output": {"uri": "s3://m/final"}})
    said = report(checkpoints=CHECKPOINTS[-2:], progress={"step": 500})
    found = facts(known=known, jobs=[job(completed_at=at(60))], pods=[ended(pod(), 0, words)], last_report=said, now=at(61))
    assert [one.step for one in make_report(found, decide(found), ActionResult()).checkpoints] == [500]


def test_a_newer_operators_rules_do_not_end_what_has_begun() -> None:
    written = spec(training={"optimizer": "adafactor", "adamBeta1": 0.9})
    new, begun = accept(written, CONFIG), accept(written, CONFIG, FirstAttempt({"training.epochs": 3}))
    assert isinstance(new, Refused) and new.is_final
    assert isinstance(begun, Accepted)
    assert any(note.startswith("a new job would be refused: spec.training.adamBeta1") for note in begun.notes)
