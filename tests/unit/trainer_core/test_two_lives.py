"""Two lives that write below one root at once: whatever the order of their requests, no marker stands over nothing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from finetune_api.errors import StorageError
from finetune_api.pod import Resume
from finetune_trainer.checkpoint.manifest import Manifest, RunFacts, base_of
from finetune_trainer.checkpoint.restore import restore
from finetune_trainer.checkpoint.tree import Fenced, Tree
from finetune_trainer.storage.base import Created, Stat
from finetune_trainer.storage.folder import FolderStore

FACTS = RunFacts()


def nothing() -> None:
    """What happens meanwhile, unless a test says otherwise."""


class Slow(FolderStore):
    """A store in which deletions are on their way until `arrive`, and where something may happen before a marker is written."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, f"file://{root}")
        self.holds = False
        self.held: list[str] = []
        self.before_delete = self.before_marker = self.before_manifest = nothing

    def delete(self, keys: Iterable[str]) -> None:
        if self.holds:
            self.held += keys
            return
        happens, self.before_delete = self.before_delete, nothing  # once
        happens()
        super().delete(keys)

    def arrive(self) -> None:
        """What was held is deleted."""
        self.holds = False
        self.delete(self.held)

    def create(self, key: str, data: bytes) -> Created:
        self.before_marker()
        return super().create(key, data)

    def put(self, key: str, data: bytes) -> None:
        if key.endswith("manifest.json"):
            self.before_manifest()
        super().put(key, data)


@pytest.fixture
def store(tmp_path: Path) -> Slow:
    """An empty root."""
    (tmp_path / "staged").mkdir()
    (tmp_path / "staged" / "weights").write_bytes(b"abc")
    return Slow(tmp_path / "root")


def commit(tree: Tree, staged: Path, step: int, attempt: int, life: str = "00000000") -> None:
    incarnation = f"a{attempt}-{life}"
    files = tree.upload(base_of(step), incarnation, staged)
    tree.commit(
        base_of(step), Manifest(step=step, attempt=attempt, incarnation=incarnation, files=files, facts=FACTS)
    )


def test_a_marker_between_a_sweeps_look_and_its_delete_goes_with_the_data(store: Slow, tmp_path: Path) -> None:
    """The old attempt is past its last look when the new one's delete arrives: the new one takes the marker back."""
    tree, key = Tree(store), f"{base_of(10)}/_COMMITTED"
    commit(tree, tmp_path / "staged", 10, 1)
    marker = store.get(key)
    assert marker is not None
    store.delete([key])  # all of it is there but its marker, which comes while it is swept
    store.before_delete = lambda: store.put(key, marker)
    assert tree.sweep().problem is None
    assert (tree.marker(10), list(store.list("checkpoints/"))) == (None, [])


def test_the_new_attempt_begins_at_zero_and_not_with_a_marker_over_nothing(store: Slow, tmp_path: Path) -> None:
    tree = Tree(store)

    def swept_meanwhile() -> None:
        store.holds = True
        tree.begin(2, b"{}")
        tree.sweep()
        store.arrive()

    store.before_marker = swept_meanwhile
    with pytest.raises(Fenced, match="was swept by another life"):
        commit(tree, tmp_path / "staged", 10, 1)
    assert restore(tree, Resume(mode="auto"), FACTS, tmp_path / "out").step == 0


def test_data_that_was_listed_before_its_manifest_is_missed_in_the_end(store: Slow, tmp_path: Path) -> None:
    """A queue starts the same attempt again: the other life's sweep saw the data without a manifest, which stays."""
    tree = Tree(store)

    def sweep_begins() -> None:
        store.holds = True
        tree.sweep()
        store.holds = False

    store.before_manifest = sweep_begins
    store.before_marker = store.arrive
    with pytest.raises(Fenced, match="was swept by another life"):
        commit(tree, tmp_path / "staged", 10, 1)
    assert tree.committed() == []


@pytest.mark.parametrize("asked", ["stat", "list"])
def test_a_store_that_is_down_behind_the_marker_makes_no_failure_of_a_commit(
    store: Slow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    tree = Tree(store)
    answer = getattr(store, asked)

    def down(key: str) -> Stat | None:
        if tree.marker(10) is not None and not key.startswith("run/"):
            raise StorageError("StorageFailed", "503")
        found: Stat | None = answer(key)
        return found

    monkeypatch.setattr(store, asked, down)
    commit(tree, tmp_path / "staged", 10, 1)
    monkeypatch.undo()
    assert [one.step for one in tree.committed()] == [10]


def test_another_life_of_an_attempt_goes_on_from_its_own_steps_behind_a_rollback(store: Slow, tmp_path: Path) -> None:
    tree, rolled_back = Tree(store), Resume(mode="auto", max_step=10)
    for step, attempt in ((10, 1), (30, 2), (20, 3)):
        commit(tree, tmp_path / "staged", step, attempt)
    found = restore(tree, rolled_back, FACTS, tmp_path / "third", attempt=3)
    assert (found.step, [one.step for one in found.passed]) == (20, [30])
    assert restore(tree, rolled_back, FACTS, tmp_path / "fourth", attempt=4).step == 10


def test_an_attempt_that_comes_after_its_successor_is_told_so_before_it_trains(store: Slow) -> None:
    tree = Tree(store)
    tree.begin(5, b"{}")
    tree.require_newest(5)
    with pytest.raises(Fenced, match="a later attempt has begun; this is attempt 4"):
        tree.require_newest(4)
