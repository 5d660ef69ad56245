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
    """Show nothing. Programs and tests use this function."""
    del description
    yield


@contextlib.contextmanager
def shown_step(description: str) -> Iterator[None]:
    """Show the step on standard error. On a terminal, show a spinner; otherwise print one line before and one line after the step."""
    from rich.console import Console  # the import takes 0.2 s

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    started_at = time.monotonic()
    if not console.is_terminal:
        console.print(f"         {description} ...")
    with console.status(description) if console.is_terminal else contextlib.nullcontext():
        yield
    console.print(f"{time.monotonic() - started_at:6.1f} s {description}")
