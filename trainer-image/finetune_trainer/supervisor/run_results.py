"""Stores the files of results beside the model: the log and the test rows before the commit, the metric files after training.

Rank 0 writes the log of the whole run and the test rows to the output folder. They are stored before the model is committed. So an attempt
that only runs the stages after training can read them from storage.
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
from finetune_trainer.results.layout import CopyFolder, copy_folder
from finetune_trainer.results.log_entry import LogEntry
from finetune_trainer.results.metric_files import RunDescription, metric_files
from finetune_trainer.storage.base import ByteCounter, join
from finetune_trainer.storage.roots import open_store
from finetune_trainer.supervisor.published_copy import PublishedCopy
from finetune_trainer.verification import reference

STARTED_KEY = f"{Storage.RUN}/started.json"
FILES_OF_RANK = (ResultFile.LOG, ResultFile.TEST_SPLIT)
"""Files that rank 0 writes to the output folder."""


class RunResults:
    """Stores the files of results of one run. Only rank 0's pod stores them."""

    def __init__(self, run: RunConfig, tree: CheckpointTree, output_folder: Path) -> None:
        self._run, self._tree, self._output_folder = run, tree, output_folder
        self._stored: set[ResultFile] = set()

    def record_start(self) -> None:
        """Record the start of the run, unless an earlier attempt has recorded it."""
        self._tree.store.create(STARTED_KEY, json.dumps({"time": datetime.now(UTC).isoformat()}).encode())

    def store_files_of_rank(self) -> None:
        """Store the files that rank 0 has written. Called before each commit. Errors: those of storage."""
        for name in FILES_OF_RANK:
            if name not in self._stored and (path := self._output_folder / name).exists():
                self._tree.store.put_file(path, join(Storage.METRICS, name))
                self._stored.add(name)
        values = self._output_folder / reference.FILE_NAME
        if values.exists():
            self._tree.store.put_file(values, reference.stored_key(sha256_file(values)))

    def store_metric_files(self) -> None:
        """Store the metric files, unless a later attempt has begun. The log is already stored. Errors: those of storage."""
        if self._tree.is_superseded(self._run.attempt):
            return
        for name, text in self._metric_files.items():
            if name not in FILES_OF_RANK:
                self._tree.store.put(join(Storage.METRICS, name), text.encode())

    @cached_property
    def _metric_files(self) -> dict[ResultFile, str]:
        """Return the contents of the metric files. Empty if the log of the run is not stored; older trainers do not store it."""
        data = self._read(ResultFile.LOG)
        if data is None:
            return {}
        entries = [LogEntry.from_json(line) for line in data.decode().splitlines()]
        return metric_files(entries, self._describe_run())

    def publish(
        self, output: Output, model: Path, stage_folders: Sequence[str], merged: Path | None = None, *, byte_counter: ByteCounter | None = None
    ) -> str:
        """Copy model, metric files and the stored files of `stage_folders` to the folder of `output.dir`. Returns its URI.

        `merged`: folder of the merged model. `byte_counter` may raise an exception to end the copy; the next attempt continues it.
        Errors: those of storage; ConfigError `OutputPathInvalid`.
        """
        folder = self.copy_folder()
        assert folder is not None, "a copy is only made with output.dir"
        store = open_store(self._run.storage.model_copy(update={"uri": self.root}))
        try:
            copy = PublishedCopy(store, folder, self._tree, byte_counter=byte_counter)
            copy.add_model(model, output.sha256 or "")
            if merged is not None:
                copy.add_merged_model(merged, output.merged_uri or "")
            for name, text in self._metric_files.items():
                copy.add_result(name, text.encode())
            if (test_rows := self._read(ResultFile.TEST_SPLIT)) is not None:
                copy.add_result(ResultFile.TEST_SPLIT, test_rows)
            for prefix in stage_folders:
                copy.add_stored_files(prefix)
        finally:
            store.close()
        return f"{self.root}/{folder.key}".rstrip("/")

    def copy_folder(self) -> CopyFolder | None:
        """Return the folder of the copy. None without `output.dir`. Errors: ConfigError `OutputPathInvalid`."""
        spec = self._run.spec
        return copy_folder(spec.output, namespace=self._run.namespace, model_source=spec.model.source or "", started_at=self.started_at())

    @property
    def root(self) -> str:
        """`storage.uri` of the spec: `publish` without `output.dir`."""
        directory = (self._run.spec.output.dir or "").strip("/")
        return (self._run.publish or "").removesuffix(directory).rstrip("/")

    def _read(self, name: ResultFile) -> bytes | None:
        path = self._output_folder / name
        return path.read_bytes() if path.exists() else self._tree.store.get(join(Storage.METRICS, name))

    def started_at(self) -> datetime:
        """Return the start of the run's first attempt."""
        data = self._tree.store.get(STARTED_KEY)
        return datetime.fromisoformat(json.loads(data)["time"]) if data is not None else datetime.now(UTC)

    def _describe_run(self) -> RunDescription:
        spec, parameters = self._run.spec, self._parameters()
        lora = spec.method.lora
        return RunDescription(
            model=redact_source(spec.model.source or ""), technique=str(method_type_of(spec)), learning_rate=_text(spec.training.learning_rate),
            batch_size=_text(spec.training.batch_size_per_device), epochs=_text(spec.training.epochs if spec.training.max_steps is None else None),
            lora_r=_text(lora.rank if lora else None), lora_alpha=_text(lora.alpha if lora else None),
            dataset_type=_text(spec.dataset.format and spec.dataset.format.value), metrics_directory=Storage.METRICS,
            started_at=self.started_at(), completed_at=datetime.now(UTC),
            trainable_parameters=parameters.get("trainable"), total_parameters=parameters.get("total"),
        )  # fmt: skip

    def _parameters(self) -> dict[str, Any]:
        """Return the parameter counts in the manifest of the committed model."""
        committed = self._tree.get_committed(None)
        manifest: Manifest | None = self._tree.read_manifest(committed) if committed is not None else None
        counts = manifest.extra.get("parameters") if manifest is not None else None
        return counts if isinstance(counts, dict) else {}


def _text(value: Any) -> str | None:
    return None if value is None else f"{value:g}" if isinstance(value, float) else str(value)
