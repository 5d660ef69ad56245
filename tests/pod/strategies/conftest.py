"""The fixture `libraries` prepares the libraries once, because the runs of all strategies share this process."""

from tests.support.models import libraries  # noqa: F401  a fixture
