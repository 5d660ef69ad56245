"""Row 13 of docs/guides/checkpoints.md: the pods of two attempts of one job train and commit at the same time.

Two attempts run at the same time if a node is lost but its pod still runs. Only the checkpoints of the later attempt
are valid. Readers recognise them by their markers in storage.
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
from finetune_trainer.checkpoint.manifest import checkpoint_folder_key, parse_step
from finetune_trainer.checkpoint.tree import CheckpointTree
from finetune_trainer.storage.s3 import S3Store
from pod_harness import Pod
from proxied_tree import ProxiedTree, compute_expected_states, make_toy_pod, read_final_state, read_logged_states

from localcluster.processes import wait_until
from localcluster.s3 import S3Endpoint
from tests.support.faultproxy import Call
from tests.support.s3proxy import S3Operation, S3Proxy

STEPS_PER_CHECKPOINT = 5
TOY_SCRIPT = {"every": STEPS_PER_CHECKPOINT, "pause": 0.1}
READ_INTERVAL_SECONDS = 0.02
MAX_HOLD_SECONDS = 120.0
"""Maximum time for which a request is held, so that a failing test ends."""


@dataclass(frozen=True)
class RequestGate:
    """A fault that holds a request until the test opens the gate."""

    is_open: threading.Event = field(default_factory=threading.Event)
    keys: list[str] = field(default_factory=list)

    async def handle(self, call: Call[S3Operation]) -> web.StreamResponse:
        self.keys.append(call.operation.key)
        await asyncio.to_thread(self.is_open.wait, MAX_HOLD_SECONDS)
        return await call.forward()


@dataclass
class TwoAttempts:
    """Two attempts of one job, each with its own proxy in front of the same store."""

    folder: Path
    spec: dict[str, Any]
    storage: ProxiedTree
    second_storage: ProxiedTree
    proxies: tuple[S3Proxy, S3Proxy]
    server: S3Endpoint
    markers_seen: dict[int, list[str]] = field(default_factory=dict)
    """For each step: the incarnations that the step's marker has named during the test, oldest first."""
    start_step: int = 0
    """Step from which the second attempt resumes."""

    def make_earlier_pod(self) -> Pod:
        """Create the pod of the first attempt, whose training lasts longer than the test."""
        return make_toy_pod(self.folder / "one", self.spec, self.storage, self.server, TOY_SCRIPT | {"steps": 100_000})

    def make_later_pod(self) -> Pod:
        """Create the pod of the second attempt while the first attempt runs.

        The second attempt resumes from the newest committed checkpoint, and ends after twelve more checkpoints.
        """
        self.start_step = max(checkpoint.step or 0 for checkpoint in self.storage.direct_tree.list_committed())
        script, resume = TOY_SCRIPT | {"further": 12 * STEPS_PER_CHECKPOINT}, ResumeConfig(mode="auto", expect_step=self.start_step)
        return make_toy_pod(self.folder / "two", self.spec, self.second_storage, self.server, script, attempt=2, resume=resume)

    @contextmanager
    def watch_markers(self) -> Iterator[None]:
        """During the `with` block, read all markers again and again in a thread, and record their changes."""
        is_done = threading.Event()

        def watch() -> None:
            while not is_done.wait(READ_INTERVAL_SECONDS):
                for checkpoint in self.storage.direct_tree.list_committed():
                    paths = self.markers_seen.setdefault(checkpoint.step or 0, [])
                    if paths[-1:] != [checkpoint.marker.path]:
                        paths.append(checkpoint.marker.path)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            is_done.set()
            thread.join()

    def assert_later_attempt_won(self, earlier_pod: Pod, later_pod: Pod, reason: str) -> None:
        """Check that the earlier attempt was fenced, and that the later attempt has the same result as an uninterrupted run."""
        assert [earlier_pod.process and earlier_pod.process.poll(), later_pod.end()] == [74, 0], (
            earlier_pod.text[-3000:] + later_pod.text[-3000:]
        )
        termination = earlier_pod.termination_message()
        assert (termination.code, termination.class_, termination.origin) == ("FencedOut", FailureClass.INFRASTRUCTURE, True)
        assert reason in (termination.message or "") and "must end" in (termination.message or "")
        resumed_step = later_pod.termination_message().resumed_from_step
        assert resumed_step is not None and resumed_step >= self.start_step
        last_step = resumed_step + 12 * STEPS_PER_CHECKPOINT
        for checkpoint in self.storage.direct_tree.list_committed():
            assert checkpoint.marker.attempt == (1 if (checkpoint.step or 0) <= resumed_step else 2), checkpoint
        for step, paths in self.markers_seen.items():
            assert paths == sorted(paths) and len(paths) <= 2, f"step {step}: {paths}"
        assert last_step in self.storage.verify_all(self.folder / "after")
        committed_folders = {f"{checkpoint.folder}/" for checkpoint in self.storage.direct_tree.list_committed()}
        data_keys = [
            stat.key
            for stat in self.storage.direct_tree.store.list("checkpoints/")
            if not stat.key.rpartition("/")[2].startswith("_")
        ]
        assert all(any(key.startswith(folder) for folder in committed_folders) for key in data_keys), "the storage still contains data of the fenced attempt"
        logged_states = read_logged_states(self.storage)
        assert {step: state for step, state in logged_states.items() if step <= last_step} == compute_expected_states(last_step)
        assert read_final_state(self.storage) == compute_expected_states(last_step)[last_step]


