"""Preparing a pod: claiming storage, and the hashes of inputs that a resumed run compares."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from finetune_trainer.checkpoint.tree import CheckpointTree, FencedOutError
from finetune_trainer.inputs import Inputs
from finetune_trainer.settings import Settings
from finetune_trainer.storage.folder import FolderStore
from finetune_trainer.supervisor.prepare import Preparation, other_inputs_of
from finetune_trainer.supervisor.run_state import RunState


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    """Inputs of every kind. The ConfigMap has the folders and links that a kubelet creates."""
    for name, text in (
        ("tokenizer/tokenizer.json", "{}"), ("reference/config.json", "{}"), ("valid.jsonl", "{}"), ("adapter/adapter_config.json", "{}"),
        ("test.jsonl", "{}"), ("maps/mine/..2026/ds.json", "{}"),
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "maps/mine/..data").symlink_to("..2026")
    (tmp_path / "maps/mine/ds.json").symlink_to("..data/ds.json")
    return Inputs(
        model=tmp_path, tokenizer=tmp_path / "tokenizer", reference=tmp_path / "reference", adapter=tmp_path / "adapter",
        validation=[tmp_path / "valid.jsonl"], test=[tmp_path / "test.jsonl"],
        model_revision="m", dataset_digest="d", output_dir=tmp_path, config_maps=tmp_path / "maps",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("file", "input_name"),
    [
        ("tokenizer/tokenizer.json", "tokenizer"), ("reference/config.json", "reference model"),
        ("adapter/adapter_config.json", "adapter"), ("valid.jsonl", "validation data"), ("test.jsonl", "test data"),
        ("maps/mine/..2026/ds.json", "contents of ConfigMaps"),
    ],
)  # fmt: skip
def test_every_input_is_compared_by_its_contents(inputs: Inputs, tmp_path: Path, file: str, input_name: str) -> None:
    before = other_inputs_of(inputs)
    (tmp_path / file).write_text('{"other": 1}')
    after = other_inputs_of(inputs)
    assert {name for name in before if before[name] != after[name]} == {input_name}


def test_a_configmap_that_is_mounted_again_with_the_same_contents_is_equal(inputs: Inputs, tmp_path: Path) -> None:
    before = other_inputs_of(inputs)
    (tmp_path / "maps/mine/..2026").rename(tmp_path / "maps/mine/..2027")
    (tmp_path / "maps/mine/..data").unlink()
    (tmp_path / "maps/mine/..data").symlink_to("..2027")
    assert other_inputs_of(inputs) == before


def test_missing_inputs_are_not_compared(tmp_path: Path) -> None:
    inputs = Inputs(
        model=tmp_path, model_revision="m", dataset_digest="d", output_dir=tmp_path, config_maps=tmp_path / "none"
    )
    assert other_inputs_of(inputs) == {}


class RecordingStore(FolderStore):
    """A folder store that records all writes and deletions."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, f"file://{root}")
        self.changes: list[str] = []

    def put(self, key: str, data: bytes) -> None:
        self.changes.append(f"put {key}")
        super().put(key, data)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.changes.append(f"delete {key}")
            super().delete([key])


@pytest.fixture
def store(tmp_path: Path) -> RecordingStore:
    """A storage root with uncommitted files of a killed incarnation."""
    store = RecordingStore(tmp_path / "root")
    store.put("checkpoints/step-00000005/a1-00000000/weights", b"never committed")
    store.changes.clear()
    return store


def make_preparation(work: Path, attempt: int, node_rank: int = 0) -> Preparation:
    run: Any = SimpleNamespace(attempt=attempt, to_bytes=lambda: b"{}")
    settings = Settings.from_env(work=str(work))
    return Preparation(run, "", replace(settings, node_rank=node_rank), RunState())


def test_leftovers_are_removed_only_after_earlier_attempts_are_fenced_out(
    store: RecordingStore, tmp_path: Path
) -> None:
    """Before the sweep, an earlier attempt that still runs must be fenced out, because it could commit data that the sweep removes."""
    make_preparation(tmp_path, 2).claim_storage(CheckpointTree(store))
    assert store.changes == [
        "put run/attempt-2/run.json", "delete checkpoints/step-00000005/a1-00000000/weights"
    ]  # fmt: skip


def test_an_attempt_that_starts_after_a_later_one_changes_nothing_in_storage(store: RecordingStore, tmp_path: Path) -> None:
    CheckpointTree(store).begin_attempt(3, b"{}")
    store.changes.clear()
    with pytest.raises(FencedOutError):
        make_preparation(tmp_path, 2).claim_storage(CheckpointTree(store))
    assert store.changes == []


def test_only_rank_0s_pod_claims_storage(store: RecordingStore, tmp_path: Path) -> None:
    make_preparation(tmp_path, 2, node_rank=1).claim_storage(CheckpointTree(store))
    assert store.changes == []
