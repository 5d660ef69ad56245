"""The program that the cluster's own tests run in pods."""

from __future__ import annotations

import pytest

from localcluster import NodeCluster, build
from localcluster.oci import Image, write_layout
from tests.e2e.localcluster.pods import TESTBOX, Lab


@pytest.fixture(scope="session")
def testbox(node_cluster: NodeCluster) -> str:
    """testbox as an image on all nodes."""
    program = build.ensure("testbox")
    layout = write_layout(program.parent / "image", Image(TESTBOX, {"/testbox": program}, ["/testbox"]))
    return node_cluster.load_image(layout)


@pytest.fixture
def lab(node_cluster: NodeCluster, namespace: str, testbox: str) -> Lab:
    """A namespace with what pods need."""
    assert testbox == TESTBOX
    return Lab(node_cluster, namespace)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that end the common cluster come after all others."""
    items.sort(key=lambda item: item.path.name == "test_life.py")
