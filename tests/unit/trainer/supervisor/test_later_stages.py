"""The stages after training: each runs once per model, and an attempt continues with the first unfinished stage."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from finetune_api.errors import CredentialsError, DataError, NoCheckpointError, StorageError
from finetune_api.status import EvaluationResult, GateResult, Output, Stage
from finetune_trainer.checkpoint.tree import FencedOutError
from finetune_trainer.stages.files import PARTS_FOLDER, StageRecord, StageResult
from finetune_trainer.supervisor import later_stages
from finetune_trainer.supervisor.exit_decision import StageReport
from finetune_trainer.supervisor.interruptible import StoppedError
from finetune_trainer.supervisor.later_stages import LaterStages

from tests.support.later_stages import (
    COMPARED,
    EVALUATION,
    MERGED,
    RECORD,
    Attempt,
    FakeStages,
    commit_model,
    write_measurements,
    write_merged_model,
)


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return commit_model(tmp_path)


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
    later_attempt = Attempt(tmp_path, 2, has_trained=False)
    assert later_attempt.end(output) == StageReport(output=output)
    assert later_attempt.stages.calls == [] and later_attempt.fetched == 0 and later_attempt.state.report().evaluation == EVALUATION


@pytest.mark.parametrize("damage", ["no record", "another model", "not JSON"])
def test_a_later_attempt_downloads_the_model_and_repeats_an_open_stage(damage: str, tmp_path: Path, output: Output) -> None:
    first_attempt = Attempt(tmp_path, 1)
    first_attempt.end(output)
    match damage:
        case "no record":
            first_attempt.tree.store.delete([RECORD])
        case "another model":
            record = json.loads(first_attempt.tree.store.get(RECORD) or b"") | {"modelSha256": "0" * 64}
            first_attempt.tree.store.put(RECORD, json.dumps(record).encode())
        case "not JSON":
            first_attempt.tree.store.put(RECORD, b"{")
    later_attempt = Attempt(tmp_path, 2, has_trained=False)
    assert later_attempt.end(output) == StageReport(output=output)
    assert later_attempt.fetched == 1
    assert (later_attempt.stages.calls[0].model / "model.safetensors").read_bytes() == b"weights"
    assert json.loads(later_attempt.tree.store.get(RECORD) or b"")["attempt"] == 2


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
    stopped_attempt = Attempt(tmp_path, 2)
    stopped_attempt.is_stopped = True
    assert stopped_attempt.end(output) == StageReport([Stage.EVALUATING], output=output) and stopped_attempt.stages.calls == []


def test_a_superseded_attempt_runs_no_stage(tmp_path: Path, output: Output) -> None:
    attempt = Attempt(tmp_path, 1)
    attempt.tree.begin_attempt(2, b"{}")
    report = attempt.end(output)
    assert report.failure is not None and isinstance(report.failure.error, FencedOutError) and attempt.stages.calls == []


def test_an_attempt_that_is_superseded_while_its_stage_runs_stores_nothing(tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = Attempt(tmp_path, 1)
    write_result = FakeStages.behaviour

    def run(folder: Path) -> None:
        write_result(folder)
        attempt.tree.begin_attempt(2, b"{}")

    monkeypatch.setattr(FakeStages, "behaviour", staticmethod(run))
    report = attempt.end(output)
    assert report.failure is not None and isinstance(report.failure.error, FencedOutError)
    assert attempt.tree.store.get(RECORD) is None and list(attempt.tree.store.list("evaluation/")) == []


def test_a_superseded_attempt_stores_no_part_and_ends_its_stage(tmp_path: Path, output: Output) -> None:
    attempt = Attempt(tmp_path, 1)

    def run(folder: Path) -> None:
        (folder / PARTS_FOLDER / "task-1.json").write_text("{}")
        attempt.tree.begin_attempt(2, b"{}")
        attempt.stages._store_parts()

    attempt.stages.behaviour = run  # type: ignore[method-assign]
    report = attempt.end(output)
    assert report.failure is not None and isinstance(report.failure.error, FencedOutError)
    assert list(attempt.tree.store.list("run/stages/")) == []


def test_a_part_that_storage_refused_is_stored_later(tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = Attempt(tmp_path, 1)
    put_file, tries = attempt.tree.store.put_file, []

    def fail_once(path: Path, key: str) -> Any:
        tries.append(key)
        if len(tries) == 1:
            raise StorageError("StoreUnavailable", "m")
        return put_file(path, key)

    def run(folder: Path) -> None:
        (folder / PARTS_FOLDER / "task-1.json").write_text("{}")
        monkeypatch.setattr(attempt.tree.store, "put_file", fail_once)
        attempt.stages._store_parts()
        attempt.stages._store_parts()
        attempt.stages._store_parts()
        raise StoppedError

    attempt.stages.behaviour = run  # type: ignore[method-assign]
    attempt.end(output)
    assert len(tries) == 2 and tries[0] == tries[1] and attempt.tree.store.get(tries[0]) == b"{}"


def test_a_process_without_a_result_is_a_failure(tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeStages, "behaviour", staticmethod(lambda _folder: None))
    report = Attempt(tmp_path, 1).end(output)
    assert report.failure is not None and report.failure.error.code == "NoStageResult"


def stop_after_a_part(attempt: Attempt) -> list[dict[str, str]]:
    """Let the attempt finish one part of its stage, then stop the attempt.

    Returns a list. At its start, each run of the stage adds the finished parts that it has found to this list.
    """
    part_texts_per_run: list[dict[str, str]] = []

    def run(folder: Path) -> None:
        part_texts_per_run.append({path.name: path.read_text() for path in (folder / PARTS_FOLDER).iterdir()})
        (folder / PARTS_FOLDER / f"task-{attempt.run.attempt}.json").write_text("{}")
        (folder / PARTS_FOLDER / "task-9.part").write_text("{")  # not complete yet
        attempt.stages._store_parts()
        raise StoppedError

    attempt.stages.behaviour = run  # type: ignore[method-assign]
    return part_texts_per_run


def test_the_next_attempt_gets_the_finished_parts_of_a_stopped_stage(tmp_path: Path, output: Output) -> None:
    first_attempt, second_attempt, attempt_with_another_model = (Attempt(tmp_path, number) for number in (1, 2, 3))
    part_texts_per_run = stop_after_a_part(first_attempt)
    assert first_attempt.end(output).open_stages == [Stage.EVALUATING] and part_texts_per_run == [{}]
    part_texts_per_run = stop_after_a_part(second_attempt)
    second_attempt.end(output)
    assert part_texts_per_run == [{"task-1.json": "{}"}]
    stored_names = {stat.key.rpartition("/")[2] for stat in first_attempt.tree.store.list("run/stages/evaluating-parts/")}
    assert stored_names == {"task-1.json", "task-2.json"}
    part_texts_per_run = stop_after_a_part(attempt_with_another_model)
    attempt_with_another_model.end(output.model_copy(update={"sha256": "0" * 64}))
    assert part_texts_per_run == [{}]  # Finished parts of another model are not used.


def test_a_part_that_cannot_be_stored_adds_a_note(tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = Attempt(tmp_path, 1)
    part_texts_per_run = stop_after_a_part(attempt)

    def fail(*_: object) -> None:
        raise StorageError("StorageFailed", "the store answers 503")

    monkeypatch.setattr(attempt.tree.store, "put_file", fail)
    assert attempt.end(output).failure is None and part_texts_per_run == [{}]
    assert attempt.state.report().resolved.notes == ["some results of finished tasks were not stored: StorageFailed"]


def test_an_unexpected_failure_keeps_the_results_of_earlier_stages(
    tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = "file:///merged"
    stages, _ = make_gated_attempt(tmp_path, 1, {Stage.EVALUATING: StageResult(merged_uri=uri), Stage.VERIFYING: RuntimeError("broken")}, monkeypatch)
    report = stages.run(output)
    assert report.failure is not None and (report.failure.stage, report.failure.error.code) == (Stage.VERIFYING, "TrainerCrashed")
    assert report.output is not None and report.output.merged_uri == uri
    disk_error = OSError(28, "No space left on device")
    stages, _ = make_gated_attempt(tmp_path, 2, {Stage.COMPARING: make_gate_result([FAILED]), Stage.VERIFYING: disk_error}, monkeypatch)
    report = stages.run(output.model_copy(update={"sha256": "1" * 64}))
    assert report.failure is not None and report.failure.error.code == "GateFailed"


# ---- gates and promotion

PASSED = GateResult(metric="perplexity", passed=True, text="perplexity is 2.5, and the gate requires at most 3")
FAILED = GateResult(metric="perplexity", passed=False, text="perplexity is 2.5, and the gate requires at most 2")
MARKER = "model/_PROMOTED"


class GatedStages(LaterStages):
    """Stages that run no process. `results` contains the result or the failure of each stage."""

    calls: list[Stage]
    results: dict[Stage, StageResult | Exception]

    def _run_stage(self, stage: Stage, output: Output) -> StageRecord:
        self.calls.append(stage)
        result = self.results.get(stage, StageResult())
        if isinstance(result, Exception):
            raise result
        return self._write_record(stage, output, result, [])


def make_gated_attempt(
    folder: Path, number: int, results: dict[Stage, StageResult | Exception], monkeypatch: pytest.MonkeyPatch
) -> tuple[GatedStages, Attempt]:
    """Return an attempt of a job with an evaluation, a comparison, a further stage that does not publish, and a copy in `output.dir`."""
    planned_stages = [Stage.EVALUATING, Stage.COMPARING, Stage.VERIFYING, Stage.UPLOADING]
    monkeypatch.setattr("finetune_trainer.supervisor.later_stages.list_planned_stages", lambda _run: planned_stages)
    attempt = Attempt(folder, number)
    attempt.stages.__class__ = GatedStages
    stages = attempt.stages
    assert isinstance(stages, GatedStages)
    stages.calls, stages.results = [], results
    return stages, attempt


def make_gate_result(gates: list[GateResult]) -> StageResult:
    return StageResult(evaluation=EvaluationResult(gates=gates))


def test_a_model_is_promoted_after_all_stages_that_do_not_publish(tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    stages, attempt = make_gated_attempt(tmp_path, 1, {Stage.COMPARING: make_gate_result([PASSED]), Stage.VERIFYING: DataError("Bad", "m")}, monkeypatch)
    report = stages.run(output)
    assert report.failure is not None and report.failure.stage is Stage.VERIFYING and attempt.tree.store.get(MARKER) is None
    stages, attempt = make_gated_attempt(tmp_path, 2, {Stage.UPLOADING: StageResult(published_uri="file:///copy")}, monkeypatch)
    report = stages.run(output)
    assert stages.calls == [Stage.VERIFYING, Stage.UPLOADING] and (report.failure, report.open_stages) == (None, [])
    assert report.output is not None and (report.output.promoted, report.output.published_uri) == (True, "file:///copy")
    assert attempt.state.report().output == report.output
    marker = json.loads(attempt.tree.store.get(MARKER) or b"")
    assert (marker["manifestSha256"], marker["uri"], marker["attempt"], marker["gates"]) == (output.sha256, output.uri, 2, [PASSED.to_wire()])


def test_a_failed_gate_ends_the_job_after_all_results_exist_and_without_a_copy(
    tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, calls in ((1, [Stage.EVALUATING, Stage.COMPARING, Stage.VERIFYING]), (2, [])):
        stages, attempt = make_gated_attempt(tmp_path, number, {Stage.COMPARING: make_gate_result([PASSED, FAILED])}, monkeypatch)
        report = stages.run(output)
        assert stages.calls == calls and report.failure is not None and report.open_stages == []
        assert (report.failure.stage, report.failure.error.code) == (Stage.COMPARING, "GateFailed")
        assert (report.failure.error.message, int(report.failure.error.exit_code)) == (FAILED.text, 80)
        assert report.output == output.model_copy(update={"promoted": False}) and attempt.tree.store.get(MARKER) is None


def test_a_failed_gate_is_the_failure_even_if_a_later_stage_fails(tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    stages, attempt = make_gated_attempt(tmp_path, 1, {Stage.EVALUATING: make_gate_result([FAILED]), Stage.VERIFYING: DataError("Bad", "broken")}, monkeypatch)
    report = stages.run(output)
    assert report.failure is not None and (report.failure.stage, report.failure.error.code) == (Stage.EVALUATING, "GateFailed")
    assert "the stage verifying failed: Bad: broken" in (attempt.state.report().resolved.notes or [])


def test_a_superseded_attempt_ends_at_once_also_after_a_failed_gate(tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a superseded attempt continued, it would run its remaining stages at the same time as the later attempt, and end with GateFailed."""
    fenced_error = FencedOutError("FencedOut", "a later attempt has begun")
    stages, attempt = make_gated_attempt(tmp_path, 1, {Stage.EVALUATING: make_gate_result([FAILED]), Stage.COMPARING: fenced_error}, monkeypatch)
    report = stages.run(output)
    assert stages.calls == [Stage.EVALUATING, Stage.COMPARING] and report.failure is not None
    assert (report.failure.stage, report.failure.error) == (Stage.COMPARING, fenced_error)
    assert not attempt.state.report().resolved.notes


