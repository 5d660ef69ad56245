"""The result file of a job: its metrics as CSV, made from the lines that the trainer stored."""

from __future__ import annotations

import csv
import io
import json
import re
from typing import Any

from finetune_api.names import Storage

from finetune_cli.job_storage import JobStorage
from finetune_cli.openai_server.failures import bad_request

NAME_BY_METRIC = {"loss": "train_loss", "eval_loss": "valid_loss"}
"""The API's names of metrics that have another name in the trainer's log."""
ATTEMPT_FILE = re.compile(r"/a(\d+)-[^/]*\.jsonl$")
"""Key of the metrics of one attempt, such as `a2-1f3c9a2b.jsonl`. The folder also contains the rows of the test set, which are no metrics."""
MAX_METRICS_BYTES = 16 << 20
"""Largest sum of a job's metrics files, because their Python objects take several times as much memory. It is enough for about 50,000 logged steps."""
FIRST_COLUMNS = ("step", "train_loss", "valid_loss")


def result_rows(storage: JobStorage, job_folder: str) -> bytes:
    """Return the metrics of a job as CSV, one row for each logged step. `job_folder` is relative to the storage.

    Steps that an attempt repeated have the values of the later attempt. Errors: StorageError, RequestFailure if the metrics are too large.
    """
    folder = f"{job_folder}/{Storage.METRICS}"
    files = {stored.key: stored.size for stored in storage.list_objects(folder) if ATTEMPT_FILE.search(stored.key)}
    size = sum(files.values())
    if size > MAX_METRICS_BYTES:
        limit = f"{size / (1 << 20):.1f} MiB, and this server reads at most {MAX_METRICS_BYTES >> 20} MiB"
        raise bad_request(f"the metrics of this job have {limit}: read them in {storage.object_uri(folder)}", "file_id", "result_file_too_large")
    rows: dict[int, dict[str, Any]] = {}
    for key in sorted(files, key=_attempt_of):
        attempt_rows: dict[int, dict[str, Any]] = {}
        for line in storage.read_object(key).split(b"\n"):
            values = _parse_line(line)
            named = {NAME_BY_METRIC.get(name, name): value for name, value in values.items()}
            if named:
                attempt_rows.setdefault(values["step"], {}).update(named)
        first = min(attempt_rows, default=0)
        rows = {step: row for step, row in rows.items() if step < first} | attempt_rows
    others = sorted({name for row in rows.values() for name in row} - set(FIRST_COLUMNS))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*FIRST_COLUMNS, *others], lineterminator="\n")
    writer.writeheader()
    writer.writerows(row for _, row in sorted(rows.items()))
    return text.getvalue().encode()


def _parse_line(line: bytes) -> dict[str, Any]:
    """Return the values of a logged step, or an empty mapping for a line that is damaged, for example by the end of its pod, or has no step."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) and type(values.get("step")) is int else {}


def _attempt_of(key: str) -> tuple[int, str]:
    """Return the attempt in the name of a file such as `a2-1f3c9a2b.jsonl`, for sorting."""
    match = ATTEMPT_FILE.search(key)
    return (int(match[1]) if match else 0, key)
