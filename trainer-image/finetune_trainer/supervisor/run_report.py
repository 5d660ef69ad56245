"""Writes the report of a run, and stores the counts of the data check for the report.

At the end of each attempt, the report is made only from data in storage, including the records of all attempts (`attempt_recorder`). The new report
replaces the report of the previous attempt.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeVar

from finetune_api.names import REPORT_KEY, Storage
from finetune_api.pod import ProgressReport, RunConfig, TerminationMessage
from finetune_api.status import Output
from pydantic import BaseModel, ValidationError

from finetune_trainer.checkpoint.manifest import Manifest
from finetune_trainer.checkpoint.tree import CheckpointTree
from finetune_trainer.evaluation.predictions import Prediction
from finetune_trainer.report import page
from finetune_trainer.report.redaction import secret_values
from finetune_trainer.report.result_sections import MAX_ANSWERS
from finetune_trainer.report.run_report import (
    CompletedStage,
    DataRecord,
    ModelFile,
    RunReport,
    StoredCheckpoint,
)
from finetune_trainer.results.file_names import ResultFile
from finetune_trainer.results.log_entry import LogEntry, join_attempts
from finetune_trainer.results.model_comparison import ModelComparison
from finetune_trainer.stages.files import StageRecord
from finetune_trainer.storage.base import join_key
from finetune_trainer.storage.roots import open_store
from finetune_trainer.supervisor.attempt_recorder import AttemptRecorder, read_attempt_records
from finetune_trainer.supervisor.run_results import RunResults

if TYPE_CHECKING:
    from finetune_trainer.data import DataSummary

log = logging.getLogger(__name__)
DATA_KEY = f"{Storage.RUN}/data.json"
MAX_SHOWN_CHECKPOINTS = 30
"""Maximum number of checkpoints in the report. The number is limited because each checkpoint needs one request to storage."""
TABLE_FIELDS_BY_RESULT = {"evaluation": ("benchmarks",), "output": ("verification",)}
"""Fields of `status.evaluation` and `status.output` that the report shows in separate tables."""
ModelT = TypeVar("ModelT", bound=BaseModel)


class ReportWriter:
    """Writes the report of one run. Only rank 0's pod writes it. Errors of all methods: those of storage."""

    def __init__(
        self, run: RunConfig, tree: CheckpointTree, results: RunResults, recorder: AttemptRecorder, *, config_sha256: str
    ) -> None:
        """`recorder` stores the record of this pod's incarnation."""
        self._run, self._tree, self._results, self._recorder, self._config_sha256 = run, tree, results, recorder, config_sha256

    def record_data(self, summary: DataSummary) -> None:
        """Store the counts that the check of the data found, such as rows and duplicates, for the report."""
        findings = summary.findings
        record = DataRecord(
            formats=[str(one) for one in summary.formats], rows=summary.rows, bad_rows=summary.bad_rows, duplicates=findings.duplicate_count,
            personal_data=findings.personal_data_counts, share_of_top_answer=findings.share_of_top_answer,
        )  # fmt: skip
        self._tree.store.put(DATA_KEY, record.model_dump_json(by_alias=True, exclude_none=True).encode())

    def write(self, message: TerminationMessage, progress: ProgressReport) -> str | None:
        """Record the end of this incarnation and store the report. Returns the report's URI; None if a later attempt has begun.

        If the results are copied to `output.dir`, the report is stored in this folder too.
        """
        if self._tree.is_superseded(self._run.attempt):
            return None
        self._recorder.record_end(message, progress)
        text = page.render(self.collect_report_data(message.output, progress), secret_values(os.environ)).encode()
        self._tree.store.put(REPORT_KEY, text)
        if message.output is not None and message.output.published_uri:
            self._store_beside_copy(text)
        return self._tree.uri(REPORT_KEY)

    def _store_beside_copy(self, text: bytes) -> None:
        folder = self._results.find_copy_folder()
        assert folder is not None, "a copy is only made with output.dir"
        store = open_store(self._run.storage.model_copy(update={"uri": self._results.root}))
        try:
            store.put(folder.key + page.COPY_NAME, text)
        finally:
            store.close()

    def collect_report_data(self, output: Output | None, progress: ProgressReport) -> RunReport:
        """Read all data that the report shows."""
        logs = _read_logs_by_incarnation(self._tree)
        records = read_attempt_records(self._tree)
        order_by_incarnation = {record.incarnation: number for number, record in enumerate(records)}
        log_entries = join_attempts(logs[name] for name in sorted(logs, key=lambda name: (order_by_incarnation.get(name, -1), name)))
        manifest = self._read_model_manifest()
        predictions = self._read_prediction_lines()
        return RunReport(
            run=self._run, config_sha256=self._config_sha256, written_at=datetime.now(UTC), started_at=self._results.read_start_time(), attempts=tuple(records),
            log=tuple(log_entries), last_lines={name: entries[-1] for name, entries in logs.items() if entries},
            output=output, evaluation=progress.evaluation, data=self._read(DATA_KEY, DataRecord),
            token_counts=(manifest.extra.get("data") or {}).get("tokens") or {} if manifest else {}, versions=manifest.facts.versions if manifest else {},
            checkpoints=tuple(self._read_checkpoints()),
            model_files=tuple(ModelFile(file.path, file.size, file.sha256) for file in manifest.files) if manifest else (),
            stages=tuple(CompletedStage(one.stage.value, one.attempt, one.time) for one in self._read_all(f"{Storage.RUN}/stages", StageRecord)),
            predictions=tuple(Prediction(**json.loads(line)) for line in predictions[:MAX_ANSWERS]), prediction_count=len(predictions),
            comparison=self._read(join_key(Storage.EVALUATION, ResultFile.MODEL_COMPARISON), ModelComparison),
            further_results=_collect_further_results(output, progress),
        )  # fmt: skip

    def _read_prediction_lines(self) -> list[str]:
        data = self._tree.store.get(join_key(Storage.EVALUATION, "predictions.jsonl"))
        return [line for line in data.decode().split("\n") if line.strip()] if data is not None else []

    def _read_model_manifest(self) -> Manifest | None:
        committed_model = self._tree.get_committed(None)
        return self._tree.read_manifest(committed_model) if committed_model is not None else None

    def _read_checkpoints(self) -> Iterator[StoredCheckpoint]:
        for committed in self._tree.list_committed()[:MAX_SHOWN_CHECKPOINTS]:
            manifest = self._tree.read_manifest(committed)
            yield StoredCheckpoint(
                committed.step or 0, committed.marker.attempt, committed.marker.manifest_sha256, committed.is_healthy,
                manifest.total_bytes if manifest else None, manifest.eval_loss if manifest else None,
            )  # fmt: skip

    def _read(self, key: str, model_class: type[ModelT]) -> ModelT | None:
        """Read an object. Return None if the object does not exist, or if this version of the trainer cannot read it."""
        data = self._tree.store.get(key)
        try:
            return model_class.model_validate_json(data) if data is not None else None
        except ValidationError:
            log.warning("%s cannot be read, so the report does not show it", key)
            return None

    def _read_all(self, folder: str, model_class: type[ModelT]) -> list[ModelT]:
        keys = [stat.key for stat in self._tree.store.list(f"{folder}/") if "/" not in stat.key.removeprefix(f"{folder}/")]
        models = (self._read(key, model_class) for key in keys)
        return [one for one in models if one is not None]


def _read_logs_by_incarnation(tree: CheckpointTree) -> dict[str, list[LogEntry]]:
    """Return the stored log lines of each incarnation."""
    prefix, suffix = f"{Storage.METRICS}/a", ".jsonl"
    logs = {}
    for stat in list(tree.store.list(prefix)):
        data = tree.store.get(stat.key) if stat.key.endswith(suffix) else None
        if data is not None:
            name = stat.key.removeprefix(f"{Storage.METRICS}/").removesuffix(suffix)
            logs[name] = [LogEntry.from_json(line) for line in data.decode().splitlines()]
    return logs


def _collect_further_results(output: Output | None, progress: ProgressReport) -> dict[str, object]:
    reports = {"evaluation": progress.evaluation, "output": output}
    result_by_name: dict[str, object] = {}
    for field, names in TABLE_FIELDS_BY_RESULT.items():
        values = model.to_wire() if (model := reports[field]) is not None else {}
        result_by_name |= {name: values[name] for name in names if values.get(name)}
    return result_by_name
