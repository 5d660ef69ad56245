"""Jobs share a cache of base models: in a PersistentVolumeClaim, which the preparation fills, and on the disk of a node."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from finetune_api.status import FineTuneJobStatus

from tests.e2e.jobs.installation import JobNamespace, make_job

pytestmark = pytest.mark.slow
TRAINER_UID = 10001
CLAIM = "models"
TWO_PODS = {"gpusPerNode": 0, "nodes": 2, "cpu": "100m", "memory": "2Gi"}


@pytest.fixture
def volume_folder() -> Iterator[Path]:
    """An empty folder that the user of the pods owns. The nodes of the local cluster see the folders of this machine.

    The folder is in memory (/dev/shm), because a model cache on a node leaves 15 % of its disk free. The disk of this machine may have less free space.
    """
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="finetune-models-") as name:
        os.chown(name, TRAINER_UID, TRAINER_UID)
        yield Path(name)


@pytest.fixture
def claim(job_namespace: JobNamespace, volume_folder: Path) -> Iterator[None]:
    """A claim in the namespace of the jobs, bound to a volume in `volume_folder`."""
    api, access_modes, size = job_namespace.installation.api, ["ReadWriteMany"], {"storage": "1Gi"}
    volume_name = f"{job_namespace.namespace}-{CLAIM}"
    claim_reference = {"namespace": job_namespace.namespace, "name": CLAIM}
    volume = {"capacity": size, "accessModes": access_modes, "hostPath": {"path": str(volume_folder)}, "storageClassName": "", "claimRef": claim_reference}
    api.create("persistentvolumes", None, {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": volume_name}, "spec": volume})
    spec = {"accessModes": access_modes, "resources": {"requests": size}, "storageClassName": "", "volumeName": volume_name}
    api.create("persistentvolumeclaims", job_namespace.namespace, {
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": CLAIM}, "spec": spec,
    })  # fmt: skip
    yield
    job_namespace.installation.cluster.kubectl("delete", "persistentvolume", volume_name, "--wait=false")


@pytest.fixture
def node_cache(job_namespace: JobNamespace, volume_folder: Path) -> Iterator[None]:
    """An installation with a cache on the nodes, for the namespace of the jobs, whose pods may mount folders of the node."""
    installation = job_namespace.installation
    labels = {"pod-security.kubernetes.io/enforce": "privileged"}
    installation.api.patch("namespaces", None, job_namespace.namespace, {"metadata": {"labels": labels}})
    installation.install(modelCache={"node": {"path": str(volume_folder), "sizeLimit": "1Gi", "namespaces": [job_namespace.namespace]}})
    yield
    installation.install()


def run_job(jobs: JobNamespace, name: str, cache: str, **spec: Any) -> FineTuneJobStatus:
    """Run a job with a cache to its end, and return its status."""
    body = make_job(name, training={"maxSteps": 2}, **spec)
    body["spec"]["model"] = body["spec"]["model"] | {"cache": cache}
    jobs.apply(body)
    return jobs.wait_finished(name)


def read_model_source(status: FineTuneJobStatus) -> str | None:
    """Return the place from which rank 0's pod loaded the model, for example the cache."""
    assert status.resolved is not None
    assert not [note for note in status.resolved.notes or [] if "cache" in note]
    return status.resolved.model_source


def list_stored_files(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return inode, modification time (ns) and owner of each weight file below `folder`, by path. These values change if the file is downloaded again."""
    stats = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*.safetensors")}
    return {path: (stat.st_ino, stat.st_mtime_ns, stat.st_uid) for path, stat in stats.items()}


@pytest.mark.usefixtures("claim")
def test_a_preparation_fills_the_claim_from_which_all_jobs_read(job_namespace: JobNamespace, volume_folder: Path) -> None:
    cache = f"pvc://{CLAIM}/hub"
    first_status = run_job(job_namespace, "first", cache, prepare={"strategy": "always"})
    stored_files = list_stored_files(volume_folder)
    assert (read_model_source(first_status), len(stored_files), {owner for *_, owner in stored_files.values()}) == ("cache", 1, {TRAINER_UID})
    assert read_model_source(run_job(job_namespace, "second", cache, resources=TWO_PODS)) == "cache"
    assert list_stored_files(volume_folder) == stored_files


@pytest.mark.usefixtures("node_cache")
def test_the_jobs_of_a_node_download_the_model_once(job_namespace: JobNamespace, volume_folder: Path) -> None:
    """Both nodes of the local cluster see the same folder, so one download serves both."""
    assert read_model_source(run_job(job_namespace, "first", "node")) == "download"
    stored_files = list_stored_files(volume_folder)
    assert (len(stored_files), {owner for *_, owner in stored_files.values()}) == (1, {TRAINER_UID})
    assert read_model_source(run_job(job_namespace, "second", "node", resources=TWO_PODS)) == "cache"
    assert list_stored_files(volume_folder) == stored_files
