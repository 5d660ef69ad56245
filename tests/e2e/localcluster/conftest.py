"""Fixtures for tests of the cluster itself: pods of testbox, a small program that ends in a chosen way."""

from __future__ import annotations

import pytest

from localcluster import NodeCluster, build
from localcluster.oci import Image, write_layout
from tests.e2e.localcluster.pods import TESTBOX, Lab


@pytest.fixture(scope="session")
def testbox(node_cluster: NodeCluster) -> str:
    """Tag of the testbox image, which is loaded into all nodes."""
    program = build.ensure("testbox")
    layout = write_layout(program.parent / "image", Image(TESTBOX, {"/testbox": program}, ["/testbox"]))
    return node_cluster.load_image(layout)


@pytest.fixture
def lab(node_cluster: NodeCluster, namespace: str, testbox: str) -> Lab:
    """A new namespace and the calls that tests make in it."""
    assert testbox == TESTBOX
    return Lab(node_cluster, namespace)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run tests that end the common cluster after all others."""
    items.sort(key=lambda item: item.path.name == "test_life.py")
