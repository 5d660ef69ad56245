"""The rig of the fault tests, for the rows that are quick enough to run each time."""

from tests.support.rig import fault_cluster, rig
from tests.support.rows import (
    pytest_configure,
    pytest_runtest_logreport,
    pytest_runtest_setup,
    pytest_terminal_summary,
)

__all__ = [
    "fault_cluster", "pytest_configure", "pytest_runtest_logreport", "pytest_runtest_setup", "pytest_terminal_summary",
    "rig",
]  # fmt: skip
