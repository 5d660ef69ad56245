"""Stores a record of each incarnation below `run/records/`. The report and the lineage statement are made from these records.

The records are not stored in `run/attempt-<n>/`, because any object in that folder fences out earlier attempts.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any

from finetune_api.lineage import AttemptRecord
from finetune_api.names import Storage
from finetune_api.pod import ProgressReport, RunConfig, TerminationMessage
from finetune_api.rules import gpus_per_pod
from finetune_api.status import ResolvedConfig
from pydantic import ValidationError

from finetune_trainer.checkpoint.tree import CheckpointTree
from finetune_trainer.storage.base import join_key
from finetune_trainer.supervisor.agent_process import count_threads_per_rank

log = logging.getLogger(__name__)
RECORDS_FOLDER = f"{Storage.RUN}/records"


class AttemptRecorder:
    """Stores the record of one incarnation. Only rank 0's pod stores the record. Errors of all methods: those of storage."""

    def __init__(self, run: RunConfig, tree: CheckpointTree, *, incarnation: str, config_sha256: str, started_at: datetime) -> None:
        """`started_at`: when the pod started."""
        self._run, self._tree = run, tree
        self._record = AttemptRecord(
            attempt=run.attempt, incarnation=incarnation, started_at=started_at, gpus=run.world.nodes * gpus_per_pod(run.spec),
            pods=run.world.nodes, config_sha256=config_sha256,
        )  # fmt: skip
        self._stored_record: AttemptRecord | None = None

    def record_start(self, start_step: int, resolved_config: ResolvedConfig) -> None:
        """Record that this incarnation begins to train, and from which step."""
        self._store(start_step=start_step, threads=count_threads_per_rank(self._run), resolved=_without_notes(resolved_config))

    def record_configuration(self, resolved_config: ResolvedConfig) -> None:
        """Record the configuration in use. Some values, such as the device, are known only after the ranks have started."""
        self._store(resolved=_without_notes(resolved_config))

    def record_end(self, message: TerminationMessage, progress: ProgressReport) -> None:
        """Record how this incarnation ends."""
        step = progress.progress.step
        self._store(
            ended_at=datetime.now(UTC), exit_code=message.exit_code, code=message.code, message=message.message, hint=message.hint,
            last_step=step if step is not None else self._record.start_step, timings=progress.timings, time_use=progress.time_use,
            notes=progress.resolved.notes or [],
            resolved=_without_notes(progress.resolved),
        )  # fmt: skip

    def _store(self, **changes: Any) -> None:
        """Store the record if a value has changed."""
        self._record = self._record.model_copy(update=changes)
        if self._record != self._stored_record:
            key = join_key(RECORDS_FOLDER, f"{self._record.incarnation}.json")
            self._tree.store.put(key, self._record.model_dump_json(by_alias=True, exclude_none=True).encode())
            self._stored_record = self._record


def _without_notes(resolved_config: ResolvedConfig) -> ResolvedConfig:
    return resolved_config.model_copy(update={"notes": None})


def read_attempt_records(tree: CheckpointTree) -> list[AttemptRecord]:
    """Return the records of all incarnations of a run, in the order of their start. A record that cannot be read is left out."""
    records = []
    for stat in tree.store.list(f"{RECORDS_FOLDER}/"):
        data = tree.store.get(stat.key)
        try:
            records.append(AttemptRecord.model_validate_json(data or b""))
        except ValidationError:
            log.warning("%s is not the record of an attempt", stat.key)
    return sorted(records, key=lambda record: (record.attempt, record.started_at))
