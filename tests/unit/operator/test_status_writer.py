"""How often the status is written, which writes are deferred, and what happens if the process dies before a write."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import Any, cast

import pytest
from finetune_api.names import Reason
from finetune_operator import events, throttle
from finetune_operator.events import EventDraft, EventRecorder
from finetune_operator.facts import ReceivedReport
from finetune_operator.kube import ApiResponse, Forbidden, KubeClient
from finetune_operator.objects import CORE_EVENT, EVENT, FINETUNEJOB, JOB, Kind, Object
from finetune_operator.plan import Plan, Situation
from finetune_operator.status_writer import may_defer
from finetune_operator.views import JobView, read_finetunejob, read_status

from tests.unit.operator.fake_cluster import KEY, FakeApiServer, OperatorProcess, new_server, start_attempt
from tests.unit.operator.samples import CONFIG, SPEC, UID, end_pod, pod, report


@pytest.fixture
def server() -> FakeApiServer:
    return new_server()


class ProcessDied(BaseException):
    """Raised to simulate that the operator process is killed."""


# Events


async def test_event_is_emitted_once_if_the_process_dies_before_the_status_write(server: FakeApiServer) -> None:
    def die_before_status_write(verb: str, kind: Kind) -> None:
        if (verb, kind) == ("update", FINETUNEJOB):
            raise ProcessDied

    server.before_request = die_before_status_write
    with pytest.raises(ProcessDied):
        await OperatorProcess(server).reconcile()
    assert server.event_counts() == {Reason.ATTEMPT_STARTED: 1}
    server.before_request = lambda verb, kind: None
    restarted_operator = OperatorProcess(server)
    await restarted_operator.reconcile()
    assert server.event_counts() == {Reason.ATTEMPT_STARTED: 1}
    assert server.count("patch", EVENT) == 0
    await restarted_operator.reconcile()
    assert server.count("create", EVENT) == 2


async def test_repeated_transition_is_counted_in_the_event_series(server: FakeApiServer) -> None:
    server.finetunejob["spec"] = {**SPEC, "suspend": True}
    process = OperatorProcess(server)
    await process.reconcile()
    for suspend in (False, True):
        server.write_spec({**SPEC, "suspend": suspend})
        server.objects.pop((JOB.plural, "run-1"), None)
        process.refresh()
        for _ in range(6):
            await process.reconcile()
            process.refresh()
    assert server.event_counts()[Reason.SUSPENDED] == 2
    assert len([body for body in server.objects.values() if body.get("reason") == Reason.SUSPENDED]) == 1


async def test_repeated_event_is_created_again_after_the_first_event_expired(server: FakeApiServer) -> None:
    recorder, draft = EventRecorder(cast("KubeClient", server), "test"), EventDraft(Reason.SUSPENDED, "x")
    await recorder.emit(read_finetunejob(server.finetunejob), [draft])
    (first_name,) = [name for plural, name in server.objects if plural == EVENT.plural]
    del server.objects[EVENT.plural, first_name]
    recorder.record_status_write(UID)
    server.write_spec({**SPEC, "suspend": True})
    await recorder.emit(read_finetunejob(server.finetunejob), [draft])
    (second_name,) = [name for plural, name in server.objects if plural == EVENT.plural]
    assert (second_name > first_name, server.event_counts()) == (True, {Reason.SUSPENDED: 1})


@pytest.mark.parametrize("refused_plural", ["events", "nothing"])
async def test_status_is_written_without_permission_for_events(server: FakeApiServer, refused_plural: str) -> None:
    def refuse(verb: str, kind: Kind) -> None:
        if kind.plural == refused_plural:
            raise Forbidden(verb, kind, "", 403, "Forbidden", "")

    server.before_request = refuse
    await OperatorProcess(server).reconcile()
    assert server.finetunejob["status"]["phase"] == "Starting"
    assert bool(server.event_counts()) is (refused_plural == "nothing")


async def test_status_is_written_when_the_event_times_out(
    server: FakeApiServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(events, "POST_TIMEOUT_SECONDS", 0.01)

    async def never_answer(kind: Kind, namespace: str, body: Object) -> ApiResponse:
        if kind is EVENT:
            await asyncio.Event().wait()
        return await FakeApiServer.create(server, kind, namespace, body)

    monkeypatch.setattr(server, "create", never_answer)
    await OperatorProcess(server).reconcile()
    assert server.finetunejob["status"]["phase"] == "Starting"
    assert server.event_counts() == {}
    assert "event not posted: timeout" in caplog.messages


# The first status during a burst of new jobs


async def test_first_status_is_written_when_the_burst_of_new_jobs_ends(
    server: FakeApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = OperatorProcess(server)
    await process.start_burst_of_new_jobs()
    await process.work()
    assert server.requests == [("create", "jobs")]
    (job,) = process.cache.get(KEY).jobs.values()
    process.cache.put_pod(pod(version=5, created_at=job.created_at))
    await process.work()
    assert server.requests == [("create", "jobs")]
    monkeypatch.setattr(throttle, "BURST_SECONDS", -1.0)
    await process.work()
    assert server.count("update", FINETUNEJOB) == 1
    assert server.event_counts() == {Reason.ATTEMPT_STARTED: 1}


async def test_first_status_is_written_at_the_limit_during_a_long_burst(
    server: FakeApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throttle, "MAX_DEFER_LIMIT_SECONDS", 0.0)
    process = OperatorProcess(server)
    await process.start_burst_of_new_jobs()
    await process.work()
    await process.work()
    assert server.count("update", FINETUNEJOB) == 1


async def test_spec_change_during_a_burst_is_handled_at_once(server: FakeApiServer) -> None:
    process = OperatorProcess(server)
    await process.start_burst_of_new_jobs()
    await process.work()
    server.write_spec({**SPEC, "suspend": True})
    process.refresh()
    await process.work()
    assert server.requests[1:] != []


async def test_start_timeout_is_scheduled_with_the_first_status(server: FakeApiServer) -> None:
    """The operator's own status writes do not cause another reconcile. So the reconcile that writes the first status must schedule the start timeout."""
    server.finetunejob["spec"] = {**SPEC, "policy": {"startTimeoutSeconds": 60}}
    process = OperatorProcess(server)
    await process.start_burst_of_new_jobs()
    await process.work()
    (job,) = process.cache.get(KEY).jobs.values()
    process.cache.put_job(replace(job, started_at=job.created_at, version=10**6))
    process.cache.put_pod(pod(version=5, created_at=job.created_at, phase="Pending", is_ready=False, node="", unschedulable_message="0/3 nodes"))
    process.queue.clear()
    await process.reconcile()
    assert server.count("update", FINETUNEJOB) == 1
    assert 50 < (process.queue.seconds_until_due() or 0) <= 61


