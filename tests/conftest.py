"""Distributes the tests to pytest-xdist workers: all tests of a file run on one worker, and all tests of the node cluster run on the same worker."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.support import fault_rows, later_clock

NODE_CLUSTER_TESTS = "tests/e2e/"
"""Folder of the tests that share the machine's only node cluster."""
NETWORK_TESTS = "tests/integration/delivery/test_network_policies.py"
"""Tests that create network namespaces. These tests never run at the same time as the node cluster, because the kernel reuses the namespace numbers of
ended pods.
"""


os.environ["CXX"] = "/no-c++-compiler-as-in-the-trainer-image"
"""torch compiles extensions with the program in `CXX`. The trainer image has no C++ compiler, so the tests must not find one either."""

if not os.environ.get("CI"):  # with CI set, hypothesis loads its own profile, which has no time limit and always tries the same examples
    settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("untimed")


def pytest_configure(config: pytest.Config) -> None:
    """Register the plugin that prints the fault rows. It is registered here, because the xdist controller prints the fault rows and loads no other conftest."""
    fault_rows.register_plugin(config)
    if not config.pluginmanager.is_registered(later_clock):
        config.pluginmanager.register(later_clock)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell starts background jobs with SIGINT ignored. Programs that the tests start would inherit the ignored SIGINT, so the tests could not interrupt
        # them.
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Run all tests of a file on one worker, because they share fixtures that are slow to create."""
    from xdist.scheduler import LoadScopeScheduling

    class ScheduleByFile(LoadScopeScheduling):  # type: ignore[misc]  # pytest-xdist is not typed
        def _split_scope(self, nodeid: str) -> str:
            return NODE_CLUSTER_TESTS if nodeid.startswith((NODE_CLUSTER_TESTS, NETWORK_TESTS)) else nodeid.partition("::")[0]

    return ScheduleByFile(config, log)


def pytest_make_parametrize_id(config: pytest.Config, val: object) -> str | None:
    """Use the length of bytes as the test id, because the bytes (for example a gzip header) may contain the current time."""
    return f"{len(val)}bytes" if isinstance(val, bytes) else None
