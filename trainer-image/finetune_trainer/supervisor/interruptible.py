"""Runs an action in a thread, so that the supervisor can end even while the action waits for a server that does not respond."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

POLL_SECONDS = 0.05
THREAD_NAME = "interruptible"
T = TypeVar("T")


class StoppedError(Exception):
    """Raised if a stop is requested while an action runs."""


def run_until(must_end: Callable[[], bool], action: Callable[[], T]) -> T:
    """Run the action in a thread and return its result. Errors: those of the action; StoppedError as soon as `must_end` returns True.

    After a stop, the thread continues until the action ends or the process exits. The next attempt must therefore be able to repeat the action.
    """
    result_future: Future[T] = Future()

    def run() -> None:
        try:
            result_future.set_result(action())
        except BaseException as error:
            result_future.set_exception(error)

    threading.Thread(target=run, name=THREAD_NAME, daemon=True).start()
    while not wait([result_future], POLL_SECONDS).done:
        if must_end():
            raise StoppedError
    if result_future.exception() is not None and must_end():
        raise StoppedError from result_future.exception()  # A transfer that ends because of the stop request can raise any error.
    return result_future.result()
