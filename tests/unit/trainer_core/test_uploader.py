"""Background uploads: one in flight, one waits, a newer one takes its place, a stop's is never dropped."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from finetune_api.errors import CredentialsError, StorageError
from finetune_trainer.checkpoint.manifest import Manifest, RunFacts, base_of
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

    def __init__(self, folder: Path, *, patience: float = 60, **policy: object) -> None:
        self.folder = folder
        self.store = Gated(folder / "root")
        self.tree, self.board = Tree(self.store), Board()
        self.uploader = Uploader(
            self.tree, self.board, RunFacts(), Policy(**policy), job="n/j/u", attempt=1,  # type: ignore[arg-type] # a table's
            final_upload_timeout=patience,
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
    assert [one.healthy for one in committed_checkpoints(bench.tree, bench.tree.committed())] == [True]


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


def test_a_stops_checkpoint_is_tried_until_there_is_no_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no successor: a store that is away for a moment must not cost it."""
    monkeypatch.setattr("finetune_trainer.checkpoint.uploader.AGAIN_SECONDS", 0.001)
    tries: list[str] = []

    def refuse(key: str) -> None:
        tries.append(key)
        if len(tries) < 5:
            raise StorageError("EndpointUnreachable", "gone")

    bench.store.refuse = refuse
    bench.offer(1, graceful=True)
    bench.settle()
    assert len(tries) == 5 and bench.uploader.graceful_step == 1 and bench.steps() == [1]


def test_a_stops_checkpoint_is_given_up_when_time_is(tmp_path: Path) -> None:
    bench = Bench(tmp_path)

    def refuse(key: str) -> None:
        raise StorageError("EndpointUnreachable", "gone")

    bench.store.refuse = refuse
    bench.offer(1, graceful=True)
    assert bench.store.entered.wait(10)
    assert not bench.uploader.drain(0)
    bench.uploader.close()
    assert bench.uploader.drain(20) and bench.uploader.graceful_step is None and bench.steps() == []


def test_what_was_passed_over_is_no_progress_gives_way_and_goes(tmp_path: Path) -> None:
    """Steps 10 to 30 are another attempt's, 20 and 30 damaged: this one goes on from 10 and does them again."""
    folder = tmp_path / "staged"
    folder.mkdir()
    (folder / "weights").write_text("old")
    bench = Bench(tmp_path / "bench", keep=1, pinned=(25,))
    for step in (10, 20, 25, 27, 30):
        files = bench.tree.upload(base_of(step), "a0-00000000", folder)
        bench.tree.commit(base_of(step), Manifest(step=step, incarnation="a0-00000000", files=files))
    own = bench.tree.committed()
    bench.uploader.adopt(committed_checkpoints(bench.tree, [one for one in own if one.step == 10]))
    bench.uploader.pass_over([one for one in own if one.step != 10])
    assert bench.uploader.committed_step == 10
    assert [one.step for one in bench.board.checkpoints] == [10]
    bench.folder.mkdir(exist_ok=True)
    bench.offer(20)
    bench.settle()
    found = {one.step: (one.marker.path, one.healthy) for one in bench.tree.committed()}
    assert found[20] == ("a1-00000000", False) and found[10][1] is True
    assert found[30] == ("a0-00000000", False), "what is behind a rollback is not proved by what this attempt does"
    bench.offer(30)
    bench.settle()
    assert {one.step: one.marker.path for one in bench.tree.committed()} == {
        10: "a0-00000000", 20: "a1-00000000", 25: "a0-00000000", 30: "a1-00000000"
    }  # fmt: skip
    assert bench.uploader.failure is None
    bench.uploader.close()


def test_what_a_marker_of_this_life_names_is_never_written_again(bench: Bench) -> None:
    bench.offer(5)
    bench.settle()
    (bench.folder / "staged-5").mkdir()
    (bench.folder / "staged-5" / "weights").write_text("other bytes")
    bench.uploader.offer(Staged(5, bench.folder / "staged-5", "a1-00000000", True, {}))
    bench.settle()
    (found,) = bench.tree.committed()
    assert bench.tree.manifest(found) is not None and bench.uploader.failure is None
    assert bench.store.get(f"{found.folder}/weights") == b"5"


def test_measures_of_the_test_set_reach_the_output_and_the_manifest(bench: Bench) -> None:
    measured = {"testRows": 3, "testLoss": 1.25}
    bench.offer(None, extra={"evaluation": measured, "notes": []})
    bench.settle()
    assert bench.uploader.output is not None and bench.uploader.output.evaluation == measured
    committed = bench.tree.marker(None)
    manifest = bench.tree.manifest(committed) if committed else None
    assert manifest is not None and manifest.extra["evaluation"] == measured


def test_a_final_model_that_cannot_be_stored_is_the_end(tmp_path: Path) -> None:
    bench = Bench(tmp_path, patience=0)

    def refuse(key: str) -> None:
        raise StorageError("StorageFailed", "gone")

    bench.store.refuse = refuse
    bench.offer(None)
    bench.settle()
    bench.uploader.close()
    assert bench.uploader.failure is not None and bench.uploader.failure.exit_code == 69


