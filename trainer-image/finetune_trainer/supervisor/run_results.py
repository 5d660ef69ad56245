"""Stores the result files next to the model: the log and the test rows before the commit, the metric files after training.

Rank 0 writes the log of the whole run and the test rows to the output folder. These files are stored before the model is committed, so that an
attempt that only runs the stages after training can read them from storage.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune_api.names import Storage
from finetune_api.pod import RunConfig
from finetune_api.rules import method_type_of
from finetune_api.sources import redact_source
from finetune_api.status import Output

from finetune_trainer.checkpoint.manifest import Manifest
from finetune_trainer.checkpoint.tree import CheckpointTree
from finetune_trainer.file_entry import sha256_file
from finetune_trainer.results.file_names import ResultFile
from finetune_trainer.results.layout import CopyFolder, find_copy_folder
from finetune_trainer.results.log_entry import LogEntry
from finetune_trainer.results.metric_files import RunDescription, build_metric_files
from finetune_trainer.storage.base import ByteCounter, CreateResult, join_key
from finetune_trainer.storage.roots import open_store
from finetune_trainer.supervisor.published_copy import PublishedCopy
from finetune_trainer.verification import reference

START_TIME_KEY = f"{Storage.RUN}/started.json"
FILES_OF_RANK_0 = (ResultFile.LOG, ResultFile.TEST_SPLIT)
"""Files that rank 0 writes to the output folder."""


class RunResults:
    """Stores the result files of one run. Only rank 0's pod stores them."""

    def __init__(self, run: RunConfig, tree: CheckpointTree, output_folder: Path) -> None:
        self._run, self._tree, self._output_folder = run, tree, output_folder
        self._stored_files: set[ResultFile] = set()

    def record_start(self) -> None:
        """Record the start of the run, unless an earlier attempt has recorded it."""
        data = json.dumps({"time": datetime.now(UTC).isoformat()}).encode()
        is_recorded = self._tree.store.create(START_TIME_KEY, data) is CreateResult.EXISTS
        if is_recorded and self._read_recorded_start() is None:  # On a volume without hard links, a pod that was killed can leave an empty file.
            self._tree.store.put(START_TIME_KEY, data)

    def store_rank_files(self) -> None:
        """Store the files that rank 0 has written, unless a later attempt has begun. Called before each commit. Errors: those of storage."""
        new_files = {name: path for name in FILES_OF_RANK_0 if name not in self._stored_files and (path := self._output_folder / name).exists()}
        if new_files and self._tree.is_superseded(self._run.attempt):
            return
        for name, path in new_files.items():
            self._tree.store.put_file(path, join_key(Storage.METRICS, name))
            self._stored_files.add(name)
        reference_values_file = self._output_folder / reference.FILE_NAME
        if reference_values_file.exists():
            self._tree.store.put_file(reference_values_file, reference.reference_values_key(sha256_file(reference_values_file)))

    def store_metric_files(self) -> None:
        """Store the metric files, unless a later attempt has begun. The file `log.jsonl` is already stored. Errors: those of storage."""
        if self._tree.is_superseded(self._run.attempt):
            return
        for name, text in self._metric_file_texts.items():
            if name not in FILES_OF_RANK_0:
                self._tree.store.put(join_key(Storage.METRICS, name), text.encode())

    @cached_property
    def _metric_file_texts(self) -> dict[ResultFile, str]:
        """Return the contents of the metric files by file name. Empty if the run has no stored log, because an older trainer did not store it."""
        data = self._read_result_file(ResultFile.LOG)
        if data is None:
            return {}
        entries = [LogEntry.from_json(line) for line in data.decode().splitlines()]
        return build_metric_files(entries, self._describe_run())

    def publish(
        self, output: Output, model_folder: Path, stage_folders: Sequence[str], merged_folder: Path | None = None, *, byte_counter: ByteCounter | None = None
    ) -> str:
        """Copy the model, the metric files and the files below `stage_folders` in storage to the folder of `output.dir`. Returns the folder's URI.

        `merged_folder`: folder of the merged model. `byte_counter` may raise an exception to end the copy; the next attempt continues the copy.
        Errors: those of storage; ConfigError `OutputPathInvalid`.
        """
        folder = self.find_copy_folder()
        assert folder is not None, "a copy is only made with output.dir"
        store = open_store(self._run.storage.model_copy(update={"uri": self.root}))
        try:
            published_copy = PublishedCopy(store, folder, self._tree, byte_counter=byte_counter)
            published_copy.add_model(model_folder, output.sha256 or "")
            if merged_folder is not None:
                published_copy.add_merged_model(merged_folder, output.merged_uri or "")
            for name, text in self._metric_file_texts.items():
                published_copy.add_result(name, text.encode())
            if (test_rows := self._read_result_file(ResultFile.TEST_SPLIT)) is not None:
                published_copy.add_result(ResultFile.TEST_SPLIT, test_rows)
            for prefix in stage_folders:
                published_copy.add_stored_files(prefix)
        finally:
            store.close()
        return f"{self.root}/{folder.key}".rstrip("/")

    def find_copy_folder(self) -> CopyFolder | None:
        """Return the folder of the copy, or None if `output.dir` is not set. Errors: ConfigError `OutputPathInvalid`."""
        spec = self._run.spec
        return find_copy_folder(spec.output, namespace=self._run.namespace, model_source=spec.model.source or "", started_at=self.read_start_time())

    @property
    def root(self) -> str:
        """The `storage.uri` of the spec. The field `publish` of the run configuration is this URI with `output.dir` at its end."""
        directory = (self._run.spec.output.dir or "").strip("/")
        return (self._run.publish or "").removesuffix(directory).rstrip("/")

    def _read_result_file(self, name: ResultFile) -> bytes | None:
        path = self._output_folder / name
        return path.read_bytes() if path.exists() else self._tree.store.get(join_key(Storage.METRICS, name))

    def read_start_time(self) -> datetime:
        """Return when the first attempt of the run started."""
        return self._read_recorded_start() or datetime.now(UTC)

    def _read_recorded_start(self) -> datetime | None:
        """Return the recorded start of the run; None if it is missing or unreadable."""
        try:
            return datetime.fromisoformat(json.loads(self._tree.store.get(START_TIME_KEY) or b"{}")["time"])
        except (ValueError, KeyError):
            return None

    def _describe_run(self) -> RunDescription:
        spec, parameter_counts = self._run.spec, self._read_parameter_counts()
        lora = spec.method.lora
        return RunDescription(
            model=redact_source(spec.model.source or ""), technique=str(method_type_of(spec)), learning_rate=_to_text(spec.training.learning_rate),
            batch_size=_to_text(spec.training.batch_size_per_device), epochs=_to_text(spec.training.epochs if spec.training.max_steps is None else None),
            lora_r=_to_text(lora.rank if lora else None), lora_alpha=_to_text(lora.alpha if lora else None),
            dataset_type=_to_text(spec.dataset.format and spec.dataset.format.value), metrics_directory=Storage.METRICS,
            started_at=self.read_start_time(), completed_at=datetime.now(UTC),
            trainable_parameters=parameter_counts.get("trainable"), total_parameters=parameter_counts.get("total"),
        )  # fmt: skip

    def _read_parameter_counts(self) -> dict[str, Any]:
        """Return the parameter counts in the manifest of the committed model."""
        committed_model = self._tree.get_committed(None)
        manifest: Manifest | None = self._tree.read_manifest(committed_model) if committed_model is not None else None
        counts = manifest.extra.get("parameters") if manifest is not None else None
        return counts if isinstance(counts, dict) else {}


def _to_text(value: Any) -> str | None:
    return None if value is None else f"{value:g}" if isinstance(value, float) else str(value)
