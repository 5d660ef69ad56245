"""Background uploads: one in flight, one waits, a newer one takes its place, a stop's is never dropped."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from finetune_api.errors import CredentialsError, StorageError
from finetune_trainer.checkpoint.manifest import RunFacts, base_of
from finetune_trainer.checkpoint.tree import Tree
from finetune_trainer.checkpoint.uploader import Policy, Staged, Uploader, committed_checkpoints
from finetune_trainer.storage.folder import FolderStore
from finetune_trainer.supervisor.board import Board


class Gated(FolderStore):
    """A folder whose writes of checkpoints wait for a gate."""

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


class Bench:
    """An uploader over a gated store."""

    def __init__(self, folder: Path, **policy: object) -> None:
        self.folder = folder
        self.store = Gated(folder / "root")
        self.tree, self.board = Tree(self.store), Board()
        self.uploader = Uploader(
            self.tree, self.board, RunFacts(), Policy(**policy), job="n/j/u", attempt=1  # type: ignore[arg-type] # a table's
        )  # fmt: skip

    def offer(self, step: int | None, *, graceful: bool = False, **facts: object) -> None:
        staged = self.folder / f"staged-{step}"
        staged.mkdir()
        (staged / "weights").write_text(f"{step}")
        if step is None:
            facts |= {"outputKind": "adapter", "step": 9}
        self.uploader.offer(Staged(step, staged, "a1-00000000", graceful, facts))

    def steps(self) -> list[int]:
        return [one.step or 0 for one in self.tree.committed()]

    def settle(self) -> None:
        self.store.gate.set()
        assert self.uploader.drain(20)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, keep=0)
    yield made
    made.settle()
    made.uploader.close()


def test_a_newer_one_replaces_the_one_that_waits(bench: Bench) -> None:
    bench.store.gate.clear()
    bench.offer(1)
    assert bench.store.entered.wait(10)
    for step in (2, 3, 4):
        bench.offer(step)
    bench.settle()
    assert bench.steps() == [4, 1]
    assert bench.board.counters["checkpoints_skipped"] == 2
    assert any("skipped" in note for note in bench.board.report().resolved.notes or [])
    assert not (bench.folder / "staged-2").exists()


def test_the_stop_checkpoint_is_never_dropped(bench: Bench) -> None:
    bench.store.gate.clear()
    bench.offer(1)
    assert bench.store.entered.wait(10)
    bench.offer(2)
    bench.offer(3, graceful=True)
    bench.offer(4)
    bench.settle()
    assert bench.steps() == [3, 1]
    assert bench.uploader.graceful_step == 3


def test_the_final_model_waits_for_the_last_checkpoint(bench: Bench) -> None:
    bench.store.gate.clear()
    bench.offer(8)
    bench.offer(None)
    bench.settle()
    assert bench.steps() == [8]
    assert bench.uploader.output is not None and bench.uploader.output.uri == f"{bench.store.uri}/model/a1-00000000"
    found = bench.tree.marker(None)
    assert found is not None and found.marker.manifest_sha256 == bench.uploader.output.sha256
    assert [one.healthy for one in committed_checkpoints(bench.tree)] == [True]


def test_healthy_only_once_the_next_window_was_finite(bench: Bench) -> None:
    bench.offer(1)
    bench.settle()
    assert [one.healthy for one in bench.tree.committed()] == [False]
    bench.offer(2)
    bench.settle()
    assert [(one.step, one.healthy) for one in bench.tree.committed()] == [(2, False), (1, True)]
    bench.offer(3, graceful=True)
    bench.settle()
    assert all(one.healthy for one in bench.tree.committed())


def test_old_ones_go_after_the_commit(tmp_path: Path) -> None:
    bench = Bench(tmp_path, keep=1, pinned=(2,))
    for step in range(1, 7):
        bench.offer(step, evalLoss=0.5 if step == 3 else 1.0)
        bench.settle()
    assert bench.steps() == [6, 5, 4, 3, 2]
    bench.uploader.retain(finished=True)
    assert bench.steps() == [6, 3, 2]
    assert [one.step for one in bench.board.checkpoints] == [6, 3, 2]
    bench.uploader.close()


def test_no_right_to_delete_is_a_warning(tmp_path: Path) -> None:
    bench = Bench(tmp_path, keep=1)

    def refuse(key: str) -> None:
        if key.startswith("delete checkpoints/") and not key.endswith(".json"):
            raise CredentialsError("PermissionDenied", "s3:DeleteObject")

    bench.store.refuse = refuse
    for step in range(1, 6):
        bench.offer(step)
        bench.settle()
    assert bench.steps() == [5, 4, 3, 2, 1]
    assert bench.uploader.failure is None
    assert any("PermissionDenied" in note for note in bench.board.report().resolved.notes or [])
    bench.uploader.close()


def test_a_checkpoint_that_cannot_be_stored_is_a_condition_and_training_goes_on(bench: Bench) -> None:
    def refuse(key: str) -> None:
        raise StorageError("StorageFailed", "gone")

    bench.store.refuse = refuse
    bench.offer(1)
    bench.settle()
    health = bench.board.report().health
    assert (health.healthy, health.checkpoint_problem) == (False, "StorageFailed: step 1 was not stored: gone")
    assert bench.uploader.failure is None
    bench.store.refuse = lambda key: None
    bench.offer(2)
    bench.settle()
    assert bench.steps() == [2]
    assert bench.board.report().health.healthy


def test_measures_of_the_test_set_reach_the_output_and_the_manifest(bench: Bench) -> None:
    measured = {"testRows": 3, "testLoss": 1.25}
    bench.offer(None, extra={"evaluation": measured, "notes": []})
    bench.settle()
    assert bench.uploader.output is not None and bench.uploader.output.evaluation == measured
    committed = bench.tree.marker(None)
    manifest = bench.tree.manifest(committed) if committed else None
    assert manifest is not None and manifest.extra["evaluation"] == measured


def test_a_final_model_that_cannot_be_stored_is_the_end(bench: Bench) -> None:
    def refuse(key: str) -> None:
        raise StorageError("StorageFailed", "gone")

    bench.store.refuse = refuse
    bench.offer(None)
    bench.settle()
    assert bench.uploader.failure is not None and bench.uploader.failure.exit_code == 69


def test_two_pods_make_one_checkpoint(tmp_path: Path) -> None:
    store = Gated(tmp_path / "root")
    pods = [
        Uploader(Tree(store), Board(), RunFacts(), Policy(), job="n/j/u", attempt=1, node=node, nodes=2)
        for node in (0, 1)
    ]
    for node, uploader in enumerate(pods):
        folder = tmp_path / f"node-{node}"
        folder.mkdir()
        (folder / f"rng_state_{node}.pth").write_text(str(node))
        uploader.offer(Staged(5, folder, "a1-00000000"))
    for uploader in pods:
        assert uploader.drain(20)
        uploader.close()
    (found,) = Tree(store).committed()
    manifest = Tree(store).manifest(found)
    assert manifest is not None
    assert [one.path for one in manifest.files] == ["rng_state_0.pth", "rng_state_1.pth"]
    assert not list(store.list(f"{base_of(5)}/a1-00000000/.parts"))


def test_a_part_that_was_skipped_is_told_at_once(tmp_path: Path) -> None:
    store = Gated(tmp_path / "root")
    Tree(store).report_part(base_of(5), "a1-00000000", 1, None)
    board = Board()
    first = Uploader(Tree(store), board, RunFacts(), Policy(), job="n/j/u", attempt=1, node=0, nodes=2)
    folder = tmp_path / "node-0"
    folder.mkdir()
    (folder / "x").write_text("x")
    first.offer(Staged(5, folder, "a1-00000000"))
    assert first.drain(20)
    first.close()
    assert Tree(store).committed() == []
    assert "PartMissing" in (board.report().health.checkpoint_problem or "")
