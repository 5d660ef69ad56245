"""Row 13 of docs/guides/checkpoints.md: two attempts of one job run at the same time, and the pods of both train and commit. Two attempts run
at the same time if a node is lost but its pod continues to run. Then only the markers in the storage decide which checkpoints are valid:
those of the later attempt.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from finetune_api.names import FailureClass
from finetune_api.pod import ResumeConfig
from finetune_trainer.checkpoint.manifest import prefix_of, step_of
from finetune_trainer.checkpoint.tree import CheckpointTree
from finetune_trainer.storage.s3 import S3Store
from pod_harness import Pod
from proxied_tree import ProxiedTree, final_state, logged_states, states, toy

from localcluster.processes import wait_until
from localcluster.s3 import S3Endpoint
from tests.support.faultproxy import Call
from tests.support.s3proxy import S3Operation, S3Proxy

EVERY = 5
SCRIPT = {"every": EVERY, "pause": 0.1}
READ_INTERVAL_SECONDS = 0.02
GATE_SECONDS = 120.0
"""Maximum time for which a request is held, so that a failing test ends."""


@dataclass(frozen=True)
class Gate:
    """Hold a request until it is released."""

    opened: threading.Event = field(default_factory=threading.Event)
    keys: list[str] = field(default_factory=list)

    async def handle(self, call: Call[S3Operation]) -> web.StreamResponse:
        self.keys.append(call.operation.key)
        await asyncio.to_thread(self.opened.wait, GATE_SECONDS)
        return await call.forward()


@dataclass
class TwoAttempts:
    """Two attempts of one job, each with its own proxy in front of the same store."""

    folder: Path
    spec: dict[str, Any]
    storage: ProxiedTree
    second: ProxiedTree
    proxies: tuple[S3Proxy, S3Proxy]
    server: S3Endpoint
    markers_seen: dict[int, list[str]] = field(default_factory=dict)
    """For each step, the incarnations that its marker has named, oldest first."""
    start: int = 0
    """The step from which the second attempt resumes."""

    def start_earlier(self) -> Pod:
        """Create the pod of the first attempt. Its training would take a long time."""
        return toy(self.folder / "one", self.spec, self.storage, self.server, SCRIPT | {"steps": 100_000})

    def start_later(self) -> Pod:
        """Create the pod of the second attempt while the first attempt runs. It ends twelve checkpoints after the step from which it resumes."""
        self.start = max(one.step or 0 for one in self.storage.direct.list_committed())
        script, resume = SCRIPT | {"further": 12 * EVERY}, ResumeConfig(mode="auto", expect_step=self.start)
        return toy(self.folder / "two", self.spec, self.second, self.server, script, attempt=2, resume=resume)

    @contextmanager
    def markers_watched(self) -> Iterator[None]:
        """Start a thread that repeatedly reads all markers and records their changes."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(READ_INTERVAL_SECONDS):
                for one in self.storage.direct.list_committed():
                    paths = self.markers_seen.setdefault(one.step or 0, [])
                    if paths[-1:] != [one.marker.path]:
                        paths.append(one.marker.path)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def assert_later_attempt_won(self, earlier: Pod, later: Pod, reason: str) -> None:
        """Check that the earlier attempt was fenced, and that the later attempt has the same result as an uninterrupted run."""
        assert [earlier.process and earlier.process.poll(), later.end()] == [74, 0], (
            earlier.text[-3000:] + later.text[-3000:]
        )
        termination = earlier.termination_message()
        assert (termination.code, termination.class_, termination.origin) == ("FencedOut", FailureClass.INFRASTRUCTURE, True)
        assert reason in (termination.message or "") and "must end" in (termination.message or "")
        resumed = later.termination_message().resumed_from_step
        assert resumed is not None and resumed >= self.start
        last = resumed + 12 * EVERY
        for one in self.storage.direct.list_committed():
            assert one.marker.attempt == (1 if (one.step or 0) <= resumed else 2), one
        for step, paths in self.markers_seen.items():
            assert paths == sorted(paths) and len(paths) <= 2, f"step {step}: {paths}"
        assert last in self.storage.verify_all(self.folder / "after")
        committed_folders = {f"{one.folder}/" for one in self.storage.direct.list_committed()}
        data = [
            stat.key
            for stat in self.storage.direct.store.list("checkpoints/")
            if not stat.key.rpartition("/")[2].startswith("_")
        ]
        assert all(any(key.startswith(folder) for folder in committed_folders) for key in data), "the storage still contains data of the fenced attempt"
        logged = logged_states(self.storage)
        assert {step: state for step, state in logged.items() if step <= last} == states(last)
        assert final_state(self.storage) == states(last)[last]