# Transitions


async def test_end_of_pods_and_end_of_their_job_are_one_write(server: FakeApiServer) -> None:
    """A Job reports its own end shortly after its pods have ended. Before the Job has reported its end, the operator must not read events about missing pods.
    """
    process, job = await start_attempt(server)
    process.cache.put_pod(pod(version=5, created_at=job.created_at))
    await process.reconcile()
    write_count = server.count("update", FINETUNEJOB)
    process.cache.put_pod(end_pod(pod(version=6, created_at=job.created_at), 0))
    await process.reconcile()
    assert server.count("update", FINETUNEJOB) == write_count
    assert server.count("list", CORE_EVENT) == 0
    process.cache.put_job(replace(job, version=10**6, completed_at=job.created_at))
    await process.reconcile()
    assert server.count("update", FINETUNEJOB) == write_count + 1
    assert server.finetunejob["status"]["phase"] == "Succeeded"


async def test_end_of_pods_is_written_if_their_job_does_not_report_its_end(
    server: FakeApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throttle, "JOB_END_DELAY_SECONDS", 0.0)
    process, job = await start_attempt(server)
    process.cache.put_pod(pod(version=5, created_at=job.created_at))
    await process.reconcile()
    write_count = server.count("update", FINETUNEJOB)
    process.cache.put_pod(end_pod(pod(version=6, created_at=job.created_at), 0))
    await process.reconcile()
    assert server.count("update", FINETUNEJOB) == write_count + 1


