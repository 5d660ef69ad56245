"""The fixture for the trainer image, which all tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.trainer_image import TrainerImage, open_trainer_image


@pytest.fixture(scope="session")
def trainer_image() -> Iterator[TrainerImage]:
    """The trainer image that is built from this checkout."""
    with open_trainer_image() as image:
        yield image
