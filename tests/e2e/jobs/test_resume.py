"""After every interruption, the next attempt resumes from a committed checkpoint and ends with the weights of an uninterrupted run."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from finetune_api.names import PLURAL, FailureClass, Label, Phase
from finetune_api.status import FineTuneJobStatus

from tests.e2e.jobs.installation import Installation, JobNamespace, demo, make_job
from tests.support.slices import quick_slice

STEPS, CHECKPOINT_STEPS = 100, 10
ONE_POD: dict[str, Any] = {"gpusPerNode": 0, "processesPerNode": 2, "cpu": "100m", "memory": "3Gi"}
TWO_PODS: dict[str, Any] = {"gpusPerNode": 0, "nodes": 2, "cpu": "100m", "memory": "2Gi"}


def make_long_job(name: str, resources: dict[str, Any], **spec_groups: Any) -> dict[str, Any]:
    """Return a job with two ranks, dropout and frequent checkpoints that trains long enough to be interrupted."""
    return make_job(
        name,
        resources=resources,
        method={"type": "lora", "lora": {"dropout": 0.1}},
        training={
            "maxSteps": STEPS, "batchSizePerDevice": 4, "gradientAccumulationSteps": 2, "learningRate": 0.001,
        },
        checkpoint={"steps": CHECKPOINT_STEPS},
        policy={"terminationGracePeriodSeconds": 60},
        **spec_groups,
    )  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted_weights(shared_namespace: JobNamespace) -> dict[str, str]:
    """Run a job without interruptions. Returns the sha256 of each weight file."""
    shared_namespace.apply(make_long_job("uninterrupted", ONE_POD))
    status = shared_namespace.wait_finished("uninterrupted")
    assert status.restarts == 0
    return read_weight_hashes(shared_namespace, status)


def read_weight_hashes(job_namespace: JobNamespace, status: FineTuneJobStatus) -> dict[str, str]:
    """Return the sha256 of each weight file of the job's final model."""
    assert status.output is not None
    assert status.output.uri is not None
    files = job_namespace.installation.read_file_hashes(status.output.uri)
    weight_hashes = {path: digest for path, digest in files.items() if path.endswith(".safetensors")}
    assert weight_hashes
    return weight_hashes


def find_last_rank_pid(job_namespace: JobNamespace, pod: str) -> int:
    """Return the process id of the last rank, as seen inside the container."""
    script = 'for p in /proc/[0-9]*; do tr "\\0" " " < $p/cmdline 2>/dev/null | grep -q "[f]inetune_trainer train" && echo ${p#/proc/}; done; true'
    rank_pids = sorted(int(line) for line in job_namespace.exec_script(pod, script).split())
    return rank_pids[-1]


def find_supervisor_pid(uid: str) -> int:
    """Return the process id of a pod's supervisor on the host. Inside the container, the supervisor is PID 1 and cannot be killed."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, groups = (folder / "cmdline").read_bytes(), (folder / "cgroup").read_text()
            last_pid = (folder / "status").read_text().partition("NSpid:")[2].splitlines()[0].split()[-1]
        except (OSError, IndexError):
            continue  # the process has ended since it was listed
        if b"supervise" in command and last_pid == "1" and uid in groups:
            return int(folder.name)
    raise AssertionError(f"no supervisor of pod {uid} on this machine")


def kill_rank(job_namespace: JobNamespace, pod: dict[str, Any]) -> None:
    """Send SIGKILL to the last rank of the pod."""
    name = pod["metadata"]["name"]
    job_namespace.exec_script(name, f"kill -9 {find_last_rank_pid(job_namespace, name)}")


def kill_supervisor(job_namespace: JobNamespace, pod: dict[str, Any]) -> None:
    """Send SIGKILL to the supervisor, PID 1 of the container."""
    del job_namespace
    os.kill(find_supervisor_pid(pod["metadata"]["uid"]), signal.SIGKILL)


def delete_pod(job_namespace: JobNamespace, pod: dict[str, Any]) -> None:
    """Delete the pod, as an eviction or a drain does."""
    job_namespace.installation.cluster.kubectl(
        "-n", job_namespace.namespace, "delete", "pod", pod["metadata"]["name"], "--wait=false"
    )


INTERRUPTIONS: dict[str, tuple[dict[str, Any], Callable[[JobNamespace, dict[str, Any]], None], int]] = {
    "rank-killed": (ONE_POD, kill_rank, 0),
    "supervisor-killed": (ONE_POD, kill_supervisor, 0),
    "pod-deleted": (ONE_POD, delete_pod, 0),
    "pod-of-two-deleted": (TWO_PODS, delete_pod, 1),
}


QUICK_INTERRUPTIONS = ("pod-of-two-deleted",)
"""The interruptions that `make test` runs in this file. The tests in tests/pod, which `make test` runs too, kill ranks and supervisors that run as local
processes.
"""


@pytest.mark.parametrize("name", quick_slice(INTERRUPTIONS, QUICK_INTERRUPTIONS))
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_run(
    shared_namespace: JobNamespace, uninterrupted_weights: dict[str, str], name: str
) -> None:
    resources, interrupt, pod_index = INTERRUPTIONS[name]
    shared_namespace.apply(make_long_job(name, resources))
    shared_namespace.wait(name, lambda s: s.latest_checkpoint, "past its first checkpoint")
    pods = shared_namespace.pods(name)
    assert len({pod["spec"]["nodeName"] for pod in pods}) == len(pods), "two pods of a gang share a node although each pod could have its own node"
    interrupt(shared_namespace, pods[pod_index])
    status = shared_namespace.wait_finished(name)
    assert status.restarts == 1
    first_attempt, second_attempt = status.attempts
    assert second_attempt.resumed_from_step is not None
    assert second_attempt.resumed_from_step >= CHECKPOINT_STEPS
    assert first_attempt.last_step is not None
    assert first_attempt.last_step < STEPS
    if "deleted" in name:
        assert first_attempt.reason == FailureClass.PREEMPTED.value
        assert first_attempt.counted is not True, "the deletion of a pod was counted as a retry"
    assert read_weight_hashes(shared_namespace, status) == uninterrupted_weights


@pytest.mark.slow  # `make test` suspends jobs in tests/integration/operator, and stops and resumes pods in tests/pod
def test_a_suspended_job_saves_a_checkpoint_and_resumes_from_it(
    shared_namespace: JobNamespace, uninterrupted_weights: dict[str, str]
) -> None:
    name = "suspended"
    shared_namespace.apply(make_long_job(name, ONE_POD))
    shared_namespace.wait(name, lambda s: s.progress and s.progress.step, "at its first step")
    set_suspend(shared_namespace, name, True)
    status = shared_namespace.wait(name, lambda s: s.phase is Phase.SUSPENDED, "suspended")
    shared_namespace.installation.api.wait_list(
        "pods",
        shared_namespace.namespace,
        lambda pods: all(has_ended(pod) for pod in pods),
        labels=f"{Label.JOB_NAME}={name}",
    )
    (first_attempt,) = status.attempts
    assert first_attempt.counted is not True, "the suspension was counted as a retry"
    set_suspend(shared_namespace, name, False)
    status = shared_namespace.wait_finished(name)
    first_attempt, second_attempt = status.attempts
    assert first_attempt.last_step is not None
    assert 0 < first_attempt.last_step < STEPS
    assert second_attempt.resumed_from_step == first_attempt.committed_step == first_attempt.last_step, "the second attempt repeats steps"
    assert read_weight_hashes(shared_namespace, status) == uninterrupted_weights


def set_suspend(job_namespace: JobNamespace, name: str, is_suspended: bool) -> None:
    """Set `spec.suspend` of a job."""
    job_namespace.installation.api.patch(PLURAL, job_namespace.namespace, name, {"spec": {"suspend": is_suspended}})


def has_ended(pod: dict[str, Any]) -> bool:
    """Whether all of a pod's containers have ended."""
    return pod["status"].get("phase") in ("Succeeded", "Failed")


