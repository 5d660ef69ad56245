"""A whole pod is killed in the middle of a commit, at a request that the proxy holds: row 12 of docs/guides/checkpoints.md.

The next attempt finds only what the store has at that moment: the incomplete step is not visible, is swept and is made again.
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from finetune_api.pod import Resume
from finetune_trainer.checkpoint.manifest import prefix_of, step_of
from proxied_tree import ProxiedTree, final_state, logged_states, states, toy

from localcluster.s3 import S3Endpoint
from tests.support.faultproxy import Call
from tests.support.s3proxy import S3Operation, S3Proxy

EVERY = 5
SCRIPT = {"every": EVERY, "pause": 0.02, "bytes": 20_000_000}
"""The state is uploaded in three parts. Checkpoints are due faster than they are stored: some are skipped."""
POINTS = {
    "part of the data": ("UploadPart", "state-0"), "manifest": ("PutObject", "manifest.json"), "marker": ("PutObject", "_COMMITTED"),
}  # fmt: skip


@dataclass(frozen=True)
class Hold:
    """Hold a request for ever. `stored`: the store has executed it, and only the response is held."""

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
    """One job, two attempts."""

    folder: Path
    spec: dict[str, Any]
    storage: ProxiedTree
    proxy: S3Proxy
    server: S3Endpoint

    def killed_at(self, point: str, stored: bool) -> tuple[list[int], int]:
        """The first attempt, killed in the commit of a step. Returns the steps that it committed before, newest first, and that step."""
        operation, key = POINTS[point]
        hold = Hold(stored)
        with toy(self.folder / "one", self.spec, self.storage, self.server, SCRIPT | {"steps": 100_000}) as pod:
            pod.wait_committed(EVERY)
            with self.proxy.fault(hold, operation=operation, key=f"checkpoints/.*{key}"):
                pod.wait_until(hold.reached.is_set)
                before = pod.report()
                pod.kill()
        cut = step_of(hold.keys[0].split("/checkpoints/")[1].split("/")[0])
        assert before is not None and cut is not None
        return [one.step for one in before.checkpoints], cut

    def uploads(self) -> int:
        """Number of unfinished multipart uploads below the job's tree."""
        prefix = self.storage.direct.store.key("")  # type: ignore[attr-defined] # an S3Store
        found = self.storage.client.list_multipart_uploads(Bucket=self.storage.bucket).get("Uploads") or []
        return sum(one["Key"].startswith(prefix) for one in found)

    def keys(self, step: int) -> set[str]:
        """Keys of a step in the store."""
        return {stat.key for stat in self.storage.direct.store.list(f"{prefix_of(step)}/")}

    def resume_from(self, step: int) -> None:
        """Run the second attempt and compare both with an uninterrupted run."""
        last = step + 3 * EVERY
        resume = Resume(mode="auto", expect_step=step)
        script = SCRIPT | {"steps": last}
        with toy(self.folder / "two", self.spec, self.storage, self.server, script, attempt=2, resume=resume) as pod:
            assert pod.end() == 0, pod.text[-3000:]
        assert pod.termination_message().resumed_from_step == step
        assert self.uploads() == 0
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
def test_a_pod_killed_before_its_marker_has_not_committed(scene: Scene, point: str, stored: bool) -> None:
    """Row 12: the step is not visible, its objects and uploads are swept, and the result equals an uninterrupted run."""
    before, cut = scene.killed_at(point, stored)
    assert scene.storage.verify_all(scene.folder / "between") == before and cut not in before
    left = scene.keys(cut)
    assert left, "the objects before the held request are stored"
    assert scene.uploads() == (1 if point == "part of the data" else 0)
    scene.resume_from(before[0])
    assert left.isdisjoint(scene.keys(cut))


@pytest.mark.faults
def test_a_pod_killed_after_its_marker_has_committed(scene: Scene) -> None:
    """Row 12: the store has the marker, and the pod is killed before it receives the response."""
    before, cut = scene.killed_at("marker", True)
    assert scene.storage.verify_all(scene.folder / "between") == [cut, *before]
    scene.resume_from(cut)
