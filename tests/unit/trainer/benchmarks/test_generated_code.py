"""The HumanEval benchmark cuts completions, and runs their code in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from finetune_api.errors import ConfigError
from finetune_trainer.benchmarks import generated_code
from finetune_trainer.benchmarks.generated_code import CodeProblem, completion_passes_tests, read_problems

ADD_PROBLEM = CodeProblem("def add(a, b):\n", "def check(candidate):\n    assert candidate(2, 3) == 5\n", "add")


@pytest.mark.parametrize(
    ("completion", "passes"),
    [
        ("    return a + b\n", True),
        ("    return a * b\n", False),
        ("    return a +\n", False),
        ("    return a + b\nprint('x')\nraise ValueError\n", True),  # the completion is cut before `print`, so ValueError is not raised
        ("    import os\n    return 5 if dict(os.environ) in ({}, {'LC_CTYPE': 'C.UTF-8'}) else 0\n", True),
        ("    open('written', 'w').close()\n    return a + b\n", True),
    ],
)
def test_a_completion_passes_if_the_tests_of_its_problem_pass(completion: str, passes: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hidden")
    monkeypatch.chdir(tmp_path)
    assert completion_passes_tests(ADD_PROBLEM, completion) is passes
    assert list(tmp_path.iterdir()) == []


def test_code_that_does_not_end_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated_code, "TIME_LIMIT_SECONDS", 1.0)
    assert not completion_passes_tests(ADD_PROBLEM, "    while True: pass\n")


def test_problems_are_read_from_json_lines_and_parquet(tmp_path: Path) -> None:
    row = {"task_id": "x", "prompt": ADD_PROBLEM.prompt, "test": ADD_PROBLEM.test, "entry_point": ADD_PROBLEM.entry_point}
    with pytest.raises(ConfigError) as missing:
        read_problems(tmp_path, "folder")
    assert missing.value.code == "BenchmarkDataMissing"
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({name: [value] for name, value in row.items()}), tmp_path / "rows.parquet")
    assert read_problems(tmp_path, "folder") == [ADD_PROBLEM]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"test": None}))
    with pytest.raises(ConfigError, match="problem 2 needs the texts prompt, test, entry_point"):
        read_problems(tmp_path, "folder")
