"""The libraries as jobs of every kind need them in one process."""

from tests.support.models import libraries  # noqa: F401  a fixture
