"""One cluster with two nodes for all tests in this folder, with real containers, DNS and S3, and one installed operator."""

from __future__ import annotations

import contextlib
import fcntl
import secrets
from collections.abc import Iterator

import pytest

from localcluster import NodeCluster, images, paths
from localcluster.steps import shown
from tests.e2e.jobs.site import OPERATOR_IMAGE, TRAINER_IMAGE, Room, Site
from tests.support.tiny import make_tiny_model


@pytest.fixture(scope="session")
def node_cluster() -> Iterator[NodeCluster]:
    """Nodes n1 and n2, each with four pretended GPUs; S3 runs on n1. The nodes' images stay for the next run."""
    with the_only_run(), NodeCluster(paths.state("tests"), nodes=2, gpus=4, step=shown) as cluster:
        yield cluster


@contextlib.contextmanager
def the_only_run() -> Iterator[None]:
    """Wait until no other run of these tests is at work on this machine: there is one cluster with nodes."""
    paths.cache().mkdir(parents=True, exist_ok=True)
    with (paths.cache() / "e2e.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with shown("wait for another run of these tests"):
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def namespace(node_cluster: NodeCluster) -> Iterator[str]:
    """A namespace of the test's own, gone afterwards with everything in it."""
    name = f"t-{secrets.token_hex(4)}"
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
    node_cluster.endpoint.request("POST", "/api/v1/namespaces", body)
    yield name
    node_cluster.endpoint.request("DELETE", f"/api/v1/namespaces/{name}")


@pytest.fixture(scope="session")
def site(node_cluster: NodeCluster, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The operator of this checkout on the cluster, ready for jobs."""
    images.build([images.Which.OPERATOR, images.Which.TRAINER], shown)
    for tag in (OPERATOR_IMAGE, TRAINER_IMAGE):
        node_cluster.load_image(tag)
    site = Site(node_cluster)
    site.install()
    model = make_tiny_model(tmp_path_factory.mktemp("model"), hidden=128, layers=4)
    site.upload(model, {})
    return site


@pytest.fixture
def room(site: Site) -> Iterator[Room]:
    """A namespace of the test's own."""
    made = site.room(f"jobs-{secrets.token_hex(4)}")
    yield made
    site.api.delete("namespaces", None, made.namespace)


@pytest.fixture(scope="module")
def shared_room(site: Site) -> Iterator[Room]:
    """A namespace for jobs that several tests look at."""
    made = site.room(f"shared-{secrets.token_hex(4)}")
    yield made
    site.api.delete("namespaces", None, made.namespace)
