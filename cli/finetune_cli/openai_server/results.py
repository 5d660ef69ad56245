"""The result file of a job: its metrics as CSV, made from the lines that the trainer stored."""

from __future__ import annotations

import csv
import io
import json
import re
from typing import Any

from finetune_api.names import Storage

from finetune_cli.job_storage import JobStorage

NAME_BY_METRIC = {"loss": "train_loss", "eval_loss": "valid_loss"}
"""The API's names of metrics that have another name in the trainer's log."""
FIRST_COLUMNS = ("step", "train_loss", "valid_loss")


def result_rows(storage: JobStorage, job_folder: str) -> bytes:
    """Return the metrics of a job as CSV, one row for each logged step. `job_folder` is relative to the storage. Errors: StorageError.

    Steps that an attempt repeated have the values of the later attempt.
    """
    files = [stored.key for stored in storage.list_objects(f"{job_folder}/{Storage.METRICS}") if stored.key.endswith(".jsonl")]
    rows: dict[int, dict[str, Any]] = {}
    for key in sorted(files, key=_attempt_of):
        attempt_rows: dict[int, dict[str, Any]] = {}
        for line in storage.read_object(key).decode(errors="replace").splitlines():
            values = json.loads(line)
            named = {NAME_BY_METRIC.get(name, name): value for name, value in values.items()}
            attempt_rows.setdefault(int(values["step"]), {}).update(named)
        first = min(attempt_rows, default=0)
        rows = {step: row for step, row in rows.items() if step < first} | attempt_rows
    others = sorted({name for row in rows.values() for name in row} - set(FIRST_COLUMNS))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*FIRST_COLUMNS, *others], lineterminator="\n")
    writer.writeheader()
    writer.writerows(row for _, row in sorted(rows.items()))
    return text.getvalue().encode()


def _attempt_of(key: str) -> tuple[int, str]:
    """Return the attempt in the name of a file such as `a2-1f3c9a2b.jsonl`, for sorting."""
    match = re.search(r"/a(\d+)-[^/]*$", key)
    return (int(match[1]) if match else 0, key)