def test_a_store_that_is_down_for_a_while_gets_the_final_model_all_the_same(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_trainer.checkpoint.uploader.AGAIN_SECONDS", 0.01)
    tries: list[str] = []

    def refuse(key: str) -> None:
        tries.append(key)
        if len(tries) < 4:
            raise StorageError("StorageFailed", "gone")

    bench.store.refuse = refuse
    bench.offer(None)
    bench.settle()
    assert bench.uploader.failure is None and bench.uploader.output is not None


def test_a_final_model_that_may_not_be_stored_is_not_tried_again(bench: Bench) -> None:
    tries: list[str] = []

    def refuse(key: str) -> None:
        tries.append(key)
        raise CredentialsError("AccessDenied", "no s3:PutObject")

    bench.store.refuse = refuse
    bench.offer(None)
    bench.settle()
    assert len(tries) == 1 and bench.uploader.failure is not None and bench.uploader.failure.exit_code == 77


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


def test_two_pods_that_wrote_one_file_differently_make_no_checkpoint(tmp_path: Path) -> None:
    """Which of the two lies in storage is a matter of luck."""
    store, boards = Gated(tmp_path / "root"), [Board(), Board()]
    pods = [
        Uploader(Tree(store), boards[node], RunFacts(), Policy(), job="n/j/u", attempt=1, node=node, nodes=2)
        for node in (0, 1)
    ]
    for node, uploader in enumerate(pods):
        folder = tmp_path / f"node-{node}"
        folder.mkdir()
        (folder / "state.json").write_text(str(node))
        uploader.offer(Staged(5, folder, "a1-00000000"))
    for uploader in pods:
        assert uploader.drain(20)
        uploader.close()
    assert Tree(store).committed() == []
    assert "PartsDiffer" in (boards[0].report().health.checkpoint_problem or "")


def test_parts_that_cannot_be_removed_do_not_undo_a_commit(tmp_path: Path) -> None:
    store, board = Gated(tmp_path / "root"), Board()

    def refuse(key: str) -> None:
        if key.startswith("delete "):
            raise CredentialsError("PermissionDenied", "s3:DeleteObject")

    store.refuse = refuse
    Tree(store).report_part(base_of(5), "a1-00000000", 1, [])
    first = Uploader(Tree(store), board, RunFacts(), Policy(), job="n/j/u", attempt=1, node=0, nodes=2)
    folder = tmp_path / "node-0"
    folder.mkdir()
    (folder / "x").write_text("x")
    first.offer(Staged(5, folder, "a1-00000000", True))
    assert first.drain(20)
    first.close()
    assert (first.graceful_step, first.committed_step, board.report().health.healthy) == (5, 5, True)


def test_a_part_that_could_not_be_stored_is_told_at_once(tmp_path: Path) -> None:
    """Rank 0's pod would wait for half an hour, and commit nothing meanwhile."""
    store, board = Gated(tmp_path / "root"), Board()
    pods = [
        Uploader(Tree(store), board, RunFacts(), Policy(), job="n/j/u", attempt=1, node=node, nodes=2)
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
        uploader.offer(Staged(5, folder, "a1-00000000"))
    for uploader in pods:
        assert uploader.drain(20)
        uploader.close()
    assert Tree(store).committed() == [] and pods[1].brought_step == 0


def test_a_slow_store_does_not_make_the_one_deaf_who_offers(tmp_path: Path) -> None:
    """The second pod tells the first that it skips: not on the thread that hears its ranks."""
    store = Gated(tmp_path / "root")
    told = threading.Event()
    put = store.put

    def slow(key: str, data: bytes) -> None:
        told.set()
        assert store.gate.wait(20)
        put(key, data)

    store.put = slow  # type: ignore[method-assign] # that is what the fault is
    second = Uploader(Tree(store), Board(), RunFacts(), Policy(), job="n/j/u", attempt=1, node=1, nodes=2)
    store.gate.clear()
    for step in (1, 2, 3):
        folder = tmp_path / f"staged-{step}"
        folder.mkdir()
        (folder / "x").write_text("x")
        second.offer(Staged(step, folder, "a1-00000000"))
        if step == 1:
            assert store.entered.wait(10)
    assert told.wait(10), "it is told although nothing can be written now"
    store.gate.set()
    assert second.drain(20)
    second.close()


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


def test_log_lines_go_before_a_commit_but_never_before_that_of_a_stop(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "root", "file:///root")
    tree, at = Tree(store), []
    uploader = Uploader(
        tree, Board(), RunFacts(), Policy(), job="n/j/u", attempt=1,
        before_commit=lambda: at.append([one.step for one in tree.committed()]),
    )  # fmt: skip
    for step, graceful in ((5, False), (8, True), (None, False)):
        folder = tmp_path / f"staged-{step}"
        folder.mkdir()
        (folder / "weights").write_text("x")
        facts = {"outputKind": "adapter", "step": 9} if step is None else {}
        uploader.offer(Staged(step, folder, "a1-00000000", graceful, facts))
        assert uploader.drain(20)
    uploader.close()
    assert at == [[], [8, 5]]
    assert uploader.output is not None
