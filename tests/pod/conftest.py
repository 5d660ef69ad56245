"""Fixtures of the pod tests: one S3 server and one tiny model for the whole session, and a separate key prefix for each test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]

from pod_buckets import BUCKET_NAME, Bucket, new_bucket  # noqa: E402 - the path comes first
from pod_harness import write_rows  # noqa: E402 - the path comes first

from localcluster.s3 import S3Endpoint  # noqa: E402 - the path comes first
from tests.support.stores import running_store  # noqa: E402 - the path comes first


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests below this folder with `pod`."""
    for item in items:
        if Path(__file__).parent in Path(item.fspath).parents:
            item.add_marker(pytest.mark.pod)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Endpoint]:
    with running_store(tmp_path_factory.mktemp("s3") / "store") as endpoint:
        endpoint.client().create_bucket(Bucket=BUCKET_NAME)
        yield endpoint


@pytest.fixture
def bucket(s3_server: S3Endpoint) -> Bucket:
    return new_bucket(s3_server)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")
