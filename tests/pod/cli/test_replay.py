"""`finetune replay` with the real trainer: it reproduces the weights on a CPU, and it reports a changed seed, changed data and a damaged model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.pod.cli.test_run_local import JOB, WITHOUT_VERIFICATION, run_finetune
from tests.support.lineage import edit_json
from tests.support.tiny import make_tiny_model

pytestmark = [pytest.mark.pod, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder with a finished run in `out`."""
    root = tmp_path_factory.mktemp("project")
    make_tiny_model(root / "tiny")
    turns = [[{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i}"}] for i in range(24)]
    (root / "rows.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns), encoding="utf-8")
    (root / "job.yaml").write_text(JOB, encoding="utf-8")
    result = run_finetune(root, "run", "job.yaml", "--local", "-o", "out", "--set", "training.seed=3", *WITHOUT_VERIFICATION)
    assert result.returncode == 0, result.stderr
    return root


@pytest.fixture
def run_folder(folder: Path) -> Path:
    (run_folder,) = (folder / "out/local/bot").iterdir()
    return run_folder


@pytest.mark.slow
def test_a_replay_reproduces_the_weights(folder: Path, run_folder: Path) -> None:
    result = run_finetune(folder, "replay", f"file://{run_folder}", "--keep", "again")
    assert (result.returncode, "equal: all " in result.stdout) == (0, True), result.stdout + result.stderr
    assert "6/6 (100%)" in result.stderr
    (repeated_run_folder,) = (folder / "again/local/bot").iterdir()
    weights = [next(root.glob("model/a*/adapter_model.safetensors")).read_bytes() for root in (run_folder, repeated_run_folder)]
    assert weights[0] == weights[1]
    verify_result = run_finetune(folder, "verify", f"file://{run_folder}")
    assert verify_result.returncode == 0, verify_result.stdout


@pytest.mark.faults
def test_a_changed_seed_in_the_statement_gives_other_weights(folder: Path, run_folder: Path) -> None:
    statement = run_folder / "lineage/statement.json"
    content_before = statement.read_bytes()
    edit_json(statement, lambda value: value["predicate"]["buildDefinition"]["externalParameters"]["spec"]["training"].update(seed=4))
    try:
        result = run_finetune(folder, "replay", f"file://{run_folder}")
    finally:
        statement.write_bytes(content_before)
    assert result.returncode == 2, result.stderr
    assert "warning: StatementContradictsRun: training.seed in the statement" in result.stderr
    last_line = result.stdout.splitlines()[-1]
    assert last_line.startswith("different: ") and "the largest difference is " in last_line
    assert "the reason is unknown: the run may have used another kind of CPU" in result.stderr


def test_changed_data_are_refused_before_the_training(folder: Path, run_folder: Path) -> None:
    rows = folder / "rows.jsonl"
    content_before = rows.read_text()
    rows.write_text(content_before.replace("question 1", "question one"))
    try:
        result = run_finetune(folder, "replay", f"file://{run_folder}")
    finally:
        rows.write_text(content_before)
    assert result.returncode == 2
    assert "InputsChanged: the inputs are not those of the run that is replayed: training data is " in result.stderr
    assert "equal" not in result.stdout and "training  " not in result.stderr


def test_a_damaged_model_is_not_compared(folder: Path, run_folder: Path) -> None:
    weights = next(run_folder.glob("model/a*/adapter_model.safetensors"))
    content_before = weights.read_bytes()
    weights.write_bytes(content_before[:-1])
    try:
        result = run_finetune(folder, "replay", f"file://{run_folder}")
    finally:
        weights.write_bytes(content_before)
    assert (result.returncode, "FileChanged: " in result.stderr) == (1, True)
