"""Attempts of a job that run only the stages after training. The storage is a local folder, and each stage calls a function of the test instead of starting a
process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune_api.pod import RunConfig
from finetune_api.spec.enums import OutputKind
from finetune_api.status import EvaluationResult, MetricResult, Output, Stage
from finetune_trainer.checkpoint.manifest import Manifest
from finetune_trainer.checkpoint.tree import CheckpointTree
from finetune_trainer.inputs import Inputs
from finetune_trainer.settings import Settings
from finetune_trainer.stages.files import OUTPUT_FOLDER, RESULT_FILE, StageResult, StageTask
from finetune_trainer.storage.folder import FolderStore
from finetune_trainer.supervisor.exit_decision import StageReport
from finetune_trainer.supervisor.later_stages import LaterStages
from finetune_trainer.supervisor.run_results import RunResults
from finetune_trainer.supervisor.run_state import RunState

from tests.support.learning import make_run

EVALUATION = EvaluationResult(rows=2, metrics={"perplexity": MetricResult(value=2.5)})
RECORD = "run/stages/evaluating.json"
EVALUATED: dict[str, Any] = {"evaluation": {"metrics": ["perplexity"]}, "dataset": {"split": {"test": 0.2}}}
COMPARED: dict[str, Any] = {"evaluation": {"metrics": ["perplexity"], "comparison": {}}, "dataset": {"split": {"test": 0.2}}}
MERGED: dict[str, Any] = {"output": {"mergeAdapter": True}}


class FakeStages(LaterStages):
    """The stages after training. Each stage calls the function `behaviour` instead of starting a process."""

    calls: list[StageTask]

    def _run_process(self, folder: Path) -> None:
        self.calls.append(StageTask.read(folder))
        self.behaviour(folder)

    @staticmethod
    def behaviour(folder: Path) -> None:
        """Write the files that the stage `evaluating` writes."""
        (folder / OUTPUT_FOLDER / "predictions.jsonl").write_text('{"a": 1}\n')
        (folder / RESULT_FILE).write_text(StageResult(evaluation=EVALUATION).model_dump_json(by_alias=True))


class Attempt:
    """One attempt of a job whose final model is already committed."""

    def __init__(self, folder: Path, number: int, *, has_trained: bool = True, spec: dict[str, Any] = EVALUATED) -> None:
        self.run, self.inputs = _make_attempt_run(folder, number, spec)
        self.tree = CheckpointTree(FolderStore(folder / "store", f"file://{folder}/store"))
        work_folder = folder / f"work-{number}"
        work_folder.mkdir()
        if has_trained:
            self.inputs.write(work_folder)
            (work_folder / "output" / "final").mkdir(parents=True)
        self.fetched, self.is_stopped, self.is_save_deadline_passed = 0, False, False
        settings = Settings(folder / "run.json", None, work_folder, folder / "log", 0, 0, "node", f"{number:08d}")
        self.state = RunState()
        results = RunResults(self.run, self.tree, work_folder / "output")
        self.stages = FakeStages(
            self.run, settings, self.tree, self.state, results=results, fetch_inputs=self._fetch, is_stop_requested=lambda: self.is_stopped,
            is_save_deadline_passed=lambda: self.is_save_deadline_passed,
        )
        self.stages.calls = []

    def _fetch(self) -> Inputs:
        self.fetched += 1
        return self.inputs

    def end(self, output: Output) -> StageReport:
        """Run the stages after training for the model `output`."""
        return self.stages.run(output)


def _make_attempt_run(folder: Path, number: int, spec: dict[str, Any]) -> tuple[RunConfig, Inputs]:
    (folder / f"inputs-{number}").mkdir()
    run, inputs = make_run(folder / f"inputs-{number}", folder / "model", spec)
    publish = f"file://{folder}/copies/{run.spec.output.dir}" if run.spec.output.dir else None
    return run.model_copy(update={"attempt": number, "publish": publish}), inputs


def commit_model(folder: Path) -> Output:
    """Commit a final model to the folder's storage, as attempt 1 would."""
    tree = CheckpointTree(FolderStore(folder / "store", f"file://{folder}/store"))
    (folder / "final").mkdir()
    (folder / "final" / "model.safetensors").write_bytes(b"weights")
    entries = tree.upload("model", "a1-00000001", folder / "final")
    marker = tree.commit("model", Manifest(incarnation="a1-00000001", step=4, kind=OutputKind.MODEL, files=entries))
    return Output(uri=tree.uri("model/a1-00000001"), sha256=marker.manifest_sha256, kind=OutputKind.MODEL)


def write_merged_model(folder: Path) -> None:
    """Write a merged model with three files, as the process of the stage `merging` does."""
    for name in ("config.json", "model-1.safetensors", "model-2.safetensors"):
        (folder / OUTPUT_FOLDER / name).write_text(name)
    (folder / RESULT_FILE).write_text(StageResult().model_dump_json(by_alias=True))


def write_measurements(folder: Path) -> None:
    """Write measurements and a result, as the processes of the stages `evaluating` and `comparing` do."""
    if StageTask.read(folder).stage is Stage.EVALUATING:
        (folder / OUTPUT_FOLDER / "measurements.json").write_text('{"rowCount": 2}')
    (folder / RESULT_FILE).write_text(StageResult(evaluation=EVALUATION).model_dump_json(by_alias=True))
