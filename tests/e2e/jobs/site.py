"""A cluster with the operator installed as users install it, a store with a small model and data, and hands for tests.

The model that the examples name is a tiny one here: what is tested is everything around the learning.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from finetune_api.names import CONTAINER, PLURAL, Label, Phase
from finetune_api.status import FineTuneJobStatus

from localcluster import NodeCluster, S3Endpoint
from tests.support.kubeapi import KubeApi, Object

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "scripts"))

import demo  # noqa: E402 -- a script, importable only now
from demo_clusters import OPERATOR_IMAGE, TRAINER_IMAGE  # noqa: E402
from tools import HELM  # noqa: E402

MODEL = f"s3://{demo.MODELS}/{demo.MODEL_KEY}"
SECRET = demo.SECRET
SMALL = {"cpu": "100m", "memory": "2Gi", "ephemeralStorage": "2Gi", "sharedMemory": "256Mi"}
"""What a pod asks for by default here, so that two cores hold all jobs of a test at once."""
PATIENCE = 240
"""Seconds that a tiny job may take on two busy cores."""


@dataclass(frozen=True)
class Place:
    """What the chart's values depend on."""

    s3: S3Endpoint
    operator_image: str = OPERATOR_IMAGE
    trainer_image: str = TRAINER_IMAGE


@dataclass(frozen=True)
class Site:
    """One installation, shared by all tests."""

    cluster: NodeCluster

    @cached_property
    def api(self) -> KubeApi:
        """The API server, as administrator."""
        return KubeApi(self.cluster.endpoint)

    @cached_property
    def store(self) -> Any:
        """A boto3 client of the cluster's S3."""
        return self.cluster.s3.client()

    def helm(self, *arguments: str, values: Mapping[str, Any] | None = None) -> str:
        """Run Helm in the operator's namespace; its output."""
        command = [str(HELM.path), "--kubeconfig", str(self.cluster.kubeconfig), "-n", demo.RELEASE, *arguments]
        done = subprocess.run(command, input=json.dumps(values or {}), capture_output=True, text=True)
        assert done.returncode == 0, f"helm {arguments[0]}: {done.stderr}"
        return done.stdout

    def install(self, **more: Any) -> str:
        """The chart with the demo's values; `more` wins. Returns Helm's notes."""
        self.api.patch("namespaces", None, demo.RELEASE, restricted(demo.RELEASE), patch="apply")
        values = demo.values(Place(self.cluster.s3)) | more  # type: ignore[arg-type]  # of a cluster it needs these only
        values["settings"] |= {"retry": {"baseSeconds": 1}}
        values["trainer"] |= {"resources": SMALL, "env": {"OMP_NUM_THREADS": "1"}}
        chart = str(ROOT / "helm/finetune-operator")
        return self.helm(
            "upgrade", "--install", demo.RELEASE, chart, "--wait", "--timeout", "2m", "-f", "-", values=values
        )

    def upload(self, model: Path, files: Mapping[str, bytes]) -> None:
        """The model where the examples look for it, and objects of the bucket `datasets`."""
        for bucket in (demo.MODELS, demo.DATASETS, demo.RESULTS):
            self.store.create_bucket(Bucket=bucket)
        for path in sorted(model.iterdir()):
            self.store.upload_file(str(path), demo.MODELS, f"{demo.MODEL_KEY}/{path.name}")
        for path in sorted((ROOT / "examples/data").iterdir()):
            self.store.upload_file(str(path), demo.DATASETS, path.name)
        for key, body in files.items():
            self.store.put_object(Bucket=demo.DATASETS, Key=key, Body=body)

    def room(self, namespace: str) -> Room:
        """A namespace for jobs: Pod Security `restricted`, and a Secret with S3 keys."""
        self.api.patch("namespaces", None, namespace, restricted(namespace), patch="apply")
        keys = {"AWS_ACCESS_KEY_ID": self.cluster.s3.access_key, "AWS_SECRET_ACCESS_KEY": self.cluster.s3.secret_key}
        room = Room(self, namespace)
        room.secret(SECRET, keys)
        return room

    def manifest(self, uri: str) -> dict[str, str]:
        """sha256 by path of the files in a committed folder."""
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        body = json.loads(self.store.get_object(Bucket=bucket, Key=f"{prefix}/manifest.json")["Body"].read())
        return {one["path"]: one["sha256"] for one in body["files"]}


