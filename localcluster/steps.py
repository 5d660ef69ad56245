"""Show the user which step is running and how long each step took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

Step = Callable[[str], AbstractContextManager[None]]
"""Context manager around a slow step: `with step("description"):`."""


@contextlib.contextmanager
def silent_step(description: str) -> Iterator[None]:
    """A `Step` that shows nothing, for programs and tests."""
    del description
    yield


@contextlib.contextmanager
def show_step(description: str) -> Iterator[None]:
    """A `Step` that shows the description on standard error: with a spinner on a terminal, otherwise with one line before and one after the step."""
    from rich.console import Console  # the import takes 0.2 s

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    started_at = time.monotonic()
    if not console.is_terminal:
        console.print(f"         {description} ...")
    with console.status(description) if console.is_terminal else contextlib.nullcontext():
        yield
    console.print(f"{time.monotonic() - started_at:6.1f} s {description}")
