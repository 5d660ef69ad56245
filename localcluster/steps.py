"""Tell the person who waits what is being done, and afterwards how long it took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

Step = Callable[[str], AbstractContextManager[None]]
"""`with step("what is done"):` around something that takes a while."""


@contextlib.contextmanager
def silent(what: str) -> Iterator[None]:
    """For programs: says nothing."""
    del what
    yield


@contextlib.contextmanager
def shown(what: str) -> Iterator[None]:
    """For people: a spinner on a terminal, two plain lines elsewhere; on standard error."""
    from rich.console import Console  # 0.2 s, not for programs

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    started = time.monotonic()
    if not console.is_terminal:
        console.print(f"         {what} ...")
    with console.status(what) if console.is_terminal else contextlib.nullcontext():
        yield
    console.print(f"{time.monotonic() - started:6.1f} s {what}")
