"""The HumanEval benchmark: the model completes Python functions, and unit tests run the result (Chen et al. 2021, arXiv 2107.03374).

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

TASK = "humaneval"
DATASET = "openai/openai_humaneval"
STOP_TEXTS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""A completion ends before the first of these texts, as in the original benchmark."""
MAX_NEW_TOKENS = 512
TIME_LIMIT_SECONDS = 10.0
MEMORY_LIMIT_BYTES = 2 << 30
COLUMNS = ("prompt", "test", "entry_point")


@dataclass(frozen=True)
class CodeProblem:
    """One function to complete, and its tests."""

    prompt: str
    test: str
    entry_point: str


def read_problems(folder: Path, field: str) -> list[CodeProblem]:
    """Read the problems in the JSON Lines or Parquet files of a folder. Errors: ConfigError BenchmarkDataMissing, BenchmarkDataInvalid."""
    rows = [row for path in sorted(folder.rglob("*.jsonl")) for row in _read_lines(path, field)]
    if not rows:
        rows = [row for path in sorted(folder.rglob("*.parquet")) for row in _read_parquet(path)]
    if not rows:
        raise ConfigError(
            "BenchmarkDataMissing", f"{field} contains neither *.jsonl nor *.parquet files with the problems of {DATASET}",
            hint=f"copy the files of the hub's data set repository {DATASET} to this folder",
        )  # fmt: skip
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not all(isinstance(row.get(column), str) for column in COLUMNS):
            raise ConfigError("BenchmarkDataInvalid", f"{field}: problem {number} needs the texts {', '.join(COLUMNS)}", hint=f"copy the files of {DATASET}")
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
    ends = [place for text in STOP_TEXTS if (place := completion.find(text)) >= 0]
    code = problem.prompt + completion[: min(ends, default=len(completion))]
    program = f"{code}\n\n{problem.test}\n\ncheck({problem.entry_point})\n"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "program.py").write_text(program, errors="replace")
        try:
            done = subprocess.run(
                [sys.executable, "-I", "program.py"], cwd=folder, env={}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, timeout=TIME_LIMIT_SECONDS, preexec_fn=_limit_resources, start_new_session=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0


def _limit_resources() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (int(TIME_LIMIT_SECONDS),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
