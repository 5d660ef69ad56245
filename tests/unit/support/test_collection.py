"""Test ids must not depend on the current time or on the process, because all xdist workers must collect the same tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
COLLECT_LATER = """
import sys, time
now = time.time
time.time = lambda: now() + 1.5
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""
"""A program that collects tests with a clock that is 1.5 seconds ahead."""


def ids_in_another_process(paths: list[str], config: pytest.Config) -> list[str]:
    """Collect tests from these files with the same -m and -k in a process with another clock and hash seed. Return their ids."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    options = ["--collect-only", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", config.option.markexpr]
    done = subprocess.run(
        [sys.executable, "-c", COLLECT_LATER, *options, "-k", config.option.keyword, *paths],
        cwd=ROOT, env=env | {"PYTHONHASHSEED": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_second_process_collects_the_same_tests_later(request: pytest.FixtureRequest) -> None:
    """A second process collects only those files of tests/unit that this run has collected, so that a run with one file stays quick."""
    ids = [item.nodeid for item in request.session.items if item.nodeid.startswith("tests/unit/")]
    paths = list(dict.fromkeys(node_id.partition("::")[0] for node_id in ids))
    assert ids_in_another_process(paths, request.config) == ids


def test_id_that_contains_the_time_differs_between_processes(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    file = tmp_path / "test_with_time.py"
    file.write_text(
        "import time, pytest\n"
        "@pytest.mark.parametrize('value', [f'at {time.time():.0f}'])\n"
        "def test_it(value): pass\n"
    )  # fmt: skip
    first = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", str(file)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    (later,) = ids_in_another_process([str(file)], request.config)
    assert later.partition("::")[2] not in first