@pytest.mark.parametrize("burst", ["transitions", "updates"])
async def test_deferred_transition_is_written_together_with_the_next_one(server: FakeApiServer, burst: str) -> None:
    process, job = await start_attempt(server)
    process.start_burst_of_transitions() if burst == "transitions" else process.start_burst_of_updates()
    write_count = server.count("update", FINETUNEJOB)
    process.cache.put_pod(pod(version=5, created_at=job.created_at))
    await process.reconcile()
    assert server.count("update", FINETUNEJOB) == write_count
    assert 0 < (process.queue.seconds_until_due() or 0) <= throttle.RECHECK_SECONDS
    process.finish_pod_and_job(job)
    await process.reconcile()
    assert server.count("update", FINETUNEJOB) == write_count + 1
    assert server.finetunejob["status"]["phase"] == "Succeeded"
    assert server.event_counts() == {Reason.ATTEMPT_STARTED: 1, Reason.SUCCEEDED: 1}


@pytest.mark.parametrize("stop_request", ["suspend", "cancel"])
async def test_suspend_and_cancel_are_written_at_once_during_a_burst(server: FakeApiServer, stop_request: str) -> None:
    process, job = await start_attempt(server)
    process.cache.put_pod(pod(version=5, created_at=job.created_at))
    await process.reconcile()
    process.start_burst_of_transitions()
    server.write_spec({**SPEC, stop_request: True})
    process.refresh()
    write_count = server.count("update", FINETUNEJOB)
    await process.reconcile()
    assert server.count("update", FINETUNEJOB) == write_count + 1


