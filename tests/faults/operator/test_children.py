"""Faults of Jobs, pods and nodes: every way in which a pod can end or fail to start, lost nodes, and changes of Jobs and Services by other clients."""

from __future__ import annotations

import pytest
from finetune_api.names import Condition, Phase, Reason

from tests.support.kubelet import ContainerExit, PodPlan, PodStart, failure_exit, success_exit
from tests.support.rig import FINETUNEJOBS, Rig, attempt_reasons, condition_is_true, count_created, find_condition

pytestmark = pytest.mark.faults


@pytest.mark.row(19)
def test_a_recreated_finetunejob_waits_for_the_old_job_and_does_not_adopt_it(rig: Rig) -> None:
    rig.start_operator()
    rig.submit()
    rig.kubelet.wait_running(rig.namespace, "job")
    rig.wait_attempt(1)
    old_uid = rig.api.get("jobs", rig.namespace, "job-1")["metadata"]["uid"]
    rig.api.delete(FINETUNEJOBS, rig.namespace, "job", propagationPolicy="Orphan")
    rig.api.wait_gone(FINETUNEJOBS, rig.namespace, "job")
    rig.submit()
    rig.wait(lambda b: find_condition(b, Condition.PODS_READY).get("reason") == Reason.CHILDREN_CONFLICT)
    assert rig.api.get("jobs", rig.namespace, "job-1")["metadata"]["uid"] == old_uid
    rig.api.delete("jobs", rig.namespace, "job-1", propagationPolicy="Foreground")
    body = rig.wait_attempt(1)
    assert attempt_reasons(body) == [(1, "")]
    assert rig.api.get("jobs", rig.namespace, "job-1")["metadata"]["uid"] != old_uid


@pytest.mark.row(22)
def test_a_deleted_service_is_created_again(rig: Rig) -> None:
    rig.start_operator(config={"resyncSeconds": 2})
    rig.submit(resources={"nodes": 2})
    rig.kubelet.wait_running(rig.namespace, "job", count=2)
    old_uid = rig.api.wait("services", rig.namespace, "job-1", lambda body: True)["metadata"]["uid"]
    rig.api.delete("services", rig.namespace, "job-1")
    rig.api.wait("services", rig.namespace, "job-1", lambda body: body["metadata"]["uid"] != old_uid)
    assert attempt_reasons(rig.get()) == [(1, "")]


@pytest.mark.row(23)
@pytest.mark.parametrize("label", ["app.kubernetes.io/managed-by", "finetune-operator.io/attempt"])
def test_a_job_that_loses_its_label_causes_no_second_job(rig: Rig, label: str) -> None:
    """The operator's watch does not deliver a Job that has lost its label.

    A Job without the label still runs, so the operator must not create a second Job for the same attempt.
    """
    proxy = rig.start_proxy()
    rig.start_operator(proxy=proxy, config={"resyncSeconds": 1})
    rig.submit()
    pod = rig.kubelet.wait_running(rig.namespace, "job")[0]
    rig.wait_attempt(1)
    rig.api.patch("jobs", rig.namespace, "job-1", {"metadata": {"labels": {label: None}}})
    rig.submit("other", suspend=True)
    rig.wait_phase(Phase.SUSPENDED, "other")
    last_exchange = len(proxy.exchanges)
    proxy.wait_for(lambda e: e.number > last_exchange and e.operation == "list pods", timeout_seconds=20)
    assert count_created(proxy, "jobs") == 1
    assert rig.api.find("pods", rig.namespace, pod.name) is not None
    rig.api.patch("jobs", rig.namespace, "job-1", {"metadata": {"labels": {label: _read_label(label)}}})
    rig.kubelet.end_pod(pod, success_exit())
    assert attempt_reasons(rig.wait_finished()) == [(1, Reason.SUCCEEDED)]


def _read_label(label: str) -> str:
    return "finetune-operator" if label.endswith("managed-by") else "1"


