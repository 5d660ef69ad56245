"""Test ids must not depend on the current time or on the process, because all xdist workers must collect the same tests."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.later_clock import clock_ahead

ROOT = Path(__file__).parents[3]
TEST_FILE_TEXT = "import time, pytest\n@pytest.mark.parametrize('value', [{}])\ndef test_it(value): pass\n"


@pytest.mark.parametrize(
    ("parameter_code", "exit_code", "expected"),
    [
        ("f'at {time.time():.0f}'", 1, "Different tests were collected between gw"),
        ("f'hash {hash(pytest.__version__)}'", 1, "Different tests were collected between gw"),
        ("'at any time'", 0, "1 passed"),
    ],
    ids=["time", "hash seed", "constant"],
)
def test_workers_refuse_ids_that_differ_between_processes(parameter_code: str, exit_code: int, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "test_with_parameter.py"
    file.write_text(TEST_FILE_TEXT.format(parameter_code))
    env = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST_") and name != "PYTHONHASHSEED"}
    options = ["-q", "-n", "2", "-p", "no:cacheprovider", "-p", "tests.support.later_clock"]
    completed_process = subprocess.run([sys.executable, "-m", "pytest", *options, str(file)], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert completed_process.returncode == exit_code and expected in completed_process.stdout, completed_process.stdout + completed_process.stderr


def test_a_copy_of_the_replaced_clock_returns_the_true_time_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    with clock_ahead(1.5):
        copied = time.time
        assert time.time() == 1001.5
    assert (copied(), time.time()) == (1000.0, 1000.0)
