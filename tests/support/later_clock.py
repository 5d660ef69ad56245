"""pytest plugin: all xdist workers but the first collect the tests with a clock that is ahead.

pytest-xdist ends a run whose workers have collected different tests. So every run with several workers shows that no test id depends on the
time, on the process or on its hash seed.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import pytest

SECONDS_AHEAD = 1.5


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Set the clock ahead during the collection of workers that are not the first one."""
    worker = getattr(session.config, "workerinput", {}).get("workerid", "gw0")
    if worker == "gw0":
        return (yield)
    with clock_ahead(SECONDS_AHEAD):
        return (yield)


@contextmanager
def clock_ahead(seconds: float) -> Iterator[None]:
    """Within the context, `time.time` is ahead. Afterwards, also modules that have imported the replaced function get the true time."""
    true_time, offset = time.time, seconds

    def time_ahead() -> float:
        return true_time() + offset

    time.time = time_ahead
    try:
        yield
    finally:
        offset, time.time = 0.0, true_time
