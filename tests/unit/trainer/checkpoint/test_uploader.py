"""Background uploads: one upload runs and one checkpoint is queued.

A newer checkpoint replaces the queued one. The checkpoint of a graceful stop is never dropped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from finetune_api.errors import CredentialsError, StorageError
from finetune_trainer.checkpoint.manifest import Manifest, RunFacts, prefix_of
from finetune_trainer.checkpoint.tree import CheckpointTree, FencedOutError
from finetune_trainer.checkpoint.uploader import KeepPolicy, StagedCheckpoint, Uploader, checkpoints_for_status
from finetune_trainer.storage.folder import FolderStore
from finetune_trainer.supervisor.run_state import RunState


class GatedStore(FolderStore):
    """A folder store whose uploads wait until `gate` is set. Each upload calls `refuse(key)`, which may raise an error."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, f"file://{root}")
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.gate.set()
        self.refuse: Callable[[str], None] = lambda key: None

    def put_file(self, source: Path, key: str, *, count: object = None) -> None:
        self.entered.set()
        assert self.gate.wait(20)
        self.refuse(key)
        super().put_file(source, key)

    def delete(self, keys: object) -> None:
        for key in keys:  # type: ignore[attr-defined] # an iterable of keys
            self.refuse(f"delete {key}")
            super().delete([key])


class UploaderBench:
    """An uploader with a GatedStore, and functions that offer checkpoints and wait for uploads."""

    def __init__(self, folder: Path, *, final_timeout: float = 60, **policy: object) -> None:
        self.folder = folder
        self.store = GatedStore(folder / "root")
        self.tree, self.run_state = CheckpointTree(self.store), RunState()
        self.uploader = Uploader(
            self.tree, self.run_state, RunFacts(), KeepPolicy(**policy), job="n/j/u", attempt=1,  # type: ignore[arg-type] # a table's
            final_upload_timeout=final_timeout,
        )  # fmt: skip

    def enqueue(self, step: int | None, *, graceful: bool = False, **facts: object) -> None:
        staged = self.folder / f"staged-{step}"
        staged.mkdir()
        (staged / "weights").write_text(f"{step}")
        if step is None:
            facts |= {"outputKind": "adapter", "step": 9}
        self.uploader.enqueue(StagedCheckpoint(step, staged, "a1-00000000", graceful, facts))

    def steps(self) -> list[int]:
        return [one.step or 0 for one in self.tree.list_committed()]

    def wait_until_idle(self) -> None:
        self.store.gate.set()
        assert self.uploader.wait_until_idle(20)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[UploaderBench]:
    bench = UploaderBench(tmp_path, keep_count=0)
    yield bench
    bench.wait_until_idle()
    bench.uploader.close()


def test_a_newer_checkpoint_replaces_the_queued_one(bench: UploaderBench) -> None:
    bench.store.gate.clear()
    bench.enqueue(1)
    assert bench.store.entered.wait(10)
    for step in (2, 3, 4):
        bench.enqueue(step)
    bench.wait_until_idle()
    assert bench.steps() == [4, 1]
    assert bench.run_state.counters["checkpoints_skipped"] == 2
    assert any("skipped" in note for note in bench.run_state.report().resolved.notes or [])
    assert not (bench.folder / "staged-2").exists()


def test_the_stop_checkpoint_is_never_dropped(bench: UploaderBench) -> None:
    bench.store.gate.clear()
    bench.enqueue(1)
    assert bench.store.entered.wait(10)
    bench.enqueue(2)
    bench.enqueue(3, graceful=True)
    bench.enqueue(4)
    bench.wait_until_idle()
    assert bench.steps() == [3, 1]


def test_a_fenced_commit_ends_the_attempt(bench: UploaderBench) -> None:
    """This incarnation must stop training, because a later attempt has begun."""
    bench.tree.begin_attempt(2, b"{}")
    bench.enqueue(1)
    bench.wait_until_idle()
    assert isinstance(bench.uploader.failure, FencedOutError) and bench.uploader.failure.exit_code == 74
    assert bench.steps() == [] and "checkpoint_failures" not in bench.run_state.counters
    bench.enqueue(2)
    bench.wait_until_idle()
    assert bench.steps() == [], "nothing is uploaded after the first fenced commit"


class FakeClock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("finetune_trainer.checkpoint.uploader.time", self)

    def monotonic(self) -> float:
        return self.now


