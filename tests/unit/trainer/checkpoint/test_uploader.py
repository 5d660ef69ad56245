"""Uploads in the background: at most one upload runs, and at most one checkpoint is queued.

A newer checkpoint replaces the queued one. The checkpoint of a graceful stop is never dropped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from finetune_api.errors import CredentialsError, StorageError
from finetune_api.status import Checkpoint
from finetune_trainer.checkpoint.manifest import Manifest, RunFacts, checkpoint_folder_key
from finetune_trainer.checkpoint.tree import CheckpointTree, FencedOutError
from finetune_trainer.checkpoint.uploader import KeepPolicy, StagedCheckpoint, Uploader, to_status_checkpoints
from finetune_trainer.storage.base import ByteCounter
from finetune_trainer.storage.folder import FolderStore
from finetune_trainer.supervisor.run_state import RunState


class GatedStore(FolderStore):
    """A folder store whose uploads wait until `gate` is set. Each upload calls `refuse(key)`, which may raise an error."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, f"file://{root}")
        self.gate = threading.Event()
        self.upload_began = threading.Event()
        self.gate.set()
        self.refuse: Callable[[str], None] = lambda key: None

    def put_file(self, source: Path, key: str, *, byte_counter: ByteCounter | None = None) -> None:
        self.upload_began.set()
        assert self.gate.wait(20)
        self.refuse(key)
        super().put_file(source, key, byte_counter=byte_counter)

    def delete(self, keys: object) -> None:
        for key in keys:  # type: ignore[attr-defined] # an iterable of keys
            self.refuse(f"delete {key}")
            super().delete([key])


class UploaderBench:
    """An uploader with a GatedStore, and functions that queue checkpoints and wait for uploads."""

    def __init__(self, folder: Path, *, node_rank: int = 0, node_count: int = 1, **policy: object) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.store = GatedStore(folder / "root")
        self.steps_before_commit: list[list[int]] = []
        self.steps_after_commit: list[list[int]] = []
        self.tree, self.run_state = CheckpointTree(self.store), RunState()
        self.uploader = Uploader(
            self.tree, self.run_state, RunFacts(), KeepPolicy(**policy), job_id="n/j/u", attempt=1,  # type: ignore[arg-type] # fields of KeepPolicy
            node_rank=node_rank, node_count=node_count, final_upload_timeout_seconds=60,
            before_commit=lambda: self.steps_before_commit.append(self.list_committed_steps()),
            after_commit=lambda: self.steps_after_commit.append(self.list_committed_steps()),
        )  # fmt: skip

    def enqueue(self, step: int | None, *, graceful: bool = False, **facts: object) -> None:
        staged_folder = self.folder / f"staged-{step}"
        staged_folder.mkdir()
        (staged_folder / "weights").write_text(f"{step}")
        if step is None:
            facts |= {"outputKind": "adapter", "step": 9}
        self.uploader.enqueue(StagedCheckpoint(step, staged_folder, "a1-00000000", graceful, facts))

    def list_committed_steps(self) -> list[int]:
        return [checkpoint.step or 0 for checkpoint in self.tree.list_committed()]

    def list_part_keys(self) -> list[str]:
        return [stat.key for stat in self.store.list("checkpoints/") if "/.parts/" in stat.key]

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
    assert bench.store.upload_began.wait(10)
    for step in (2, 3, 4):
        bench.enqueue(step)
    bench.wait_until_idle()
    assert bench.list_committed_steps() == [4, 1]
    assert bench.run_state.counters["checkpoints_skipped"] == 2
    assert any("skipped" in note for note in bench.run_state.report().resolved.notes or [])
    assert not (bench.folder / "staged-2").exists()


def test_the_checkpoint_of_a_stop_is_never_dropped(bench: UploaderBench) -> None:
    bench.store.gate.clear()
    bench.enqueue(1)
    assert bench.store.upload_began.wait(10)
    bench.enqueue(2)
    bench.enqueue(3, graceful=True)
    bench.enqueue(4)
    bench.wait_until_idle()
    assert bench.list_committed_steps() == [3, 1]
    assert bench.run_state.counters["checkpoints_skipped"] == 2
    assert not (bench.folder / "staged-4").exists()
    assert bench.list_part_keys() == [], "a run with one pod does not report parts"
    assert bench.steps_before_commit == [], "the action before a commit does not delay the commit of a stop"


