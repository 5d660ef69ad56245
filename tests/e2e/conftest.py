"""One cluster with two nodes for all tests in this folder, with real containers, DNS and S3."""

from __future__ import annotations

import contextlib
import fcntl
import secrets
from collections.abc import Iterator

import pytest

from localcluster import NodeCluster, paths
from localcluster.steps import shown


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
