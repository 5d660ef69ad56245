"""`finetune run --local` with the real trainer on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pod.cli.sources import SOURCES, import_options, make_rows
from tests.support.tiny import make_tiny_model

pytestmark = [pytest.mark.pod, pytest.mark.timeout(300)]
FINETUNE_COMMAND = [sys.executable, "-m", "finetune_cli"]
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
WITHOUT_VERIFICATION = ("--set", "output.verify=false")
"""Options for tests that do not need the verification of the stored model, which runs in a separate process."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a project folder with a tiny model, rows and a manifest."""
    root = tmp_path_factory.mktemp("project")
    make_tiny_model(root / "tiny")
    turns = [
        [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i}"}]
        for i in range(24)
    ]
    (root / "rows.jsonl").write_text(
        "".join(json.dumps({"messages": messages}) + "\n" for messages in turns), encoding="utf-8"
    )
    (root / "job.yaml").write_text(JOB, encoding="utf-8")
    return root


def run_finetune(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    return subprocess.run(
        [*FINETUNE_COMMAND, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_a_local_run_commits_its_model_with_the_layout_of_s3(folder: Path) -> None:
    result = run_finetune(folder, "run", "job.yaml", "--local", "-o", "out")
    assert result.returncode == 0, result.stderr
    (marker,) = (folder / "out/local/bot").glob("*/model/_COMMITTED")
    path = marker.parent / json.loads(marker.read_text())["path"]
    assert (path / "adapter_config.json").is_file()
    assert result.stdout == f"bot: done, the model is in file://{path}\n"
    page = next(folder.rglob("report/index.html"))
    assert f"report: {page}" in result.stderr.replace("\n", "")
    assert "6/6 (100%)" in result.stderr
    steps = sorted(path.parent.name for path in marker.parents[1].glob("checkpoints/*/_COMMITTED"))
    assert steps == ["step-00000003", "step-00000006"]


def test_a_failure_is_reported_with_its_hint(folder: Path) -> None:
    (folder / "bad.jsonl").write_text('{"messages": [{"role": "nobody", "content": "x"}]}\n', encoding="utf-8")
    failed_process = run_finetune(folder, "run", "job.yaml", "--local", "-o", "bad", "--set", "dataset.train=file://bad.jsonl")
    assert failed_process.returncode == 2
    assert "error: Data " in failed_process.stderr
    assert "Traceback" not in failed_process.stderr


def test_ctrl_c_saves_a_checkpoint_and_the_same_command_resumes(folder: Path) -> None:
    arguments = [
        "run",
        "job.yaml",
        "--local",
        "-o",
        "stopped",
        "--set",
        "training.maxSteps=300",
        "--set",
        "checkpoint.steps=1000",
        *WITHOUT_VERIFICATION,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    process = subprocess.Popen(
        [*FINETUNE_COMMAND, *arguments], cwd=folder, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("training"):
            break
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 1
    assert "run the same command again to continue" in stderr
    (checkpoint_marker,) = (folder / "stopped/local/bot").glob("*/checkpoints/*/_COMMITTED")
    saved_step = int(checkpoint_marker.parent.name.removeprefix("step-"))
    assert 0 < saved_step < 300
    run_with_other_seed = run_finetune(folder, *arguments, "--set", "training.seed=1")
    assert (run_with_other_seed.returncode, "holds results of a job bot with another spec" in run_with_other_seed.stderr) == (1, True)
    resume_result = run_finetune(folder, *arguments)
    assert resume_result.returncode == 0, resume_result.stderr
    message = json.loads((folder / "stopped/.finetune/bot/work/termination-message.json").read_text(encoding="utf-8"))
    assert (message["resumedFromStep"], message["step"]) == (saved_step, 300)


@pytest.mark.slow  # `make test` runs a manifest in this file, and compares the manifests of all sources in tests/unit/cli
@pytest.mark.parametrize("source", SOURCES)
def test_an_imported_job_trains(folder: Path, source: str) -> None:
    home = folder / source
    home.mkdir()
    (home / SOURCES[source].file).write_text(SOURCES[source].text, encoding="utf-8")
    (home / "rows.jsonl").write_text(make_rows(SOURCES[source].rows), encoding="utf-8")
    import_options_of_source = import_options(source, "./tiny", f"./{source}/rows.jsonl")
    import_result = run_finetune(folder, "import", f"{source}/{SOURCES[source].file}", *import_options_of_source, "-o", f"{source}/job.yaml")
    assert import_result.returncode == 0, import_result.stderr
    run_result = run_finetune(folder, "run", f"{source}/job.yaml", "--local", "-o", f"{source}/out")
    assert run_result.returncode == 0, run_result.stderr
    (marker,) = (home / "out" / "local").glob(f"{source}/*/model/_COMMITTED")
    adapter = marker.parent / json.loads(marker.read_text())["path"] / "adapter_config.json"
    assert json.loads(adapter.read_text(encoding="utf-8"))["r"] == SOURCES[source].rank
    message = json.loads((home / f"out/.finetune/{source}/work/termination-message.json").read_text(encoding="utf-8"))
    assert message["step"] == SOURCES[source].steps
