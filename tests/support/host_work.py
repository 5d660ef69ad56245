"""Count the work of the host in each training step: modules visited by walks over the model, and values read from tensors."""

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
"""Methods of a tensor that need its values on the host. On a GPU, the host waits until the GPU has computed them."""
SKIPPED_FOLDERS = ("/torch/", "/contextlib.py", "/tests/support/host_work.py")


class HostWork:
    """The counts of one training step, or of all steps so far."""

    def __init__(self) -> None:
        self.visited_modules: Counter[str] = Counter()
        """Number of visited modules, by the caller of the walk."""
        self.tensor_reads: Counter[str] = Counter()
        """Number of values read from tensors, by the caller."""


def _caller() -> str:
    """Return the innermost function outside torch, as `folder/file.py:function`."""
    frame = sys._getframe(2)
    while frame.f_back is not None and any(part in frame.f_code.co_filename for part in SKIPPED_FOLDERS):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_code.co_name}"


@contextmanager
def count_host_work() -> Iterator[HostWork]:
    """Count all walks and reads within the context. All walks of torch (also `train`, `apply` and `parameters`) use one of two methods."""
    work = HostWork()
    original_modules, original_children = Module.named_modules, Module.named_children

    def named_modules(self: Module, memo: Any = None, *args: Any, **options: Any) -> Iterator[Any]:
        is_outermost = memo is None
        for found in original_modules(self, memo, *args, **options):
            if is_outermost:
                work.visited_modules[_caller()] += 1
            yield found

    def named_children(self: Module) -> Iterator[Any]:
        for found in original_children(self):
            work.visited_modules[_caller()] += 1
            yield found

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        def read(self: torch.Tensor, *args: Any, **options: Any) -> Any:
            work.tensor_reads[_caller()] += 1
            return method(self, *args, **options)

        return read

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Module, "named_modules", named_modules)
        patch.setattr(Module, "named_children", named_children)
        for name in READING_METHODS:
            patch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
        yield work
