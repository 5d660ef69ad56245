"""Builds the result file of a job: its metrics as CSV, from the JSONL files that the trainer stored."""

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
"""For each metric that has different names in the API and in the trainer: the name in the API."""
ATTEMPT_FILE_PATTERN = re.compile(r"/a(\d+)-[^/]*\.jsonl$")
"""Matches the S3 key of the metrics file of one attempt, such as `a2-1f3c9a2b.jsonl`. Other files in the folder contain no metrics."""
MAX_METRICS_BYTES = 16 << 20
"""Largest total size of a job's metrics files, in bytes, which is enough for about 50,000 logged steps.

The parsed metrics take several times as much memory.
"""
FIRST_COLUMNS = ("step", "train_loss", "valid_loss")


def build_metrics_csv(storage: JobStorage, job_folder: str) -> bytes:
    """Return the metrics of a job as CSV, with one row for each logged step. `job_folder` is relative to the storage.

    If a later attempt repeated a step, the row of the step has the values of the later attempt. Raise RequestFailure if the metrics are too large,
    and StorageError if S3 fails.
    """
    folder = f"{job_folder}/{Storage.METRICS}"
    size_by_key = {stored_object.key: stored_object.size for stored_object in storage.list_objects(folder) if ATTEMPT_FILE_PATTERN.search(stored_object.key)}
    total_bytes = sum(size_by_key.values())
    if total_bytes > MAX_METRICS_BYTES:
        sizes_text = f"{total_bytes / (1 << 20):.1f} MiB, and this server reads at most {MAX_METRICS_BYTES >> 20} MiB"
        raise bad_request(f"the metrics of this job have {sizes_text}: read them in {storage.make_object_uri(folder)}", "file_id", "result_file_too_large")
    rows: dict[int, dict[str, Any]] = {}
    for key in sorted(size_by_key, key=_get_attempt_sort_key):
        attempt_rows: dict[int, dict[str, Any]] = {}
        for line in storage.read_object(key).split(b"\n"):
            logged_values = _parse_line(line)
            api_values = {NAME_BY_METRIC.get(name, name): value for name, value in logged_values.items()}
            if api_values:
                attempt_rows.setdefault(logged_values["step"], {}).update(api_values)
        first_step = min(attempt_rows, default=0)
        rows = {step: row for step, row in rows.items() if step < first_step} | attempt_rows
    other_columns = sorted({name for row in rows.values() for name in row} - set(FIRST_COLUMNS))
    csv_buffer = io.StringIO()
    writer = csv.DictWriter(csv_buffer, [*FIRST_COLUMNS, *other_columns], lineterminator="\n")
    writer.writeheader()
    writer.writerows(row for _, row in sorted(rows.items()))
    return csv_buffer.getvalue().encode()


def _parse_line(line: bytes) -> dict[str, Any]:
    """Return the values of a logged step. Return an empty dict for a line without a step, and for a damaged line, such as the last line of a killed pod."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) and type(values.get("step")) is int else {}


def _get_attempt_sort_key(object_key: str) -> tuple[int, str]:
    """Return a key that sorts metrics files by the number of their attempt, which is 2 for `a2-1f3c9a2b.jsonl`."""
    match = ATTEMPT_FILE_PATTERN.search(object_key)
    return (int(match[1]) if match else 0, object_key)
