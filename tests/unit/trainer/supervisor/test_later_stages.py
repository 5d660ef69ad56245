"""The stages after training: each runs once per model, and an attempt continues with the first open stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from finetune_api.errors import DataError, StorageError
from finetune_api.pod import RunConfig
from finetune_api.spec.enums import OutputKind
from finetune_api.status import EvaluationResult, MetricResult, Output, Stage
from finetune_trainer.checkpoint.manifest import Manifest
from finetune_trainer.checkpoint.tree import CheckpointTree, FencedOutError
from finetune_trainer.inputs import Inputs
from finetune_trainer.settings import Settings
from finetune_trainer.stages.files import OUTPUT_FOLDER, PARTS_FOLDER, RESULT_FILE, StageResult, StageTask
from finetune_trainer.storage.folder import FolderStore
from finetune_trainer.supervisor.exit_decision import StageReport
from finetune_trainer.supervisor.later_stages import LaterStages, StoppedError
from finetune_trainer.supervisor.run_results import RunResults
from finetune_trainer.supervisor.run_state import RunState

from tests.support.learning import make_run

EVALUATION = EvaluationResult(rows=2, metrics={"perplexity": MetricResult(value=2.5)})
RECORD = "run/stages/evaluating.json"


class FakeStages(LaterStages):
    """Stages whose processes are replaced by a function."""

    calls: list[StageTask]

    def _run_process(self, stage: Stage, folder: Path) -> None:
        self.calls.append(StageTask.read(folder))
        self.behaviour(folder)

    @staticmethod
    def behaviour(folder: Path) -> None:
        (folder / OUTPUT_FOLDER / "predictions.jsonl").write_text('{"a": 1}\n')
        (folder / RESULT_FILE).write_text(StageResult(evaluation=EVALUATION).model_dump_json(by_alias=True))


class Attempt:
    """One attempt of a job whose model is committed."""

    def __init__(self, folder: Path, number: int, *, has_trained: bool = True) -> None:
        self.run, self.inputs = _run_of(folder, number)
        self.tree = CheckpointTree(FolderStore(folder / "store", f"file://{folder}/store"))
        work = folder / f"work-{number}"
        work.mkdir()
        if has_trained:
            self.inputs.write(work)
            (work / "output" / "final").mkdir(parents=True)
        self.fetched, self.is_stopped = 0, False
        settings = Settings(folder / "run.json", None, work, folder / "log", 0, 0, "node", f"{number:08d}")
        self.state = RunState()
        results = RunResults(self.run, self.tree, work / "output")
        self.stages = FakeStages(
            self.run, settings, self.tree, self.state, results=results, fetch_inputs=self._fetch, is_stop_requested=lambda: self.is_stopped
        )
        self.stages.calls = []

    def _fetch(self) -> Inputs:
        self.fetched += 1
        return self.inputs

    def end(self, output: Output) -> StageReport:
        return self.stages.run(output)


def _run_of(folder: Path, number: int) -> tuple[RunConfig, Inputs]:
    spec = {"evaluation": {"metrics": ["perplexity"]}, "dataset": {"split": {"test": 0.2}}}
    (folder / f"inputs-{number}").mkdir()
    run, inputs = make_run(folder / f"inputs-{number}", folder / "model", spec)
    return run.model_copy(update={"attempt": number}), inputs


@pytest.fixture
def output(tmp_path: Path) -> Output:
    """The committed model of attempt 1."""
    tree = CheckpointTree(FolderStore(tmp_path / "store", f"file://{tmp_path}/store"))
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "model.safetensors").write_bytes(b"weights")
    entries = tree.upload("model", "a1-00000001", tmp_path / "final")
    marker = tree.commit("model", Manifest(incarnation="a1-00000001", step=4, kind=OutputKind.MODEL, files=entries))
    return Output(uri=tree.uri("model/a1-00000001"), sha256=marker.manifest_sha256, kind=OutputKind.MODEL)


def test_a_stage_stores_its_files_and_its_record(tmp_path: Path, output: Output) -> None:
    attempt = Attempt(tmp_path, 1)
    assert attempt.end(output) == StageReport(output=output)
    assert attempt.state.report().evaluation == EVALUATION and attempt.fetched == 0
    assert attempt.stages.calls[0].model == tmp_path / "work-1" / "output" / "final"
    assert attempt.tree.store.get("evaluation/predictions.jsonl") == b'{"a": 1}\n'
    record = json.loads(attempt.tree.store.get(RECORD) or b"")
    assert (record["modelSha256"], record["attempt"], record["result"]["evaluation"]) == (output.sha256, 1, EVALUATION.to_wire())
    assert record["files"][0]["key"] == "evaluation/predictions.jsonl" and record["files"][0]["size"] == 9


def test_a_later_attempt_skips_a_stage_that_is_done(tmp_path: Path, output: Output) -> None:
    Attempt(tmp_path, 1).end(output)
    later = Attempt(tmp_path, 2, has_trained=False)
    assert later.end(output) == StageReport(output=output)
    assert later.stages.calls == [] and later.fetched == 0 and later.state.report().evaluation == EVALUATION


@pytest.mark.parametrize("damaged", ["no record", "another model", "not JSON"])
def test_a_later_attempt_downloads_the_model_and_repeats_an_open_stage(damaged: str, tmp_path: Path, output: Output) -> None:
    first = Attempt(tmp_path, 1)
    first.end(output)
    match damaged:
        case "no record":
            first.tree.store.delete([RECORD])
        case "another model":
            record = json.loads(first.tree.store.get(RECORD) or b"") | {"modelSha256": "0" * 64}
            first.tree.store.put(RECORD, json.dumps(record).encode())
        case "not JSON":
            first.tree.store.put(RECORD, b"{")
    later = Attempt(tmp_path, 2, has_trained=False)
    assert later.end(output) == StageReport(output=output)
    assert later.fetched == 1
    assert (later.stages.calls[0].model / "model.safetensors").read_bytes() == b"weights"
    assert json.loads(later.tree.store.get(RECORD) or b"")["attempt"] == 2


def test_a_damaged_model_is_found_before_the_stage_runs(tmp_path: Path, output: Output) -> None:
    (tmp_path / "store" / "model" / "a1-00000001" / "model.safetensors").write_bytes(b"WEIGHTS")
    attempt = Attempt(tmp_path, 2, has_trained=False)
    report = attempt.end(output)
    assert report.failure is not None and report.failure.error.code == "ModelDamaged" and report.open_stages == [Stage.EVALUATING]
    assert attempt.stages.calls == []


def test_a_failure_leaves_the_stage_open(tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    error = DataError("NoTrainableToken", "m")

    def fail(_folder: Path) -> None:
        raise error

    monkeypatch.setattr(FakeStages, "behaviour", staticmethod(fail))
    attempt = Attempt(tmp_path, 1)
    report = attempt.end(output)
    assert report.failure is not None and (report.failure.stage, report.failure.error) == (Stage.EVALUATING, error)
    assert report.open_stages == [Stage.EVALUATING] and attempt.tree.store.get(RECORD) is None


def test_a_stop_leaves_the_stage_open_without_a_failure(tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_folder: Path) -> None:
        raise StoppedError

    monkeypatch.setattr(FakeStages, "behaviour", staticmethod(stop))
    assert Attempt(tmp_path, 1).end(output) == StageReport([Stage.EVALUATING], output=output)
    stopped_before = Attempt(tmp_path, 2)
    stopped_before.is_stopped = True
    assert stopped_before.end(output) == StageReport([Stage.EVALUATING], output=output) and stopped_before.stages.calls == []


def test_an_attempt_that_was_superseded_runs_no_stage(tmp_path: Path, output: Output) -> None:
    attempt = Attempt(tmp_path, 1)
    attempt.tree.begin_attempt(2, b"{}")
    report = attempt.end(output)
    assert report.failure is not None and isinstance(report.failure.error, FencedOutError) and attempt.stages.calls == []


def test_a_process_without_a_result_is_a_failure(tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeStages, "behaviour", staticmethod(lambda _folder: None))
    report = Attempt(tmp_path, 1).end(output)
    assert report.failure is not None and report.failure.error.code == "NoStageResult"


def stop_after_a_part(attempt: Attempt) -> list[dict[str, str]]:
    """Let the attempt finish one part of its stage, then stop it. Returns the parts that the stage began with, once it has run."""
    found: list[dict[str, str]] = []

    def run(folder: Path) -> None:
        found.append({path.name: path.read_text() for path in (folder / PARTS_FOLDER).iterdir()})
        (folder / PARTS_FOLDER / f"task-{attempt.run.attempt}.json").write_text("{}")
        (folder / PARTS_FOLDER / "task-9.part").write_text("{")  # not complete yet
        attempt.stages._store_parts()
        raise StoppedError

    attempt.stages.behaviour = run  # type: ignore[method-assign]
    return found


def test_finished_parts_of_a_stopped_stage_are_given_to_the_next_attempt(tmp_path: Path, output: Output) -> None:
    first, second, other = (Attempt(tmp_path, number) for number in (1, 2, 3))
    found = stop_after_a_part(first)
    assert first.end(output).open_stages == [Stage.EVALUATING] and found == [{}]
    found = stop_after_a_part(second)
    second.end(output)
    assert found == [{"task-1.json": "{}"}]
    stored = {stat.key.rpartition("/")[2] for stat in first.tree.store.list("run/stages/evaluating-parts/")}
    assert stored == {"task-1.json", "task-2.json"}
    found = stop_after_a_part(other)
    other.end(output.model_copy(update={"sha256": "0" * 64}))
    assert found == [{}]  # parts of another model do not count


def test_a_part_that_cannot_be_stored_adds_a_note(tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = Attempt(tmp_path, 1)
    found = stop_after_a_part(attempt)

    def fail(*_: object) -> None:
        raise StorageError("StorageFailed", "the store answers 503")

    monkeypatch.setattr(attempt.tree.store, "put_file", fail)
    assert attempt.end(output).failure is None and found == [{}]
    assert attempt.state.report().resolved.notes == ["some results of finished tasks were not stored: StorageFailed"]
