"""A cluster with an installed operator, a model and data in its S3, and helpers with which tests apply jobs.

A tiny model replaces the model of the examples, because the tests do not check the quality of the training.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from finetune_api.names import PLURAL, TRAINER_CONTAINER, Label, Phase
from finetune_api.status import FineTuneJobStatus

from localcluster import NodeCluster, S3Endpoint
from tests.support.kubeapi import KubeApi, Object

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "scripts"))

import demo  # noqa: E402 -- a script, importable only now
from demo_clusters import OPERATOR_IMAGE, TRAINER_IMAGE  # noqa: E402
from tools import HELM  # noqa: E402

MODEL = f"s3://{demo.MODELS_BUCKET}/{demo.MODEL_KEY_PREFIX}"
SECRET = demo.SECRET_NAME
SMALL_RESOURCES = {"cpu": "100m", "memory": "2Gi", "ephemeralStorage": "2Gi", "sharedMemory": "256Mi"}
"""The chart's default resources of a pod, small enough that all jobs of a test fit on two cores."""
JOB_TIMEOUT_SECONDS = 240
"""How long a tiny job may take on two busy cores."""
LONG_RUN_STEPS = 400
"""Number of steps of a job that a test must observe while it runs. 30 steps take less than a second, so the operator might never report the phase Running."""


@dataclass(frozen=True)
class ChartInputs:
    """The S3 endpoint and the images that the tests write into the chart's values."""

    s3: S3Endpoint
    operator_image: str = OPERATOR_IMAGE
    trainer_image: str = TRAINER_IMAGE


