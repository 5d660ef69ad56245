"""The report of a run: it is made from storage at the end of each attempt, and never causes a failure."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from finetune_api.names import REPORT_KEY, ExitCode
from finetune_api.pod import ProgressReport, RunConfig, StoreTarget, TerminationMessage
from finetune_api.spec.enums import DatasetFormat
from finetune_api.status import Output, Progress, ResolvedConfig, Stage
from finetune_trainer.checkpoint.tree import CheckpointTree
from finetune_trainer.data.load import DataSummary
from finetune_trainer.settings import Settings
from finetune_trainer.storage.folder import FolderStore
from finetune_trainer.supervisor.attempt_recorder import AttemptRecorder
from finetune_trainer.supervisor.exit_decision import ExitDecision
from finetune_trainer.supervisor.run_report import ReportWriter
from finetune_trainer.supervisor.run_results import RunResults
from finetune_trainer.supervisor.supervise import Supervisor

from tests.support.html_page import parse_page, read_table
from tests.support.learning import make_run

START = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
SUMMARY = DataSummary(DatasetFormat.MESSAGES, [DatasetFormat.MESSAGES], {"train": 3})


@pytest.fixture
def tree(tmp_path: Path) -> CheckpointTree:
    return CheckpointTree(FolderStore(tmp_path / "store", f"file://{tmp_path}/store"))


def make_writer(tmp_path: Path, tree: CheckpointTree, attempt: int = 1) -> tuple[ReportWriter, RunConfig]:
    run, _ = make_run(tmp_path, tmp_path / "model")
    run = run.model_copy(update={"attempt": attempt, "storage": StoreTarget(uri=tree.store.uri)})
    results = RunResults(run, tree, tmp_path / "output")
    recorder = AttemptRecorder(run, tree, incarnation=f"a{attempt}-0000000{attempt}", config_sha256="c0ffee", started_at=START)
    return ReportWriter(run, tree, results, recorder, config_sha256="c0ffee"), run


def make_progress(step: int) -> ProgressReport:
    return ProgressReport(attempt=1, uid="u", progress=Progress(step=step), timings={"training": 5.0})


def put_log(tree: CheckpointTree, incarnation: str, steps: range) -> None:
    lines = [json.dumps({"step": step, "loss": 1.0, "unix_time": START.timestamp() + step}) for step in steps]
    tree.store.put(f"metrics/{incarnation}.jsonl", "\n".join(lines).encode())


def test_a_later_attempt_replaces_the_report_and_keeps_the_earlier_attempt(tmp_path: Path, tree: CheckpointTree) -> None:
    first_writer, _ = make_writer(tmp_path, tree)
    first_writer._recorder.record_start(0, ResolvedConfig())
    first_writer.record_data(SUMMARY)
    put_log(tree, "a1-00000001", range(1, 6))
    uri = first_writer.write(TerminationMessage(exit_code=71, code="GpuOutOfMemory", message="no memory"), make_progress(5))
    assert uri == f"{tree.store.uri}/{REPORT_KEY}"
    second_writer, _ = make_writer(tmp_path, tree, 2)
    second_writer._recorder.record_start(4, ResolvedConfig())
    second_writer.record_data(SUMMARY)
    put_log(tree, "a2-00000002", range(5, 9))
    second_writer.write(TerminationMessage(exit_code=0, output=Output(uri="file:///model")), make_progress(8))
    page = parse_page((tree.store.get(REPORT_KEY) or b"").decode())
    assert [row[3:] for row in read_table(page, "Attempts of the run")[1:]] == [
        ["0", "5", "1", "exit code 71, GpuOutOfMemory: no memory"], ["4", "8", "–", "completed"],
    ]  # fmt: skip
    steps = [row.children[0].full_text for row in page.find_all("figure")[0].find_all("tr")[1:]]
    assert steps == [str(step) for step in range(1, 9)]
    assert dict(read_table(page, "Rows and lengths"))["rows"] == "3"


def test_a_superseded_attempt_writes_no_report(tmp_path: Path, tree: CheckpointTree) -> None:
    writer, run = make_writer(tmp_path, tree)
    tree.begin_attempt(2, run.to_bytes())
    assert writer.write(TerminationMessage(exit_code=0), make_progress(1)) is None
    assert [stat.key for stat in tree.store.list("")] == ["run/attempt-2/run.json"]


def test_objects_of_another_version_are_left_out(tmp_path: Path, tree: CheckpointTree) -> None:
    writer, _ = make_writer(tmp_path, tree)
    for key in ("run/data.json", "evaluation/model_comparison.json", "run/records/a1-x.json", "run/stages/evaluating.json"):
        tree.store.put(key, b'{"badRows": "many"}')
    assert writer.write(TerminationMessage(exit_code=0), make_progress(1)) is not None
    page = parse_page((tree.store.get(REPORT_KEY) or b"").decode())
    assert len(read_table(page, "Attempts of the run")) == 2 and "no attempt has checked the data" in page.full_text


class BrokenReportWriter:
    def write(self, *_: Any) -> str:
        raise KeyError("a bug in the report")


def test_a_report_that_cannot_be_written_adds_a_note(tmp_path: Path) -> None:
    settings = Settings(tmp_path / "run.json", None, tmp_path, tmp_path / "message", 0, 0, "node", "pod")
    supervisor: Any = Supervisor(settings)
    supervisor._report_writer = BrokenReportWriter()
    supervisor._facts.output = output = Output(uri="file:///model")
    supervisor._write_report(ExitDecision(ExitCode.OK))
    report = supervisor._state.report()
    assert report.resolved.notes == ["the run's report was not written: ReportFailed"]
    assert (supervisor._facts.output, report.stage) == (output, Stage.REPORTING)