EXIT_CASES: dict[str, tuple[ContainerExit, str, str]] = {
    "host memory": (ContainerExit(137, reason="OOMKilled"), Reason.OUT_OF_MEMORY, "OutOfMemory"),
    "killed": (ContainerExit(137), Reason.INTERNAL_ERROR, "Internal"),
    "exit 1": (ContainerExit(1, "RuntimeError: something\nthe last line"), Reason.INTERNAL_ERROR, "Internal"),
    "gpu memory": (failure_exit(71, message="CUDA out of memory"), Reason.OUT_OF_MEMORY, "OutOfMemory"),
    "storage": (failure_exit(69, message="503 for ten minutes"), Reason.STORAGE_ERROR, "Storage"),
    "peer": (failure_exit(74, message="rank 1 is gone"), Reason.PEER_FAILED, "Infrastructure"),
    "evicted": (ContainerExit(137, pod_reason="Evicted", disruption_reason="TerminationByKubelet"), Reason.PREEMPTED, "Preempted"),
    "preempted": (ContainerExit(75, disruption_reason="PreemptionByScheduler"), Reason.PREEMPTED, "Preempted"),
}


@pytest.mark.row(24)
@pytest.mark.parametrize("case", EXIT_CASES)
def test_each_end_of_a_pod_has_its_own_reason_and_is_retried(rig: Rig, case: str) -> None:
    container_exit, reason, _ = EXIT_CASES[case]
    rig.start_operator()
    rig.submit()
    pod = rig.kubelet.wait_running(rig.namespace, "job", attempt=1)[0]
    rig.wait_attempt(1)
    rig.kubelet.end_pod(pod, container_exit)
    body = rig.wait_attempt(2)
    assert attempt_reasons(body)[0] == (1, reason)
    rig.wait_event(reason)
    is_counted = reason not in (Reason.PREEMPTED, Reason.OUT_OF_MEMORY)
    assert body["status"].get("retriesUsed", 0) == (1 if is_counted else 0)


@pytest.mark.row(24)
@pytest.mark.parametrize(
    ("code", "failure_class"), [(64, "User"), (65, "Data"), (66, "Model"), (67, "Storage"), (77, "Storage")]
)
def test_an_error_that_no_retry_can_fix_fails_the_job_at_once(rig: Rig, code: int, failure_class: str) -> None:
    rig.start_operator()
    rig.submit()
    pod = rig.kubelet.wait_running(rig.namespace, "job")[0]
    rig.kubelet.end_pod(pod, failure_exit(code, code="SomeError", message="the message", hint="the hint"))
    body = rig.wait_finished()
    assert len(body["status"]["attempts"]) == 1
    reported_failure = body["status"]["failure"]
    assert (reported_failure["class"], reported_failure["code"], reported_failure["exitCode"]) == (failure_class, "SomeError", code)
    assert (reported_failure["message"], reported_failure["hint"]) == ("the message", "the hint")
    assert condition_is_true(body, Condition.STALLED)


@pytest.mark.row(24)
@pytest.mark.parametrize(
    ("plan", "reason", "expected_text"),
    [
        (PodPlan(start=PodStart.UNSCHEDULABLE, message="0/9 nodes are available"), Reason.UNSCHEDULABLE, "0/9 nodes"),
        (PodPlan(start=PodStart.CONTAINER_WAITING, message="no such image"), Reason.IMAGE_PULL_FAILED, "no such image"),
        (
            PodPlan(start=PodStart.CONTAINER_WAITING, reason="CreateContainerConfigError", message='secret "s" not found'),
            Reason.CONFIG_MISSING, 'secret "s" not found',
        ),
    ],
    ids=["unschedulable", "image", "secret"],
)  # fmt: skip
def test_pods_that_do_not_start_show_the_reason_until_the_problem_is_solved(
    rig: Rig, plan: PodPlan, reason: Reason, expected_text: str
) -> None:
    rig.kubelet.set_plan(rig.namespace, plan)
    rig.start_operator()
    rig.submit(policy={"startTimeoutSeconds": 2})
    body = rig.wait(lambda b: find_condition(b, Condition.PODS_READY).get("reason") == reason)
    assert expected_text in find_condition(body, Condition.PODS_READY)["message"]
    rig.wait(lambda b: condition_is_true(b, Condition.STALLED))
    rig.wait_event(reason)
    rig.kubelet.set_plan(rig.namespace, PodPlan())
    body = rig.wait(lambda b: condition_is_true(b, Condition.PODS_READY))
    assert not condition_is_true(body, Condition.STALLED)
    assert attempt_reasons(body) == [(1, "")]


