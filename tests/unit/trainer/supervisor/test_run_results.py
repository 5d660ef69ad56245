"""The result files that rank 0 writes, and the start time of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from finetune_trainer.checkpoint.tree import CheckpointTree
from finetune_trainer.storage.folder import FolderStore
from finetune_trainer.supervisor.run_results import START_TIME_KEY, RunResults

from tests.support.learning import make_run


@pytest.fixture
def tree(tmp_path: Path) -> CheckpointTree:
    return CheckpointTree(FolderStore(tmp_path / "store", f"file://{tmp_path}/store"))


def make_results(tmp_path: Path, tree: CheckpointTree) -> RunResults:
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "log.jsonl").write_text("{}\n")
    return RunResults(make_run(tmp_path, tmp_path / "model")[0], tree, tmp_path / "output")


@pytest.mark.parametrize("newest_attempt", [1, 2])
def test_only_the_newest_attempt_stores_its_log(tmp_path: Path, tree: CheckpointTree, newest_attempt: int) -> None:
    results = make_results(tmp_path, tree)
    tree.begin_attempt(newest_attempt, b"{}")
    results.store_rank_files()
    assert tree.store.get("metrics/log.jsonl") == (b"{}\n" if newest_attempt == 1 else None)


@pytest.mark.parametrize("content", [b"", b"{", b"{}"])
def test_an_unreadable_start_time_is_recorded_again(tmp_path: Path, tree: CheckpointTree, content: bytes) -> None:
    """A pod that is killed while it creates the file can leave an empty file, if the volume has no hard links."""
    results = make_results(tmp_path, tree)
    tree.store.put(START_TIME_KEY, content)
    results.record_start()
    started_at = results.read_start_time()
    results.record_start()
    assert results.read_start_time() == started_at and tree.store.get(START_TIME_KEY) != content
