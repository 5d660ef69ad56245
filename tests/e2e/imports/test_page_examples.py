"""Every example in the documentation of other fine-tuning tools is imported, applied without changes, and runs on the cluster with all its features."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from finetune_api.names import KIND, TRAINER_CONTAINER, Env
from finetune_api.status import FineTuneJobStatus

from tests.e2e.imports.cluster_servers import create_service, enter_network
from tests.e2e.jobs.installation import JobNamespace
from tests.support.hub import TOKEN, Hub, serve_hub
from tests.support.mlflow_runs import MlflowRuns
from tests.support.page_examples import (
    EXAMPLE_WITH_SAME_JOB,
    PAGE_EXAMPLES,
    TRACKING_URI,
    list_missing_config_maps,
    make_import_arguments,
    make_job_name,
    write_stand_ins,
)
from tests.support.page_results import FinishedRun, check_mlflow, check_results, check_tensorboard, check_wandb_files
from tests.support.tracker_servers import TrackerServer, make_mlflow_server

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]  # `make test` only compares the examples' manifests, in tests/unit/cli
EXAMPLES = [name for name in PAGE_EXAMPLES if name not in EXAMPLE_WITH_SAME_JOB]
BUCKET = "page-examples"
JOBS_AT_A_TIME = 2


@dataclass
class ExampleJobs:
    """Runs the imported jobs in one namespace, two at a time, so that the next job starts while one job trains."""

    job_namespace: JobNamespace
    folder: Path
    names: list[str]
    hub: Hub | None = None
    mlflow: TrackerServer | None = None
    specs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def wait_finished(self, name: str) -> FinishedRun:
        """Import and apply the jobs of this example and of the next example, and wait until the job of this example succeeds."""
        index = self.names.index(name)
        for example_name in self.names[index : index + JOBS_AT_A_TIME]:
            if example_name not in self.specs:
                self.specs[example_name] = self._apply(example_name)
        status: FineTuneJobStatus = self.job_namespace.wait_finished(make_job_name(name))
        return FinishedRun(self.specs[name], status, self.read, self.list_files)

    def _apply(self, name: str) -> dict[str, Any]:
        manifest = self.folder / f"{name}.yaml"
        options = ["--storage", f"s3://finetune/{name}", "-o", str(manifest)]
        command, *arguments = make_import_arguments(name, f"s3://{BUCKET}")
        completed_process = subprocess.run(
            [sys.executable, "-m", "finetune_cli", command, *options, *arguments], capture_output=True, text=True,
            env={**os.environ, "MLFLOW_TRACKING_URI": TRACKING_URI},
        )  # fmt: skip
        assert completed_process.returncode == 0, completed_process.stderr
        (job,) = [manifest_object for manifest_object in yaml.safe_load_all(manifest.read_text("utf-8")) if manifest_object["kind"] == KIND]
        for config_map, data in list_missing_config_maps(name, job["spec"]):
            self.job_namespace.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": config_map}, "data": data})
        self.job_namespace.apply(manifest)
        spec: dict[str, Any] = job["spec"]
        return spec

    def read(self, uri: str) -> bytes:
        """Read the S3 object at this address."""
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        return bytes(self.job_namespace.installation.store.get_object(Bucket=bucket, Key=key)["Body"].read())

    def list_files(self, uri: str) -> list[str]:
        """List the keys below an S3 folder, relative to this folder."""
        bucket, _, prefix = f"{uri.removeprefix('s3://')}/".partition("/")
        pages = self.job_namespace.installation.store.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [item["Key"].removeprefix(prefix) for page in pages for item in page.get("Contents", [])]


@pytest.fixture(scope="module")
def example_jobs(
    shared_namespace: JobNamespace, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[ExampleJobs]:
    """Upload the small models and data that replace those of the examples, and start the servers that the selected examples need."""
    selected_names = [item.callspec.params["name"] for item in request.session.items if item.path == request.path]  # type: ignore[attr-defined]  # all tests are parametrised
    folder, cluster = tmp_path_factory.mktemp("examples"), shared_namespace.installation.cluster
    write_stand_ins(folder)
    shared_namespace.installation.upload_folder(folder, BUCKET)
    jobs = ExampleJobs(shared_namespace, folder, selected_names)
    changes = [change for name in selected_names for change in PAGE_EXAMPLES[name].changes]
    address = cluster.plan.nodes[0].address
    with ExitStack() as servers:
        if any("HF_ENDPOINT" in change for change in changes):
            jobs.hub = servers.enter_context(serve_hub(address, enter_network(cluster.network_namespace_pid), "http://hub"))
            create_service(shared_namespace, "hub", 80, jobs.hub.port)
            shared_namespace.create_secret("hub", {"token": TOKEN})
        if MLFLOW_EXAMPLES & set(selected_names):
            command_prefix = ["nsenter", "--net", "--target", str(cluster.network_namespace_pid)]
            jobs.mlflow = servers.enter_context(make_mlflow_server(folder / "mlflow", address, command_prefix, f"mlflow,mlflow:5000,{address}:*"))
            create_service(shared_namespace, "mlflow", 5000, jobs.mlflow.port)
        yield jobs


MLFLOW_EXAMPLES = {"samples-toml-A", "blocks-toml-09"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_imported_example_runs_to_its_end(example_jobs: ExampleJobs, name: str, tmp_path: Path) -> None:
    run = example_jobs.wait_finished(name)
    check_results(run, PAGE_EXAMPLES[name].steps)
    trackers = run.get_field("tracking.reportTo") or []
    if "tensorboard" in trackers:
        check_tensorboard(run, tmp_path)
    if "wandb" in trackers:
        check_wandb_files(run, tmp_path)
    if "mlflow" in trackers:
        assert example_jobs.mlflow is not None
        address = example_jobs.job_namespace.installation.cluster.plan.nodes[0].address
        check_mlflow(run, MlflowRuns(f"http://{address}:{example_jobs.mlflow.port}", run.get_field("tracking.mlflow.experimentName")))
    if run.get_field("output.hub.push"):
        assert example_jobs.hub is not None
        check_hub(run, example_jobs.hub)
    if token := run.get_field("model.tokenSecretRef"):
        check_token_from_secret(example_jobs.job_namespace, make_job_name(name), token)


def check_hub(run: FinishedRun, hub: Hub) -> None:
    """Check that the model hub has the files of the adapter, and that the hub repository is private or public as the job requests."""
    repository = hub.repositories[f"me/{run.get_field('output.hub.repository')}"]
    assert repository.is_private is run.get_field("output.hub.private")
    assert run.output.hub_uri == f"http://hub/me/{run.get_field('output.hub.repository')}/tree/{repository.commits[-1].oid}"
    assert repository.files["adapter_model.safetensors"] == run.read(f"{run.output.uri}/adapter_model.safetensors")


def check_token_from_secret(job_namespace: JobNamespace, name: str, token_reference: dict[str, str]) -> None:
    """Check that the pod reads its Hugging Face token from the Secret that the import wrote."""
    (pod,) = job_namespace.pods(name)
    (container,) = [candidate for candidate in pod["spec"]["containers"] if candidate["name"] == TRAINER_CONTAINER]
    (variable,) = [candidate for candidate in container["env"] if candidate["name"] == Env.HF_TOKEN.value]
    assert variable["valueFrom"]["secretKeyRef"] == token_reference == {"name": f"{name}-import", "key": "hf-token"}
