"""Run pods as local processes with a real S3 server, with the helpers of the pod tests."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.pod import ResumeConfig, StoreTarget

from localcluster.s3 import S3Endpoint, S3Process
from tests.pod.pod_harness import PYTHONPATH, UID, Pod, run_config, write_rows
from tests.support.tiny import make_tiny_model

ROOT = Path(__file__).resolve().parents[2]
BUCKET = "benchmarks"
POD_PYTHONPATH = os.pathsep.join([PYTHONPATH, str(ROOT / "tests/pod")])
"""PYTHONPATH of a pod. It includes the folder `tests/pod`, so that a pod can run a module of this folder instead of the training."""


@dataclass(frozen=True)
class Workspace:
    """A folder, an S3 server, models and training data that all pods of a benchmark share."""

    folder: Path
    server: S3Endpoint

    @property
    def credentials(self) -> dict[str, str]:
        """The environment variables that give a pod the S3 credentials."""
        return {"AWS_ACCESS_KEY_ID": self.server.access_key, "AWS_SECRET_ACCESS_KEY": self.server.secret_key}

    def make_target(self, run_name: str, *, endpoint_url: str | None = None) -> StoreTarget:
        """Return the storage location of the run `run_name`."""
        return StoreTarget(uri=f"s3://{BUCKET}/{run_name}/team/job/{UID}", endpoint=endpoint_url or self.server.host_url)

    def make_spec(self, model: dict[str, Any] | None = None, **groups: Any) -> dict[str, Any]:
        """Return the spec of a small job. `model` contains arguments of make_tiny_model, which creates the model at the first call."""
        model_arguments = model or {}
        model_name = "-".join(["model", *(f"{key}{value}" for key, value in sorted(model_arguments.items()))])
        if not (self.folder / model_name / "config.json").exists():
            make_tiny_model(self.folder / model_name, **model_arguments)
        if not (self.folder / "rows.jsonl").exists():
            write_rows(self.folder / "rows.jsonl")
        model_reference = {"source": f"file://{self.folder}/{model_name}"}
        return {
            "model": model_reference,
            "dataset": {"train": f"file://{self.folder}/rows.jsonl", "format": "messages"},
            **groups,
        }

    def create_pod(
        self, name: str, spec: dict[str, Any], target: StoreTarget, module_name: str, *,
        attempt: int = 1, newest_step: int = 0, env: dict[str, str] | None = None,
    ) -> Pod:  # fmt: skip
        """Create a pod with one rank that runs the module `module_name` instead of the training."""
        run = run_config(spec, target, attempt=attempt, resume=ResumeConfig(mode="auto", expect_step=newest_step))
        environment = {"PYTHONPATH": POD_PYTHONPATH, "FINETUNE_TRAINER_MODULE": module_name, **self.credentials}
        return Pod(run, self.folder / name, environment | (env or {}))


@contextlib.contextmanager
def open_workspace(folder: Path | None = None) -> Iterator[Workspace]:
    """Start an S3 server and yield a workspace, in a temporary folder or in `folder`, which is kept."""
    with contextlib.ExitStack() as stack:
        workspace_folder = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workspace_folder.mkdir(parents=True, exist_ok=True)
        server = stack.enter_context(S3Process(workspace_folder / "s3"))
        s3_client = server.client()
        if BUCKET not in {bucket["Name"] for bucket in s3_client.list_buckets()["Buckets"]}:
            s3_client.create_bucket(Bucket=BUCKET)
        os.environ |= {"AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key}
        yield Workspace(workspace_folder, server)


def summarize(values: list[float], digits: int = 3) -> dict[str, float | int | None]:
    """Return the number of values, their median, 99th percentile and maximum."""
    if not values:
        return {"n": 0, "p50": None, "p99": None, "most": None}
    sorted_values = sorted(values)

    def compute_percentile(fraction: float) -> float:
        return round(sorted_values[min(len(sorted_values) - 1, int(fraction * len(sorted_values)))], digits)

    return {"n": len(sorted_values), "p50": compute_percentile(0.5), "p99": compute_percentile(0.99), "most": round(sorted_values[-1], digits)}
