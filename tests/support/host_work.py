"""Counts the work of the host (CPU) in a training step: the visited modules of the model, and the values read from tensors."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Module

READING_METHODS = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__")
"""Tensor methods that copy values to the host. If the tensor is on a GPU, these methods wait until the GPU has computed the values."""
SKIPPED_FOLDERS = ("/torch/", "/contextlib.py", "/tests/support/host_work.py")


class HostWork:
    """The module visits and tensor reads that were counted in one `count_host_work` block."""

    def __init__(self) -> None:
        self.visited_modules: Counter[str] = Counter()
        """Number of modules that each caller has visited, by caller."""
        self.tensor_reads: Counter[str] = Counter()
        """Number of values that each caller has read from tensors, by caller."""


def _find_caller() -> str:
    """Return the innermost calling function outside torch, as `folder/file.py:function`."""
    frame = sys._getframe(2)
    while frame.f_back is not None and any(part in frame.f_code.co_filename for part in SKIPPED_FOLDERS):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_code.co_name}"


@contextmanager
def count_host_work() -> Iterator[HostWork]:
    """Count the module visits and tensor reads in a `with` block. It is enough to count the calls of `named_modules` and `named_children`, because `train`,
    `apply` and `parameters` of torch also call these two.
    """
    work = HostWork()
    original_modules, original_children = Module.named_modules, Module.named_children

    def named_modules(self: Module, memo: Any = None, *args: Any, **options: Any) -> Iterator[Any]:
        is_outermost = memo is None
        for name_and_module in original_modules(self, memo, *args, **options):
            if is_outermost:
                work.visited_modules[_find_caller()] += 1
            yield name_and_module

    def named_children(self: Module) -> Iterator[Any]:
        for name_and_child in original_children(self):
            work.visited_modules[_find_caller()] += 1
            yield name_and_child

    def count_reads(method: Callable[..., Any]) -> Callable[..., Any]:
        def count_and_read(self: torch.Tensor, *args: Any, **options: Any) -> Any:
            work.tensor_reads[_find_caller()] += 1
            return method(self, *args, **options)

        return count_and_read

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Module, "named_modules", named_modules)
        patch.setattr(Module, "named_children", named_children)
        for name in READING_METHODS:
            patch.setattr(torch.Tensor, name, count_reads(getattr(torch.Tensor, name)))
        yield work
