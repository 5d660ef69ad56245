"""Fixtures of the CLI tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from finetune_cli import main, output

Write = Callable[[str, str], Path]
Call = Callable[..., tuple[int, str, str]]
JOB = """\
apiVersion: finetune-operator.io/v1alpha1
kind: FineTuneJob
metadata: {name: bot}
spec:
  model: {source: org/m}
  dataset: {train: "s3://data/t.jsonl"}
"""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a file in the folder of the test."""

    def write_text(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_text


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Return a function that runs a command in this process and returns exit code, stdout and stderr."""
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*words: str | Path, tool_arguments: tuple[str, ...] = ()) -> tuple[int, str, str]:
        output.console.cache_clear()
        output.error_console.cache_clear()
        capsys.readouterr()
        code = main.run([str(word) for word in words], list(tool_arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
