"""One configuration of each source, imported by the command line, applied as it comes out, and trained on the real cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from finetune_api.names import CONTAINER, Env
from finetune_api.status import FineTuneJobStatus, OutputKind

from tests.e2e.jobs.site import MODEL, JobNamespace
from tests.pod.cli.sources import SOURCES, options, rows

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
QUICK = ("env", "hydra")
"""Trained in `make test`; the others are in `make test-faults`, and two of them in the pod tests."""
BUCKET = "datasets"


@dataclass
class Imports:
    """Imported jobs, two at a time: while one trains, the next one starts."""

    job_namespace: JobNamespace
    folder: Path
    wanted: list[str]
    applied: set[str] = field(default_factory=set)

    def end(self, name: str) -> FineTuneJobStatus:
        """Import and apply a source, and the one after it, and wait for its end."""
        place = self.wanted.index(name)
        for one in self.wanted[place : place + 2]:
            if one not in self.applied:
                self.applied.add(one)
                self._apply(one)
        return self.job_namespace.end(name)

    def _apply(self, name: str) -> None:
        source, key = SOURCES[name], f"imports/{name}.jsonl"
        self.job_namespace.site.store.put_object(Bucket=BUCKET, Key=key, Body=rows(source.rows).encode())
        home = self.folder / name
        home.mkdir()
        (home / source.file).write_text(source.text, encoding="utf-8")
        words = ["import", str(home / source.file), *options(name, MODEL, f"s3://{BUCKET}/{key}")]
        done = subprocess.run(
            [sys.executable, "-m", "finetune_cli", *words, "-o", str(home / "job.yaml")], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        self.job_namespace.apply(home / "job.yaml")


@pytest.fixture(scope="module")
def imports(
    shared_namespace: JobNamespace, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Imports:
    """All of them in one namespace; only those that this run asks for."""
    asked = {item.callspec.params["name"] for item in request.session.items if item.path == request.path}  # type: ignore[attr-defined]  # all are parametrised
    return Imports(shared_namespace, tmp_path_factory.mktemp("imports"), [name for name in SOURCES if name in asked])


@pytest.mark.parametrize(
    "name", [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in SOURCES]
)
def test_an_imported_job_trains(imports: Imports, name: str) -> None:
    status = imports.end(name)
    assert status.progress is not None
    assert (status.progress.step, status.restarts) == (SOURCES[name].steps, 0)
    assert status.output is not None
    assert status.output.uri is not None
    assert status.output.kind is OutputKind.ADAPTER
    bucket, _, prefix = status.output.uri.removeprefix("s3://").partition("/")
    body = imports.job_namespace.site.store.get_object(Bucket=bucket, Key=f"{prefix}/adapter_config.json")[
        "Body"
    ].read()
    assert json.loads(body)["r"] == SOURCES[name].rank
    if name == "env":
        token_from_its_secret(imports.job_namespace, name)


def token_from_its_secret(job_namespace: JobNamespace, name: str) -> None:
    """The pod was started with the token of the file, from the Secret that the import wrote."""
    (pod,) = job_namespace.pods(name)
    (container,) = [one for one in pod["spec"]["containers"] if one["name"] == CONTAINER]
    (variable,) = [one for one in container["env"] if one["name"] == Env.HF_TOKEN.value]
    assert variable["valueFrom"]["secretKeyRef"] == {"name": f"{name}-import", "key": "hf-token"}
