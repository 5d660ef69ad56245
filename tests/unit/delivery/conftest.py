"""The scripts are programs, not a package: make them importable here, and build Helm if it is not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "scripts"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def helm(root: Path) -> Path:
    """The Helm program of the cache."""
    out = subprocess.run([sys.executable, root / "scripts/tools.py"], check=True, capture_output=True, text=True)
    return Path(out.stdout.strip())
