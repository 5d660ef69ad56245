"""One 32-bit copy of 16-bit weights for all ranks of a pod."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from finetune_trainer import shared_weights  # noqa: E402 - torch first: without it there is nothing to test
from safetensors import safe_open  # noqa: E402 - likewise
from safetensors.torch import load_file, save_file  # noqa: E402 - likewise


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with two weight files, of several number formats and shapes."""
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = {
        "matrix": torch.randn(3, 5).to(torch.bfloat16), "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
        "scalar": torch.tensor(0.1, dtype=torch.bfloat16), "empty": torch.zeros(0, 4, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]), "ids": torch.arange(3),
    }  # fmt: skip
    save_file(tensors, folder / "a.safetensors", metadata={"format": "pt", "origin": "test"})
    save_file({"other": torch.ones(2)}, folder / "b.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")
    return folder


def test_sixteen_bit_numbers_become_equal_numbers_of_32_bits(model: Path, tmp_path: Path) -> None:
    shared_weights.write_as_float32(model / "a.safetensors", tmp_path / "converted.safetensors")
    before, after = load_file(model / "a.safetensors"), load_file(tmp_path / "converted.safetensors")
    assert {name: str(tensor.dtype) for name, tensor in after.items()} == {
        "matrix": "torch.float32", "half": "torch.float32", "scalar": "torch.float32", "empty": "torch.float32", "flags": "torch.bool", "ids": "torch.int64",
    }  # fmt: skip
    assert all(torch.equal(after[name], before[name].to(after[name].dtype)) and after[name].shape == before[name].shape for name in before)
    with safe_open(tmp_path / "converted.safetensors", framework="pt") as stored:
        assert stored.metadata() == {"format": "pt", "origin": "test"}


def test_all_ranks_load_from_a_folder_that_exists_only_while_the_model_is_loaded(model: Path, tmp_path: Path) -> None:
    waits: list[bool] = []
    work = tmp_path / "work"
    work.mkdir()
    folder = work / shared_weights.FOLDER
    wait = lambda: waits.append(folder.exists())  # noqa: E731 -- the shortest form
    with (
        shared_weights.float32_weights(model, work, converts=True, wait_for_ranks=wait) as (converted, notes),
        shared_weights.float32_weights(model, work, converts=False, wait_for_ranks=wait) as (of_second_rank, _),
    ):
        assert converted == of_second_rank == folder and notes == []
        assert sorted(path.name for path in folder.iterdir()) == ["a.safetensors", "b.safetensors", "config.json"]
        assert (folder / "config.json").read_text() == "{}"
        mapped = load_file(folder / "a.safetensors")
    assert not folder.exists() and list(work.iterdir()) == []
    assert waits == [True] * 4, "the ranks wait until the files exist, and again before the files are removed"
    assert mapped["half"].tolist() == [1.5, -2.0], "mapped weights outlive the removal of their file"
    assert load_file(model / "a.safetensors")["matrix"].dtype is torch.bfloat16


@pytest.mark.parametrize(("missing_bytes", "is_converted"), [(0, True), (1, False)])
def test_without_space_every_rank_loads_the_original_files(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing_bytes: int, is_converted: bool
) -> None:
    """The converted files need 4 bytes for each of the 15 + 2 + 1 + 2 numbers, 2 bytes for the flags, and 24 for the ids."""
    space = 4 * 20 + 2 + 24 + shared_weights.DISK_RESERVE_BYTES - missing_bytes
    monkeypatch.setattr(shared_weights, "free_bytes", lambda work: space)
    with shared_weights.float32_weights(model, tmp_path, converts=True, wait_for_ranks=lambda: None) as (folder, notes):
        assert (folder == tmp_path / shared_weights.FOLDER) is is_converted
        assert notes == ([] if is_converted else [
            "every rank loads all weights before they are sharded: the pod's disk has no space for 32-bit copies of the weight files"
        ])  # fmt: skip


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", True), ("float16", True), ("float32", False)])
def test_only_models_with_16_bit_weights_are_converted(tmp_path: Path, dtype: str, expected: bool) -> None:
    save_file({"ids": torch.arange(2), "weight": torch.ones(2, dtype=getattr(torch, dtype))}, tmp_path / "model.safetensors")
    assert shared_weights.has_16_bit_weights(tmp_path) is expected
