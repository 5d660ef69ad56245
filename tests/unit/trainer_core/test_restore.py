"""Where an attempt starts, and which checkpoints are refused or not exact: over a folder, since no fault is in play."""

from __future__ import annotations

from pathlib import Path

import pytest
from finetune_api.errors import ConfigError, NoCheckpointError
from finetune_api.pod import Resume, StoreTarget
from finetune_trainer.checkpoint.manifest import Manifest, RunFacts, base_of
from finetune_trainer.checkpoint.restore import Restored, restore
from finetune_trainer.checkpoint.tree import Tree
from finetune_trainer.storage.roots import open_store

FACTS = RunFacts(
    model_revision="m", dataset_digest="d", method="lora", trainer="sft", effective_batch=4, versions={"torch": "2"}
)


@pytest.fixture
def place(tmp_path: Path) -> Tree:
    return Tree(open_store(StoreTarget(uri=f"file://{tmp_path}/root/team/job/uid")))


@pytest.fixture
def two(place: Tree, tmp_path: Path) -> Tree:
    """Steps 5 and 10 are committed."""
    folder = tmp_path / "staged"
    folder.mkdir()
    (folder / "weights").write_text("w")
    for step in (5, 10):
        files = place.upload(base_of(step), "a1-00000000", folder)
        place.commit(base_of(step), Manifest(step=step, incarnation="a1-00000000", files=files, facts=FACTS))
    return place


def back(place: Tree, folder: Path, resume: Resume | None = None, facts: RunFacts = FACTS) -> Restored:
    return restore(place, resume or Resume(mode="auto", expect_step=10), facts, folder / "restored")


def test_progress_without_any_checkpoint_is_73(place: Tree, tmp_path: Path) -> None:
    with pytest.raises(NoCheckpointError):
        back(place, tmp_path, Resume(mode="auto", expect_step=7))
    assert back(place, tmp_path, Resume(mode="auto")).step == 0


def test_never_and_rollback(two: Tree, tmp_path: Path) -> None:
    assert back(two, tmp_path, Resume(mode="never", expect_step=0)).step == 0
    assert back(two, tmp_path, Resume(mode="auto", expect_step=10, max_step=9)).step == 5


@pytest.mark.parametrize("uri", ["{root}/checkpoints/step-00000005", "{root}/checkpoints/step-00000005/a1-00000000/"])
def test_a_checkpoint_by_its_uri(two: Tree, tmp_path: Path, uri: str) -> None:
    named = uri.format(root=two.store.uri)
    assert back(two, tmp_path, Resume(mode=named)).step == 5


@pytest.mark.parametrize(
    ("uri", "code"),
    [("{root}/checkpoints/step-00000006", "CheckpointNotFound"), ("{root}/model", "ResumeInvalid")],
)
def test_a_uri_that_is_none(two: Tree, tmp_path: Path, uri: str, code: str) -> None:
    with pytest.raises((NoCheckpointError, ConfigError)) as caught:
        back(two, tmp_path, Resume(mode=uri.format(root=two.store.uri)))
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_revision": "other"}, "base model"),
        ({"dataset_digest": "other"}, "training data"),
        ({"method": "full"}, "method"),
        ({"effective_batch": 8}, "effective batch"),
        ({"strategy": "deepspeed", "world_size": 2}, "DeepSpeed"),
    ],
)
def test_another_run_is_refused_with_the_difference(
    two: Tree, tmp_path: Path, change: dict[str, object], word: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        back(two, tmp_path, facts=FACTS.model_copy(update=change))
    assert caught.value.code == "CheckpointIncompatible" and word in caught.value.message


@pytest.mark.parametrize(
    ("change", "word"),
    [({"world_size": 2}, "ranks"), ({"micro_batch": 2}, "split"), ({"versions": {"torch": "3"}}, "torch 2 -> 3")],
)
def test_what_is_allowed_and_not_exact_says_why(
    two: Tree, tmp_path: Path, change: dict[str, object], word: str
) -> None:
    found = back(two, tmp_path, facts=FACTS.model_copy(update=change))
    assert found.step == 10 and found.exact is False and word in (found.note or "")


def test_sweeping_takes_what_no_marker_names_and_nothing_else(two: Tree, tmp_path: Path) -> None:
    before = {stat.key for stat in two.store.list("checkpoints/")}
    two.store.put("checkpoints/step-00000010/a9-deadbeef/weights", b"a zombie's")
    two.store.put("checkpoints/step-00000015/a1-00000000/weights", b"never committed")
    two.store.put("checkpoints/step-00000015/_HEALTHY", b"{}")
    assert two.sweep() == 3
    assert {stat.key for stat in two.store.list("checkpoints/")} == before
    assert back(two, tmp_path).step == 10
