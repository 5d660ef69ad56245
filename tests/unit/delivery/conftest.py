"""Add `scripts/`, which is not a package, to the import path, and build Helm if necessary."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from finetune_cli.main import app
from typer.testing import CliRunner, Result

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "scripts"))


RunFinetune = Callable[[list[str]], Result]


@pytest.fixture(scope="session")
def run_finetune() -> RunFinetune:
    """Return a function that runs `finetune` in the process of the test. The function returns the exit code and the output of the program."""
    return lambda arguments: CliRunner().invoke(app, arguments)


@pytest.fixture(scope="session")
def root() -> Path:
    """Root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def helm(root: Path) -> Path:
    """Build Helm unless the cache already contains the program. Returns the path of the program."""
    completed_process = subprocess.run([sys.executable, root / "scripts/tools.py"], check=True, capture_output=True, text=True)
    return Path(completed_process.stdout.strip())
