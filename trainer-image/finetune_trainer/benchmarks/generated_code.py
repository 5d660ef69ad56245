"""Runs the HumanEval benchmark: unit tests check Python functions that the model has completed (Chen et al. 2021, arXiv 2107.03374).

The generated code runs in a separate process with an empty environment, a temporary working directory, and limits on time and memory.
The code can still use the network and read the files that the pod's user can read, so a job must set `allowCodeExecution`.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.errors import ConfigError

HUMANEVAL_TASK = "humaneval"
HUMANEVAL_DATASET = "openai/openai_humaneval"
STOP_TEXTS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""A completion is cut before the first place where one of these texts occurs, as in the original benchmark."""
MAX_NEW_TOKENS = 512
TIME_LIMIT_SECONDS = 10.0
MEMORY_LIMIT_BYTES = 2 << 30
PROBLEM_COLUMNS = ("prompt", "test", "entry_point")


@dataclass(frozen=True)
class CodeProblem:
    """One Python function that the model completes, and its tests."""

    prompt: str
    test: str
    entry_point: str


def read_problems(folder: Path, field: str) -> list[CodeProblem]:
    """Read the problems from the JSON Lines or Parquet files of a folder. `field`: name of the folder in messages.

    Errors: ConfigError BenchmarkDataMissing, BenchmarkDataInvalid.
    """
    rows = [row for path in sorted(folder.rglob("*.jsonl")) for row in _read_lines(path, field)]
    if not rows:
        rows = [row for path in sorted(folder.rglob("*.parquet")) for row in _read_parquet(path)]
    if not rows:
        raise ConfigError(
            "BenchmarkDataMissing", f"{field} contains neither *.jsonl nor *.parquet files with the problems of {HUMANEVAL_DATASET}",
            hint=f"copy the files of the hub's data set repository {HUMANEVAL_DATASET} to this folder",
        )  # fmt: skip
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not all(isinstance(row.get(column), str) for column in PROBLEM_COLUMNS):
            problem = f"{field}: problem {number} needs the texts {', '.join(PROBLEM_COLUMNS)}"
            raise ConfigError("BenchmarkDataInvalid", problem, hint=f"copy the files of {HUMANEVAL_DATASET}")
    return [CodeProblem(row["prompt"], row["test"], row["entry_point"]) for row in rows]


def _read_lines(path: Path, field: str) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except ValueError as error:
        raise ConfigError("BenchmarkDataInvalid", f"{field}: {path.name} is not valid JSON Lines: {error}", hint="correct the file") from error


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    from pyarrow import parquet

    return list(parquet.read_table(path).to_pylist())


def completion_passes_tests(problem: CodeProblem, completion: str) -> bool:
    """Whether the completed function passes the tests of its problem."""
    stop_positions = [position for text in STOP_TEXTS if (position := completion.find(text)) >= 0]
    code = problem.prompt + completion[: min(stop_positions, default=len(completion))]
    program = f"{code}\n\n{problem.test}\n\ncheck({problem.entry_point})\n"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "program.py").write_text(program, errors="replace")
        try:
            finished_process = subprocess.run(
                [sys.executable, "-I", "program.py"], cwd=folder, env={}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, timeout=TIME_LIMIT_SECONDS, preexec_fn=_limit_resources, start_new_session=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
    return finished_process.returncode == 0


def _limit_resources() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (int(TIME_LIMIT_SECONDS),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
