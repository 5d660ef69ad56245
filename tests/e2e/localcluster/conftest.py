"""Fixtures for tests of the local cluster. The pods of these tests run testbox, a small program whose behaviour and exit code a test chooses."""

from __future__ import annotations

import pytest

from localcluster import NodeCluster, build
from localcluster.oci import Image, write_layout
from tests.e2e.localcluster.pods import TESTBOX_IMAGE, NamespaceApi


@pytest.fixture(scope="session")
def testbox(node_cluster: NodeCluster) -> str:
    """Load the testbox image into all nodes. Returns the tag of the image."""
    program = build.ensure_built("testbox")
    layout = write_layout(program.parent / "image", Image(TESTBOX_IMAGE, {"/testbox": program}, ["/testbox"]))
    return node_cluster.load_image(layout)


@pytest.fixture
def api(node_cluster: NodeCluster, namespace: str, testbox: str) -> NamespaceApi:
    """A client for API calls in a new namespace."""
    assert testbox == TESTBOX_IMAGE
    return NamespaceApi(node_cluster, namespace)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the tests that stop the shared cluster to the end of the test run."""
    items.sort(key=lambda item: item.path.name == "test_cleanup.py")
