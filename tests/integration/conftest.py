"""Fixtures of the integration tests: a real API server and a real S3 server. Each server is started once per test session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from localcluster import ControlPlane, Endpoint, S3Endpoint
from tests.support.stores import running_store


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A running control plane: etcd, kube-apiserver and kube-controller-manager. Its kubeconfig has administrator rights. Each test creates its own
    namespaces.
    """
    with ControlPlane(tmp_path_factory.mktemp("control-plane") / "state") as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Endpoint]:
    """A running S3 server with authentication. Each test creates its own bucket."""
    with running_store(tmp_path_factory.mktemp("s3") / "store") as endpoint:
        yield endpoint
