"""The status and the events that come of facts and a plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from finetune_api.names import Condition, Phase, Reason
from finetune_api.pod import TerminationMessage
from finetune_api.status import FineTuneJobStatus
from finetune_operator.decide import decide
from finetune_operator.events import MAX_NOTE, Note, build_event, transitions
from finetune_operator.facts import Facts
from finetune_operator.plan import ActionResult
from finetune_operator.policies.blocking import BlockingCondition
from finetune_operator.report import report as compute

from tests.unit.operator.samples import at, ended, facts, finetunejob, job, pod, report, spec, status

RUNNING = {
    "attempt": 1,
    "startTime": "2026-11-21T12:00:00Z",
    "attempts": [{"number": 1, "startTime": "2026-11-21T12:00:00Z"}],
}


def told(found: Facts, acted: ActionResult | None = None) -> FineTuneJobStatus:
    return compute(found, decide(found), acted or ActionResult())


def truths(found: FineTuneJobStatus) -> dict[str, str]:
    return {one.type.value: one.status for one in found.conditions}


def test_the_first_look() -> None:
    found = told(facts(), ActionResult(created_job=job()))
    assert (found.phase, found.attempt, found.restarts, found.observed_generation) == (Phase.STARTING, 1, 0, 1)
    assert found.workers is not None and found.workers.display == "0/1"
    assert found.progress is not None and (found.progress.display, found.progress.eta) == ("-", "-")
    assert truths(found) == {
        "Accepted": "True", "PodsReady": "False", "Suspended": "False", "CheckpointsHealthy": "Unknown",
        "Succeeded": "Unknown", "Finished": "False", "Reconciling": "True",
    }  # fmt: skip
    assert found.resolved is not None
    assert (found.resolved.world_size, found.resolved.effective_batch) == (1, 16)
    assert found.resolved.defaults is not None and found.resolved.defaults["training.learningRate"] == 2e-4


@pytest.mark.parametrize(
    ("stage", "step", "attempt", "phase"),
    [
        ("starting", 0, 1, Phase.STARTING),
        ("downloading", 0, 1, Phase.STARTING),
        ("checking", 0, 1, Phase.VALIDATING),
        ("training", 3, 1, Phase.RUNNING),
        ("saving", 3, 1, Phase.RUNNING),
        ("evaluating", 3, 1, Phase.RUNNING),
        ("evaluating", 10, 1, Phase.EVALUATING),
        ("uploading", 10, 1, Phase.UPLOADING),
        ("downloading", 0, 2, Phase.RECOVERING),
        ("training", 4, 2, Phase.RUNNING),
    ],
)
def test_phases_follow_the_pod(stage: str, step: int, attempt: int, phase: Phase) -> None:
    known: dict[str, Any] = {**RUNNING, "attempt": attempt}
    if attempt == 2:
        first = {
            "number": 1,
            "startTime": "2026-11-21T12:00:00Z",
            "endTime": "2026-11-21T12:01:00Z",
            "reason": "Preempted",
        }
        known["attempts"] = [first, {"number": 2, "startTime": "2026-11-21T12:02:00Z"}]
    said = report(stage=stage, attempt=attempt, progress={"step": step, "totalSteps": 10})
    pods = [pod(attempt, uid="pod-1-0")]
    found = told(facts(known=status(**known), jobs=[job(attempt)], pods=pods, last_report=said))
    assert found.phase == phase


def test_a_restarted_operator_does_not_forget_that_the_job_trains() -> None:
    known = {**RUNNING, "attempts": [{**RUNNING["attempts"][0], "lastStep": 4}]}  # type: ignore[dict-item, index] # test data
    found = told(facts(known=status(**known), jobs=[job()], pods=[pod()]))
    assert found.phase is Phase.RUNNING


def test_progress_for_people() -> None:
    said = report(progress={"step": 120, "totalSteps": 500, "secondsRemaining": 4320})
    found = told(facts(known=status(**RUNNING), jobs=[job()], pods=[pod()], last_report=said))
    assert found.progress is not None
    assert (found.progress.display, found.progress.percent, found.progress.eta) == ("120/500 (24%)", 24, "1h12m")


def test_checkpoints_the_newest_five_and_the_best() -> None:
    marks = [{"step": s, "uri": f"s3://b/{s}", "evalLoss": abs(s - 20) + 1.0} for s in range(10, 100, 10)]
    said = report(checkpoints=marks, latestCheckpoint="s3://b/90")
    found = told(facts(known=status(**RUNNING), jobs=[job()], pods=[pod()], last_report=said))
    assert [one.step for one in found.checkpoints] == [20, 50, 60, 70, 80, 90]
    assert found.latest_checkpoint == "s3://b/90"
    assert truths(found)["CheckpointsHealthy"] == "True"


def test_success_from_the_last_words_alone() -> None:
    words = TerminationMessage.model_validate(
        {"step": 500, "output": {"uri": "s3://b/model", "kind": "adapter"}, "latestCheckpoint": "s3://b/500"}
    )
    found = told(facts(known=status(**RUNNING), jobs=[job(completed_at=at(90))], pods=[ended(pod(), 0, words)], now=at(95)))
    assert (found.phase, found.duration, found.completion_time) == (Phase.SUCCEEDED, "1m30s", at(90))
    assert found.output is not None and found.output.uri == "s3://b/model"
    assert found.progress is not None and found.progress.step == 500
    assert "Reconciling" not in truths(found)
    assert "Stalled" not in truths(found)


def test_start_timeout_needs_a_human_and_is_not_the_end() -> None:
    written = spec(policy={"startTimeoutSeconds": 60})
    pulling = pod(phase="Pending", is_ready=False, waiting_reason="ImagePullBackOff", waiting_message="no")
    late = told(facts(written=written, known=status(**RUNNING), jobs=[job()], pods=[pulling], now=at(61)))
    assert (truths(late)["Stalled"], truths(late)["Reconciling"], truths(late)["Finished"]) == ("True", "True", "False")
    early = told(facts(written=written, known=status(**RUNNING), jobs=[job()], pods=[pulling], now=at(59)))
    assert "Stalled" not in truths(early)


def test_a_pool_that_vanished_does_not_disturb_what_runs() -> None:
    written = spec(resources={"nodes": 2, "nodePool": "gone", "gpusPerNode": 1}, policy={"activeDeadlineSeconds": 100})
    pods = [pod(), pod(index=1)]
    found = facts(written=written, known=status(**RUNNING), jobs=[job()], pods=pods, now=at(50))
    assert decide(found).termination is None
    shown = told(found)
    assert shown.workers is not None and shown.workers.display == "2/2"
    assert truths(shown)["Accepted"] == "False"
    late = decide(facts(written=written, known=status(**RUNNING), jobs=[job()], pods=pods, now=at(101)))
    assert late.termination is not None and late.termination.reason is Reason.DEADLINE_EXCEEDED


def test_transition_times_only_move_with_the_status() -> None:
    first = told(facts(known=status(**RUNNING), jobs=[job()], pods=[pod(is_ready=False)], now=at(10)))
    second = told(facts(known=first, jobs=[job()], pods=[pod(is_ready=False)], now=at(20)))
    third = told(facts(known=second, jobs=[job()], pods=[pod()], now=at(30)))

    def when(found: FineTuneJobStatus) -> Any:
        return next(one.last_transition_time for one in found.conditions if one.type is Condition.PODS_READY)

    assert (when(first), when(second), when(third)) == (at(10), at(10), at(30))


def test_a_second_look_changes_nothing() -> None:
    first = told(facts(known=status(**RUNNING), jobs=[job()], pods=[pod()], now=at(10)))
    assert told(facts(known=first, jobs=[job()], pods=[pod()], now=at(20))).to_wire() == first.to_wire()


def test_progress_alone_is_no_transition() -> None:
    def at_step(step: int) -> FineTuneJobStatus:
        said = report(progress={"step": step, "totalSteps": 500}, metrics={"trainLoss": 1 / step})
        return told(facts(known=status(**RUNNING), jobs=[job()], pods=[pod()], last_report=said))

    assert at_step(7).prompt_part() == at_step(9).prompt_part()
    assert at_step(7).to_wire() != at_step(9).to_wire()


def test_a_status_stays_small_whatever_the_pods_say() -> None:
    words = TerminationMessage(code="X" * 5000, message="y" * 100_000, hint="z" * 100_000)
    gone = replace(
        ended(pod(), 65),
        terminated=replace(ended(pod(), 65, words).terminated, message=words.model_dump_json(by_alias=True)),
    )  # type: ignore[type-var] # it ended
    found = told(
        facts(
            known=status(**RUNNING), jobs=[job(failed_at=at(60))], pods=[gone], blocking=BlockingCondition(Reason.QUEUED, "q" * 9999)
        )
    )
    assert len(str(found.to_wire())) < 20_000


# Events


def reasons(old: FineTuneJobStatus, new: FineTuneJobStatus) -> list[str]:
    return [note.reason.value for note in transitions(old, new)]


def test_the_events_of_a_whole_run() -> None:
    seen: list[str] = []
    current = FineTuneJobStatus()
    said = report(progress={"step": 1, "totalSteps": 9}, checkpoints=[{"step": 1, "uri": "s3://b/1"}])
    steps: list[tuple[Facts, ActionResult]] = []

    def go(acted: ActionResult | None = None, **what: Any) -> None:
        nonlocal current
        found = facts(known=current, **what)
        new = told(found, acted)
        seen.extend(reasons(current, new))
        current = new
        steps.append((found, acted or ActionResult()))

    go(ActionResult(created_job=job()))
    go(jobs=[job()], pods=[pod(is_ready=False, phase="Pending", unschedulable="0/1 nodes")])
    go(jobs=[job()], pods=[pod()])
    go(jobs=[job()], pods=[pod()], last_report=said)
    go(jobs=[job(completed_at=at(9))], pods=[ended(pod(), 0)])
    go(jobs=[job(completed_at=at(9))], pods=[ended(pod(), 0)])
    assert seen == [
        "Accepted", "AttemptStarted", "Unschedulable", "TrainingStarted", "FirstCheckpointCommitted", "Succeeded",
    ]  # fmt: skip


def test_the_events_of_a_retry() -> None:
    first = told(facts(known=status(**RUNNING), jobs=[job()], pods=[pod()]))
    second = told(facts(known=first, jobs=[job(failed_at=at(60))], pods=[ended(pod(), 71)], now=at(61)))
    assert reasons(first, second) == ["OutOfMemory", "OutOfMemory", "Retrying"]
    assert (second.attempt, second.restarts, second.phase) == (2, 1, Phase.RECOVERING)


def test_the_same_event_has_the_same_name_and_another_note_another() -> None:
    def name(note: str) -> str:
        event = build_event(finetunejob(), Note(Reason.STALLED, note), "x", at(0))
        assert len(event["note"]) <= MAX_NOTE
        return str(event["metadata"]["name"])

    assert name("a") == name("a")
    assert name("a") != name("b")
    assert name("n" * 9999).startswith("run.")
