"""Repeats a short action in a thread while the caller works."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeat_in_background(action: Callable[[], None], seconds: float, name: str) -> Iterator[None]:
    """Call `action` at once and then every `seconds`, in a thread with this name, until the block ends."""
    ended = threading.Event()

    def repeat() -> None:
        action()
        while not ended.wait(seconds):
            action()

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
