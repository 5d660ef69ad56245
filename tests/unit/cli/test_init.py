"""`finetune init`."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.cli.conftest import RunCommand, WriteFile


def test_all_unknown_values_are_reported(run_command: RunCommand) -> None:
    stderr = run_command("init", "bot", "--model", "org/m", "--data", "org/d", "--method", "x", "--trainer", "y")[2]
    assert [line.split(";")[0] for line in stderr.splitlines()] == [
        "error: --method: unknown value x",
        "error: --trainer: unknown value y",
    ]


@pytest.mark.parametrize("trainer", ["sft", "dpo", "grpo", "kto", "orpo", "reward"])
def test_written_manifest_is_valid(run_command: RunCommand, write_file: WriteFile, trainer: str) -> None:
    code, text, _ = run_command("init", "bot", "--model", "org/m", "--data", "s3://data/t.jsonl", "--trainer", trainer)
    assert code == 0
    stderr = run_command("validate", write_file("job.yaml", text))[2]
    assert [line for line in stderr.splitlines() if "NotSupportedYet" not in line] == []


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        ("--storage", "x", "'x' is not s3://bucket/prefix, pvc://claim/path or file:///path; for example --storage s3://models/finetune"),
        ("--gpus", "-1", "-1: should be greater than or equal to 0; for example --gpus 8"),
    ],
)  # fmt: skip
def test_invalid_value_is_reported_as_the_option(run_command: RunCommand, option: str, value: str, problem: str) -> None:
    outcome = run_command("init", "bot", "--model", "org/m", "--data", "s3://data/t.jsonl", option, value)
    assert outcome == (1, "", f"error: {option}: {problem}\n")


def test_missing_and_invalid_values_are_refused(run_command: RunCommand, write_file: WriteFile, tmp_path: Path) -> None:
    assert (
        "--model is missing; `finetune init` asks for missing values only on a terminal"
        in run_command("init", "bot", "--data", "x/y")[2]
    )
    assert "metadata.name" in run_command("init", "Bad", "--model", "org/m", "--data", "x/y")[2]
    assert "--method: unknown value lra" in run_command("init", "bot", "--model", "o/m", "--data", "x/y", "--method", "lra")[2]
    existing_path = write_file("job.yaml", "")
    assert (
        "already exists; choose another file"
        in run_command("init", "bot", "--model", "o/m", "--data", "x/y", "-o", existing_path)[2]
    )


def answer_on_terminal(folder: Path, words: list[str], answers: list[str]) -> tuple[int, str, str]:
    """Run `init` with a pseudo-terminal as stdin, and return exit code, stdout and stderr."""
    terminal, program_side = pty.openpty()
    try:
        os.write(terminal, "".join(f"{answer}\n" for answer in answers).encode())
        command = [sys.executable, "-m", "finetune_cli", "init", *words]
        env = {**os.environ, "NO_COLOR": "1"}
        completed_process = subprocess.run(command, stdin=program_side, capture_output=True, text=True, cwd=folder, env=env, timeout=30, check=False)
    finally:
        os.close(terminal)
        os.close(program_side)
    return completed_process.returncode, completed_process.stdout, completed_process.stderr


def test_terminal_asks_again_for_every_wrong_value(tmp_path: Path, run_command: RunCommand) -> None:
    (tmp_path / "job.yaml").write_text("")
    code, out, stderr = answer_on_terminal(
        tmp_path, ["--method", "lra", "--gpus", "-1", "-o", "job.yaml"], ["Bad Name", "", "org/m", "s3://data/t.jsonl", "lora", "bot", "two", "0", "new.yaml"]
    )
    assert (code, out) == (0, "")
    errors = [line.rpartition("error: ")[2].split(";")[0] for line in stderr.splitlines() if "error: " in line]
    assert [error.split(":")[0] for error in errors] == [
        "nothing", "--method", "metadata.name", "--gpus", "two", "job.yaml already exists",
    ]  # fmt: skip
    text = (tmp_path / "new.yaml").read_text()
    assert ('name: "bot"' in text, "gpusPerNode: 0" in text, 'source: "org/m"' in text) == (True, True, True)
    assert run_command("validate", tmp_path / "new.yaml")[0] == 0
    assert (tmp_path / "job.yaml").read_text() == ""


def test_end_of_input_ends_the_questions(tmp_path: Path) -> None:
    code, out, _ = answer_on_terminal(tmp_path, ["bot"], ["\x04"])
    assert (code, out) == (1, "")
