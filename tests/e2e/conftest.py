"""One cluster with two nodes for all tests in this folder, with real containers, DNS and S3."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from localcluster import NodeCluster, paths
from localcluster.steps import shown


@pytest.fixture(scope="session")
def node_cluster() -> Iterator[NodeCluster]:
    """Nodes n1 and n2, each with four pretended GPUs; S3 runs on n1. The nodes' images stay for the next run."""
    with NodeCluster(paths.state("tests"), nodes=2, gpus=4, step=shown) as cluster:
        yield cluster


@pytest.fixture
def namespace(node_cluster: NodeCluster) -> Iterator[str]:
    """A namespace of the test's own, gone afterwards with everything in it."""
    name = f"t-{secrets.token_hex(4)}"
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
    node_cluster.endpoint.request("POST", "/api/v1/namespaces", body)
    yield name
    node_cluster.endpoint.request("DELETE", f"/api/v1/namespaces/{name}")
