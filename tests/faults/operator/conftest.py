"""Fixtures for the tests of fault matrix rows that take long or need a separate control plane."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from localcluster import ControlPlane, Endpoint
from tests.support.fault_rows import register_plugin
from tests.support.rig import fault_cluster, rig

__all__ = ["fault_cluster", "rig"]


def pytest_configure(config: pytest.Config) -> None:
    register_plugin(config)


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A running control plane: etcd, kube-apiserver and kube-controller-manager."""
    with ControlPlane(tmp_path_factory.mktemp("control-plane") / "state") as endpoint:
        yield endpoint