@pytest.fixture
def two_attempts(tmp_path: Path, spec: dict[str, Any], storage: ProxiedTree, proxy: S3Proxy, s3_server: S3Endpoint) -> Iterator[TwoAttempts]:
    with S3Proxy(s3_server.host_url) as second_proxy:
        target = storage.direct_tree.store.target.model_copy(update={"endpoint": second_proxy.url})  # type: ignore[attr-defined] # an S3Store
        second_storage = ProxiedTree(CheckpointTree(S3Store(target)), storage.direct_tree, storage.client, storage.bucket)
        yield TwoAttempts(tmp_path, spec, storage, second_storage, (proxy, second_proxy), s3_server)


def test_an_earlier_attempt_ends_once_a_later_one_has_begun(two_attempts: TwoAttempts) -> None:
    """Row 13: the first attempt ends and commits nothing more as soon as the second attempt has begun."""
    with two_attempts.watch_markers(), two_attempts.make_earlier_pod() as earlier_pod:
        earlier_pod.wait_committed(2 * STEPS_PER_CHECKPOINT)
        with two_attempts.make_later_pod() as later_pod:
            earlier_pod.end(120)
            assert later_pod.process is not None and later_pod.process.poll() is None, (
                "the second attempt must still run when the first one ends"
            )
            later_pod.end()
    two_attempts.assert_later_attempt_won(earlier_pod, later_pod, "a later attempt has begun")


@dataclass
class MarkerRace:
    """Two attempts that write the marker of the same step at the same time. The proxies hold both write requests until the test releases them."""

    two_attempts: TwoAttempts
    earlier_pod: Pod
    step: int
    marker_gates: tuple[RequestGate, RequestGate]
    final_check_gate: RequestGate
    """Holds the request with which the first attempt checks its data. The attempt sends this request after it has written its marker."""

    def release_marker(self, attempt: int) -> None:
        """Release the request with which an attempt writes its marker, and wait until the marker is stored."""
        self.marker_gates[attempt - 1].is_open.set()
        wait_until(f"the marker of attempt {attempt}", lambda: self.read_marked_attempt() == attempt, servers=[], timeout=60)

    def read_marked_attempt(self) -> int:
        """Return the number of the attempt that the step's marker names; 0 if there is no marker."""
        checkpoint = self.two_attempts.storage.direct_tree.get_committed(self.step)
        return checkpoint.marker.attempt if checkpoint is not None else 0

    def finish_earlier(self) -> None:
        """Release all requests of the first attempt and wait until its pod has ended."""
        self.marker_gates[0].is_open.set()
        self.final_check_gate.is_open.set()
        self.earlier_pod.end(120)


def release_later_first(race: MarkerRace) -> None:
    race.release_marker(2)
    race.finish_earlier()


def release_earlier_without_data(race: MarkerRace) -> None:
    race.release_marker(1)
    race.finish_earlier()
    assert race.read_marked_attempt() == 0, "the second attempt had removed the data, so the first attempt must remove its marker"
    race.release_marker(2)


def release_both_before_earlier_check(race: MarkerRace) -> None:
    race.release_marker(1)
    race.release_marker(2)
    race.finish_earlier()


@pytest.mark.parametrize(
    ("release_requests", "reason"),
    [
        pytest.param(release_later_first, "was committed by a2-", id="later-first", marks=pytest.mark.faults),
        pytest.param(
            release_earlier_without_data, "another incarnation has removed", id="earlier-first-removed", marks=pytest.mark.faults
        ),
        pytest.param(
            release_both_before_earlier_check, "another incarnation has removed", id="earlier-first-replaced", marks=pytest.mark.faults
        ),
    ],
)  # fmt: skip
def test_the_later_attempts_marker_stays_if_two_attempts_commit_the_same_step(
    two_attempts: TwoAttempts, release_requests: Callable[[MarkerRace], None], reason: str
) -> None:
    """Row 13: both attempts write the marker of the same step, in every order of their requests."""
    with two_attempts.watch_markers(), two_attempts.make_earlier_pod() as earlier_pod:
        earlier_pod.wait_committed(STEPS_PER_CHECKPOINT)
        marker_gates, final_check_gate = (RequestGate(), RequestGate()), RequestGate()
        two_attempts.proxies[0].fault(marker_gates[0], operation="PutObject", key="checkpoints/.*_COMMITTED", max_hits=1)
        earlier_pod.wait_until(lambda: bool(marker_gates[0].keys))
        step = parse_step(marker_gates[0].keys[0].split("/")[-2])
        assert step is not None
        two_attempts.proxies[0].fault(final_check_gate, operation="HeadObject", key=f"{checkpoint_folder_key(step)}/a1-.*/manifest.json", max_hits=1)
        two_attempts.proxies[1].fault(marker_gates[1], operation="PutObject", key=f"{checkpoint_folder_key(step)}/_COMMITTED", max_hits=1)
        with two_attempts.make_later_pod() as later_pod:
            later_pod.wait_until(lambda: bool(marker_gates[1].keys))
            race = MarkerRace(two_attempts, earlier_pod, step, marker_gates, final_check_gate)
            release_requests(race)
            assert race.read_marked_attempt() == 2
            later_pod.end()
    two_attempts.assert_later_attempt_won(earlier_pod, later_pod, reason)
    assert two_attempts.markers_seen[step][-1].startswith("a2-")
