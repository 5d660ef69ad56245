"""The model of these tests is random: what an objective prefers shows at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.models import libraries, other_model, raw_model  # noqa: F401  fixtures


@pytest.fixture(scope="session")
def model(raw_model: Path) -> Path:  # noqa: F811  the fixture by that name
    """Random weights."""
    return raw_model