def test_a_stop_after_a_failed_gate_leaves_the_other_stages_to_the_next_attempt(
    tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages, _ = make_gated_attempt(tmp_path, 1, {Stage.COMPARING: make_gate_result([FAILED]), Stage.VERIFYING: StoppedError()}, monkeypatch)
    report = stages.run(output)
    assert (report.failure, report.open_stages) == (None, [Stage.VERIFYING, Stage.UPLOADING])


def test_without_gates_nothing_is_promoted(tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    stages, attempt = make_gated_attempt(tmp_path, 1, {Stage.COMPARING: StageResult(evaluation=EVALUATION)}, monkeypatch)
    report = stages.run(output)
    assert report.output == output and report.failure is None and attempt.tree.store.get(MARKER) is None


def test_a_superseded_attempt_promotes_nothing(tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    stages, attempt = make_gated_attempt(tmp_path, 1, {Stage.COMPARING: make_gate_result([PASSED])}, monkeypatch)
    promote = stages._promote

    def promote_beside_a_later_attempt(*arguments: Any) -> None:
        attempt.tree.begin_attempt(2, b"{}")
        promote(*arguments)

    monkeypatch.setattr(stages, "_promote", promote_beside_a_later_attempt)
    report = stages.run(output)
    assert report.failure is not None and isinstance(report.failure.error, FencedOutError)
    assert attempt.tree.store.get(MARKER) is None and Stage.UPLOADING not in stages.calls


def test_the_sweep_of_a_later_attempt_keeps_the_marker(tmp_path: Path, output: Output) -> None:
    attempt = Attempt(tmp_path, 1)
    attempt.tree.store.put(MARKER, b"{}")
    attempt.tree.store.put("model/a9-00000009/left-over", b"x")
    assert attempt.tree.sweep().removed_count == 1 and attempt.tree.store.get(MARKER) == b"{}"


# ---- what the stage `comparing` reads

def test_a_later_attempt_compares_with_the_stored_measurements(tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeStages, "behaviour", staticmethod(write_measurements))
    first_attempt = Attempt(tmp_path, 1, spec=COMPARED)
    assert first_attempt.end(output).open_stages == []
    first_attempt.tree.store.delete(["run/stages/comparing.json"])
    later_attempt = Attempt(tmp_path, 2, spec=COMPARED)
    assert later_attempt.end(output).failure is None
    [task] = later_attempt.stages.calls
    assert task.stage is Stage.COMPARING and task.evaluated is not None
    assert (task.evaluated / "measurements.json").read_text() == '{"rowCount": 2}'


@pytest.mark.parametrize("content", [b"{}", None])
def test_damaged_measurements_are_measured_again_by_the_next_attempt(
    content: bytes | None, tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeStages, "behaviour", staticmethod(write_measurements))
    first_attempt = Attempt(tmp_path, 1, spec=COMPARED)
    first_attempt.end(output)
    first_attempt.tree.store.delete(["run/stages/comparing.json", *([] if content else ["evaluation/measurements.json"])])
    if content:
        first_attempt.tree.store.put("evaluation/measurements.json", content)
    report = Attempt(tmp_path, 2, spec=COMPARED).end(output)
    assert report.failure is not None and (report.failure.stage, report.failure.error.code) == (Stage.COMPARING, "EvaluationDamaged")
    assert report.failure.error.exit_code == 69  # The job is retried after this exit code.
    third_attempt = Attempt(tmp_path, 3, spec=COMPARED)
    assert third_attempt.end(output).failure is None and [task.stage for task in third_attempt.stages.calls] == [Stage.EVALUATING, Stage.COMPARING]


def test_the_merged_model_is_committed_and_named_in_the_output(tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeStages, "behaviour", staticmethod(write_merged_model))
    attempt = Attempt(tmp_path, 1, spec=MERGED)
    report = attempt.end(output)
    uri = f"file://{tmp_path}/store/merged/a1-00000001"
    assert report.output == output.model_copy(update={"merged_uri": uri}) and report.open_stages == []
    committed_model = attempt.tree.get_merged()
    assert committed_model is not None
    manifest = attempt.tree.read_manifest(committed_model)
    assert manifest is not None and manifest.extra == {"adapter": output.uri, "adapterSha256": output.sha256} and manifest.step == 4
    assert [file.path for file in manifest.files] == ["config.json", "model-1.safetensors", "model-2.safetensors"]
    # The sweep removes the files of other incarnations, but neither the committed merged model nor its marker.
    attempt.tree.store.put("merged/a1-ffffffff/model.safetensors", b"leftover")
    assert attempt.tree.sweep().removed_count == 1
    assert [stat.key for stat in attempt.tree.store.list("merged/")] == [
        "merged/_COMMITTED", *(f"merged/a1-00000001/{name}" for name in ("config.json", "manifest.json", "model-1.safetensors", "model-2.safetensors"))
    ]  # fmt: skip


@pytest.mark.parametrize("adapter", ["same", "another"])
def test_a_committed_merged_model_of_the_same_adapter_is_not_made_again(adapter: str, tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeStages, "behaviour", staticmethod(write_merged_model))
    first_attempt = Attempt(tmp_path, 1, spec=MERGED)
    first_attempt.end(output)
    first_attempt.tree.store.delete(["run/stages/merging.json"])  # This simulates an attempt that ended before it stored the record.
    later_attempt = Attempt(tmp_path, 2, spec=MERGED)
    adapter_output = output if adapter == "same" else output.model_copy(update={"sha256": "0" * 64})
    report = later_attempt.end(adapter_output)
    incarnation = "a1-00000001" if adapter == "same" else "a2-00000002"
    assert report.output is not None and report.output.merged_uri == f"file://{tmp_path}/store/merged/{incarnation}"
    assert len(later_attempt.stages.calls) == (0 if adapter == "same" else 1)


def test_a_stop_ends_the_upload_of_the_merged_model_after_the_current_file(tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeStages, "behaviour", staticmethod(write_merged_model))
    attempt = Attempt(tmp_path, 1, spec=MERGED)
    put_file = attempt.tree.store.put_file

    def put_and_stop(*arguments: Any, **options: Any) -> None:
        put_file(*arguments, **options)
        attempt.is_stopped = True

    monkeypatch.setattr(attempt.tree.store, "put_file", put_and_stop)
    report = attempt.end(output)
    assert (report.open_stages, report.failure) == ([Stage.MERGING], None)
    assert [stat.key for stat in attempt.tree.store.list("merged/")] == ["merged/a1-00000001/config.json"]


@pytest.mark.parametrize("is_merged_here", [True, False])
def test_the_stages_after_the_merge_find_the_merged_model(is_merged_here: bool, tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeStages, "behaviour", staticmethod(write_merged_model))
    first_attempt = Attempt(tmp_path, 1, spec=MERGED)
    merged_output = first_attempt.end(output).output
    assert merged_output is not None
    attempt = first_attempt if is_merged_here else Attempt(tmp_path, 2, has_trained=False, spec=MERGED)
    folder = attempt.stages.provide_merged_model(merged_output)
    assert folder is not None and (folder / "model-2.safetensors").read_text() == "model-2.safetensors"
    assert attempt.stages.provide_merged_model(merged_output) == folder and attempt.stages.provide_merged_model(output) is None


def test_a_damaged_merged_model_is_refused(tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeStages, "behaviour", staticmethod(write_merged_model))
    merged_output = Attempt(tmp_path, 1, spec=MERGED).end(output).output
    (tmp_path / "store" / "merged" / "a1-00000001" / "config.json").write_text("CONFIG.JSON")
    assert merged_output is not None
    with pytest.raises(NoCheckpointError, match="ModelDamaged"):
        Attempt(tmp_path, 2, spec=MERGED).stages.provide_merged_model(merged_output)


def test_a_stop_during_a_push_leaves_the_stage_open(tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = {"push": True, "repository": "org/bot", "tokenSecretRef": {"name": "hub", "key": "token"}}
    attempt, may_end = Attempt(tmp_path, 1, spec={"output": {"hub": hub}}), threading.Event()

    def push(*_: Any, **__: Any) -> str:
        attempt.is_stopped = True
        may_end.wait()
        return "uri"

    monkeypatch.setattr(later_stages, "push_to_hub", push)
    report = attempt.end(output)
    may_end.set()
    assert (report.open_stages, report.failure, report.output) == ([Stage.UPLOADING], None, output)


def test_the_error_of_a_push_is_the_failure_of_the_stage(tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = {"push": True, "repository": "org/bot", "tokenSecretRef": {"name": "hub", "key": "token"}}
    error = CredentialsError("HubAccessDenied", "m")

    def push(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(later_stages, "push_to_hub", push)
    report = Attempt(tmp_path, 1, spec={"output": {"hub": hub}}).end(output)
    assert report.failure is not None and (report.failure.stage, report.failure.error) == (Stage.UPLOADING, error)
