"""What the operator writes: nothing while it is idle, progress only at intervals, repeated events as a series, and messages without secrets."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
from finetune_api.names import Condition, Phase, Reason

from tests.support.kubelet import ContainerExit, PodPlan, failure_exit, success_exit
from tests.support.rig import FINETUNEJOBS, Rig, attempt_reasons, count_status_writes, find_condition

pytestmark = pytest.mark.faults
SHIFT_SOURCE = Path(__file__).with_name("clock_shift.c")


@pytest.mark.row(41)
def test_finished_jobs_cause_no_requests(rig: Rig) -> None:
    proxy = rig.start_proxy()
    rig.kubelet.set_plan(rig.namespace, PodPlan(when_running=success_exit()))
    rig.start_operator(proxy=proxy, config={"resyncSeconds": 3})
    for number in range(30):
        rig.submit(f"job-{number}")
    for number in range(30):
        rig.wait_finished(f"job-{number}", timeout=60)
    start = time.monotonic()
    proxy.wait_for(lambda e: e.started_at > start + 15 and e.operation.startswith("list"), timeout_seconds=60)
    later_requests = [e for e in proxy.exchanges if e.started_at > start + 2]
    assert {e.operation for e in later_requests if e.method != "GET"} == set()
    assert {e.operation for e in later_requests if not e.operation.startswith("watch")} == {
        f"list {FINETUNEJOBS}", "list jobs", "list pods",
    }  # fmt: skip
    assert len([e for e in later_requests if e.operation == "list pods"]) <= 5


@pytest.mark.row(57)
def test_progress_is_throttled_and_transitions_are_written_at_once(rig: Rig) -> None:
    proxy = rig.start_proxy()
    scrape_config = {"intervalSeconds": 0.05, "startingIntervalSeconds": 0.05}
    rig.start_operator(proxy=proxy, config={"progressSeconds": 4, "scrape": scrape_config})
    rig.submit()
    pod = rig.kubelet.wait_running(rig.namespace, "job")[0]
    rig.kubelet.set_progress(rig.namespace, "job", progress={"step": 1, "totalSteps": 10_000})
    rig.wait_phase(Phase.RUNNING)
    writes_before, start = count_status_writes(proxy), time.monotonic()
    requests_before = rig.kubelet.progress_requests[rig.namespace, "job"]
    step = 1
    while time.monotonic() < start + 13:
        step += 1
        rig.kubelet.set_progress(rig.namespace, "job", progress={"step": step, "totalSteps": 10_000})
        rig.kubelet.wait_progress_request(rig.namespace, "job")
    elapsed_seconds = time.monotonic() - start
    assert rig.kubelet.progress_requests[rig.namespace, "job"] - requests_before > 50
    assert 1 <= count_status_writes(proxy) - writes_before <= elapsed_seconds / 4 + 1
    rig.kubelet.end_pod(pod, success_exit())
    assert attempt_reasons(rig.wait_finished()) == [(1, Reason.SUCCEEDED)]


@pytest.mark.row(56)
def test_a_repeated_event_is_counted_in_a_series(rig: Rig) -> None:
    rig.start_operator()
    rig.submit(suspend=True)
    rig.wait_phase(Phase.SUSPENDED)
    for _ in range(4):
        rig.patch_spec(suspend=False)
        rig.kubelet.wait_running(rig.namespace, "job")
        rig.wait(lambda b: b["status"].get("phase") not in (Phase.SUSPENDED, Phase.SUSPENDING))
        rig.patch_spec(suspend=True)
        rig.wait_phase(Phase.SUSPENDED)
    events = rig.api.wait_list(
        "events", rig.namespace,
        lambda items: any(
            e["reason"] == Reason.SUSPENDED and (e.get("series") or {}).get("count", 0) >= 4 for e in items
        ),
    )  # fmt: skip
    suspended_events = [e for e in events if e["reason"] == Reason.SUSPENDED]
    assert len(suspended_events) == 1
    event_names = [e["metadata"]["name"] for e in events if e["regarding"]["name"] == "job"]
    assert len(event_names) == len(set(event_names))


SECRET_VALUES = ("wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "hf_abcdefghijklmnopqrstuvwxyz", "AKIAIOSFODNN7EXAMPLE")


@pytest.mark.row(58)
def test_long_messages_of_pods_are_shortened_and_their_secrets_masked(rig: Rig) -> None:
    operator = rig.start_operator()
    rig.submit(policy={"retries": 0})
    pod = rig.kubelet.wait_running(rig.namespace, "job")[0]
    message = (
        f"AWS_SECRET_ACCESS_KEY={SECRET_VALUES[0]} token: {SECRET_VALUES[1]} {SECRET_VALUES[2]} \x00\x1b[31m\ud7ff" + "long " * 200_000
    )
    rig.kubelet.end_pod(pod, ContainerExit(70, json.dumps({"class": "Internal", "code": "Loud", "message": message})))
    body = rig.wait_finished()
    rig.wait_event(Reason.FAILED)
    written_text = json.dumps(body) + json.dumps(rig.api.list_events(rig.namespace, "job")) + operator.log
    assert [secret for secret in SECRET_VALUES if secret in written_text] == []
    assert len(json.dumps(body)) < 100_000
    assert body["status"]["failure"]["code"] == "Loud"
    assert "[redacted]" in body["status"]["failure"]["message"]
    assert all(len(e["note"]) <= 1024 for e in rig.api.list_events(rig.namespace, "job"))


@pytest.mark.row(58)
def test_a_termination_message_that_is_not_json_is_tolerated(rig: Rig) -> None:
    rig.start_operator()
    rig.submit(policy={"retries": 0})
    pod = rig.kubelet.wait_running(rig.namespace, "job")[0]
    rig.kubelet.end_pod(pod, ContainerExit(1, '{"class": "Nonsense", "step": "many", \x01\x02 "message": [1'))
    body = rig.wait_finished()
    assert body["status"]["failure"]["exitCode"] == 1
    assert body["status"]["phase"] == Phase.FAILED


@pytest.fixture(scope="module")
def clock_shift(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a library that shifts a process's wall clock by $CLOCK_SHIFT seconds, like libfaketime. Return its path."""
    library = tmp_path_factory.mktemp("clock") / "shift.so"
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, SHIFT_SOURCE, "-ldl"], check=True)
    except FileNotFoundError:
        pytest.skip("there is no C compiler to build the library that shifts the clock")
    return library


