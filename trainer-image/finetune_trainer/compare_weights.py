"""Compares the weights of two models: all tensors of the safetensors files of two folders. `finetune replay` runs this module as a process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune_api.base import LenientModel
from pydantic import Field


class WeightComparison(LenientModel):
    """The result of a comparison, printed as JSON on stdout."""

    tensors: int = Field(description="Number of tensors that both models have.")
    equal: bool = Field(description="Whether both models have the same tensors, with the same types, shapes and bits.")
    different_tensors: int = Field(description="Number of tensors that both models have, but with different values.")
    largest_difference: float = Field(default=0.0, description="Largest absolute difference between the models' values. 1.7e308 if it is not finite.")
    largest_in: str | None = Field(default=None, description="Tensor with the largest difference.")
    mismatched: list[str] = Field(default_factory=list, description="Tensors that only one model has, or whose types or shapes differ.")


def compare(left_folder: Path, right_folder: Path) -> WeightComparison:
    """Compare the models in two folders. Raises ValueError if one of them has no safetensors file."""
    left_files, right_files = _map_tensors_to_files(left_folder), _map_tensors_to_files(right_folder)
    if not left_files or not right_files:
        raise ValueError(f"{left_folder if not left_files else right_folder} has no weights in safetensors files")
    mismatched_names = sorted(left_files.keys() ^ right_files.keys())
    different_count, largest_difference, largest_in = 0, 0.0, None
    for name in sorted(left_files.keys() & right_files.keys()):
        difference = _largest_difference(_load_tensor(left_files[name], name), _load_tensor(right_files[name], name))
        if difference is None:
            mismatched_names.append(name)
        elif difference > 0:
            different_count += 1
            if difference > largest_difference:
                largest_difference, largest_in = difference, name
    return WeightComparison(
        tensors=len(left_files.keys() & right_files.keys()), equal=not different_count and not mismatched_names, different_tensors=different_count,
        largest_difference=min(largest_difference, 1.7e308), largest_in=largest_in, mismatched=mismatched_names,
    )  # fmt: skip


def _map_tensors_to_files(folder: Path) -> dict[str, Path]:
    from safetensors import safe_open

    return {name: file for file in _list_weight_files(folder) for name in safe_open(file, "pt").keys()}  # noqa: SIM118  not a dict


def _list_weight_files(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.glob("*.safetensors"))


def _load_tensor(file: Path, name: str) -> Any:
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(name)


def _largest_difference(left_tensor: Any, right_tensor: Any) -> float | None:
    """Return the largest absolute difference between the values of two tensors: 0 if all bits are equal, None if type or shape differs.

    The difference is 5e-324 if the tensors differ only in signs of zeros, and infinite if a NaN differs.
    """
    import torch

    if left_tensor.dtype != right_tensor.dtype or left_tensor.shape != right_tensor.shape:
        return None
    if left_tensor.numel() == 0 or torch.equal(left_tensor.contiguous().view(torch.uint8), right_tensor.contiguous().view(torch.uint8)):
        return 0.0
    difference = (left_tensor.double() - right_tensor.double()).abs().nan_to_num(nan=float("inf"))
    return max(float(difference.max()), 5e-324)


def main(arguments: list[str]) -> int:
    """Compare the models in two folders and print the result. Returns 0, even if the models differ."""
    left_folder, right_folder = map(Path, arguments)
    print(json.dumps(compare(left_folder, right_folder).to_wire()))
    return 0
