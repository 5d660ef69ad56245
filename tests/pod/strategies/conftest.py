"""Fixtures of the libraries: runs of every strategy share this process."""

from tests.support.models import libraries  # noqa: F401  a fixture
