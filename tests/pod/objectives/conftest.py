"""The model of these tests has random weights, so that the effect of an objective is visible after a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.models import libraries, other_model, raw_model  # noqa: F401  fixtures


@pytest.fixture(scope="session")
def model(raw_model: Path) -> Path:  # noqa: F811  the argument is the imported fixture
    """A model with random weights."""
    return raw_model