def test_the_attempt_ends_if_no_checkpoint_is_stored_for_too_long(
    bench: UploaderBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock(monkeypatch)

    def refuse(key: str) -> None:
        raise StorageError("EndpointUnreachable", "gone")

    bench.store.refuse = refuse
    for step in (1, 2):
        clock.now += 100
        bench.enqueue(step)
        bench.wait_until_idle()
    clock.now += 499
    assert bench.uploader.unsaved_error(600, None) is None
    clock.now += 2
    assert bench.uploader.unsaved_error(600, 700) is None, "the limit is at least the job's stall timeout"
    assert bench.uploader.unsaved_error(200, None) is not None
    error = bench.uploader.unsaved_error(600, None)
    assert error is not None and (error.exit_code, error.code) == (69, "CheckpointsNotSaved")
    assert "EndpointUnreachable: step 2 was not stored: gone" in error.message
    bench.store.refuse = lambda key: None
    bench.enqueue(3)
    bench.wait_until_idle()
    clock.now += 10_000
    assert bench.uploader.unsaved_error(600, None) is None, "step 3 is committed"


def test_an_already_committed_step_does_not_count_as_unsaved(
    bench: UploaderBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock(monkeypatch)
    for _ in range(2):
        bench.enqueue(1)
        bench.wait_until_idle()
    clock.now += 10_000
    assert bench.uploader.unsaved_error(600, None) is None


def test_a_run_may_go_unsaved_for_several_checkpoint_intervals(bench: UploaderBench, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(monkeypatch)
    bench.uploader.record_unsaved()
    clock.now += 1000
    bench.uploader.record_unsaved()
    clock.now += 1999
    assert bench.uploader.unsaved_error(60, None) is None
    clock.now += 2
    assert bench.uploader.unsaved_error(60, None) is not None


def test_the_final_model_is_uploaded_after_the_last_checkpoint(bench: UploaderBench) -> None:
    bench.store.gate.clear()
    bench.enqueue(8)
    bench.enqueue(None)
    bench.wait_until_idle()
    assert bench.steps() == [8]
    assert bench.uploader.output is not None and bench.uploader.output.uri == f"{bench.store.uri}/model/a1-00000000"
    found = bench.tree.get_committed(None)
    assert found is not None and found.marker.manifest_sha256 == bench.uploader.output.sha256
    assert [one.healthy for one in checkpoints_for_status(bench.tree, bench.tree.list_committed())] == [True]


def test_a_checkpoint_is_healthy_once_the_next_one_is_committed(bench: UploaderBench) -> None:
    bench.enqueue(1)
    bench.wait_until_idle()
    assert [one.healthy for one in bench.tree.list_committed()] == [False]
    bench.enqueue(2)
    bench.wait_until_idle()
    assert [(one.step, one.healthy) for one in bench.tree.list_committed()] == [(2, False), (1, True)]
    bench.enqueue(3, graceful=True)
    bench.wait_until_idle()
    assert all(one.healthy for one in bench.tree.list_committed())


def test_old_checkpoints_are_removed_after_a_commit(tmp_path: Path) -> None:
    bench = UploaderBench(tmp_path, keep_count=1, pinned_steps=(2,))
    for step in range(1, 7):
        bench.enqueue(step, evalLoss=0.5 if step == 3 else 1.0)
        bench.wait_until_idle()
    assert bench.steps() == [6, 5, 4, 3, 2]
    bench.uploader.apply_retention(is_run_finished=True)
    assert bench.steps() == [6, 3, 2]
    assert [one.step for one in bench.run_state.checkpoints] == [6, 3, 2]
    bench.uploader.close()


def test_a_missing_permission_to_delete_adds_a_note(tmp_path: Path) -> None:
    bench = UploaderBench(tmp_path, keep_count=1)

    def refuse(key: str) -> None:
        if key.startswith("delete checkpoints/") and not key.endswith(".json"):
            raise CredentialsError("PermissionDenied", "s3:DeleteObject")

    bench.store.refuse = refuse
    for step in range(1, 6):
        bench.enqueue(step)
        bench.wait_until_idle()
    assert bench.steps() == [5, 4, 3, 2, 1]
    assert bench.uploader.failure is None
    assert any("PermissionDenied" in note for note in bench.run_state.report().resolved.notes or [])
    bench.uploader.close()


def test_a_checkpoint_that_cannot_be_stored_is_reported_and_training_goes_on(bench: UploaderBench) -> None:
    def refuse(key: str) -> None:
        raise StorageError("StorageFailed", "gone")

    bench.store.refuse = refuse
    bench.enqueue(1)
    bench.wait_until_idle()
    health = bench.run_state.report().health
    assert (health.healthy, health.checkpoint_problem) == (False, "StorageFailed: step 1 was not stored: gone")
    assert bench.uploader.failure is None
    bench.store.refuse = lambda key: None
    bench.enqueue(2)
    bench.wait_until_idle()
    assert bench.steps() == [2]
    assert bench.run_state.report().health.healthy


def test_the_checkpoint_of_a_stop_is_retried(bench: UploaderBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """No later checkpoint follows the checkpoint of a stop. A short outage of the store must not lose this checkpoint."""
    monkeypatch.setattr("finetune_trainer.checkpoint.uploader.RETRY_PAUSE_SECONDS", 0.001)
    tries: list[str] = []

    def refuse(key: str) -> None:
        tries.append(key)
        if len(tries) < 5:
            raise StorageError("EndpointUnreachable", "gone")

    bench.store.refuse = refuse
    bench.enqueue(1, graceful=True)
    bench.wait_until_idle()
    assert len(tries) == 5 and bench.steps() == [1]


def test_closing_the_uploader_abandons_the_graceful_stop_checkpoint(tmp_path: Path) -> None:
    bench = UploaderBench(tmp_path)

    def refuse(key: str) -> None:
        raise StorageError("EndpointUnreachable", "gone")

    bench.store.refuse = refuse
    bench.enqueue(1, graceful=True)
    assert bench.store.entered.wait(10)
    assert not bench.uploader.wait_until_idle(0)
    bench.uploader.close()
    assert bench.uploader.wait_until_idle(20) and bench.steps() == []


def test_skipped_checkpoints_are_replaced_or_removed_and_do_not_count_as_progress(tmp_path: Path) -> None:
    """Another attempt committed steps 10 to 30. This attempt resumes from 10 and repeats the later steps."""
    folder = tmp_path / "staged"
    folder.mkdir()
    (folder / "weights").write_text("old")
    bench = UploaderBench(tmp_path / "bench", keep_count=1, pinned_steps=(25,))
    for step in (10, 20, 25, 27, 30):
        files = bench.tree.upload(prefix_of(step), "a0-00000000", folder)
        bench.tree.commit(prefix_of(step), Manifest(step=step, incarnation="a0-00000000", files=files))
    own = bench.tree.list_committed()
    bench.uploader.adopt_committed(checkpoints_for_status(bench.tree, [one for one in own if one.step == 10]))
    bench.uploader.set_skipped([one for one in own if one.step != 10])
    assert bench.uploader.committed_step == 10
    assert [one.step for one in bench.run_state.checkpoints] == [10]
    bench.folder.mkdir(exist_ok=True)
    bench.enqueue(20)
    bench.wait_until_idle()
    found = {one.step: (one.marker.path, one.healthy) for one in bench.tree.list_committed()}
    assert found[20] == ("a1-00000000", False) and found[10][1] is True
    assert found[30] == ("a0-00000000", False), "finite losses of this attempt do not make a skipped checkpoint healthy"
    bench.enqueue(30)
    bench.wait_until_idle()
    assert {one.step: one.marker.path for one in bench.tree.list_committed()} == {
        10: "a0-00000000", 20: "a1-00000000", 25: "a0-00000000", 30: "a1-00000000"
    }  # fmt: skip
    assert bench.uploader.failure is None
    bench.uploader.close()


def test_the_data_of_a_committed_checkpoint_is_never_written_again(bench: UploaderBench) -> None:
    bench.enqueue(5)
    bench.wait_until_idle()
    (bench.folder / "staged-5").mkdir()
    (bench.folder / "staged-5" / "weights").write_text("other bytes")
    bench.uploader.enqueue(StagedCheckpoint(5, bench.folder / "staged-5", "a1-00000000", True, {}))
    bench.wait_until_idle()
    (found,) = bench.tree.list_committed()
    assert bench.tree.read_manifest(found) is not None and bench.uploader.failure is None
    assert bench.store.get(f"{found.folder}/weights") == b"5"


def test_the_evaluation_is_part_of_output_and_manifest(bench: UploaderBench) -> None:
    measured = {"testRows": 3, "testLoss": 1.25}
    bench.enqueue(None, extra={"evaluation": measured, "notes": []})
    bench.wait_until_idle()
    assert bench.uploader.output is not None and bench.uploader.output.evaluation == measured
    committed = bench.tree.get_committed(None)
    manifest = bench.tree.read_manifest(committed) if committed else None
    assert manifest is not None and manifest.extra["evaluation"] == measured


def test_a_final_model_that_cannot_be_stored_ends_the_attempt(tmp_path: Path) -> None:
    bench = UploaderBench(tmp_path, final_timeout=0)

    def refuse(key: str) -> None:
        raise StorageError("StorageFailed", "gone")

    bench.store.refuse = refuse
    bench.enqueue(None)
    bench.wait_until_idle()
    bench.uploader.close()
    assert bench.uploader.failure is not None and bench.uploader.failure.exit_code == 69


def test_the_final_model_is_retried_while_the_store_is_unavailable(
    bench: UploaderBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_trainer.checkpoint.uploader.RETRY_PAUSE_SECONDS", 0.01)
    tries: list[str] = []

    def refuse(key: str) -> None:
        tries.append(key)
        if len(tries) < 4:
            raise StorageError("StorageFailed", "gone")

    bench.store.refuse = refuse
    bench.enqueue(None)
    bench.wait_until_idle()
    assert bench.uploader.failure is None and bench.uploader.output is not None


def test_a_final_model_without_permission_to_write_is_not_retried(bench: UploaderBench) -> None:
    tries: list[str] = []

    def refuse(key: str) -> None:
        tries.append(key)
        raise CredentialsError("AccessDenied", "no s3:PutObject")

    bench.store.refuse = refuse
    bench.enqueue(None)
    bench.wait_until_idle()
    assert len(tries) == 1 and bench.uploader.failure is not None and bench.uploader.failure.exit_code == 77


def test_the_files_of_two_pods_form_one_checkpoint(tmp_path: Path) -> None:
    store = GatedStore(tmp_path / "root")
    pods = [
        Uploader(CheckpointTree(store), RunState(), RunFacts(), KeepPolicy(), job="n/j/u", attempt=1, node=node, nodes=2)
        for node in (0, 1)
    ]
    for node, uploader in enumerate(pods):
        folder = tmp_path / f"node-{node}"
        folder.mkdir()
        (folder / f"rng_state_{node}.pth").write_text(str(node))
        uploader.enqueue(StagedCheckpoint(5, folder, "a1-00000000"))
    for uploader in pods:
        assert uploader.wait_until_idle(20)
        uploader.close()
    (found,) = CheckpointTree(store).list_committed()
    manifest = CheckpointTree(store).read_manifest(found)
    assert manifest is not None
    assert [one.path for one in manifest.files] == ["rng_state_0.pth", "rng_state_1.pth"]
    assert not list(store.list(f"{prefix_of(5)}/a1-00000000/.parts"))


def test_no_checkpoint_is_committed_if_pods_wrote_one_file_differently(tmp_path: Path) -> None:
    store, states = GatedStore(tmp_path / "root"), [RunState(), RunState()]
    pods = [
        Uploader(CheckpointTree(store), states[node], RunFacts(), KeepPolicy(), job="n/j/u", attempt=1, node=node, nodes=2)
        for node in (0, 1)
    ]
    for node, uploader in enumerate(pods):
        folder = tmp_path / f"node-{node}"
        folder.mkdir()
        (folder / "state.json").write_text(str(node))
        uploader.enqueue(StagedCheckpoint(5, folder, "a1-00000000"))
    for uploader in pods:
        assert uploader.wait_until_idle(20)
        uploader.close()
    assert CheckpointTree(store).list_committed() == []
    assert "PartsDiffer" in (states[0].report().health.checkpoint_problem or "")


def test_part_files_that_cannot_be_removed_do_not_undo_a_commit(tmp_path: Path) -> None:
    store, run_state = GatedStore(tmp_path / "root"), RunState()

    def refuse(key: str) -> None:
        if key.startswith("delete "):
            raise CredentialsError("PermissionDenied", "s3:DeleteObject")

    store.refuse = refuse
    CheckpointTree(store).report_part(prefix_of(5), "a1-00000000", 1, [])
    first = Uploader(CheckpointTree(store), run_state, RunFacts(), KeepPolicy(), job="n/j/u", attempt=1, node=0, nodes=2)
    folder = tmp_path / "node-0"
    folder.mkdir()
    (folder / "x").write_text("x")
    first.enqueue(StagedCheckpoint(5, folder, "a1-00000000", True))
    assert first.wait_until_idle(20)
    first.close()
    assert (first.committed_step, run_state.report().health.healthy) == (5, True)


def test_a_part_that_cannot_be_stored_is_reported_at_once(tmp_path: Path) -> None:
    """Without the report, rank 0's pod would wait for this part for half an hour and commit no checkpoint in this time."""
    store, run_state = GatedStore(tmp_path / "root"), RunState()
    pods = [
        Uploader(CheckpointTree(store), run_state, RunFacts(), KeepPolicy(), job="n/j/u", attempt=1, node=node, nodes=2)
        for node in (0, 1)
    ]

    def refuse(key: str) -> None:
        if key.endswith("rng-1"):
            raise StorageError("StorageFailed", "gone")

    store.refuse = refuse
    for node, uploader in enumerate(pods):
        folder = tmp_path / f"node-{node}"
        folder.mkdir()
        (folder / f"rng-{node}").write_text(str(node))
        uploader.enqueue(StagedCheckpoint(5, folder, "a1-00000000"))
    for uploader in pods:
        assert uploader.wait_until_idle(20)
        uploader.close()
    assert CheckpointTree(store).list_committed() == [] and pods[1].uploaded_step == 0


def test_a_slow_store_does_not_block_offer(tmp_path: Path) -> None:
    """A pod reports a skipped part on a separate thread. The thread that handles the ranks' messages must not wait for the store."""
    store = GatedStore(tmp_path / "root")
    reported = threading.Event()
    put = store.put

    def slow(key: str, data: bytes) -> None:
        reported.set()
        assert store.gate.wait(20)
        put(key, data)

    store.put = slow  # type: ignore[method-assign] # the fault to test
    second = Uploader(CheckpointTree(store), RunState(), RunFacts(), KeepPolicy(), job="n/j/u", attempt=1, node=1, nodes=2)
    store.gate.clear()
    for step in (1, 2, 3):
        folder = tmp_path / f"staged-{step}"
        folder.mkdir()
        (folder / "x").write_text("x")
        second.enqueue(StagedCheckpoint(step, folder, "a1-00000000"))
        if step == 1:
            assert store.entered.wait(10)
    assert reported.wait(10), "the report must be sent although the store is slow"
    store.gate.set()
    assert second.wait_until_idle(20)
    second.close()


def test_no_checkpoint_is_committed_if_a_pod_skips_its_part(tmp_path: Path) -> None:
    store = GatedStore(tmp_path / "root")
    CheckpointTree(store).report_part(prefix_of(5), "a1-00000000", 1, None)
    run_state = RunState()
    first = Uploader(CheckpointTree(store), run_state, RunFacts(), KeepPolicy(), job="n/j/u", attempt=1, node=0, nodes=2)
    folder = tmp_path / "node-0"
    folder.mkdir()
    (folder / "x").write_text("x")
    first.enqueue(StagedCheckpoint(5, folder, "a1-00000000"))
    assert first.wait_until_idle(20)
    first.close()
    assert CheckpointTree(store).list_committed() == []
    assert "PartMissing" in (run_state.report().health.checkpoint_problem or "")


def test_before_commit_is_called_except_for_the_checkpoint_of_a_stop(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "root", "file:///root")
    tree, steps_before_commit = CheckpointTree(store), []
    uploader = Uploader(
        tree, RunState(), RunFacts(), KeepPolicy(), job="n/j/u", attempt=1,
        before_commit=lambda: steps_before_commit.append([one.step for one in tree.list_committed()]),
    )  # fmt: skip
    for step, graceful in ((5, False), (8, True), (None, False)):
        folder = tmp_path / f"staged-{step}"
        folder.mkdir()
        (folder / "weights").write_text("x")
        facts = {"outputKind": "adapter", "step": 9} if step is None else {}
        uploader.enqueue(StagedCheckpoint(step, folder, "a1-00000000", graceful, facts))
        assert uploader.wait_until_idle(20)
    uploader.close()
    assert steps_before_commit == [[], [8, 5]]
    assert uploader.output is not None
