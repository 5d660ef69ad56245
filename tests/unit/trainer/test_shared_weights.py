"""All ranks of a pod share one 32-bit copy of 16-bit weights."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from finetune_trainer import shared_weights  # noqa: E402 - torch first: without it there is nothing to test
from finetune_trainer.verification.weight_files import has_16_bit_weights, read_header  # noqa: E402 - likewise
from safetensors import safe_open  # noqa: E402 - likewise
from safetensors.torch import load_file, save_file  # noqa: E402 - likewise


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with two weight files in several number formats and shapes, and a third weight file that transformers does not read."""
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = {
        "matrix": torch.randn(3, 5).to(torch.bfloat16), "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
        "scalar": torch.tensor(0.1, dtype=torch.bfloat16), "empty": torch.zeros(0, 4, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]), "ids": torch.arange(3),
    }  # fmt: skip
    save_file(tensors, folder / "a.safetensors", metadata={"format": "pt", "origin": "test"})
    save_file({"other": torch.ones(2)}, folder / "b.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(tensors, "a.safetensors") | {"other": "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_file({"copy": torch.ones(1000, dtype=torch.bfloat16)}, folder / "consolidated.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def test_the_conversion_to_32_bits_keeps_all_values(model: Path, tmp_path: Path) -> None:
    source = model / "a.safetensors"
    shared_weights.write_as_float32(source, read_header(source), tmp_path / "converted.safetensors")
    original_weights, converted_weights = load_file(model / "a.safetensors"), load_file(tmp_path / "converted.safetensors")
    assert {name: str(tensor.dtype) for name, tensor in converted_weights.items()} == {
        "matrix": "torch.float32", "half": "torch.float32", "scalar": "torch.float32", "empty": "torch.float32", "flags": "torch.bool", "ids": "torch.int64",
    }  # fmt: skip
    for name, original_weight in original_weights.items():
        converted_weight = converted_weights[name]
        assert torch.equal(converted_weight, original_weight.to(converted_weight.dtype)) and converted_weight.shape == original_weight.shape
    with safe_open(tmp_path / "converted.safetensors", framework="pt") as stored_file:
        assert stored_file.metadata() == {"format": "pt", "origin": "test"}


def test_all_ranks_load_from_a_folder_that_exists_only_while_the_model_is_loaded(model: Path, tmp_path: Path) -> None:
    folder_existed_at_waits: list[bool] = []
    work = tmp_path / "work"
    work.mkdir()
    folder = work / shared_weights.CONVERTED_FOLDER_NAME
    wait = lambda: folder_existed_at_waits.append(folder.exists())  # noqa: E731 -- the shortest form
    with (
        shared_weights.float32_weights(model, work, converts=True, local_rank_0_first=nullcontext(), wait_for_ranks=wait) as (folder_of_first_rank, notes),
        shared_weights.float32_weights(model, work, converts=False, local_rank_0_first=nullcontext(), wait_for_ranks=wait) as (folder_of_second_rank, _),
    ):
        assert folder_of_first_rank == folder_of_second_rank == folder and notes == []
        assert sorted(path.name for path in folder.iterdir()) == [
            "a.safetensors", "b.safetensors", "config.json", "consolidated.safetensors", "model.safetensors.index.json"
        ]  # fmt: skip
        assert [path.name for path in sorted(folder.iterdir()) if not path.is_symlink()] == ["a.safetensors", "b.safetensors"], "only these are converted"
        assert (folder / "config.json").read_text() == "{}"
        mapped_weights = load_file(folder / "a.safetensors")
    assert not folder.exists() and list(work.iterdir()) == []
    assert folder_existed_at_waits == [True] * 2, "before the files are removed, the ranks wait for each other"
    assert mapped_weights["half"].tolist() == [1.5, -2.0], "mapped weights outlive the removal of their file"
    assert load_file(model / "a.safetensors")["matrix"].dtype is torch.bfloat16


@pytest.mark.parametrize(("missing_bytes", "is_converted"), [(0, True), (1, False)])
def test_without_space_every_rank_loads_the_original_files(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing_bytes: int, is_converted: bool
) -> None:
    """The converted files need 4 bytes for each of the 15 + 2 + 1 + 2 numbers, 2 bytes for the flags, and 24 bytes for the ids."""
    free_space_bytes = 4 * 20 + 2 + 24 + shared_weights.DISK_RESERVE_BYTES - missing_bytes
    monkeypatch.setattr(shared_weights, "free_bytes", lambda work: free_space_bytes)
    with shared_weights.float32_weights(model, tmp_path, converts=True, local_rank_0_first=nullcontext(), wait_for_ranks=lambda: None) as (folder, notes):
        assert (folder == tmp_path / shared_weights.CONVERTED_FOLDER_NAME) is is_converted
        assert notes == ([] if is_converted else [
            "every rank loads all weights before they are sharded: the pod's disk has no space for 32-bit copies of the weight files"
        ])  # fmt: skip


def test_converted_files_of_an_interrupted_run_are_not_used(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / shared_weights.CONVERTED_FOLDER_NAME).mkdir()
    monkeypatch.setattr(shared_weights, "free_bytes", lambda work: 0)
    with shared_weights.float32_weights(model, tmp_path, converts=True, local_rank_0_first=nullcontext(), wait_for_ranks=lambda: None) as (folder, _):
        assert folder == model


@pytest.mark.parametrize(("dtype", "is_converted"), [("bfloat16", True), ("float16", True), ("float32", False)])
def test_only_models_with_16_bit_weights_are_converted(tmp_path: Path, dtype: str, is_converted: bool) -> None:
    save_file({"ids": torch.arange(2), "weight": torch.ones(2, dtype=getattr(torch, dtype))}, tmp_path / "model.safetensors")
    assert has_16_bit_weights(tmp_path) is is_converted
