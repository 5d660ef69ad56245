"""A whole pod is killed in the middle of a commit, at a request that the proxy holds: row 12 of docs/guides/checkpoints.md.

What the store has at that moment is all that the next attempt finds: the half step is not seen, is swept away, and is made again.
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
from storage_place import Connection, final_state, logged_states, states, toy

from localcluster.s3 import S3Endpoint
from tests.support.faultproxy import Call
from tests.support.s3proxy import S3Operation, S3Proxy

EVERY = 5
SCRIPT = {"every": EVERY, "pause": 0.02, "bytes": 20_000_000}
"""A state so large that it goes up in three parts. Checkpoints are due faster than they are stored: some are skipped."""
POINTS = {
    "part of the data": ("UploadPart", "state-0"), "manifest": ("PutObject", "manifest.json"), "marker": ("PutObject", "_COMMITTED"),
}  # fmt: skip


@dataclass(frozen=True)
class Hold:
    """The request is held for ever. `stored`: the store has done it, and only the answer is held."""

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
    place: Connection
    proxy: S3Proxy
    server: S3Endpoint

    def killed_at(self, point: str, stored: bool) -> tuple[list[int], int]:
        """The first attempt, killed in the commit of a step. Returns the steps that it committed before, newest first, and that step."""
        operation, key = POINTS[point]
        hold = Hold(stored)
        with toy(self.folder / "one", self.spec, self.place, self.server, SCRIPT | {"steps": 100_000}) as pod:
            pod.wait_committed(EVERY)
            with self.proxy.fault(hold, operation=operation, key=f"checkpoints/.*{key}"):
                pod.wait_until(hold.reached.is_set)
                before = pod.report()
                pod.kill()
        cut = step_of(hold.keys[0].split("/checkpoints/")[1].split("/")[0])
        assert before is not None and cut is not None
        return [one.step for one in before.checkpoints], cut

    def uploads(self) -> int:
        """Multipart uploads that nobody has finished, below the job's tree."""
        prefix = self.place.truly.store.key("")  # type: ignore[attr-defined] # an S3Store
        found = self.place.client.list_multipart_uploads(Bucket=self.place.bucket).get("Uploads") or []
        return sum(one["Key"].startswith(prefix) for one in found)

    def keys(self, step: int) -> set[str]:
        """What the store has of a step."""
        return {stat.key for stat in self.place.truly.store.list(f"{prefix_of(step)}/")}

    def goes_on_from(self, step: int) -> None:
        """The second attempt goes on from that step, and both together are a run that nothing happened to."""
        last = step + 3 * EVERY
        resume = Resume(mode="auto", expect_step=step)
        script = SCRIPT | {"steps": last}
        with toy(self.folder / "two", self.spec, self.place, self.server, script, attempt=2, resume=resume) as pod:
            assert pod.end() == 0, pod.text[-3000:]
        assert pod.words().resumed_from_step == step
        assert self.uploads() == 0
        logged = logged_states(self.place)
        assert {number: state for number, state in logged.items() if number <= last} == states(last)
        assert final_state(self.place) == states(last)[last]
        assert last in self.place.whole(self.folder / "after")


@pytest.fixture
def scene(tmp_path: Path, spec: dict[str, Any], place: Connection, proxy: S3Proxy, s3_server: S3Endpoint) -> Scene:
    return Scene(tmp_path, spec, place, proxy, s3_server)


@pytest.mark.parametrize(
    ("point", "stored"),
    [
        ("marker", False),
        *(pytest.param(*one, marks=pytest.mark.faults) for one in (
            ("part of the data", False), ("manifest", False), ("part of the data", True), ("manifest", True),
        )),
    ],
)  # fmt: skip
def test_a_pod_killed_before_its_marker_leaves_nothing_that_counts(scene: Scene, point: str, stored: bool) -> None:
    """Row 12: the step is not seen, what is there of it is swept, no multipart upload stays, and the end is the undisturbed run's."""
    before, cut = scene.killed_at(point, stored)
    assert scene.place.whole(scene.folder / "between") == before and cut not in before
    left = scene.keys(cut)
    assert left, "what came before the held request is there"
    assert scene.uploads() == (1 if point == "part of the data" else 0)
    scene.goes_on_from(before[0])
    assert left.isdisjoint(scene.keys(cut))


@pytest.mark.faults
def test_a_pod_killed_when_its_marker_was_stored_has_committed(scene: Scene) -> None:
    """Row 12, the other side of the last point: the store has the marker, and the pod never heard of it."""
    before, cut = scene.killed_at("marker", True)
    assert scene.place.whole(scene.folder / "between") == [cut, *before]
    scene.goes_on_from(cut)