@dataclass(frozen=True)
class Installation:
    """A cluster with an installed operator, which all tests share."""

    cluster: NodeCluster

    @cached_property
    def api(self) -> KubeApi:
        """A client of the API server with administrator rights."""
        return KubeApi(self.cluster.endpoint)

    @cached_property
    def store(self) -> Any:
        """A boto3 client of the cluster's S3."""
        return self.cluster.s3.client()

    def helm(self, *arguments: str, values: Mapping[str, Any] | None = None) -> str:
        """Run Helm in the operator's namespace with these chart values. Returns its output."""
        command = [str(HELM.path), "--kubeconfig", str(self.cluster.kubeconfig), "-n", demo.RELEASE_NAME, *arguments]
        completed_process = subprocess.run(command, input=json.dumps(values or {}), capture_output=True, text=True)
        assert completed_process.returncode == 0, f"helm {arguments[0]}: {completed_process.stderr}"
        return completed_process.stdout

    def install(self, **chart_values: Any) -> str:
        """Install or upgrade the chart with the demo's values, overridden by `chart_values`. Returns Helm's output."""
        self.api.patch("namespaces", None, demo.RELEASE_NAME, make_restricted_namespace(demo.RELEASE_NAME), patch_type="apply")
        values = demo.make_helm_values(ChartInputs(self.cluster.s3)) | chart_values  # type: ignore[arg-type]  # demo.make_helm_values reads only the fields of ChartInputs
        values["settings"] |= {"retry": {"baseSeconds": 1}}
        # Some virtual machines advertise AMX but do not permit it, so 16-bit matrix products would be killed with SIGILL.
        values["trainer"] |= {"resources": SMALL_RESOURCES, "env": {"OMP_NUM_THREADS": "1", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_FP16"}}
        chart = str(ROOT / "helm/finetune-operator")
        return self.helm(
            "upgrade", "--install", demo.RELEASE_NAME, chart, "--wait", "--timeout", "2m", "-f", "-", values=values
        )

    def upload(self, model: Path, files: Mapping[str, bytes]) -> None:
        """Upload the model to the address that the examples use as model.source, and the files to the bucket `datasets`."""
        for bucket in (demo.MODELS_BUCKET, demo.DATASETS_BUCKET, demo.RESULTS_BUCKET):
            self.store.create_bucket(Bucket=bucket)
        for path in sorted(model.iterdir()):
            self.store.upload_file(str(path), demo.MODELS_BUCKET, f"{demo.MODEL_KEY_PREFIX}/{path.name}")
        for path in sorted((ROOT / "examples/data").iterdir()):
            self.store.upload_file(str(path), demo.DATASETS_BUCKET, path.name)
        for key, body in files.items():
            self.store.put_object(Bucket=demo.DATASETS_BUCKET, Key=key, Body=body)

    def upload_folder(self, folder: Path, bucket: str) -> None:
        """Upload all files of a folder to a new bucket."""
        self.store.create_bucket(Bucket=bucket)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.store.upload_file(str(path), bucket, path.relative_to(folder).as_posix())

    def create_namespace(self, namespace: str) -> JobNamespace:
        """Create a namespace for jobs, with Pod Security `restricted` and a Secret with the S3 keys."""
        self.api.patch("namespaces", None, namespace, make_restricted_namespace(namespace), patch_type="apply")
        keys = {"AWS_ACCESS_KEY_ID": self.cluster.s3.access_key, "AWS_SECRET_ACCESS_KEY": self.cluster.s3.secret_key}
        created_namespace = JobNamespace(self, namespace)
        created_namespace.create_secret(SECRET, keys)
        return created_namespace

    def read_file_hashes(self, uri: str) -> dict[str, str]:
        """Return the sha256 of each file of a committed folder, by path, as its manifest.json lists them."""
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        body = json.loads(self.store.get_object(Bucket=bucket, Key=f"{prefix}/manifest.json")["Body"].read())
        return {entry["path"]: entry["sha256"] for entry in body["files"]}


def make_restricted_namespace(name: str) -> Object:
    """Return the manifest of a namespace with the Pod Security level `restricted`."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


@dataclass(frozen=True)
class JobNamespace:
    """A namespace in which a test applies jobs."""

    installation: Installation
    namespace: str

    def create_secret(self, name: str, keys: Mapping[str, str]) -> None:
        """Create a Secret with these keys and values."""
        body = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": dict(keys)}
        self.installation.api.create("secrets", self.namespace, body)

    def apply(self, *manifests: Object | Path) -> None:
        """Run `kubectl apply` for each object or manifest file."""
        for manifest in manifests:
            text = manifest.read_text("utf-8") if isinstance(manifest, Path) else yaml.safe_dump(manifest)
            self.installation.cluster.kubectl("-n", self.namespace, "apply", "-f", "-", stdin=text)

    def status(self, name: str) -> FineTuneJobStatus:
        """Read the status of a job."""
        return parse_status(self.installation.api.get(PLURAL, self.namespace, name))

    def wait(
        self,
        name: str,
        until: Callable[[FineTuneJobStatus], object],
        description: str,
        timeout: float = JOB_TIMEOUT_SECONDS,
    ) -> FineTuneJobStatus:
        """Wait until `until(status)` is true, and return the status. After `timeout` seconds, raise AssertionError with the status and the pods' logs."""
        try:
            job_object = self.installation.api.wait(
                PLURAL,
                self.namespace,
                name,
                lambda body: bool(until(parse_status(body))),
                timeout=timeout,
                description=description,
            )
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self._read_pod_logs(name)}") from None
        return parse_status(job_object)

    def wait_finished(self, name: str, phase: Phase = Phase.SUCCEEDED) -> FineTuneJobStatus:
        """Wait until the job ends, and return its status. Raise AssertionError if the job's final phase is not `phase`."""
        status = self.wait(name, lambda s: s.phase in (Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED), "finished")
        assert status.phase is phase, f"{name}: {status.phase}, {status.failure}\n{self._read_pod_logs(name)}"
        return status

    def pods(self, name: str) -> list[Object]:
        """List the pods of a job, sorted by attempt."""
        pods = self.installation.api.list("pods", self.namespace, labels=f"{Label.JOB_NAME}={name}")
        return sorted(pods, key=lambda pod: (int(pod["metadata"]["labels"][Label.ATTEMPT]), pod["metadata"]["name"]))

    def exec_script(self, pod: str, script: str) -> str:
        """Run a shell script in the trainer container of a pod. Returns its output."""
        return self.installation.cluster.kubectl(
            "-n", self.namespace, "exec", pod, "-c", TRAINER_CONTAINER, "--", "sh", "-c", script
        )

    def _read_pod_logs(self, name: str) -> str:
        log_texts = []
        for pod in self.pods(name):
            logs = self.installation.cluster.kubectl(
                "-n", self.namespace, "logs", "--tail=30", pod["metadata"]["name"], check=False
            )
            log_texts.append(f"--- {pod['metadata']['name']} {pod['status'].get('phase')}\n{logs}")
        return "\n".join(log_texts)


def parse_status(body: Object) -> FineTuneJobStatus:
    """Parse the status of a FineTuneJob. If it has no status yet, return an empty status with observedGeneration -1."""
    return FineTuneJobStatus.model_validate(body.get("status") or {"observedGeneration": -1})


def make_job(name: str, **spec: Any) -> Object:
    """Return the manifest of a FineTuneJob that trains the uploaded model on CPUs. Each spec group in `spec` replaces the default group of that name."""
    groups: Object = {
        "model": {"source": MODEL},
        "dataset": {"train": "s3://datasets/captain.jsonl"},
        "resources": {"gpusPerNode": 0, "cpu": "100m", "memory": "2Gi"},
    }
    return {
        "apiVersion": "finetune-operator.io/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name},
        "spec": groups | spec,
    }  # fmt: skip
