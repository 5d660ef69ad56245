"""`finetune run --local`: the real trainer on this machine, by the command a user types."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny import make_tiny_model

pytestmark = [pytest.mark.pod, pytest.mark.timeout(300)]
FINETUNE = [sys.executable, "-m", "finetune_cli"]
JOB = """\
apiVersion: finetune-operator.io/v1alpha1
kind: FineTuneJob
metadata: {name: bot}
spec:
  model: {source: "file://tiny"}
  dataset: {train: "file://rows.jsonl", format: messages, maxSequenceLength: 64}
  training: {maxSteps: 6, batchSizePerDevice: 2, gradientAccumulationSteps: 1}
  checkpoint: {steps: 3}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and rows, as a user's project would be."""
    root = tmp_path_factory.mktemp("project")
    make_tiny_model(root / "tiny")
    turns = [
        [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i}"}]
        for i in range(24)
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns), encoding="utf-8")
    (root / "job.yaml").write_text(JOB, encoding="utf-8")
    return root


def finetune(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    return subprocess.run([*FINETUNE, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_run_commits_its_model_where_s3_would_hold_it(folder: Path) -> None:
    done = finetune(folder, "run", "job.yaml", "--local", "-o", "out")
    assert done.returncode == 0, done.stderr
    (marker,) = (folder / "out/local/bot").glob("*/model/_COMMITTED")
    path = marker.parent / json.loads(marker.read_text())["path"]
    assert (path / "adapter_config.json").is_file()
    assert done.stdout == f"bot: done, file://{path}\n"
    assert "6/6 (100%)" in done.stderr
    steps = sorted(one.parent.name for one in marker.parents[1].glob("checkpoints/*/_COMMITTED"))
    assert steps == ["step-00000003", "step-00000006"]


def test_a_failure_is_told_with_its_hint(folder: Path) -> None:
    (folder / "bad.jsonl").write_text('{"messages": [{"role": "nobody", "content": "x"}]}\n', encoding="utf-8")
    failed = finetune(folder, "run", "job.yaml", "--local", "-o", "bad", "--set", "dataset.train=file://bad.jsonl")
    assert failed.returncode == 2
    assert "error: Data " in failed.stderr
    assert "Traceback" not in failed.stderr


def test_ctrl_c_saves_and_the_same_command_goes_on(folder: Path) -> None:
    words = [
        *FINETUNE,
        "run",
        "job.yaml",
        "--local",
        "-o",
        "stopped",
        "--set",
        "training.maxSteps=4000",
        "--set",
        "checkpoint.steps=4000",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    process = subprocess.Popen(
        words, cwd=folder, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("training"):
            break
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 1
    assert "the same command goes on from there" in said
    (step,) = (folder / "stopped/local/bot").glob("*/checkpoints/*/_COMMITTED")
    saved = int(step.parent.name.removeprefix("step-"))
    again = finetune(
        folder,
        "run",
        "job.yaml",
        "--local",
        "-o",
        "stopped",
        "--set",
        f"training.maxSteps={saved + 2}",
        "--set",
        "checkpoint.steps=4000",
    )
    assert again.returncode == 0, again.stderr
    log = (folder / "stopped/.finetune/bot/attempt-2.log").read_text(encoding="utf-8")
    assert f"step {saved + 2}/{saved + 2}" in log


def test_an_import_of_another_tool_trains(folder: Path) -> None:
    rows = [{"instruction": f"question {i}", "response": f"answer {i}"} for i in range(24)]
    (folder / "i.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "t.env").write_text(
        "MODEL_NAME=./tiny\nTRAIN_DATA_PATH=./i.jsonl\nDATASET_TYPE=instruction_jsonl\nEPOCHS=1\nDEVICE=cpu\nLORA_R=4\nMAX_LENGTH=64\n",
        encoding="utf-8",
    )
    imported = finetune(
        folder, "import", "t.env", "--set", "dataset.split.test=0", "--set", "dataset.split.train=0.9", "-o", "t.yaml"
    )
    assert imported.returncode == 0, imported.stderr
    text = (folder / "t.yaml").read_text(encoding="utf-8")
    kept = "\n".join(
        line
        for line in text.splitlines()
        if not line.startswith(("  output:", "    dir:", "    project:", "    layout:"))
    )
    (folder / "t.yaml").write_text(kept + "\n", encoding="utf-8")
    trained = finetune(folder, "run", "t.yaml", "--local", "-o", "env")
    assert trained.returncode == 0, trained.stderr