def test_a_fenced_commit_ends_the_attempt(bench: UploaderBench) -> None:
    """This incarnation must stop training, because a later attempt has begun."""
    bench.tree.begin_attempt(2, b"{}")
    bench.enqueue(1)
    bench.wait_until_idle()
    assert isinstance(bench.uploader.failure, FencedOutError) and bench.uploader.failure.exit_code == 74
    assert bench.list_committed_steps() == [] and "checkpoint_failures" not in bench.run_state.counters
    bench.enqueue(2)
    bench.wait_until_idle()
    assert bench.list_committed_steps() == [], "nothing is uploaded after the first fenced commit"


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


def test_the_final_model_is_uploaded_after_the_last_checkpoint(bench: UploaderBench) -> None:
    bench.store.gate.clear()
    bench.enqueue(8)
    bench.enqueue(None)
    bench.wait_until_idle()
    assert bench.list_committed_steps() == [8]
    assert bench.uploader.output is not None and bench.uploader.output.uri == f"{bench.store.uri}/model/a1-00000000"
    committed_checkpoint = bench.tree.get_committed(None)
    assert committed_checkpoint is not None and committed_checkpoint.marker.manifest_sha256 == bench.uploader.output.sha256
    assert [checkpoint.healthy for checkpoint in to_status_checkpoints(bench.tree, bench.tree.list_committed())] == [True]


def test_a_checkpoint_is_healthy_once_the_next_one_is_committed(bench: UploaderBench) -> None:
    bench.enqueue(1)
    bench.wait_until_idle()
    assert [checkpoint.is_healthy for checkpoint in bench.tree.list_committed()] == [False]
    bench.enqueue(2)
    bench.wait_until_idle()
    assert [(checkpoint.step, checkpoint.is_healthy) for checkpoint in bench.tree.list_committed()] == [(2, False), (1, True)]
    bench.enqueue(3, graceful=True)
    bench.wait_until_idle()
    assert all(checkpoint.is_healthy for checkpoint in bench.tree.list_committed())


def test_old_checkpoints_are_removed_after_a_commit(tmp_path: Path) -> None:
    bench = UploaderBench(tmp_path, keep_count=1, pinned_steps=(2,))
    for step in range(1, 7):
        bench.enqueue(step, evalLoss=0.5 if step == 3 else 1.0)
        bench.wait_until_idle()
    assert bench.list_committed_steps() == [6, 5, 4, 3, 2]
    bench.uploader.apply_retention(is_run_finished=True)
    assert bench.list_committed_steps() == [6, 3, 2]
    assert [checkpoint.step for checkpoint in bench.run_state.checkpoints] == [6, 3, 2]
    bench.uploader.close()


def test_a_missing_permission_to_delete_adds_a_note(tmp_path: Path) -> None:
    bench = UploaderBench(tmp_path, keep_count=1)

    def refuse_deletion(key: str) -> None:
        if key.startswith("delete checkpoints/") and not key.endswith(".json"):
            raise CredentialsError("PermissionDenied", "s3:DeleteObject")

    bench.store.refuse = refuse_deletion
    for step in range(1, 6):
        bench.enqueue(step)
        bench.wait_until_idle()
    assert bench.list_committed_steps() == [5, 4, 3, 2, 1]
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
    assert bench.run_state.counters["checkpoint_failures"] == 1 and bench.list_part_keys() == []
    assert not (bench.folder / "staged-1").exists()
    bench.store.refuse = lambda key: None
    bench.enqueue(2)
    bench.wait_until_idle()
    assert bench.list_committed_steps() == [2]
    assert bench.run_state.report().health.healthy


