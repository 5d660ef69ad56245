"""Fixtures of the storage fault tests: a real S3 server behind a fault proxy, and a job's checkpoints on this server."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [
    str(Path(__file__).parent),
    str(Path(__file__).parents[2] / "pod"),
    str(Path(__file__).parents[2] / "support"),
]

from finetune_api.pod import StoreTarget  # noqa: E402 - the path comes first
from finetune_trainer.checkpoint.tree import CheckpointTree  # noqa: E402 - the path comes first
from finetune_trainer.storage.s3 import S3Store  # noqa: E402 - the path comes first
from pod_harness import write_rows  # noqa: E402 - the path comes first
from proxied_tree import ProxiedTree  # noqa: E402 - the path comes first
from tiny import make_tiny_model  # noqa: E402 - the path comes first

from localcluster.s3 import S3Endpoint  # noqa: E402 - the path comes first
from tests.support.s3proxy import S3Proxy  # noqa: E402 - the path comes first
from tests.support.stores import running_store  # noqa: E402 - the path comes first


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Endpoint]:
    with running_store(tmp_path_factory.mktemp("s3") / "store") as endpoint:
        yield endpoint


@pytest.fixture
def proxy(s3_server: S3Endpoint) -> Iterator[S3Proxy]:
    with S3Proxy(s3_server.host_url) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def credentials(s3_server: S3Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret_key)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)


@pytest.fixture(scope="session")
def bucket_name(s3_server: S3Endpoint) -> str:
    """Create one bucket for all tests, because SeaweedFS reserves volumes for every bucket. Each test uses another key prefix."""
    s3_server.client().create_bucket(Bucket="faults")
    return "faults"


@pytest.fixture
def storage(s3_server: S3Endpoint, proxy: S3Proxy, bucket_name: str) -> ProxiedTree:
    uri = f"s3://{bucket_name}/{uuid.uuid4().hex}/team/job/uid"
    return ProxiedTree(
        CheckpointTree(S3Store(StoreTarget(uri=uri, endpoint=proxy.url))),
        CheckpointTree(S3Store(StoreTarget(uri=uri, endpoint=s3_server.host_url))),
        s3_server.client(), bucket_name,
    )  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Write a staged checkpoint with files of several sizes, and return its folder."""
    import random

    folder = tmp_path / "checkpoint"
    (folder / "sub").mkdir(parents=True)
    (folder / "trainer_state.json").write_text('{"global_step": 5}')
    (folder / "sub" / "rng_state.pth").write_bytes(random.Random(1).randbytes(20_000))
    (folder / "optimizer.pt").write_bytes(random.Random(2).randbytes(200_000))
    return folder


@pytest.fixture(scope="session")
def spec(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl")
    return {
        "model": {"source": f"file://{folder}/model"},
        "dataset": {"train": f"file://{folder}/rows.jsonl", "format": "messages"},
        "checkpoint": {"steps": 5, "keep": 0},
    }
