"""The quick rows of the fault matrix: lost responses, conflicts, a stale cache, a killed operator, and objects of other owners."""

from __future__ import annotations

import pytest
from finetune_api import names
from finetune_api.names import Condition, Label, Phase, Reason

from tests.support.apiproxy import DelayEvents, LostResponse, ReplayEvents, Status, StatusAfterApply, active_rules
from tests.support.kubelet import ContainerExit, PodPlan, failure_exit, success_exit
from tests.support.rig import (
    FINETUNEJOBS,
    Rig,
    attempt_reasons,
    condition_is_true,
    count_created,
    count_status_writes,
    find_condition,
    find_forbidden_writes,
)

pytestmark = pytest.mark.integration


@pytest.mark.row(1)
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_complete_run_needs_few_writes_and_none_to_spec_or_metadata(rig: Rig, nodes: int) -> None:
    proxy = rig.start_proxy()
    rig.start_operator(proxy=proxy)
    rig.submit(resources={"nodes": nodes})
    pods = rig.kubelet.wait_running(rig.namespace, "job", count=nodes)
    rig.wait_phase(Phase.STARTING)
    for pod in pods:
        rig.kubelet.end_pod(pod, success_exit("s3://bucket/prefix/model"))
    body = rig.wait_finished()
    rig.wait_event(Reason.SUCCEEDED)
    assert condition_is_true(body, Condition.SUCCEEDED)
    assert body["status"]["phase"] == Phase.SUCCEEDED
    assert body["status"]["output"]["uri"] == "s3://bucket/prefix/model"
    assert attempt_reasons(body) == [(1, Reason.SUCCEEDED)]
    assert rig.list_job_names() == ["job-1"]
    assert (count_created(proxy, "jobs"), count_created(proxy, "services")) == (1, 1 if nodes > 1 else 0)
    assert count_status_writes(proxy) <= 8
    assert find_forbidden_writes(proxy) == []
    metadata = rig.get()["metadata"]
    assert "finalizers" not in metadata
    assert "annotations" not in metadata
    assert {m["subresource"] for m in metadata["managedFields"] if m["manager"] == names.MANAGER_NAME} == {"status"}


@pytest.mark.row(2)
@pytest.mark.parametrize("point", ["before_status_write", "after_job_create"])
def test_a_kill_of_the_operator_while_a_job_starts_does_not_change_the_result(rig: Rig, point: str) -> None:
    operator = rig.start_operator()
    operator.kill_at(point)
    rig.submit()
    assert operator.wait_end() == -9
    proxy = rig.start_proxy()
    rig.start_operator(proxy=proxy)
    rig.kubelet.end_pod(rig.kubelet.wait_running(rig.namespace, "job")[0], success_exit())
    body = rig.wait_finished()
    assert attempt_reasons(body) == [(1, Reason.SUCCEEDED)]
    assert rig.list_job_names() == ["job-1"]
    rig.wait_event(Reason.SUCCEEDED)
    events = rig.list_event_notes()
    assert len(events) == len(set(events))


@pytest.mark.row(3, 6)
def test_the_last_spec_change_while_the_operator_is_down_applies(rig: Rig) -> None:
    rig.submit("new")
    rig.submit("flipped")
    for value in (True, False, True):
        rig.patch_spec("flipped", suspend=value)
    proxy = rig.start_proxy()
    rig.start_operator(proxy=proxy)
    rig.wait_phase(Phase.SUSPENDED, "flipped")
    rig.wait_attempt(1, "new")
    assert rig.list_job_names("flipped") == []
    assert count_created(proxy, "jobs") == 1


@pytest.mark.row(4)
def test_a_finetunejob_can_be_deleted_while_the_operator_is_down(rig: Rig) -> None:
    operator = rig.start_operator()
    rig.submit()
    rig.kubelet.wait_running(rig.namespace, "job")
    operator.kill()
    rig.api.delete(FINETUNEJOBS, rig.namespace, "job")
    rig.api.wait_gone(FINETUNEJOBS, rig.namespace, "job")
    rig.api.wait_gone("jobs", rig.namespace, "job-1", timeout=60)
    rig.kubelet.wait_pods(rig.namespace, "job", lambda pods: not pods)
    proxy = rig.start_proxy()
    rig.start_operator(proxy=proxy)
    rig.submit("another")
    rig.wait_attempt(1, "another")
    assert [e for e in proxy.exchanges if e.method == "DELETE"] == []


