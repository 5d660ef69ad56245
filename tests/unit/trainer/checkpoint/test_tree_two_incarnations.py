"""Two incarnations write to the folder of one job at the same time.

In whatever order their requests are served, all files that a marker refers to exist.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from finetune_api.errors import StorageError
from finetune_api.pod import ResumeConfig
from finetune_trainer.checkpoint.manifest import Manifest, RunFacts, checkpoint_folder_key
from finetune_trainer.checkpoint.restore import restore
from finetune_trainer.checkpoint.tree import CheckpointTree, FencedOutError
from finetune_trainer.storage.base import CreateResult, ObjectStat
from finetune_trainer.storage.folder import FolderStore

FACTS = RunFacts()


def do_nothing() -> None:
    """Do nothing: the default of the hooks."""


class SlowStore(FolderStore):
    """A store that can delay deletions until `apply_deletions`. It calls hooks before deletions, and before a marker or manifest is written."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, f"file://{root}")
        self.delays_deletions = False
        self.delayed_keys: list[str] = []
        self.before_delete = self.before_marker = self.before_manifest = do_nothing

    def delete(self, keys: Iterable[str]) -> None:
        if self.delays_deletions:
            self.delayed_keys += keys
            return
        hook, self.before_delete = self.before_delete, do_nothing  # run the hook only once
        hook()
        super().delete(keys)

    def apply_deletions(self) -> None:
        """Carry out the delayed deletions."""
        self.delays_deletions = False
        self.delete(self.delayed_keys)

    def create(self, key: str, data: bytes) -> CreateResult:
        self.before_marker()
        return super().create(key, data)

    def put(self, key: str, data: bytes) -> None:
        if key.endswith("manifest.json"):
            self.before_manifest()
        super().put(key, data)


@pytest.fixture
def store(tmp_path: Path) -> SlowStore:
    """Create an empty store, and the files of a staged checkpoint."""
    (tmp_path / "staged").mkdir()
    (tmp_path / "staged" / "weights").write_bytes(b"abc")
    return SlowStore(tmp_path / "root")


def commit_checkpoint(tree: CheckpointTree, staged_folder: Path, step: int, attempt: int, pod_uid: str = "00000000") -> None:
    incarnation = f"a{attempt}-{pod_uid}"
    files = tree.upload(checkpoint_folder_key(step), incarnation, staged_folder)
    tree.commit(
        checkpoint_folder_key(step), Manifest(step=step, attempt=attempt, incarnation=incarnation, files=files, facts=FACTS)
    )


def test_a_marker_created_between_listing_and_delete_of_a_sweep_is_removed(store: SlowStore, tmp_path: Path) -> None:
    """The old attempt passes its last check, the sweep deletes the files, and the old attempt creates its marker.

    The sweep must remove this marker.
    """
    tree, marker_key = CheckpointTree(store), f"{checkpoint_folder_key(10)}/_COMMITTED"
    commit_checkpoint(tree, tmp_path / "staged", 10, 1)
    marker_data = store.get(marker_key)
    assert marker_data is not None
    store.delete([marker_key])  # the hook below creates the marker again during the sweep
    store.before_delete = lambda: store.put(marker_key, marker_data)
    assert tree.sweep().first_error is None
    assert (tree.get_committed(10), list(store.list("checkpoints/"))) == (None, [])


def test_a_sweep_during_a_commit_leaves_no_marker(store: SlowStore, tmp_path: Path) -> None:
    tree = CheckpointTree(store)

    def begin_and_sweep() -> None:
        store.delays_deletions = True
        tree.begin_attempt(2, b"{}")
        tree.sweep()
        store.apply_deletions()

    store.before_marker = begin_and_sweep
    with pytest.raises(FencedOutError, match="another incarnation has removed"):
        commit_checkpoint(tree, tmp_path / "staged", 10, 1)
    assert restore(tree, ResumeConfig(mode="auto"), FACTS, tmp_path / "out").step == 0


def test_a_commit_fails_if_a_sweep_removed_its_data_before_the_manifest(store: SlowStore, tmp_path: Path) -> None:
    """A queue starts an attempt again while its old pods still run. The sweep of the new pods lists the objects before the old pods write the manifest."""
    tree = CheckpointTree(store)

    def start_sweep() -> None:
        store.delays_deletions = True
        tree.sweep()
        store.delays_deletions = False

    store.before_manifest = start_sweep
    store.before_marker = store.apply_deletions
    with pytest.raises(FencedOutError, match="another incarnation has removed"):
        commit_checkpoint(tree, tmp_path / "staged", 10, 1)
    assert tree.list_committed() == []


@pytest.mark.parametrize("method", ["stat", "list"])
def test_a_store_that_fails_after_the_marker_does_not_undo_the_commit(
    store: SlowStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    tree = CheckpointTree(store)
    original_method = getattr(store, method)

    def fail_after_marker(key: str) -> ObjectStat | None:
        if tree.get_committed(10) is not None and not key.startswith("run/"):
            raise StorageError("StorageFailed", "503")
        result: ObjectStat | None = original_method(key)
        return result

    monkeypatch.setattr(store, method, fail_after_marker)
    commit_checkpoint(tree, tmp_path / "staged", 10, 1)
    monkeypatch.undo()
    assert [checkpoint.step for checkpoint in tree.list_committed()] == [10]


def test_another_incarnation_resumes_from_the_attempts_own_steps_after_a_rollback(
    store: SlowStore, tmp_path: Path
) -> None:
    tree, rollback_config = CheckpointTree(store), ResumeConfig(mode="auto", max_step=10)
    for step, attempt in ((10, 1), (30, 2), (20, 3)):
        commit_checkpoint(tree, tmp_path / "staged", step, attempt)
    result = restore(tree, rollback_config, FACTS, tmp_path / "third", attempt=3)
    assert (result.step, [checkpoint.step for checkpoint in result.skipped_checkpoints]) == (20, [30])
    assert restore(tree, rollback_config, FACTS, tmp_path / "fourth", attempt=4).step == 10
    config_with_known_attempt = rollback_config.model_copy(update={"rolled_back_attempt": 3})
    assert restore(tree, config_with_known_attempt, FACTS, tmp_path / "fifth", attempt=4).step == 20, "step 20 is used although the operator did not see it"


def test_an_attempt_is_fenced_before_training_if_a_later_one_has_begun(store: SlowStore) -> None:
    tree = CheckpointTree(store)
    tree.begin_attempt(5, b"{}")
    tree.require_newest_attempt(5)
    with pytest.raises(FencedOutError, match="a later attempt has begun; this attempt, 4, must end"):
        tree.require_newest_attempt(4)