def condition(kind: str, value: str, reason: str) -> Object:
    return {"type": kind, "status": value, "reason": reason, "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}


STATUS_CHANGES = {
    "only readiness changed": ({}, {}, True),
    "a step is done": ({}, {"progress": {"step": 1}}, False),
    "running time ended": ({"activeSeconds": 1}, {"activeSeconds": 5}, False),
    "a queue holds the job": ({}, {"conditions": [condition("QuotaReserved", "False", "Queued")]}, False),
    "a pod is unschedulable": ({}, {"conditions": [condition("PodsReady", "False", "Unschedulable")]}, False),
    "a checkpoint is committed": ({}, {"latestCheckpoint": "step-00000010"}, False),
    "the attempt resumed from a step": ({}, {"attempts": [{"number": 1, "resumedFromStep": 7}]}, False),
    "the attempt started": ({}, {"attempts": [{"number": 1}], "conditions": [condition("Accepted", "True", "Accepted")]}, True),
}


@pytest.mark.parametrize("case", STATUS_CHANGES)
def test_only_transitions_without_an_event_may_be_deferred(case: str) -> None:
    old_fields, new_fields, is_deferrable = STATUS_CHANGES[case]
    old_status, new_status = read_status(old_fields), read_status(new_fields)
    assert may_defer(Plan(Situation.ACTIVE), old_status, new_status, events.draft_events(old_status, new_status)) is is_deferrable
    assert not may_defer(Plan(Situation.SUSPENDED), old_status, new_status, [])


# Progress


@pytest.mark.parametrize("burst", ["transitions", "updates"])
async def test_progress_before_the_first_step_is_deferred_during_a_burst(
    server: FakeApiServer, monkeypatch: pytest.MonkeyPatch, burst: str
) -> None:
    process, job = await start_attempt(server)
    write_count, now = server.count("update", FINETUNEJOB), asyncio.get_running_loop().time()
    process.cache.put_pod(pod(version=5, is_ready=False, image_id="trainer@sha256:1", created_at=job.created_at))
    process.reconciler._observer.states[KEY].pending_changes.progress_at = now - CONFIG.progress_seconds - 1
    process.start_burst_of_transitions() if burst == "transitions" else process.start_burst_of_updates()
    await process.reconcile()
    assert server.count("update", FINETUNEJOB) == write_count
    monkeypatch.setattr(throttle, "BURST_SECONDS", -1.0)
    await process.reconcile()
    assert server.count("update", FINETUNEJOB) == write_count + 1


async def test_progress_interval_starts_when_the_report_was_received(
    server: FakeApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interval between writes of progress starts when the report arrived. If it started at the write, one late write would delay all later writes."""
    process, job = await start_attempt(server)
    process.cache.put_pod(pod(version=5, created_at=job.created_at))
    received_report = ReceivedReport(report(progress={"step": 7, "totalSteps": 9}), server.clock.now() - timedelta(seconds=4), "pod-1-0")
    monkeypatch.setattr(process.scraper, "last_report", lambda *_: received_report)
    await process.reconcile()
    assert server.finetunejob["status"]["progress"]["step"] == 7
    passed_seconds = asyncio.get_running_loop().time() - process.reconciler._observer.states[KEY].pending_changes.progress_at
    assert 4 <= passed_seconds < 8


# A status that the API server rejects


def has_progress(status: Object) -> bool:
    return "step" in (status.get("progress") or {})


def report_step(process: OperatorProcess, job: JobView, monkeypatch: pytest.MonkeyPatch, **reported: Any) -> None:
    """Put a running pod into the cache, and let the scraper return the pod's report of step 7."""
    process.cache.put_pod(pod(version=5, created_at=job.created_at))
    received_report = ReceivedReport(report(progress={"step": 7}, **reported), process.server.clock.now(), "pod-1-0")
    monkeypatch.setattr(process.scraper, "last_report", lambda key, uid, attempt: received_report if attempt == 1 else None)


async def finish_deletion(process: OperatorProcess, job: JobView) -> None:
    """End the pod of the deleted Job, and reconcile."""
    assert (JOB.plural, job.name) not in process.server.objects
    process.cache.mark_pod_deleted(end_pod(pod(version=9, created_at=job.created_at), 75))
    for _ in range(3):
        process.refresh()
        await process.reconcile()


@pytest.mark.parametrize(("stop_request", "phase"), [({"suspend": True}, "Suspended"), ({"cancel": True}, "Cancelled")])
async def test_suspend_and_cancel_work_although_the_status_is_rejected(
    server: FakeApiServer, monkeypatch: pytest.MonkeyPatch, stop_request: Object, phase: str
) -> None:
    server.rejects_status = has_progress
    process, job = await start_attempt(server)
    report_step(process, job, monkeypatch)
    await process.reconcile()
    server.write_spec({**SPEC, **stop_request})
    process.refresh()
    for _ in range(2):
        await process.reconcile()
    await finish_deletion(process, job)
    assert server.finetunejob["status"]["phase"] == phase
    assert not has_progress(server.finetunejob["status"])
    assert server.event_counts()[Reason.STATUS_REJECTED] == 1


async def test_suspend_works_although_an_older_crd_lacks_phases_and_a_condition(server: FakeApiServer) -> None:
    process, job = await start_attempt(server)
    server.rejects_status = lambda status: status.get("phase", "").startswith("Suspend") or status["conditions"][0]["type"] == "Accepted"
    server.rejection_message = (
        'FineTuneJob "run" is invalid: [status.conditions[0].type: Unsupported value: "Accepted": supported values: "Finished", '
        'status.phase: Unsupported value: "Suspending": supported values: "Running"]'
    )
    process.cache.put_pod(pod(version=5, created_at=job.created_at))
    server.write_spec({**SPEC, "suspend": True})
    process.refresh()
    for _ in range(2):
        await process.reconcile()
    await finish_deletion(process, job)
    assert server.condition("Suspended")["status"] == "True"
    assert "phase" not in server.finetunejob["status"]


async def test_status_that_an_older_crd_prunes_is_not_written_again(server: FakeApiServer) -> None:
    server.pruned_fields = frozenset({"reason"})
    process, _ = await start_attempt(server)
    write_count, event_counts = server.count("update", FINETUNEJOB), server.event_counts()
    assert write_count and "reason" not in server.finetunejob["status"]
    for _ in range(3):
        process.refresh()
        await process.reconcile()
    assert (server.count("update", FINETUNEJOB), server.event_counts()) == (write_count, event_counts)
    server.write_spec({**SPEC, "suspend": True})
    process.refresh()
    await process.reconcile()
    assert server.count("update", FINETUNEJOB) == write_count + 1


async def test_deadline_works_although_the_status_is_rejected(server: FakeApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.rejects_status = has_progress
    server.finetunejob["spec"] = {**SPEC, "policy": {"activeDeadlineSeconds": 600}}
    process, job = await start_attempt(server)
    report_step(process, job, monkeypatch)
    await process.reconcile()
    server.clock.clock_offset = timedelta(seconds=601)
    for _ in range(2):
        await process.reconcile()
    await finish_deletion(process, job)
    assert server.finetunejob["status"]["phase"] == "Failed"
    assert server.finetunejob["status"]["failure"]["code"] == Reason.DEADLINE_EXCEEDED


async def test_rejected_progress_does_not_change_the_stored_status(server: FakeApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    process, job = await start_attempt(server)
    process.cache.put_pod(pod(version=5, created_at=job.created_at))
    await process.reconcile()
    server.rejects_status = has_progress
    report_step(process, job, monkeypatch, stage="downloading")
    stored_job, versions = server.finetunejob, []
    for _ in range(3):
        process.reconciler._observer.states[KEY].pending_changes.progress_at = float("-inf")  # with this value, the next write of progress is due at once
        await process.reconcile()
        versions.append(server.finetunejob["metadata"]["resourceVersion"])
    assert len(set(versions)) == 1
    changed_fields = [name for name in ("phase", "attempts", "progress") if server.finetunejob["status"].get(name) != stored_job["status"].get(name)]
    assert changed_fields == []
    assert server.event_counts()[Reason.STATUS_REJECTED] == 1


async def test_stored_values_that_a_newer_crd_rejects_are_left_out(server: FakeApiServer) -> None:
    process, job = await start_attempt(server)
    stored_job = server.finetunejob
    checkpoint = {"step": 5, "uri": "s3://b/5"}
    server.put(FINETUNEJOB, {**stored_job, "status": {**stored_job["status"], "checkpoints": [checkpoint]}})
    server.rejects_status = lambda status: "checkpoints" in status and status["checkpoints"] != []
    process.refresh()
    server.write_spec({**SPEC, "suspend": True})
    process.refresh()
    await process.reconcile()
    assert server.finetunejob["status"]["attempts"][0]["reason"] == Reason.SUSPENDED
    assert server.finetunejob["status"].get("checkpoints", []) == []


async def test_status_that_another_writer_changed_is_written_again(server: FakeApiServer) -> None:
    """The operator keeps the JSON of the last status that it wrote. The operator must not use this JSON if another client has changed the job since then."""
    process = OperatorProcess(server)
    await process.work()
    written_status = server.finetunejob["status"]
    write_count = server.count("update", FINETUNEJOB)
    process.refresh()
    await process.reconcile()
    assert server.count("update", FINETUNEJOB) == write_count
    server.put(FINETUNEJOB, {**server.finetunejob, "status": {**written_status, "phase": "Failed"}})
    process.refresh()
    await process.reconcile()
    assert (server.count("update", FINETUNEJOB), server.finetunejob["status"]) == (write_count + 1, written_status)
