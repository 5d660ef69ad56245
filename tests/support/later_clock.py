"""Pytest plugin: the first xdist worker collects the tests with the true time, and all other workers collect them with a clock that is ahead.

pytest-xdist aborts a run whose workers collect different tests. A run with several workers thus fails if a test id depends on the time, on the
process or on its hash seed.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import pytest

SECONDS_AHEAD = 1.5


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Collect the tests with a clock that is ahead, except on the first worker."""
    worker = getattr(session.config, "workerinput", {}).get("workerid", "gw0")
    if worker == "gw0":
        return (yield)
    with clock_ahead(SECONDS_AHEAD):
        return (yield)


@contextmanager
def clock_ahead(seconds: float) -> Iterator[None]:
    """Replace `time.time` by a clock that is ahead, until the `with` block ends. After the block, modules that have imported the replacement get the true
    time from it.
    """
    true_time, offset = time.time, seconds

    def time_ahead() -> float:
        return true_time() + offset

    time.time = time_ahead
    try:
        yield
    finally:
        offset, time.time = 0.0, true_time
