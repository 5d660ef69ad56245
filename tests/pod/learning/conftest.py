"""The model of these tests is pre-trained, because adapters on random weights learn almost nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.models import libraries, raw_model, taught_model  # noqa: F401  fixtures


@pytest.fixture(scope="session")
def model(taught_model: Path) -> Path:  # noqa: F811  the argument is the imported fixture
    """A model that is pre-trained on the ten questions of the tests, but with other answers than the tests train."""
    return taught_model