@pytest.mark.row(29)
@pytest.mark.parametrize("hours", [2, -2])
def test_a_wrong_clock_of_the_operator_does_not_affect_deadline_and_ttl(rig: Rig, clock_shift: Path, hours: int) -> None:
    proxy = rig.start_proxy()
    env = {"LD_PRELOAD": str(clock_shift), "CLOCK_SHIFT": str(hours * 3600)}
    rig.start_operator(proxy=proxy, env=env)
    rig.submit("ended", policy={"ttlSecondsAfterFinished": 4})
    rig.submit("kept", policy={"ttlSecondsAfterFinished": 600})
    rig.submit("late", policy={"activeDeadlineSeconds": 4})
    rig.submit("early", policy={"activeDeadlineSeconds": 600})
    for name in ("ended", "kept"):
        rig.kubelet.end_pod(rig.kubelet.wait_running(rig.namespace, name)[0], success_exit())
    body = rig.wait_finished("ended")
    assert rig.api.find("jobs", rig.namespace, "ended-1") is not None
    completed_at = body["status"]["completionTime"]
    rig.api.wait_gone("jobs", rig.namespace, "ended-1")
    assert _read_server_time(rig) >= _compute_unix_time(completed_at, 4)
    assert attempt_reasons(rig.wait_finished("late")) == [(1, Reason.DEADLINE_EXCEEDED)]
    started_at = rig.get("late")["status"]["attempts"][0]["startTime"]
    assert _read_server_time(rig) >= _compute_unix_time(started_at, 4)
    assert rig.api.find("jobs", rig.namespace, "kept-1") is not None
    assert attempt_reasons(rig.get("early")) == [(1, "")]
    assert find_condition(rig.get("early"), Condition.FINISHED)["status"] == "False"
    assert len(proxy.exchanges) < 400, "a wrong clock causes a busy loop"


def _read_server_time(rig: Rig) -> float:
    """Return the API server's current time as a Unix time, rounded up to whole seconds."""
    created_object = rig.api.create("events", rig.namespace, {
        "metadata": {"generateName": "now-"}, "eventTime": "2026-01-01T00:00:00.000000Z", "action": "Look", "type": "Normal",
        "reportingController": "test", "reportingInstance": "test", "reason": "Now", "regarding": {"namespace": rig.namespace},
    })  # fmt: skip
    return _compute_unix_time(created_object["metadata"]["creationTimestamp"], 0) + 1


def _compute_unix_time(timestamp: str, seconds: float) -> float:
    """Return the Unix time that is `seconds` after a timestamp of the API server."""
    from datetime import datetime

    return datetime.fromisoformat(timestamp.replace("Z", "+00:00")).timestamp() + seconds


def test_a_failure_emits_one_event(rig: Rig) -> None:
    rig.start_operator()
    rig.submit(policy={"retries": 0})
    rig.kubelet.end_pod(rig.kubelet.wait_running(rig.namespace, "job")[0], failure_exit(70, message="broken"))
    rig.wait_finished()
    rig.wait_event(Reason.FAILED)
    assert [note for reason, note in rig.list_event_notes() if reason == Reason.FAILED] == [
        note for reason, note in set(rig.list_event_notes()) if reason == Reason.FAILED
    ]
