"""Fixtures for the tests of fault matrix rows that are quick enough for `make test`."""

import pytest

from tests.support.fault_rows import register_plugin
from tests.support.rig import fault_cluster, rig

__all__ = ["fault_cluster", "rig"]


def pytest_configure(config: pytest.Config) -> None:
    register_plugin(config)
