"""`finetune init`."""

from __future__ import annotations

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
        ("--storage", "x", "'x': the value does not have the required form; for example --storage s3://models/finetune"),
        ("--gpus", "-1", "-1: should be greater than or equal to 0"),
    ],
)  # fmt: skip
def test_invalid_value_is_reported_as_the_option(run_command: RunCommand, option: str, value: str, problem: str) -> None:
    result = run_command("init", "bot", "--model", "org/m", "--data", "s3://data/t.jsonl", option, value)
    assert result == (1, "", f"error: {option}: {problem}\n")


def test_missing_and_invalid_values_are_refused(run_command: RunCommand, write_file: WriteFile, tmp_path: Path) -> None:
    assert (
        "--model is missing; `finetune init` asks for missing values only on a terminal"
        in run_command("init", "bot", "--data", "x/y")[2]
    )
    assert "metadata.name" in run_command("init", "Bad", "--model", "org/m", "--data", "x/y")[2]
    assert "--method: unknown value lra" in run_command("init", "bot", "--model", "o/m", "--data", "x/y", "--method", "lra")[2]
    existing = write_file("job.yaml", "")
    assert (
        "already exists; choose another file"
        in run_command("init", "bot", "--model", "o/m", "--data", "x/y", "-o", existing)[2]
    )
