"""The weights of two models are compared bit by bit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_trainer.compare_weights import compare, main
from safetensors.torch import save_file


def write_weights(folder: Path, **tensors: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_equal_weights_may_be_in_files_with_different_names(tmp_path: Path) -> None:
    a, b = torch.ones(2), torch.zeros(3, dtype=torch.bfloat16)
    left = write_weights(tmp_path / "left", a=a, b=b)
    right = write_weights(tmp_path / "right", a=a)
    save_file({"b": b}, right / "second.safetensors")
    result = compare(left, right)
    assert (result.equal, result.tensors, result.different_tensors, result.largest_in) == (True, 2, 0, None)


def test_the_largest_difference_is_found(tmp_path: Path) -> None:
    left = write_weights(tmp_path / "left", a=torch.tensor([1.0, 2.0]), b=torch.tensor([1.0]), c=torch.tensor([5.0]))
    right = write_weights(tmp_path / "right", a=torch.tensor([1.0, 2.5]), b=torch.tensor([0.0]), c=torch.tensor([5.0]))
    result = compare(left, right)
    assert (result.equal, result.different_tensors, result.largest_difference, result.largest_in) == (False, 2, 1.0, "b")


@pytest.mark.parametrize(("left", "right"), [(0.0, -0.0), (1.0, math.nan), (math.nan, math.inf)])
def test_different_bits_are_a_difference(left: float, right: float, tmp_path: Path) -> None:
    folders = [write_weights(tmp_path / str(i), a=torch.tensor([value])) for i, value in enumerate((left, right))]
    result = compare(*folders)
    assert (result.equal, result.different_tensors, result.largest_in, math.isfinite(result.largest_difference)) == (False, 1, "a", True)


def test_different_names_types_and_shapes_are_mismatches(tmp_path: Path) -> None:
    left = write_weights(tmp_path / "left", a=torch.zeros(2), b=torch.zeros(2), only_left=torch.zeros(1))
    right = write_weights(tmp_path / "right", a=torch.zeros(3), b=torch.zeros(2).half(), only_right=torch.zeros(1))
    assert compare(left, right).mismatched == ["only_left", "only_right", "a", "b"]


def test_main_prints_json_and_a_folder_without_weights_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left, right = write_weights(tmp_path / "left", a=torch.zeros(2)), tmp_path / "empty"
    assert main([str(left), str(left)]) == 0
    assert json.loads(capsys.readouterr().out) == {"tensors": 1, "equal": True, "differentTensors": 0, "largestDifference": 0.0, "mismatched": []}
    right.mkdir()
    with pytest.raises(ValueError, match="empty has no weights"):
        compare(left, right)
