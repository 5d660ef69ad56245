"""Whatever is killed, the next attempt goes on from a committed checkpoint and ends with the undisturbed run's weights."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finetune_api.names import FailureClass
from finetune_api.status import FineTuneJobStatus

from tests.e2e.jobs.site import Room, job

STEPS, EVERY = 100, 10
ONE_POD: dict[str, Any] = {"gpusPerNode": 0, "processesPerNode": 2, "cpu": "100m", "memory": "3Gi"}
TWO_PODS: dict[str, Any] = {"gpusPerNode": 0, "nodes": 2, "cpu": "100m", "memory": "2Gi"}


def long_job(name: str, resources: dict[str, Any]) -> dict[str, Any]:
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
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(shared_room: Room) -> dict[str, str]:
    """sha256 by file of the run that nothing happened to."""
    shared_room.apply(long_job("undisturbed", ONE_POD))
    status = shared_room.end("undisturbed")
    assert status.restarts == 0
    return weights(shared_room, status)


def weights(room: Room, status: FineTuneJobStatus) -> dict[str, str]:
    """sha256 of the final weights."""
    assert status.output is not None
    assert status.output.uri is not None
    files = room.site.manifest(status.output.uri)
    found = {path: digest for path, digest in files.items() if path.endswith(".safetensors")}
    assert found
    return found


def rank_of(room: Room, pod: str) -> int:
    """Process id, in the container, of the last rank."""
    script = 'for p in /proc/[0-9]*; do tr "\\0" " " < $p/cmdline 2>/dev/null | grep -q "[f]inetune_trainer train" && echo ${p#/proc/}; done; true'
    found = sorted(int(line) for line in room.execute(pod, script).split())
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


def kill_rank(room: Room, pod: dict[str, Any]) -> None:
    """kill -9 of one rank."""
    name = pod["metadata"]["name"]
    room.execute(name, f"kill -9 {rank_of(room, name)}")


def kill_supervisor(room: Room, pod: dict[str, Any]) -> None:
    """kill -9 of the container's first process."""
    del room
    os.kill(supervisor_on_this_machine(pod["metadata"]["uid"]), signal.SIGKILL)


def delete_pod(room: Room, pod: dict[str, Any]) -> None:
    """What an eviction or a drain does."""
    room.site.cluster.kubectl("-n", room.namespace, "delete", "pod", pod["metadata"]["name"], "--wait=false")


DISTURBANCES: dict[str, tuple[dict[str, Any], Callable[[Room, dict[str, Any]], None], int]] = {
    "rank-killed": (ONE_POD, kill_rank, 0),
    "supervisor-killed": (ONE_POD, kill_supervisor, 0),
    "pod-deleted": (ONE_POD, delete_pod, 0),
    "pod-of-two-deleted": (TWO_PODS, delete_pod, 1),
}


@pytest.mark.parametrize("name", DISTURBANCES)
def test_resumed_run_equals_the_undisturbed_one(shared_room: Room, undisturbed: dict[str, str], name: str) -> None:
    resources, disturb, victim = DISTURBANCES[name]
    shared_room.apply(long_job(name, resources))
    shared_room.wait(name, lambda s: s.latest_checkpoint, "past its first checkpoint")
    disturb(shared_room, shared_room.pods(name)[victim])
    status = shared_room.end(name)
    assert status.restarts == 1
    first, second = status.attempts
    assert second.resumed_from_step is not None
    assert second.resumed_from_step >= EVERY
    assert first.last_step is not None
    assert first.last_step < STEPS
    if "deleted" in name:
        assert first.reason == FailureClass.PREEMPTED.value
        assert first.counted is not True, "a pod that was taken away costs no retry"
    assert weights(shared_room, status) == undisturbed
