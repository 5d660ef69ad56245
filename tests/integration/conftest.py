"""A real API server and a real S3 server for the tests in this folder, one of each for the whole run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from localcluster import ControlPlane, Endpoint, S3Endpoint, S3Process


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """etcd, kube-apiserver, kube-controller-manager; `kubeconfig` has administrator rights. Tests make namespaces."""
    with ControlPlane(tmp_path_factory.mktemp("control-plane") / "state") as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Endpoint]:
    """SeaweedFS with authentication; tests make a bucket each."""
    with S3Process(tmp_path_factory.mktemp("s3")) as endpoint:
        yield endpoint