@pytest.mark.row(7)
@pytest.mark.parametrize("fault", [LostResponse(), StatusAfterApply(504)], ids=["lost", "504"])
def test_a_lost_response_to_a_creation_leads_to_one_job(rig: Rig, fault: LostResponse | StatusAfterApply) -> None:
    proxy = rig.start_proxy()
    rig.start_operator(proxy=proxy)
    with proxy.fault(fault, verb="create", resource="jobs", max_hits=1) as rule:
        rig.submit()
        body = rig.wait_attempt(1)
    assert rule.hits == 1
    assert rig.list_job_names() == ["job-1"]
    assert attempt_reasons(body) == [(1, "")]
    assert count_created(proxy, "jobs") == 1


@pytest.mark.row(8)
def test_status_conflicts_are_retried_without_a_warning(rig: Rig) -> None:
    proxy = rig.start_proxy()
    rig.start_operator(proxy=proxy)
    with active_rules(
        proxy.fault(Status(409), verb="update", resource=f"{FINETUNEJOBS}/status", max_hits=5),
        proxy.fault(Status(409), verb="patch", resource=f"{FINETUNEJOBS}/status", max_hits=5),
    ):
        rig.submit()
        rig.kubelet.end_pod(rig.kubelet.wait_running(rig.namespace, "job")[0], success_exit())
        body = rig.wait_finished()
    assert attempt_reasons(body) == [(1, Reason.SUCCEEDED)]
    assert sum(e.fault_name == "Status" for e in proxy.exchanges) == 5


@pytest.mark.row(17)
def test_repeated_watch_events_change_nothing(rig: Rig) -> None:
    proxy = rig.start_proxy()
    rig.start_operator(proxy=proxy)
    rig.submit()
    rig.kubelet.end_pod(rig.kubelet.wait_running(rig.namespace, "job")[0], success_exit())
    finished_job = rig.wait_finished()
    proxy.clear_exchanges()
    for resource in ("pods", "jobs", FINETUNEJOBS):
        assert proxy.command_watches(resource, ReplayEvents(50)) >= 1
    rig.submit("later")
    rig.wait_attempt(1, "later")
    assert rig.get()["status"] == finished_job["status"]
    assert [e.path for e in proxy.exchanges if e.method != "GET" and "/job" in e.path.partition(f"{FINETUNEJOBS}/")[2]] == []
    assert rig.list_job_names() == ["job-1"]


@pytest.mark.row(18)
def test_a_stale_cache_causes_no_second_job(rig: Rig) -> None:
    proxy = rig.start_proxy()
    with active_rules(
        proxy.fault(DelayEvents(1.5), verb="watch", resource="jobs"),
        proxy.fault(DelayEvents(1.5), verb="watch", resource="pods"),
        proxy.fault(DelayEvents(1.5), verb="watch", resource=FINETUNEJOBS),
    ):
        rig.start_operator(proxy=proxy, config={"resyncSeconds": 3600})
        rig.submit()
        pod = rig.kubelet.wait_running(rig.namespace, "job", attempt=1)[0]
        rig.kubelet.end_pod(pod, failure_exit(70, message="broken"))
        pod = rig.kubelet.wait_running(rig.namespace, "job", attempt=2)[0]
        rig.kubelet.end_pod(pod, success_exit())
        body = rig.wait_finished()
    assert attempt_reasons(body) == [(1, Reason.INTERNAL_ERROR), (2, Reason.SUCCEEDED)]
    assert count_created(proxy, "jobs") == 2