def restricted(name: str) -> Object:
    """A namespace under the strictest Pod Security level."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


@dataclass(frozen=True)
class Room:
    """A namespace in which a test applies jobs."""

    site: Site
    namespace: str
    _applied: list[str] = field(default_factory=list)

    def secret(self, name: str, keys: Mapping[str, str]) -> None:
        """Create a Secret."""
        body = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": dict(keys)}
        self.site.api.create("secrets", self.namespace, body)

    def apply(self, *manifests: Object | Path) -> None:
        """`kubectl apply` with objects or a file."""
        for one in manifests:
            text = one.read_text("utf-8") if isinstance(one, Path) else yaml.safe_dump(one)
            self.site.cluster.kubectl("-n", self.namespace, "apply", "-f", "-", stdin=text)

    def status(self, name: str) -> FineTuneJobStatus:
        """The job's status."""
        return read(self.site.api.get(PLURAL, self.namespace, name))

    def wait(
        self, name: str, good: Callable[[FineTuneJobStatus], object], what: str, timeout: float = PATIENCE
    ) -> FineTuneJobStatus:
        """The status as soon as it is `good`. AssertionError with status and pods' last words after `timeout` seconds."""
        try:
            found = self.site.api.wait(
                PLURAL, self.namespace, name, lambda body: bool(good(read(body))), timeout=timeout, what=what
            )
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self._last_words(name)}") from None
        return read(found)

    def end(self, name: str, phase: Phase = Phase.SUCCEEDED) -> FineTuneJobStatus:
        """The status when the job has ended, which must be in `phase`."""
        status = self.wait(name, lambda s: s.phase in (Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED), "over")
        assert status.phase is phase, f"{name}: {status.phase}, {status.failure}\n{self._last_words(name)}"
        return status

    def pods(self, name: str) -> list[Object]:
        """Pods of a job, newest attempt last."""
        found = self.site.api.list("pods", self.namespace, labels=f"{Label.NAME}={name}")
        return sorted(found, key=lambda pod: (int(pod["metadata"]["labels"][Label.ATTEMPT]), pod["metadata"]["name"]))

    def execute(self, pod: str, script: str) -> str:
        """Run a shell script in a trainer container."""
        return self.site.cluster.kubectl("-n", self.namespace, "exec", pod, "-c", CONTAINER, "--", "sh", "-c", script)

    def _last_words(self, name: str) -> str:
        found = []
        for pod in self.pods(name):
            logs = self.site.cluster.kubectl(
                "-n", self.namespace, "logs", "--tail=30", pod["metadata"]["name"], check=False
            )
            found.append(f"--- {pod['metadata']['name']} {pod['status'].get('phase')}\n{logs}")
        return "\n".join(found)


def read(body: Object) -> FineTuneJobStatus:
    """The status of a FineTuneJob's JSON; an empty one before the operator has written it."""
    return FineTuneJobStatus.model_validate(body.get("status") or {"observedGeneration": -1})


def job(name: str, **spec: Any) -> Object:
    """A FineTuneJob on CPU with the site's model; `spec` adds groups and replaces them."""
    groups: Object = {
        "model": {"source": MODEL},
        "dataset": {"train": "s3://datasets/captain.jsonl"},
        "resources": {"gpusPerNode": 0, "cpu": "100m", "memory": "2Gi"},
    }
    return {
        "apiVersion": "finetune-operator.io/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name},
        "spec": groups | spec,
    }  # fmt: skip