@pytest.mark.row(25)
def test_a_deleted_node_does_not_count_as_a_retry(rig: Rig) -> None:
    rig.start_operator()
    rig.submit(policy={"terminationGracePeriodSeconds": 1})
    pod = rig.kubelet.wait_running(rig.namespace, "job")[0]
    rig.kubelet.set_progress(
        rig.namespace, "job", progress={"step": 7, "totalSteps": 20}, latestCheckpoint="s3://b/step-00000005",
        checkpoints=[{"step": 5, "uri": "s3://b/step-00000005", "sha256": "0" * 64, "healthy": True}],
    )  # fmt: skip
    rig.wait(lambda b: (b["status"].get("progress") or {}).get("step") == 7)
    rig.kubelet.kill_node(pod.node)
    try:
        rig.api.delete("nodes", None, pod.node)
        body = rig.wait_attempt(2, timeout=150)
    finally:
        rig.kubelet.recreate_node(pod.node)
    assert attempt_reasons(body)[0] == (1, Reason.NODE_LOST)
    assert body["status"].get("retriesUsed", 0) == 0
    run_config_text = _read_run_config(rig, 2)
    assert '"expectStep":5' in run_config_text
    rig.wait_event(Reason.NODE_LOST)


def _read_run_config(rig: Rig, attempt: int) -> str:
    job = rig.api.get("jobs", rig.namespace, f"job-{attempt}")
    return str(job["spec"]["template"]["metadata"]["annotations"]["finetune-operator.io/run.json"])


@pytest.mark.row(26)
def test_the_pod_of_an_unreachable_node_is_removed(rig: Rig) -> None:
    rig.start_operator()
    tolerations = [
        {"key": f"node.kubernetes.io/{word}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 1}
        for word in ("not-ready", "unreachable")
    ]
    rig.submit(policy={"terminationGracePeriodSeconds": 1}, placement={"tolerations": tolerations})
    pod = rig.kubelet.wait_running(rig.namespace, "job")[0]
    rig.wait_attempt(1)
    rig.kubelet.kill_node(pod.node)
    try:
        body = rig.wait_attempt(2, timeout=150)
        assert attempt_reasons(body)[0] == (1, Reason.NODE_LOST)
        assert body["status"].get("retriesUsed", 0) == 0
        assert rig.api.find("pods", rig.namespace, pod.name) is None
        new_pod = rig.kubelet.wait_running(rig.namespace, "job", attempt=2)[0]
        assert new_pod.node != pod.node
    finally:
        rig.kubelet.revive_node(pod.node)


@pytest.mark.row(24)
def test_the_failure_names_the_rank_that_failed_first(rig: Rig) -> None:
    rig.start_operator()
    rig.submit(resources={"nodes": 2})
    pods = rig.kubelet.wait_running(rig.namespace, "job", count=2)
    rig.wait_attempt(1)
    rig.kubelet.end_pod(pods[0], failure_exit(74, message="rank 1 is gone", origin=False))
    rig.kubelet.end_pod(pods[1], failure_exit(65, code="RowInvalid", message="row 7", origin=True))
    body = rig.wait_finished()
    assert body["status"]["failure"]["code"] == "RowInvalid"
    assert len(body["status"]["attempts"]) == 1