@pytest.mark.row(20)
def test_jobs_of_other_owners_are_not_changed(rig: Rig) -> None:
    labels = {Label.MANAGED_BY.value: names.MANAGER_NAME, Label.JOB_NAME.value: "job", Label.JOB_UID.value: "another"}
    template = {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "x"}]}}

    def create_foreign_job(name: str, attempt: int) -> str:
        body = {"metadata": {"name": name, "labels": labels | {Label.ATTEMPT.value: str(attempt)}}}
        spec = {"suspend": True, "template": template}
        return str(rig.api.create("jobs", rig.namespace, body | {"spec": spec})["metadata"]["uid"])

    unrelated_uid, blocking_uid = create_foreign_job("unrelated", 7), create_foreign_job("job-1", 1)
    proxy = rig.start_proxy()
    rig.start_operator(proxy=proxy)
    rig.submit()
    body = rig.wait(lambda b: find_condition(b, Condition.PODS_READY).get("reason") == Reason.CHILDREN_CONFLICT)
    assert body["status"]["phase"] == Phase.PENDING
    assert "job-1" in find_condition(body, Condition.PODS_READY)["message"]
    assert [e for e in proxy.exchanges if e.method == "DELETE"] == []
    rig.api.delete("jobs", rig.namespace, "job-1", propagationPolicy="Background", preconditions={"uid": blocking_uid})
    rig.wait_attempt(1)
    assert rig.api.get("jobs", rig.namespace, "unrelated")["metadata"]["uid"] == unrelated_uid
    assert rig.api.get("jobs", rig.namespace, "job-1")["metadata"]["uid"] != blocking_uid
    assert [e for e in proxy.exchanges if e.method == "DELETE"] == []


@pytest.mark.row(21)
def test_a_deleted_job_counts_as_an_ended_attempt(rig: Rig) -> None:
    rig.start_operator()
    rig.submit(policy={"retries": 1})
    for attempt in (1, 2):
        rig.kubelet.wait_running(rig.namespace, "job", attempt=attempt)
        rig.wait_attempt(attempt)
        rig.api.delete("jobs", rig.namespace, f"job-{attempt}", propagationPolicy="Foreground")
    body = rig.wait_finished()
    assert attempt_reasons(body) == [(1, Reason.PREEMPTED), (2, Reason.PREEMPTED)]
    assert find_condition(body, Condition.SUCCEEDED)["reason"] == Reason.RETRIES_EXHAUSTED
    rig.wait_event(Reason.FAILED)


@pytest.mark.row(27)
def test_a_job_without_retries_left_is_finished_permanently(rig: Rig) -> None:
    proxy = rig.start_proxy()
    rig.kubelet.set_plan(rig.namespace, PodPlan(when_running=failure_exit(70, message="it breaks each time")))
    rig.start_operator(proxy=proxy)
    rig.submit(policy={"retries": 2})
    body = rig.wait_finished()
    assert body["status"]["phase"] == Phase.FAILED
    assert attempt_reasons(body) == [(n, Reason.INTERNAL_ERROR) for n in (1, 2, 3)]
    assert condition_is_true(body, Condition.STALLED)
    assert not condition_is_true(body, Condition.RECONCILING)
    assert find_condition(body, Condition.SUCCEEDED)["reason"] == Reason.RETRIES_EXHAUSTED
    assert "it breaks each time" in body["status"]["failure"]["message"]
    assert count_created(proxy, "jobs") == 3
    rig.submit("later", suspend=True)
    rig.wait_phase(Phase.SUSPENDED, "later")
    assert count_created(proxy, "jobs") == 3
    assert rig.list_event_reasons().count(Reason.FAILED) == 1


@pytest.mark.row(30)
def test_suspend_resume_suspend_leaves_no_pods(rig: Rig) -> None:
    rig.kubelet.set_plan(rig.namespace, PodPlan(when_deleted=failure_exit(75, step=4, committed_step=4)))
    rig.start_operator()
    rig.submit()
    rig.kubelet.wait_running(rig.namespace, "job")
    for value in (True, False, True):
        rig.patch_spec(suspend=value)
    body = rig.wait_phase(Phase.SUSPENDED)
    rig.kubelet.wait_pods(rig.namespace, "job", lambda pods: not pods)
    assert condition_is_true(body, Condition.SUSPENDED)
    assert all(a["reason"] == Reason.SUSPENDED for a in body["status"]["attempts"])
    rig.patch_spec(suspend=False)
    rig.kubelet.end_pod(rig.kubelet.wait_running(rig.namespace, "job")[0], ContainerExit(0))
    assert condition_is_true(rig.wait_finished(), Condition.SUCCEEDED)
