"""Which changes of the status emit events, and how the Event objects are named."""

from __future__ import annotations

from typing import Any

from finetune_api.names import Reason
from finetune_api.status import FineTuneJobStatus
from finetune_operator.decide import decide
from finetune_operator.events import MAX_NOTE_CHARACTERS, EventDraft, build_event, build_event_name, draft_events
from finetune_operator.plan import ActionResult
from finetune_operator.report import compute_status

from tests.unit.operator.samples import at, end_pod, facts, finetunejob, job, pod, report, status

RUNNING_STATUS = {
    "attempt": 1,
    "startTime": "2026-11-21T12:00:00Z",
    "attempts": [{"number": 1, "startTime": "2026-11-21T12:00:00Z"}],
}


def compute_next_status(old_status: FineTuneJobStatus, result: ActionResult | None = None, **facts_fields: Any) -> tuple[FineTuneJobStatus, list[str]]:
    """Return the next status, and the reasons of the events that the operator emits about this change of the status."""
    job_facts = facts(status=old_status, **facts_fields)
    new_status = compute_status(job_facts, decide(job_facts), result or ActionResult())
    return new_status, [note.reason.value for note in draft_events(old_status, new_status)]


def test_events_of_a_whole_run() -> None:
    received_report = report(progress={"step": 1, "totalSteps": 9}, checkpoints=[{"step": 1, "uri": "s3://b/1"}])
    steps: list[tuple[ActionResult | None, dict[str, Any]]] = [
        (ActionResult(created_job=job()), {}),
        (None, {"jobs": [job()], "pods": [pod(is_ready=False, phase="Pending", unschedulable_message="0/1 nodes")]}),
        (None, {"jobs": [job()], "pods": [pod()]}),
        (None, {"jobs": [job()], "pods": [pod()], "last_report": received_report}),
        (None, {"jobs": [job(completed_at=at(9))], "pods": [end_pod(pod(), 0)]}),
        (None, {"jobs": [job(completed_at=at(9))], "pods": [end_pod(pod(), 0)]}),
    ]
    seen_reasons: list[str] = []
    current_status = FineTuneJobStatus()
    for result, facts_fields in steps:
        current_status, reasons = compute_next_status(current_status, result, **facts_fields)
        seen_reasons += reasons
    assert seen_reasons == [
        "AttemptStarted", "Unschedulable", "TrainingStarted", "FirstCheckpointCommitted", "Succeeded",
    ]  # fmt: skip


def test_events_of_a_retry() -> None:
    first_status, _ = compute_next_status(status(**RUNNING_STATUS), jobs=[job()], pods=[pod()])
    second_status, reasons = compute_next_status(first_status, jobs=[job(failed_at=at(60))], pods=[end_pod(pod(), 71)], now=at(61))
    assert reasons == ["OutOfMemory", "OutOfMemory", "Retrying"]
    assert (second_status.attempt, second_status.restarts, second_status.phase) == (2, 1, "Recovering")


def test_name_of_an_event_depends_on_its_message() -> None:
    def build_name(text: str) -> str:
        return build_event_name(finetunejob(), EventDraft(Reason.STALLED, text), 0)

    assert build_name("a") == build_name("a")
    assert build_name("a") != build_name("b")
    assert build_name("n" * 9999).startswith("run.")
    event = build_event(finetunejob(), EventDraft(Reason.STALLED, "n" * 9999), "name", "x", at(0))
    assert (event["metadata"]["name"], len(event["note"]) <= MAX_NOTE_CHARACTERS) == ("name", True)


def test_names_sort_in_the_order_in_which_events_are_emitted() -> None:
    versions_and_numbers = [(9, 0), (9, 1), (9, 12), (10, 0), (99999, 0), (100000, 0)]
    names = [build_event_name(finetunejob(version=version), EventDraft(Reason.ACCEPTED, f"{version}"), number) for version, number in versions_and_numbers]
    assert sorted(names) == names
