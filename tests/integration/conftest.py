"""Fixtures of the integration tests: a real API server and a real S3 server, each started once per session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from localcluster import ControlPlane, Endpoint, S3Endpoint
from tests.support.stores import running_store


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A control plane and its administrator's kubeconfig: etcd, kube-apiserver, kube-controller-manager. Tests create their own namespaces."""
    with ControlPlane(tmp_path_factory.mktemp("control-plane") / "state") as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Endpoint]:
    """SeaweedFS with authentication. Each test creates its own bucket."""
    with running_store(tmp_path_factory.mktemp("s3") / "store") as endpoint:
        yield endpoint
