"""Mark all tests of this folder with `e2e`, because they run real pods."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of this folder with `e2e`, because they run real pods."""
    for item in items:
        if "tests/e2e/jobs" in item.path.as_posix():
            item.add_marker(pytest.mark.e2e)