def test_the_checkpoint_of_a_stop_is_retried(bench: UploaderBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """No later checkpoint follows the checkpoint of a stop. A short outage of the store must not lose this checkpoint."""
    monkeypatch.setattr("finetune_trainer.checkpoint.uploader.RETRY_PAUSE_SECONDS", 0.001)
    tried_keys: list[str] = []

    def refuse_four_times(key: str) -> None:
        tried_keys.append(key)
        if len(tried_keys) < 5:
            raise StorageError("EndpointUnreachable", "gone")

    bench.store.refuse = refuse_four_times
    bench.enqueue(1, graceful=True)
    bench.wait_until_idle()
    assert len(tried_keys) == 5 and bench.list_committed_steps() == [1]


def test_closing_the_uploader_ends_the_retries_of_the_checkpoint_of_a_stop(tmp_path: Path) -> None:
    bench = UploaderBench(tmp_path)

    def refuse(key: str) -> None:
        raise StorageError("EndpointUnreachable", "gone")

    bench.store.refuse = refuse
    bench.enqueue(1, graceful=True)
    assert bench.store.upload_began.wait(10)
    assert not bench.uploader.wait_until_idle(0)
    bench.uploader.close()
    assert bench.uploader.wait_until_idle(20) and bench.list_committed_steps() == []


def test_skipped_checkpoints_are_replaced_or_removed_and_do_not_count_as_progress(tmp_path: Path) -> None:
    """An earlier attempt committed checkpoints of steps 10 to 30. This attempt resumes from step 10 and repeats the later steps."""
    staged_folder = tmp_path / "staged"
    staged_folder.mkdir()
    (staged_folder / "weights").write_text("old")
    bench = UploaderBench(tmp_path / "bench", keep_count=1, pinned_steps=(25,))
    for step in (10, 20, 25, 27, 30):
        files = bench.tree.upload(checkpoint_folder_key(step), "a0-00000000", staged_folder)
        bench.tree.commit(checkpoint_folder_key(step), Manifest(step=step, incarnation="a0-00000000", files=files))
    old_checkpoints = bench.tree.list_committed()
    bench.uploader.adopt_committed(to_status_checkpoints(bench.tree, [checkpoint for checkpoint in old_checkpoints if checkpoint.step == 10]))
    bench.uploader.add_skipped([checkpoint for checkpoint in old_checkpoints if checkpoint.step != 10])
    assert bench.uploader.committed_step == 10
    assert [checkpoint.step for checkpoint in bench.run_state.checkpoints] == [10]
    bench.folder.mkdir(exist_ok=True)
    bench.enqueue(20)
    bench.wait_until_idle()
    path_and_health_by_step = {checkpoint.step: (checkpoint.marker.path, checkpoint.is_healthy) for checkpoint in bench.tree.list_committed()}
    assert path_and_health_by_step[20] == ("a1-00000000", False) and path_and_health_by_step[10][1] is True
    assert path_and_health_by_step[30] == ("a0-00000000", False), "finite losses of this attempt do not make a skipped checkpoint healthy"
    bench.enqueue(30)
    bench.wait_until_idle()
    assert {checkpoint.step: checkpoint.marker.path for checkpoint in bench.tree.list_committed()} == {
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
    (committed_checkpoint,) = bench.tree.list_committed()
    assert bench.tree.read_manifest(committed_checkpoint) is not None and bench.uploader.failure is None
    assert bench.store.get(f"{committed_checkpoint.folder}/weights") == b"5"


def test_the_evaluation_is_part_of_output_and_manifest(bench: UploaderBench) -> None:
    evaluation = {"testRows": 3, "testLoss": 1.25}
    bench.enqueue(None, extra={"evaluation": evaluation, "notes": []})
    bench.wait_until_idle()
    assert bench.uploader.output is not None and bench.uploader.output.evaluation == evaluation
    committed_checkpoint = bench.tree.get_committed(None)
    manifest = bench.tree.read_manifest(committed_checkpoint) if committed_checkpoint else None
    assert manifest is not None and manifest.extra["evaluation"] == evaluation


def test_the_final_model_is_retried_while_the_store_is_unavailable(
    bench: UploaderBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_trainer.checkpoint.uploader.RETRY_PAUSE_SECONDS", 0.01)
    tried_keys: list[str] = []

    def refuse_three_times(key: str) -> None:
        tried_keys.append(key)
        if len(tried_keys) < 4:
            raise StorageError("StorageFailed", "gone")

    bench.store.refuse = refuse_three_times
    bench.enqueue(None)
    bench.wait_until_idle()
    assert bench.uploader.failure is None and bench.uploader.output is not None


def test_the_files_of_two_pods_form_one_checkpoint(tmp_path: Path) -> None:
    store = GatedStore(tmp_path / "root")
    uploaders = [
        Uploader(CheckpointTree(store), RunState(), RunFacts(), KeepPolicy(), job_id="n/j/u", attempt=1, node_rank=node, node_count=2)
        for node in (0, 1)
    ]
    for node, uploader in enumerate(uploaders):
        folder = tmp_path / f"node-{node}"
        folder.mkdir()
        (folder / f"rng_state_{node}.pth").write_text(str(node))
        uploader.enqueue(StagedCheckpoint(5, folder, "a1-00000000"))
    for uploader in uploaders:
        assert uploader.wait_until_idle(20)
        uploader.close()
    (committed_checkpoint,) = CheckpointTree(store).list_committed()
    manifest = CheckpointTree(store).read_manifest(committed_checkpoint)
    assert manifest is not None
    assert [entry.path for entry in manifest.files] == ["rng_state_0.pth", "rng_state_1.pth"]
    assert not list(store.list(f"{checkpoint_folder_key(5)}/a1-00000000/.parts"))


def test_no_checkpoint_is_committed_if_pods_wrote_one_file_differently(tmp_path: Path) -> None:
    store, run_states = GatedStore(tmp_path / "root"), [RunState(), RunState()]
    uploaders = [
        Uploader(CheckpointTree(store), run_states[node], RunFacts(), KeepPolicy(), job_id="n/j/u", attempt=1, node_rank=node, node_count=2)
        for node in (0, 1)
    ]
    for node, uploader in enumerate(uploaders):
        folder = tmp_path / f"node-{node}"
        folder.mkdir()
        (folder / "state.json").write_text(str(node))
        uploader.enqueue(StagedCheckpoint(5, folder, "a1-00000000"))
    for uploader in uploaders:
        assert uploader.wait_until_idle(20)
        uploader.close()
    assert CheckpointTree(store).list_committed() == []
    assert "PartsDiffer" in (run_states[0].report().health.checkpoint_problem or "")


def test_part_files_that_cannot_be_removed_do_not_undo_a_commit(tmp_path: Path) -> None:
    store, run_state = GatedStore(tmp_path / "root"), RunState()

    def refuse_deletion(key: str) -> None:
        if key.startswith("delete "):
            raise CredentialsError("PermissionDenied", "s3:DeleteObject")

    store.refuse = refuse_deletion
    CheckpointTree(store).report_part(checkpoint_folder_key(5), "a1-00000000", 1, [])
    uploader = Uploader(CheckpointTree(store), run_state, RunFacts(), KeepPolicy(), job_id="n/j/u", attempt=1, node_rank=0, node_count=2)
    folder = tmp_path / "node-0"
    folder.mkdir()
    (folder / "x").write_text("x")
    uploader.enqueue(StagedCheckpoint(5, folder, "a1-00000000", True))
    assert uploader.wait_until_idle(20)
    uploader.close()
    assert (uploader.committed_step, run_state.report().health.healthy) == (5, True)


def test_a_part_that_cannot_be_stored_is_reported_at_once(tmp_path: Path) -> None:
    """If the pod did not report that its part is missing, rank 0's pod would wait half an hour for this part, and would commit nothing meanwhile."""
    store, run_state = GatedStore(tmp_path / "root"), RunState()
    uploaders = [
        Uploader(CheckpointTree(store), run_state, RunFacts(), KeepPolicy(), job_id="n/j/u", attempt=1, node_rank=node, node_count=2)
        for node in (0, 1)
    ]

    def refuse_second_part(key: str) -> None:
        if key.endswith("rng-1"):
            raise StorageError("StorageFailed", "gone")

    store.refuse = refuse_second_part
    for node, uploader in enumerate(uploaders):
        folder = tmp_path / f"node-{node}"
        folder.mkdir()
        (folder / f"rng-{node}").write_text(str(node))
        uploader.enqueue(StagedCheckpoint(5, folder, "a1-00000000"))
    for uploader in uploaders:
        assert uploader.wait_until_idle(20)
        uploader.close()
    assert CheckpointTree(store).list_committed() == [] and uploaders[1].uploaded_step == 0


def test_a_slow_store_does_not_block_enqueue(tmp_path: Path) -> None:
    """The thread that handles the ranks' messages must not wait for the store.

    A separate thread therefore reports that the pod skips its part of a checkpoint.
    """
    store = GatedStore(tmp_path / "root")
    report_started = threading.Event()
    original_put = store.put

    def put_slowly(key: str, data: bytes) -> None:
        report_started.set()
        assert store.gate.wait(20)
        original_put(key, data)

    store.put = put_slowly  # type: ignore[method-assign] # the fault to test
    uploader = Uploader(CheckpointTree(store), RunState(), RunFacts(), KeepPolicy(), job_id="n/j/u", attempt=1, node_rank=1, node_count=2)
    store.gate.clear()
    for step in (1, 2, 3):
        folder = tmp_path / f"staged-{step}"
        folder.mkdir()
        (folder / "x").write_text("x")
        uploader.enqueue(StagedCheckpoint(step, folder, "a1-00000000"))
        if step == 1:
            assert store.upload_began.wait(10)
    assert report_started.wait(10), "the report must be sent although the store is slow"
    store.gate.set()
    assert uploader.wait_until_idle(20)
    uploader.close()


def test_no_checkpoint_is_committed_if_a_pod_skips_its_part(tmp_path: Path) -> None:
    store = GatedStore(tmp_path / "root")
    CheckpointTree(store).report_part(checkpoint_folder_key(5), "a1-00000000", 1, None)
    run_state = RunState()
    uploader = Uploader(CheckpointTree(store), run_state, RunFacts(), KeepPolicy(), job_id="n/j/u", attempt=1, node_rank=0, node_count=2)
    folder = tmp_path / "node-0"
    folder.mkdir()
    (folder / "x").write_text("x")
    uploader.enqueue(StagedCheckpoint(5, folder, "a1-00000000"))
    assert uploader.wait_until_idle(20)
    uploader.close()
    assert CheckpointTree(store).list_committed() == []
    assert "PartMissing" in (run_state.report().health.checkpoint_problem or "")


def test_before_commit_is_called_except_for_the_checkpoint_of_a_stop(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "root", "file:///root")
    tree, steps_before_commit = CheckpointTree(store), []
    uploader = Uploader(
        tree, RunState(), RunFacts(), KeepPolicy(), job_id="n/j/u", attempt=1,
        before_commit=lambda: steps_before_commit.append([checkpoint.step for checkpoint in tree.list_committed()]),
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


def test_manifest_and_status_hold_the_facts_of_a_checkpoint(bench: UploaderBench, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(monkeypatch)

    def advance_clock(key: str) -> None:
        clock.now += 1.23456
        bench.store.retries += 3

    bench.store.refuse = advance_clock
    bench.enqueue(12, epoch=0.5, samples=96, tokens=4096, evalLoss=1.5, extra={"notes": ["x"]})
    bench.wait_until_idle()
    (committed_checkpoint,) = bench.tree.list_committed()
    manifest = bench.tree.read_manifest(committed_checkpoint)
    assert manifest is not None and manifest.model_dump(exclude={"files", "facts", "version"}) == {
        "job": "n/j/u", "attempt": 1, "incarnation": "a1-00000000", "step": 12, "epoch": 0.5, "samples": 96, "tokens": 4096,
        "eval_loss": 1.5, "graceful": False, "kind": None, "extra": {"notes": ["x"]},
    }  # fmt: skip
    (shown_checkpoint,) = bench.run_state.checkpoints
    assert shown_checkpoint.time is not None and shown_checkpoint.model_dump(exclude={"time"}) == {
        "step": 12, "uri": f"{bench.store.uri}/{committed_checkpoint.folder}", "sha256": committed_checkpoint.marker.manifest_sha256, "bytes": 2,
        "healthy": False, "eval_loss": 1.5, "save_seconds": 1.235,
    }  # fmt: skip
    assert bench.run_state.last_save_seconds == 1.235
    assert bench.run_state.counters == {"uploaded_bytes": 2, "checkpoints": 1, "storage_retries": 3}
    assert (bench.steps_before_commit, bench.steps_after_commit) == ([[]], [[12]])
    assert not (bench.folder / "staged-12").exists()
    bench.enqueue(13, graceful=True)
    bench.wait_until_idle()
    committed_checkpoint, older_checkpoint = bench.tree.list_committed()
    manifest = bench.tree.read_manifest(committed_checkpoint)
    assert manifest is not None and manifest.graceful
    assert [(checkpoint.step, checkpoint.healthy) for checkpoint in bench.run_state.checkpoints] == [(13, True), (12, True)]
    assert bench.run_state.counters["storage_retries"] == 6
    bench.store.delete([f"{older_checkpoint.folder}/manifest.json"])
    status_checkpoints = to_status_checkpoints(bench.tree, [committed_checkpoint, older_checkpoint])
    assert [(checkpoint.step, checkpoint.bytes, checkpoint.eval_loss) for checkpoint in status_checkpoints] == [(13, 2, None), (12, None, None)]


@pytest.mark.parametrize(
    ("due_seconds", "timeout_seconds", "stall_timeout_seconds", "limit_seconds"),
    [
        ([0], 60, None, 60), ([0], 0.5, None, 0.5), ([0], 60, 30, 60), ([0], 60, 90, 90), ([0, 20], 60, None, 60), ([0, 30], 60, None, 90),
        ([0, 30], 95, 92, 95), ([0, 10, 40], 60, None, 90), ([0, 30, 40], 55, None, 55),
    ],
    ids=str,
)  # fmt: skip
def test_unsaved_checkpoints_are_an_error_after_the_longest_limit(
    due_seconds: list[float], timeout_seconds: float, stall_timeout_seconds: float | None, limit_seconds: float, bench: UploaderBench,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    clock = FakeClock(monkeypatch)
    assert bench.uploader.unsaved_error(0, None) is None, "no checkpoint is due"
    for seconds in due_seconds:
        clock.now = 1000 + seconds
        bench.uploader.record_unsaved()
    clock.now = 1000 + limit_seconds
    assert bench.uploader.unsaved_error(timeout_seconds, stall_timeout_seconds) is None
    clock.now += 0.25
    error = bench.uploader.unsaved_error(timeout_seconds, stall_timeout_seconds)
    assert error is not None and (
        error.message
        == f"no checkpoint was committed for {limit_seconds + 0.25:.0f} s although some were due: the upload has not ended"
    )


def test_a_queued_checkpoint_counts_as_unsaved_from_the_time_it_was_queued(bench: UploaderBench, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(monkeypatch)
    second_upload_began, may_finish = threading.Event(), threading.Event()

    def block_second_upload(key: str) -> None:
        if "step-00000002" in key:
            second_upload_began.set()
            assert may_finish.wait(20)

    bench.store.refuse = block_second_upload
    bench.store.gate.clear()
    bench.enqueue(1)
    assert bench.store.upload_began.wait(10) and not bench.uploader.wait_until_idle(0)
    clock.now += 10
    bench.enqueue(2)
    bench.store.gate.set()
    assert second_upload_began.wait(10)
    clock.now += 60
    assert bench.uploader.unsaved_error(60, None) is None, "step 1 is committed, and step 2 is queued for 60 s"
    clock.now += 0.5
    assert bench.uploader.unsaved_error(60, None) is not None
    may_finish.set()
    bench.enqueue(None)
    bench.wait_until_idle()
    clock.now += 1000
    assert bench.uploader.unsaved_error(60, None) is None, "the final model is no checkpoint"


@pytest.mark.parametrize(
    ("step", "graceful", "error", "try_seconds", "expected_try_count", "expected_problem"),
    [
        (None, False, StorageError("StorageFailed", "gone"), 30, 2, None),
        (None, False, StorageError("StorageFailed", "gone"), 45, 2, None),
        (None, True, CredentialsError("AccessDenied", "no"), 30, 1, None),
        (3, False, StorageError("StorageFailed", "gone"), 30, 1, "StorageFailed: step 3 was not stored: gone"),
        (3, True, CredentialsError("AccessDenied", "no"), 30, 1, "AccessDenied: step 3 was not stored: no"),
        (3, False, ValueError("bad"), 30, 1, "UploadFailed: step 3 was not stored: ValueError: bad"),
    ],
    ids=["until the limit", "beyond the limit", "final model, refused", "checkpoint", "checkpoint of a stop, refused", "other error"],
)
def test_only_the_last_upload_of_a_run_is_retried(
    step: int | None, graceful: bool, error: Exception, try_seconds: float, expected_try_count: int, expected_problem: str | None, bench: UploaderBench,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Each try of an upload takes `try_seconds` seconds. The upload of the final model is retried for 60 seconds."""
    clock = FakeClock(monkeypatch)
    monkeypatch.setattr("finetune_trainer.checkpoint.uploader.RETRY_PAUSE_SECONDS", 0.001)
    tried_keys: list[str] = []

    def refuse(key: str) -> None:
        clock.now += try_seconds
        tried_keys.append(key)
        raise error

    bench.store.refuse = refuse
    bench.enqueue(step, graceful=graceful)
    bench.wait_until_idle()
    assert len(tried_keys) == expected_try_count and bench.run_state.counters["checkpoint_failures"] == 1
    assert bench.run_state.checkpoint_problem == expected_problem
    assert bench.uploader.failure is (error if step is None else None)
    assert bench.uploader.output is None


def test_a_step_before_the_last_committed_step_is_not_uploaded(bench: UploaderBench) -> None:
    assert bench.uploader.committed_step == 0
    for step in (5, 4):
        bench.enqueue(step)
        bench.wait_until_idle()
    assert bench.list_committed_steps() == [5] and bench.uploader.committed_step == 5
    assert not (bench.folder / "staged-4").exists()


def test_three_checkpoints_are_kept_by_default(tmp_path: Path) -> None:
    bench = UploaderBench(tmp_path)
    for step in range(1, 6):
        bench.enqueue(step)
        bench.wait_until_idle()
    assert bench.list_committed_steps() == [5, 4, 3] and bench.uploader.output is None
    bench.uploader.close()


@pytest.mark.parametrize("wait_seconds", [30, 30.5], ids=["within the limit", "after the limit"])
def test_after_the_limit_for_parts_a_commit_does_not_wait(wait_seconds: float, bench: UploaderBench, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(monkeypatch)
    bench.uploader.limit_part_wait(30)
    clock.now += wait_seconds
    bench.enqueue(1)
    bench.wait_until_idle()
    assert bench.list_committed_steps() == [1] and bench.steps_before_commit == ([[]] if wait_seconds == 30 else [])


@pytest.mark.parametrize("graceful", [False, True], ids=["checkpoint", "checkpoint of a stop"])
def test_a_commit_does_not_wait_if_the_checkpoint_of_a_stop_is_queued(graceful: bool, bench: UploaderBench) -> None:
    bench.store.gate.clear()
    bench.enqueue(1)
    assert bench.store.upload_began.wait(10)
    bench.enqueue(2, graceful=graceful)
    bench.wait_until_idle()
    assert bench.steps_before_commit == ([] if graceful else [[], [1]])


def test_a_silent_pod_delays_neither_the_checkpoint_of_a_stop_nor_the_final_model(tmp_path: Path) -> None:
    bench = UploaderBench(tmp_path, node_count=2)
    bench.tree.report_part(checkpoint_folder_key(6), "a1-00000000", 1, [])
    bench.enqueue(5)
    assert bench.store.upload_began.wait(10)
    bench.enqueue(6, graceful=True)
    bench.wait_until_idle()
    assert bench.list_committed_steps() == [6]
    bench.enqueue(7)
    bench.uploader.limit_part_wait(-1)
    bench.wait_until_idle()
    assert bench.run_state.checkpoint_problem == (
        "PartMissing: step 7 was not stored: pod 1 did not write its part of checkpoints/step-00000007 within 1800 s"
    )
    bench.enqueue(None)
    bench.wait_until_idle()
    assert bench.uploader.output is not None and bench.uploader.output.kind == "adapter"
    bench.uploader.close()


def test_another_pod_uploads_its_files_and_commits_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(monkeypatch)
    bench = UploaderBench(tmp_path, node_rank=1, node_count=2)

    def refuse_put(key: str, data: bytes) -> None:
        raise StorageError("StorageFailed", "gone")

    original_put, bench.store.put = bench.store.put, refuse_put  # type: ignore[method-assign] # the fault to test
    bench.enqueue(4)
    bench.wait_until_idle()
    assert bench.uploader.uploaded_step == 0, "the part could not be reported"
    bench.store.put = original_put  # type: ignore[method-assign]
    bench.enqueue(5)
    bench.wait_until_idle()
    clock.now += 1000
    assert bench.uploader.uploaded_step == 5 and bench.uploader.unsaved_error(60, None) is None
    assert bench.list_part_keys() == [f"{checkpoint_folder_key(5)}/a1-00000000/.parts/node-1.json"]
    assert (bench.list_committed_steps(), bench.uploader.committed_step, bench.run_state.checkpoints) == ([], 0, [])
    bench.uploader.close()


@pytest.mark.parametrize(("rank0_report", "expected_step"), [({"step": 9}, 9), ({}, 7)], ids=["step of the report", "newest step"])
def test_the_manifest_of_the_final_model_holds_the_last_step(rank0_report: dict[str, int], expected_step: int, bench: UploaderBench) -> None:
    bench.run_state.record_step(7)
    folder = bench.folder / "final"
    folder.mkdir()
    for name in ("b", "a"):
        (folder / name).write_text(name)
    bench.uploader.enqueue(StagedCheckpoint(None, folder, "a1-00000000", rank0_report=rank0_report))
    bench.wait_until_idle()
    committed_checkpoint = bench.tree.get_committed(None)
    manifest = bench.tree.read_manifest(committed_checkpoint) if committed_checkpoint else None
    assert manifest is not None and (manifest.step, [entry.path for entry in manifest.files]) == (expected_step, ["a", "b"])
    assert bench.steps_after_commit == [] and not folder.exists()


def test_a_checkpoint_of_the_restored_step_is_not_healthy_yet(tmp_path: Path) -> None:
    """A run that resumes at step 10 may save step 10 again. Whether the losses after step 10 are finite is not known yet."""
    bench = UploaderBench(tmp_path, keep_count=0)
    marked_steps: list[int] = []
    original_mark = bench.tree.mark_healthy

    def record_mark(step: int) -> None:
        marked_steps.append(step)
        original_mark(step)

    bench.tree.mark_healthy = record_mark  # type: ignore[method-assign]
    bench.uploader.adopt_committed([
        Checkpoint(step=5, uri="5", healthy=True), Checkpoint(step=8, uri="8", healthy=False), Checkpoint(step=10, uri="10", healthy=False),
    ])  # fmt: skip
    for step, expected_steps in ((10, [8]), (11, [8, 10]), (12, [8, 10, 11])):
        bench.enqueue(step)
        bench.wait_until_idle()
        assert marked_steps == expected_steps
    assert [(checkpoint.step, checkpoint.healthy) for checkpoint in bench.run_state.checkpoints] == [(12, False), (11, True), (10, True), (8, True), (5, True)]
    bench.uploader.close()


def test_closing_ends_the_thread_after_the_queued_upload(tmp_path: Path) -> None:
    threads_before = set(threading.enumerate())
    bench = UploaderBench(tmp_path)
    (thread,) = set(threading.enumerate()) - threads_before
    assert thread.daemon, "a store that does not answer must not keep the process alive"
    bench.enqueue(1)
    bench.wait_until_idle()
    assert thread.is_alive()
    bench.store.gate.clear()
    bench.store.upload_began.clear()
    bench.enqueue(2)
    assert bench.store.upload_began.wait(10)
    bench.enqueue(3)
    bench.uploader.close()
    bench.store.gate.set()
    thread.join(10)
    assert not thread.is_alive() and bench.list_committed_steps() == [3, 2, 1]
