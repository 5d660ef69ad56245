"""Whatever is killed, the next attempt goes on from a committed checkpoint and ends with the undisturbed run's weights."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from finetune_api.names import PLURAL, FailureClass, Label, Phase
from finetune_api.status import FineTuneJobStatus

from tests.e2e.jobs.site import JobNamespace, Site, demo, job

STEPS, EVERY = 100, 10
ONE_POD: dict[str, Any] = {"gpusPerNode": 0, "processesPerNode": 2, "cpu": "100m", "memory": "3Gi"}
TWO_PODS: dict[str, Any] = {"gpusPerNode": 0, "nodes": 2, "cpu": "100m", "memory": "2Gi"}


def long_job(name: str, resources: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Two ranks, dropout, checkpoints often; long enough to be disturbed in the middle."""
    return job(
        name,
        resources=resources,
        method={"type": "lora", "lora": {"dropout": 0.1}},
        training={
            "maxSteps": STEPS, "batchSizePerDevice": 4, "gradientAccumulationSteps": 2, "learningRate": 0.001,
        },
        checkpoint={"steps": EVERY},
        policy={"terminationGracePeriodSeconds": 60},
        **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(shared_namespace: JobNamespace) -> dict[str, str]:
    """sha256 by file of the run that nothing happened to."""
    shared_namespace.apply(long_job("undisturbed", ONE_POD))
    status = shared_namespace.end("undisturbed")
    assert status.restarts == 0
    return weights(shared_namespace, status)


def weights(job_namespace: JobNamespace, status: FineTuneJobStatus) -> dict[str, str]:
    """sha256 of the final weights."""
    assert status.output is not None
    assert status.output.uri is not None
    files = job_namespace.site.manifest(status.output.uri)
    found = {path: digest for path, digest in files.items() if path.endswith(".safetensors")}
    assert found
    return found


def rank_of(job_namespace: JobNamespace, pod: str) -> int:
    """Process id, in the container, of the last rank."""
    script = 'for p in /proc/[0-9]*; do tr "\\0" " " < $p/cmdline 2>/dev/null | grep -q "[f]inetune_trainer train" && echo ${p#/proc/}; done; true'
    found = sorted(int(line) for line in job_namespace.execute(pod, script).split())
    return found[-1]


def supervisor_on_this_machine(uid: str) -> int:
    """Process id, on this machine, of the first process of a pod's trainer container: only from outside can it be killed."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, groups = (folder / "cmdline").read_bytes(), (folder / "cgroup").read_text()
            last_pid = (folder / "status").read_text().partition("NSpid:")[2].splitlines()[0].split()[-1]
        except (OSError, IndexError):
            continue  # it has ended meanwhile
        if b"supervise" in command and last_pid == "1" and uid in groups:
            return int(folder.name)
    raise AssertionError(f"no supervisor of pod {uid} on this machine")


def kill_rank(job_namespace: JobNamespace, pod: dict[str, Any]) -> None:
    """kill -9 of one rank."""
    name = pod["metadata"]["name"]
    job_namespace.execute(name, f"kill -9 {rank_of(job_namespace, name)}")


def kill_supervisor(job_namespace: JobNamespace, pod: dict[str, Any]) -> None:
    """kill -9 of the container's first process."""
    del job_namespace
    os.kill(supervisor_on_this_machine(pod["metadata"]["uid"]), signal.SIGKILL)


def delete_pod(job_namespace: JobNamespace, pod: dict[str, Any]) -> None:
    """What an eviction or a drain does."""
    job_namespace.site.cluster.kubectl(
        "-n", job_namespace.namespace, "delete", "pod", pod["metadata"]["name"], "--wait=false"
    )


DISTURBANCES: dict[str, tuple[dict[str, Any], Callable[[JobNamespace, dict[str, Any]], None], int]] = {
    "rank-killed": (ONE_POD, kill_rank, 0),
    "supervisor-killed": (ONE_POD, kill_supervisor, 0),
    "pod-deleted": (ONE_POD, delete_pod, 0),
    "pod-of-two-deleted": (TWO_PODS, delete_pod, 1),
}


LONG = ("rank-killed", "supervisor-killed", "pod-deleted")
"""Only in `make test-faults`: the quick run kills ranks and supervisors as local processes (tests/pod) and deletes one pod of two here."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in DISTURBANCES]
)
def test_resumed_run_equals_the_undisturbed_one(
    shared_namespace: JobNamespace, undisturbed: dict[str, str], name: str
) -> None:
    resources, disturb, victim = DISTURBANCES[name]
    shared_namespace.apply(long_job(name, resources))
    shared_namespace.wait(name, lambda s: s.latest_checkpoint, "past its first checkpoint")
    disturb(shared_namespace, shared_namespace.pods(name)[victim])
    status = shared_namespace.end(name)
    assert status.restarts == 1
    first, second = status.attempts
    assert second.resumed_from_step is not None
    assert second.resumed_from_step >= EVERY
    assert first.last_step is not None
    assert first.last_step < STEPS
    if "deleted" in name:
        assert first.reason == FailureClass.PREEMPTED.value
        assert first.counted is not True, "a pod that was taken away costs no retry"
    assert weights(shared_namespace, status) == undisturbed


def test_suspended_in_the_middle_it_saves_first_and_goes_on_from_that_step(
    shared_namespace: JobNamespace, undisturbed: dict[str, str]
) -> None:
    name = "suspended"
    shared_namespace.apply(long_job(name, ONE_POD))
    shared_namespace.wait(name, lambda s: s.progress and s.progress.step, "at its first step")
    suspend(shared_namespace, name, True)
    status = shared_namespace.wait(name, lambda s: s.phase is Phase.SUSPENDED, "suspended")
    shared_namespace.site.api.wait_list(
        "pods", shared_namespace.namespace, lambda pods: all(over(pod) for pod in pods), labels=f"{Label.NAME}={name}"
    )
    (first,) = status.attempts
    assert first.counted is not True, "a wish of the user costs no retry"
    suspend(shared_namespace, name, False)
    status = shared_namespace.end(name)
    first, second = status.attempts
    assert first.last_step is not None
    assert 0 < first.last_step < STEPS
    assert second.resumed_from_step == first.committed_step == first.last_step, "not one step is repeated"
    assert weights(shared_namespace, status) == undisturbed


def suspend(job_namespace: JobNamespace, name: str, wished: bool) -> None:
    """Set spec.suspend."""
    job_namespace.site.api.patch(PLURAL, job_namespace.namespace, name, {"spec": {"suspend": wished}})


def over(pod: dict[str, Any]) -> bool:
    """Whether all of a pod's containers have ended."""
    return pod["status"].get("phase") in ("Succeeded", "Failed")


def test_a_name_that_is_used_again_waits_for_the_pods_of_the_one_before(shared_namespace: JobNamespace) -> None:
    """Deleted and applied again at once: two objects of one name never run at the same time, and share no folder."""
    name = "twice"
    shared_namespace.apply(long_job(name, ONE_POD))
    shared_namespace.wait(name, lambda s: s.progress and s.progress.step, "at its first step")
    shared_namespace.site.cluster.kubectl(
        "-n", shared_namespace.namespace, "delete", "finetunejob", name, "--wait=false"
    )
    (old,) = shared_namespace.pods(name)
    shared_namespace.apply(job(name, training={"maxSteps": 2}))
    status = shared_namespace.end(name)
    assert status.output is not None
    assert status.output.uri is not None
    assert (
        shared_namespace.site.api.get(PLURAL, shared_namespace.namespace, name)["metadata"]["uid"] in status.output.uri
    )
    (attempt,) = status.attempts
    assert (attempt.resumed_from_step, attempt.last_step) == (None, 2)
    (pod,) = shared_namespace.pods(name)
    assert pod["metadata"]["uid"] != old["metadata"]["uid"]


@pytest.fixture
def n2(site: Site) -> Iterator[str]:
    """The second node without the operator on it, brought back afterwards."""
    kubectl = site.cluster.kubectl
    kubectl("cordon", "n2")
    for pod in site.api.list("pods", demo.RELEASE):
        if pod["spec"].get("nodeName") == "n2":
            kubectl("-n", demo.RELEASE, "delete", "pod", pod["metadata"]["name"])
    kubectl("-n", demo.RELEASE, "rollout", "status", f"deployment/{demo.RELEASE}", "--timeout=60s")
    kubectl("uncordon", "n2")
    yield "n2"
    site.cluster.start_node("n2")
    kubectl("uncordon", "n1")


@pytest.mark.slow
def test_a_node_that_loses_its_power_costs_the_steps_since_the_checkpoint(
    shared_namespace: JobNamespace, undisturbed: dict[str, str], n2: str
) -> None:
    name, cluster = "node-lost", shared_namespace.site.cluster
    taints = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
    soon = [{"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 1} for key in taints]
    cluster.kubectl("cordon", "n1")
    shared_namespace.apply(long_job(name, ONE_POD, placement={"tolerations": soon}))
    shared_namespace.wait(name, lambda s: s.latest_checkpoint, "past its first checkpoint")
    cluster.kubectl("uncordon", "n1")
    cluster.power_off(n2)
    status = shared_namespace.wait(name, lambda s: s.phase is Phase.SUCCEEDED, "over", timeout=420)
    first, second = status.attempts
    assert first.counted is not True, "a node that is lost costs no retry"
    assert first.node == n2
    assert second.resumed_from_step is not None
    assert second.resumed_from_step >= EVERY
    assert weights(shared_namespace, status) == undisturbed