@pytest.mark.slow  # `make test` checks in tests/integration/operator/test_lifecycle.py that a Job with another owner blocks the attempt
def test_a_recreated_job_waits_for_the_pods_of_the_deleted_job_of_the_same_name(shared_namespace: JobNamespace) -> None:
    """A job is deleted and applied again at once. The pods of the deleted job and of the new job never run at the same time, and the two jobs share no folder
    in S3.
    """
    name = "twice"
    shared_namespace.apply(make_long_job(name, ONE_POD))
    shared_namespace.wait(name, lambda s: s.progress and s.progress.step, "at its first step")
    shared_namespace.installation.cluster.kubectl(
        "-n", shared_namespace.namespace, "delete", "finetunejob", name, "--wait=false"
    )
    (old_pod,) = shared_namespace.pods(name)
    shared_namespace.apply(make_job(name, training={"maxSteps": 2}))
    status = shared_namespace.wait_finished(name)
    assert status.output is not None
    assert status.output.uri is not None
    assert (
        shared_namespace.installation.api.get(PLURAL, shared_namespace.namespace, name)["metadata"]["uid"]
        in status.output.uri
    )
    (attempt,) = status.attempts
    assert (attempt.resumed_from_step, attempt.last_step) == (None, 2)
    (pod,) = shared_namespace.pods(name)
    assert pod["metadata"]["uid"] != old_pod["metadata"]["uid"]


@pytest.fixture
def n2(installation: Installation) -> Iterator[str]:
    """The second node, on which the operator does not run. After the test, the node is started again."""
    kubectl = installation.cluster.kubectl
    kubectl("cordon", "n2")
    for pod in installation.api.list("pods", demo.RELEASE_NAME):
        if pod["spec"].get("nodeName") == "n2":
            kubectl("-n", demo.RELEASE_NAME, "delete", "pod", pod["metadata"]["name"])
    kubectl("-n", demo.RELEASE_NAME, "rollout", "status", f"deployment/{demo.RELEASE_NAME}", "--timeout=60s")
    kubectl("uncordon", "n2")
    yield "n2"
    installation.cluster.start_node("n2")
    kubectl("uncordon", "n1")


@pytest.mark.slow
def test_a_job_on_a_powered_off_node_resumes_from_its_checkpoint_on_another_node(
    shared_namespace: JobNamespace, uninterrupted_weights: dict[str, str], n2: str
) -> None:
    name, cluster = "node-lost", shared_namespace.installation.cluster
    taints = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
    tolerations = [{"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 1} for key in taints]
    cluster.kubectl("cordon", "n1")
    shared_namespace.apply(make_long_job(name, ONE_POD, placement={"tolerations": tolerations}))
    shared_namespace.wait(name, lambda s: s.latest_checkpoint, "past its first checkpoint")
    cluster.kubectl("uncordon", "n1")
    cluster.power_off(n2)
    status = shared_namespace.wait(name, lambda s: s.phase is Phase.SUCCEEDED, "succeeded", timeout=420)
    first_attempt, second_attempt = status.attempts
    assert first_attempt.counted is not True, "the lost node was counted as a retry"
    assert first_attempt.node == n2
    assert second_attempt.resumed_from_step is not None
    assert second_attempt.resumed_from_step >= CHECKPOINT_STEPS
    assert read_weight_hashes(shared_namespace, status) == uninterrupted_weights
