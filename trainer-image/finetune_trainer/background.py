"""Repeats a short action in a background thread while a block of code runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeat_in_background(action: Callable[[], None], interval_seconds: float, thread_name: str) -> Iterator[None]:
    """Call `action` at once and then every `interval_seconds`, in a thread named `thread_name`, until the `with` block ends."""
    end_event = threading.Event()

    def repeat() -> None:
        action()
        while not end_event.wait(interval_seconds):
            action()

    thread = threading.Thread(target=repeat, name=thread_name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end_event.set()
        thread.join()
