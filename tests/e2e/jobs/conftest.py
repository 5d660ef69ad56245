"""One installation of the operator for all tests here: images, chart, model and data."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from localcluster import NodeCluster, images
from localcluster.steps import shown
from tests.e2e.jobs.site import OPERATOR_IMAGE, TRAINER_IMAGE, Room, Site
from tests.support.tiny import make_tiny_model


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder run real pods."""
    for item in items:
        if "tests/e2e/jobs" in item.path.as_posix():
            item.add_marker(pytest.mark.e2e)


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
