"""`finetune import` reads a configuration file of each source. The imported job is applied unchanged and trains on the real cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from finetune_api.names import TRAINER_CONTAINER, Env
from finetune_api.status import FineTuneJobStatus, OutputKind

from tests.e2e.jobs.installation import MODEL, JobNamespace
from tests.pod.cli.sources import SOURCES, import_options, make_rows

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
QUICK_SOURCES = ("env", "hydra")
"""Sources that `make test` trains. `make test-faults` trains the other sources."""
DATASET_BUCKET = "datasets"


@dataclass
class ImportedJobs:
    """Imports sources and runs their jobs, two at a time: while one job trains, the next job starts."""

    job_namespace: JobNamespace
    folder: Path
    names: list[str]
    applied_names: set[str] = field(default_factory=set)

    def wait_finished(self, name: str) -> FineTuneJobStatus:
        """Import and apply the jobs of this source and of the next source. Wait until the job of this source ends."""
        index = self.names.index(name)
        for one in self.names[index : index + 2]:
            if one not in self.applied_names:
                self.applied_names.add(one)
                self._import_and_apply(one)
        return self.job_namespace.wait_finished(name)

    def _import_and_apply(self, name: str) -> None:
        source, key = SOURCES[name], f"imports/{name}.jsonl"
        self.job_namespace.installation.store.put_object(Bucket=DATASET_BUCKET, Key=key, Body=make_rows(source.rows).encode())
        folder = self.folder / name
        folder.mkdir()
        (folder / source.file).write_text(source.text, encoding="utf-8")
        arguments = ["import", str(folder / source.file), *import_options(name, MODEL, f"s3://{DATASET_BUCKET}/{key}")]
        done = subprocess.run(
            [sys.executable, "-m", "finetune_cli", *arguments, "-o", str(folder / "job.yaml")],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        self.job_namespace.apply(folder / "job.yaml")


@pytest.fixture(scope="module")
def imported_jobs(
    shared_namespace: JobNamespace, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> ImportedJobs:
    """Imports the sources whose tests this session runs. All jobs share one namespace."""
    selected = {item.callspec.params["name"] for item in request.session.items if item.path == request.path}  # type: ignore[attr-defined]  # all are parametrised
    return ImportedJobs(shared_namespace, tmp_path_factory.mktemp("imports"), [name for name in SOURCES if name in selected])


@pytest.mark.parametrize(
    "name", [one if one in QUICK_SOURCES else pytest.param(one, marks=pytest.mark.slow) for one in SOURCES]
)
def test_imported_job_trains(imported_jobs: ImportedJobs, name: str) -> None:
    status = imported_jobs.wait_finished(name)
    assert status.progress is not None
    assert (status.progress.step, status.restarts) == (SOURCES[name].steps, 0)
    assert status.output is not None
    assert status.output.uri is not None
    assert status.output.kind is OutputKind.ADAPTER
    bucket, _, prefix = status.output.uri.removeprefix("s3://").partition("/")
    body = imported_jobs.job_namespace.installation.store.get_object(Bucket=bucket, Key=f"{prefix}/adapter_config.json")[
        "Body"
    ].read()
    assert json.loads(body)["r"] == SOURCES[name].rank
    if name == "env":
        check_token_from_secret(imported_jobs.job_namespace, name)


def check_token_from_secret(job_namespace: JobNamespace, name: str) -> None:
    """Check that the pod reads its Hugging Face token from the Secret that the import wrote."""
    (pod,) = job_namespace.pods(name)
    (container,) = [one for one in pod["spec"]["containers"] if one["name"] == TRAINER_CONTAINER]
    (variable,) = [one for one in container["env"] if one["name"] == Env.HF_TOKEN.value]
    assert variable["valueFrom"]["secretKeyRef"] == {"name": f"{name}-import", "key": "hf-token"}
