"""The model of these tests has been taught to speak, so that adapters have something to build on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.models import libraries, raw_model, taught_model  # noqa: F401  fixtures


@pytest.fixture(scope="session")
def model(taught_model: Path) -> Path:  # noqa: F811  the fixture by that name
    """Weights that know the words of the ten rows, with other answers."""
    return taught_model
