"""Row 12 of docs/guides/checkpoints.md: a pod is killed during a commit, while the proxy holds one of the pod's requests. The next attempt ignores the
incomplete checkpoint, removes its objects, and repeats the step.
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from finetune_api.pod import ResumeConfig
from finetune_trainer.checkpoint.manifest import checkpoint_folder_key, parse_step
from proxied_tree import ProxiedTree, compute_expected_states, make_toy_pod, read_final_state, read_logged_states

from localcluster.s3 import S3Endpoint
from tests.support.faultproxy import Call
from tests.support.s3proxy import S3Operation, S3Proxy
from tests.support.store_features import UNFINISHED_UPLOADS, YES, read_result_of_chosen_store

STEPS_PER_CHECKPOINT = 5
TOY_SCRIPT = {"every": STEPS_PER_CHECKPOINT, "pause": 0.02, "bytes": 20_000_000}
"""Script of the toy ranks. A checkpoint of 20 MB is uploaded in three parts. Some checkpoints are skipped, because they are saved faster than they can
be uploaded.
"""
REQUEST_BY_KILL_POINT = {
    "part of the data": ("UploadPart", "state-0"), "manifest": ("PutObject", "manifest.json"), "marker": ("PutObject", "_COMMITTED"),
}  # fmt: skip


@dataclass(frozen=True)
class HoldRequest:
    """A fault that never answers a request. If `is_executed` is true, the store executes the request, and only its response is held."""

    is_executed: bool
    has_arrived: threading.Event = field(default_factory=threading.Event)
    keys: list[str] = field(default_factory=list)

    async def handle(self, call: Call[S3Operation]) -> web.StreamResponse:
        if self.is_executed:
            await call.execute_on_server()
        self.keys.append(call.operation.key)
        self.has_arrived.set()
        return await asyncio.get_running_loop().create_future()


@dataclass(frozen=True)
class KillScenario:
    """A job with two attempts: the first is killed during a commit, and the second resumes."""

    folder: Path
    spec: dict[str, Any]
    storage: ProxiedTree
    proxy: S3Proxy
    server: S3Endpoint

    def kill_first_attempt_at(self, point: str, is_executed: bool) -> tuple[list[int], int]:
        """Kill the first attempt at the given point of a commit.

        Returns the steps that were committed before the kill (newest first), and the step whose commit was interrupted.
        """
        operation, key = REQUEST_BY_KILL_POINT[point]
        held_request = HoldRequest(is_executed)
        with make_toy_pod(self.folder / "one", self.spec, self.storage, self.server, TOY_SCRIPT | {"steps": 100_000}) as pod:
            pod.wait_committed(STEPS_PER_CHECKPOINT)
            with self.proxy.fault(held_request, operation=operation, key=f"checkpoints/.*{key}"):
                pod.wait_until(held_request.has_arrived.is_set)
                last_report = pod.report()
                pod.kill()
        interrupted_step = parse_step(held_request.keys[0].split("/checkpoints/")[1].split("/")[0])
        assert last_report is not None and interrupted_step is not None
        return [checkpoint.step for checkpoint in last_report.checkpoints], interrupted_step

    def count_unfinished_uploads(self) -> int:
        """Count the unfinished multipart uploads of the job."""
        prefix = self.storage.direct_tree.store.full_key("")  # type: ignore[attr-defined] # an S3Store
        uploads = self.storage.client.list_multipart_uploads(Bucket=self.storage.bucket).get("Uploads") or []
        return sum(upload["Key"].startswith(prefix) for upload in uploads)

    def list_keys(self, step: int) -> set[str]:
        """Return the keys of a step's objects in the store."""
        return {stat.key for stat in self.storage.direct_tree.store.list(f"{checkpoint_folder_key(step)}/")}

    def resume_from(self, step: int) -> None:
        """Run the second attempt until it ends, and check that its logs and its result equal those of an uninterrupted run.

        Also check that the second attempt has removed unfinished uploads, unless the store cannot list unfinished uploads by a key prefix.
        """
        uploads_before = self.count_unfinished_uploads()
        last_step = step + 3 * STEPS_PER_CHECKPOINT
        resume = ResumeConfig(mode="auto", expect_step=step)
        script = TOY_SCRIPT | {"steps": last_step}
        with make_toy_pod(self.folder / "two", self.spec, self.storage, self.server, script, attempt=2, resume=resume) as pod:
            assert pod.end() == 0, pod.text[-3000:]
        assert pod.termination_message().resumed_from_step == step
        assert self.count_unfinished_uploads() == (0 if read_result_of_chosen_store(UNFINISHED_UPLOADS) == YES else uploads_before)
        logged_states = read_logged_states(self.storage)
        assert {number: state for number, state in logged_states.items() if number <= last_step} == compute_expected_states(last_step)
        assert read_final_state(self.storage) == compute_expected_states(last_step)[last_step]
        assert last_step in self.storage.verify_all(self.folder / "after")


@pytest.fixture
def scenario(tmp_path: Path, spec: dict[str, Any], storage: ProxiedTree, proxy: S3Proxy, s3_server: S3Endpoint) -> KillScenario:
    return KillScenario(tmp_path, spec, storage, proxy, s3_server)


@pytest.mark.parametrize(
    ("point", "is_executed"),
    [
        ("marker", False),
        *(pytest.param(*case, marks=pytest.mark.faults) for case in (
            ("part of the data", False), ("manifest", False), ("part of the data", True), ("manifest", True),
        )),
    ],
)  # fmt: skip
def test_a_step_is_not_committed_if_the_pod_is_killed_before_the_marker(scenario: KillScenario, point: str, is_executed: bool) -> None:
    """Row 12: the interrupted step does not count as committed.

    The next attempt removes the objects and unfinished uploads of this step, and has the same result as an uninterrupted run.
    """
    committed_steps, interrupted_step = scenario.kill_first_attempt_at(point, is_executed)
    assert scenario.storage.verify_all(scenario.folder / "between") == committed_steps and interrupted_step not in committed_steps
    leftover_keys = scenario.list_keys(interrupted_step)
    assert leftover_keys, "the objects before the held request are stored"
    assert scenario.count_unfinished_uploads() == (1 if point == "part of the data" else 0)
    scenario.resume_from(committed_steps[0])
    assert leftover_keys.isdisjoint(scenario.list_keys(interrupted_step))


@pytest.mark.faults
def test_a_step_is_committed_if_the_pod_is_killed_after_the_marker(scenario: KillScenario) -> None:
    """Row 12: the marker is stored, but the pod is killed before it receives the store's response."""
    committed_steps, interrupted_step = scenario.kill_first_attempt_at("marker", True)
    assert scenario.storage.verify_all(scenario.folder / "between") == [interrupted_step, *committed_steps]
    scenario.resume_from(interrupted_step)
