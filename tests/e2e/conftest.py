"""Fixtures of the e2e tests. All tests share one cluster (two nodes, real containers, DNS and S3) and one installed operator."""

from __future__ import annotations

import contextlib
import fcntl
import secrets
from collections.abc import Iterator

import pytest

from localcluster import NodeCluster, images, paths
from localcluster.steps import show_step
from tests.e2e.jobs.installation import OPERATOR_IMAGE, TRAINER_IMAGE, Installation, JobNamespace, demo
from tests.support.audit_log import read_requests
from tests.support.tiny import make_tiny_model


@pytest.fixture(scope="session")
def node_cluster() -> Iterator[NodeCluster]:
    """A cluster of the nodes n1 and n2, each with four simulated GPUs. S3 runs on n1. The images on the nodes are kept for the next test run."""
    with exclusive_run(), NodeCluster(paths.get_default_state_folder("tests"), nodes=2, gpus=4, step=show_step) as cluster:
        yield cluster


@contextlib.contextmanager
def exclusive_run() -> Iterator[None]:
    """Hold this machine's lock during the test run, because only one cluster with nodes can run at a time."""
    paths.cache_folder().mkdir(parents=True, exist_ok=True)
    with (paths.cache_folder() / "e2e.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with show_step("wait for another run of these tests"):
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def namespace(node_cluster: NodeCluster) -> Iterator[str]:
    """A new namespace, deleted after the test."""
    name = f"t-{secrets.token_hex(4)}"
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
    node_cluster.endpoint.request("POST", "/api/v1/namespaces", body)
    yield name
    node_cluster.endpoint.request("DELETE", f"/api/v1/namespaces/{name}")


@pytest.fixture(scope="session")
def installation(node_cluster: NodeCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """The cluster with the operator of this checkout and a model in S3. After all tests, the fixture checks that RBAC forbade no request of the operator."""
    images.build_images([images.ImageName.OPERATOR, images.ImageName.TRAINER], show_step)
    for tag in (OPERATOR_IMAGE, TRAINER_IMAGE):
        node_cluster.load_image(tag)
    installation = Installation(node_cluster)
    installation.install()
    model = make_tiny_model(tmp_path_factory.mktemp("model"), hidden=128, layers=4)
    installation.upload(model, {})
    yield installation
    requests = read_requests(node_cluster.endpoint, demo.RELEASE_NAME, demo.RELEASE_NAME)
    print("permissions that the operator used:", sorted({request.permission for request in requests}))  # shown by pytest -s
    assert sorted(request for request in requests if not request.is_permitted) == []


@pytest.fixture
def job_namespace(installation: Installation) -> Iterator[JobNamespace]:
    """A new namespace for jobs, deleted after the test."""
    created_namespace = installation.create_namespace(f"jobs-{secrets.token_hex(4)}")
    yield created_namespace
    installation.api.delete("namespaces", None, created_namespace.namespace)


@pytest.fixture(scope="module")
def shared_namespace(installation: Installation) -> Iterator[JobNamespace]:
    """A namespace for the jobs that several tests of a module share."""
    created_namespace = installation.create_namespace(f"shared-{secrets.token_hex(4)}")
    yield created_namespace
    installation.api.delete("namespaces", None, created_namespace.namespace)
