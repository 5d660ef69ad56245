"""Row 12 of docs/guides/checkpoints.md: a pod is killed during a commit, while the proxy holds one of its requests. The next attempt ignores
the incomplete checkpoint, removes its objects, and repeats the step.
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
from finetune_trainer.checkpoint.manifest import prefix_of, step_of
from proxied_tree import ProxiedTree, final_state, logged_states, states, toy

from localcluster.s3 import S3Endpoint
from tests.support.faultproxy import Call
from tests.support.s3proxy import S3Operation, S3Proxy

EVERY = 5
SCRIPT = {"every": EVERY, "pause": 0.02, "bytes": 20_000_000}
"""A checkpoint of this size is uploaded in three parts. Checkpoints are saved faster than they can be uploaded, so some are skipped."""
POINTS = {
    "part of the data": ("UploadPart", "state-0"), "manifest": ("PutObject", "manifest.json"), "marker": ("PutObject", "_COMMITTED"),
}  # fmt: skip


@dataclass(frozen=True)
class Hold:
    """Never answer a request. If `stored` is true, the store executes the request, and only the response is held."""

    stored: bool
    reached: threading.Event = field(default_factory=threading.Event)
    keys: list[str] = field(default_factory=list)

    async def handle(self, call: Call[S3Operation]) -> web.StreamResponse:
        if self.stored:
            await call.apply()
        self.keys.append(call.operation.key)
        self.reached.set()
        return await asyncio.get_running_loop().create_future()


@dataclass(frozen=True)
class Scene:
    """A job with two attempts: the first attempt is killed during a commit, and the second attempt resumes."""

    folder: Path
    spec: dict[str, Any]
    storage: ProxiedTree
    proxy: S3Proxy
    server: S3Endpoint

    def kill_first_attempt_at(self, point: str, stored: bool) -> tuple[list[int], int]:
        """Kill the first attempt during a commit. Returns the previously committed steps (newest first) and the interrupted step."""
        operation, key = POINTS[point]
        hold = Hold(stored)
        with toy(self.folder / "one", self.spec, self.storage, self.server, SCRIPT | {"steps": 100_000}) as pod:
            pod.wait_committed(EVERY)
            with self.proxy.fault(hold, operation=operation, key=f"checkpoints/.*{key}"):
                pod.wait_until(hold.reached.is_set)
                before = pod.report()
                pod.kill()
        interrupted = step_of(hold.keys[0].split("/checkpoints/")[1].split("/")[0])
        assert before is not None and interrupted is not None
        return [one.step for one in before.checkpoints], interrupted

    def count_unfinished_uploads(self) -> int:
        """Count the unfinished multipart uploads of the job."""
        prefix = self.storage.direct.store.key("")  # type: ignore[attr-defined] # an S3Store
        found = self.storage.client.list_multipart_uploads(Bucket=self.storage.bucket).get("Uploads") or []
        return sum(one["Key"].startswith(prefix) for one in found)

    def keys(self, step: int) -> set[str]:
        """Return the keys of a step's objects in the store."""
        return {stat.key for stat in self.storage.direct.store.list(f"{prefix_of(step)}/")}

    def resume_from(self, step: int) -> None:
        """Run the second attempt until it ends. Compare its logs and its result with those of an uninterrupted run."""
        last = step + 3 * EVERY
        resume = ResumeConfig(mode="auto", expect_step=step)
        script = SCRIPT | {"steps": last}
        with toy(self.folder / "two", self.spec, self.storage, self.server, script, attempt=2, resume=resume) as pod:
            assert pod.end() == 0, pod.text[-3000:]
        assert pod.termination_message().resumed_from_step == step
        assert self.count_unfinished_uploads() == 0
        logged = logged_states(self.storage)
        assert {number: state for number, state in logged.items() if number <= last} == states(last)
        assert final_state(self.storage) == states(last)[last]
        assert last in self.storage.verify_all(self.folder / "after")


@pytest.fixture
def scene(tmp_path: Path, spec: dict[str, Any], storage: ProxiedTree, proxy: S3Proxy, s3_server: S3Endpoint) -> Scene:
    return Scene(tmp_path, spec, storage, proxy, s3_server)


@pytest.mark.parametrize(
    ("point", "stored"),
    [
        ("marker", False),
        *(pytest.param(*one, marks=pytest.mark.faults) for one in (
            ("part of the data", False), ("manifest", False), ("part of the data", True), ("manifest", True),
        )),
    ],
)  # fmt: skip
def test_a_step_is_not_committed_if_the_pod_is_killed_before_the_marker(scene: Scene, point: str, stored: bool) -> None:
    """Row 12: the step is not visible, the next attempt removes its objects and uploads, and the result equals that of an uninterrupted run."""
    before, interrupted = scene.kill_first_attempt_at(point, stored)
    assert scene.storage.verify_all(scene.folder / "between") == before and interrupted not in before
    leftovers = scene.keys(interrupted)
    assert leftovers, "the objects before the held request are stored"
    assert scene.count_unfinished_uploads() == (1 if point == "part of the data" else 0)
    scene.resume_from(before[0])
    assert leftovers.isdisjoint(scene.keys(interrupted))


@pytest.mark.faults
def test_a_step_is_committed_if_the_pod_is_killed_after_the_marker(scene: Scene) -> None:
    """Row 12: the store has stored the marker, but the pod is killed before it receives the response."""
    before, interrupted = scene.kill_first_attempt_at("marker", True)
    assert scene.storage.verify_all(scene.folder / "between") == [interrupted, *before]
    scene.resume_from(interrupted)
