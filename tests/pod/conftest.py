"""Shared by the pod tests: one S3 server a session, a bucket a test, one tiny model."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]

from finetune_api.pod import StoreTarget
from harness import UID, write_rows
from localcluster.s3 import S3Endpoint, S3Process


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in Path(item.fspath).parents:
            item.add_marker(pytest.mark.pod)


@dataclass(frozen=True)
class Bucket:
    """A bucket of the test's own."""

    name: str
    endpoint: S3Endpoint

    @property
    def client(self) -> Any:
        return self.endpoint.client()

    @property
    def env(self) -> dict[str, str]:
        """Credentials for a pod."""
        return {"AWS_ACCESS_KEY_ID": self.endpoint.access_key, "AWS_SECRET_ACCESS_KEY": self.endpoint.secret_key}

    def target(self, **change: Any) -> StoreTarget:
        """The job's own tree in it."""
        given = {"uri": f"s3://{self.name}/root/team/job/{UID}", "endpoint": self.endpoint.host_url} | change
        return StoreTarget.model_validate(given)

    def keys(self, prefix: str = "") -> list[str]:
        """Keys below the job's tree, relative to it."""
        base = f"root/team/job/{UID}/"
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=base + prefix)
        return [one["Key"][len(base) :] for page in pages for one in page.get("Contents", [])]

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=data)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Endpoint]:
    with S3Process(tmp_path_factory.mktemp("s3")) as endpoint:
        yield endpoint


@pytest.fixture
def bucket(s3_server: S3Endpoint) -> Bucket:
    return new_bucket(s3_server)


def new_bucket(server: S3Endpoint) -> Bucket:
    name = f"b-{uuid.uuid4().hex[:12]}"
    server.client().create_bucket(Bucket=name)
    return Bucket(name, server)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")
