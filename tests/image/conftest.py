"""The built trainer image for all tests in this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.trainer_image import TrainerImage, open_trainer_image


@pytest.fixture(scope="session")
def trainer_image() -> Iterator[TrainerImage]:
    """The trainer image of this checkout."""
    with open_trainer_image() as image:
        yield image
