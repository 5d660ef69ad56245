"""The rig of the fault tests, for the rows that are quick enough for every test run."""

import pytest

from tests.support.rig import fault_cluster, rig
from tests.support.rows import register

__all__ = ["fault_cluster", "rig"]


def pytest_configure(config: pytest.Config) -> None:
    register(config)
