"""Fixtures for the rows of the fault matrix that are quick enough for every test run."""

import pytest

from tests.support.fault_rows import register_plugin
from tests.support.rig import fault_cluster, rig

__all__ = ["fault_cluster", "rig"]


def pytest_configure(config: pytest.Config) -> None:
    register_plugin(config)
