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
from finetune_trainer.report.redaction import list_secret_values
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
            formats=[str(data_format) for data_format in summary.formats], rows=summary.rows, bad_rows=summary.bad_rows, duplicates=findings.duplicate_count,
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
        page_bytes = page.render(self.collect_report_data(message.output, progress), list_secret_values(os.environ)).encode()
        self._tree.store.put(REPORT_KEY, page_bytes)
        if message.output is not None and message.output.published_uri:
            self._store_next_to_copy(page_bytes)
        return self._tree.uri(REPORT_KEY)

    def _store_next_to_copy(self, page_bytes: bytes) -> None:
        folder = self._results.find_copy_folder()
        assert folder is not None, "a copy is only made with output.dir"
        store = open_store(self._run.storage.model_copy(update={"uri": self._results.root}))
        try:
            store.put(folder.key + page.COPY_NAME, page_bytes)
        finally:
            store.close()

    def collect_report_data(self, output: Output | None, progress: ProgressReport) -> RunReport:
        """Read all data that the report shows."""
        entries_by_incarnation = _read_logs_by_incarnation(self._tree)
        records = read_attempt_records(self._tree)
        order_by_incarnation = {record.incarnation: number for number, record in enumerate(records)}
        ordered_incarnations = sorted(entries_by_incarnation, key=lambda name: (order_by_incarnation.get(name, -1), name))
        log_entries = join_attempts(entries_by_incarnation[name] for name in ordered_incarnations)
        manifest = self._read_model_manifest()
        prediction_lines = self._read_prediction_lines()
        return RunReport(
            run=self._run, config_sha256=self._config_sha256, written_at=datetime.now(UTC), started_at=self._results.read_start_time(), attempts=tuple(records),
            log=tuple(log_entries), last_lines={name: entries[-1] for name, entries in entries_by_incarnation.items() if entries},
            output=output, evaluation=progress.evaluation, data=self._read(DATA_KEY, DataRecord),
            token_counts=(manifest.extra.get("data") or {}).get("tokens") or {} if manifest else {}, versions=manifest.facts.versions if manifest else {},
            checkpoints=tuple(self._read_checkpoints()),
            model_files=tuple(ModelFile(file.path, file.size, file.sha256) for file in manifest.files) if manifest else (),
            stages=tuple(CompletedStage(record.stage.value, record.attempt, record.time) for record in self._read_folder(f"{Storage.RUN}/stages", StageRecord)),
            predictions=tuple(Prediction(**json.loads(line)) for line in prediction_lines[:MAX_ANSWERS]), prediction_count=len(prediction_lines),
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
        for checkpoint in self._tree.list_committed()[:MAX_SHOWN_CHECKPOINTS]:
            manifest = self._tree.read_manifest(checkpoint)
            yield StoredCheckpoint(
                checkpoint.step or 0, checkpoint.marker.attempt, checkpoint.marker.manifest_sha256, checkpoint.is_healthy,
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

    def _read_folder(self, folder: str, model_class: type[ModelT]) -> list[ModelT]:
        keys = [stat.key for stat in self._tree.store.list(f"{folder}/") if "/" not in stat.key.removeprefix(f"{folder}/")]
        models = (self._read(key, model_class) for key in keys)
        return [model for model in models if model is not None]


def _read_logs_by_incarnation(tree: CheckpointTree) -> dict[str, list[LogEntry]]:
    """Return the stored log lines of each incarnation."""
    prefix, suffix = f"{Storage.METRICS}/a", ".jsonl"
    entries_by_incarnation = {}
    for stat in list(tree.store.list(prefix)):
        data = tree.store.get(stat.key) if stat.key.endswith(suffix) else None
        if data is not None:
            incarnation = stat.key.removeprefix(f"{Storage.METRICS}/").removesuffix(suffix)
            entries_by_incarnation[incarnation] = [LogEntry.from_json(line) for line in data.decode().splitlines()]
    return entries_by_incarnation


def _collect_further_results(output: Output | None, progress: ProgressReport) -> dict[str, object]:
    results = {"evaluation": progress.evaluation, "output": output}
    result_by_name: dict[str, object] = {}
    for result_name, table_fields in TABLE_FIELDS_BY_RESULT.items():
        wire_values = model.to_wire() if (model := results[result_name]) is not None else {}
        result_by_name |= {name: wire_values[name] for name in table_fields if wire_values.get(name)}
    return result_by_name
