"""What a run is compared by when it goes on: everything that was read counts."""

from __future__ import annotations

from pathlib import Path

import pytest
from finetune_trainer.inputs import Inputs
from finetune_trainer.supervisor.prepare import beside_of


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    """Inputs with everything there is; a ConfigMap lies there as the kubelet mounts it."""
    for name, text in (
        ("tokenizer/tokenizer.json", "{}"), ("reference/config.json", "{}"), ("valid.jsonl", "{}"), ("adapter/adapter_config.json", "{}"),
        ("maps/mine/..2026/ds.json", "{}"),
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "maps/mine/..data").symlink_to("..2026")
    (tmp_path / "maps/mine/ds.json").symlink_to("..data/ds.json")
    return Inputs(
        model=tmp_path, tokenizer=tmp_path / "tokenizer", reference=tmp_path / "reference", adapter=tmp_path / "adapter", validation=[tmp_path / "valid.jsonl"],
        model_revision="m", dataset_digest="d", output_dir=tmp_path, config_maps=tmp_path / "maps",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("file", "word"),
    [
        ("tokenizer/tokenizer.json", "tokenizer"), ("reference/config.json", "reference model"),
        ("adapter/adapter_config.json", "adapter"), ("valid.jsonl", "validation data"), ("maps/mine/..2026/ds.json", "contents of ConfigMaps"),
    ],
)  # fmt: skip
def test_whatever_was_read_is_told_apart_by_its_contents(inputs: Inputs, tmp_path: Path, file: str, word: str) -> None:
    before = beside_of(inputs)
    (tmp_path / file).write_text('{"other": 1}')
    after = beside_of(inputs)
    assert {name for name in before if before[name] != after[name]} == {word}


def test_a_configmap_that_is_mounted_anew_with_the_same_contents_is_the_same(inputs: Inputs, tmp_path: Path) -> None:
    before = beside_of(inputs)
    (tmp_path / "maps/mine/..2026").rename(tmp_path / "maps/mine/..2027")
    (tmp_path / "maps/mine/..data").unlink()
    (tmp_path / "maps/mine/..data").symlink_to("..2027")
    assert beside_of(inputs) == before


def test_what_is_not_there_is_not_compared(tmp_path: Path) -> None:
    bare = Inputs(
        model=tmp_path, model_revision="m", dataset_digest="d", output_dir=tmp_path, config_maps=tmp_path / "none"
    )
    assert beside_of(bare) == {}
