"""How the tests share two cores: files side by side, the tests of the one cluster with nodes one after another."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.support import rows

NODES = "tests/e2e/"
"""Where the tests of the cluster with nodes lie, of which there is one on a machine."""


if not os.environ.get("CI"):  # with CI set, hypothesis loads its own profile, which has no time limits and fixed examples
    settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("untimed")


def pytest_configure(config: pytest.Config) -> None:
    """The table of fault rows is printed by the process that gathers the results, which loads no conftest but this."""
    rows.register(config)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A run in the background of a script inherits it, and so would all programs that tests interrupt.
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several processes: a file is not torn apart, since its tests share what is slow to make."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]  # pytest-xdist is not typed
        def _split_scope(self, nodeid: str) -> str:
            return NODES if nodeid.startswith(NODES) else nodeid.partition("::")[0]

    return ByFile(config, log)


def pytest_make_parametrize_id(config: pytest.Config, val: object) -> str | None:
    """Bytes in parametrised ids by their length: content such as a gzip header may hold the current second."""
    return f"{len(val)}bytes" if isinstance(val, bytes) else None