@pytest.fixture
def two(tmp_path: Path, spec: dict[str, Any], storage: ProxiedTree, proxy: S3Proxy, s3_server: S3Endpoint) -> Iterator[TwoAttempts]:
    with S3Proxy(s3_server.host_url) as other:
        target = storage.direct.store.target.model_copy(update={"endpoint": other.url})  # type: ignore[attr-defined] # an S3Store
        second = ProxiedTree(CheckpointTree(S3Store(target)), storage.direct, storage.client, storage.bucket)
        yield TwoAttempts(tmp_path, spec, storage, second, (proxy, other), s3_server)


def test_an_earlier_attempt_ends_once_a_later_one_has_begun(two: TwoAttempts) -> None:
    """Row 13: when the second attempt has begun, the first attempt ends and commits nothing more."""
    with two.markers_watched(), two.start_earlier() as earlier:
        earlier.wait_committed(2 * EVERY)
        with two.start_later() as later:
            earlier.end(120)
            assert later.process is not None and later.process.poll() is None, (
                "the second attempt must still run when the first one ends"
            )
            later.end()
    two.assert_later_attempt_won(earlier, later, "a later attempt has begun")


@dataclass
class Race:
    """Two attempts that write the marker of the same step. The proxies hold both write requests."""

    two: TwoAttempts
    earlier: Pod
    step: int
    markers: tuple[Gate, Gate]
    final_check: Gate
    """Holds the request with which the first attempt checks its data after it has written its marker."""

    def release_marker(self, attempt: int) -> None:
        """Release the marker request of an attempt, and wait until the marker is stored."""
        self.markers[attempt - 1].opened.set()
        wait_until(f"the marker of attempt {attempt}", lambda: self.marked_attempt() == attempt, servers=[], timeout=60)

    def marked_attempt(self) -> int:
        """Return the number of the attempt that the step's marker names; 0 if there is no marker."""
        found = self.two.storage.direct.get_committed(self.step)
        return found.marker.attempt if found is not None else 0

    def finish_earlier(self) -> None:
        """Release all requests of the first attempt and wait until its pod has ended."""
        self.markers[0].opened.set()
        self.final_check.opened.set()
        self.earlier.end(120)


def later_first(race: Race) -> None:
    race.release_marker(2)
    race.finish_earlier()


def earlier_first_and_removed(race: Race) -> None:
    race.release_marker(1)
    race.finish_earlier()
    assert race.marked_attempt() == 0, "the second attempt had removed the data, so the first attempt must remove its marker"
    race.release_marker(2)


def earlier_first_and_replaced(race: Race) -> None:
    race.release_marker(1)
    race.release_marker(2)
    race.finish_earlier()


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        pytest.param(later_first, "was committed by a2-", id="later-first", marks=pytest.mark.faults),
        pytest.param(
            earlier_first_and_removed, "another incarnation has removed", id="earlier-first-removed", marks=pytest.mark.faults
        ),
        pytest.param(
            earlier_first_and_replaced, "another incarnation has removed", id="earlier-first-replaced", marks=pytest.mark.faults
        ),
    ],
)  # fmt: skip
def test_the_later_attempts_marker_stays_if_two_attempts_commit_the_same_step(two: TwoAttempts, order: Callable[[Race], None], reason: str) -> None:
    """Row 13: both attempts write the marker of the same step. The order of the requests varies."""
    with two.markers_watched(), two.start_earlier() as earlier:
        earlier.wait_committed(EVERY)
        markers, final_check = (Gate(), Gate()), Gate()
        two.proxies[0].fault(markers[0], operation="PutObject", key="checkpoints/.*_COMMITTED", times=1)
        earlier.wait_until(lambda: bool(markers[0].keys))
        step = step_of(markers[0].keys[0].split("/")[-2])
        assert step is not None
        two.proxies[0].fault(final_check, operation="HeadObject", key=f"{prefix_of(step)}/a1-.*/manifest.json", times=1)
        two.proxies[1].fault(markers[1], operation="PutObject", key=f"{prefix_of(step)}/_COMMITTED", times=1)
        with two.start_later() as later:
            later.wait_until(lambda: bool(markers[1].keys))
            race = Race(two, earlier, step, markers, final_check)
            order(race)
            assert race.marked_attempt() == 2
            later.end()
    two.assert_later_attempt_won(earlier, later, reason)
    assert two.markers_seen[step][-1].startswith("a2-")
