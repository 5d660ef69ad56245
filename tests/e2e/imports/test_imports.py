"""A job of the OpenAI fine-tuning API is imported, applied without changes, and trains on a real cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from finetune_api.status import OutputKind

from tests.e2e.jobs.installation import MODEL, JobNamespace
from tests.pod.cli.sources import SOURCES, import_options, make_rows

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]
NAME = "openai"
"""The name of the tool whose job this file imports. test_page_examples.py imports the examples of the other tools."""
DATASET_BUCKET = "datasets"


def test_an_imported_job_trains(job_namespace: JobNamespace, tmp_path: Path) -> None:
    source, key, store = SOURCES[NAME], f"imports/{NAME}.jsonl", job_namespace.installation.store
    store.put_object(Bucket=DATASET_BUCKET, Key=key, Body=make_rows(source.rows).encode())
    (tmp_path / source.file).write_text(source.text, encoding="utf-8")
    arguments = ["import", str(tmp_path / source.file), *import_options(NAME, MODEL, f"s3://{DATASET_BUCKET}/{key}")]
    completed_process = subprocess.run(
        [sys.executable, "-m", "finetune_cli", *arguments, "-o", str(tmp_path / "job.yaml")], capture_output=True, text=True
    )
    assert completed_process.returncode == 0, completed_process.stderr
    job_namespace.apply(tmp_path / "job.yaml")
    status = job_namespace.wait_finished(NAME)
    assert status.progress is not None and status.output is not None and status.output.uri is not None
    assert (status.progress.step, status.restarts, status.output.kind) == (source.steps, 0, OutputKind.ADAPTER)
    bucket, _, prefix = status.output.uri.removeprefix("s3://").partition("/")
    body = store.get_object(Bucket=bucket, Key=f"{prefix}/adapter_config.json")["Body"].read()
    assert json.loads(body)["r"] == source.rank
