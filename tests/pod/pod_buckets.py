"""The S3 bucket of the test session, in which each test has its own key prefix."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from finetune_api.pod import StoreTarget
from pod_harness import UID

from localcluster.s3 import S3Endpoint

BUCKET_NAME = "pods"


@dataclass(frozen=True)
class Bucket:
    """One test's key prefix in the shared bucket. All tests share one bucket, because SeaweedFS reserves volumes for each bucket."""

    name: str
    endpoint: S3Endpoint
    root: str
    """The key prefix of the test, without a trailing slash."""

    @property
    def client(self) -> Any:
        return self.endpoint.client()

    @property
    def env(self) -> dict[str, str]:
        """The environment variables that give a pod its S3 credentials."""
        return {"AWS_ACCESS_KEY_ID": self.endpoint.access_key, "AWS_SECRET_ACCESS_KEY": self.endpoint.secret_key}

    def target(self, **change: Any) -> StoreTarget:
        """Return the storage target of the job `team/job`, with the fields in `change` replaced."""
        fields = {"uri": f"s3://{self.name}/{self.root}/team/job/{UID}", "endpoint": self.endpoint.host_url} | change
        return StoreTarget.model_validate(fields)

    def keys(self, prefix: str = "") -> list[str]:
        """List the job's keys that begin with `prefix`. The returned keys and `prefix` are relative to the job's folder."""
        base = f"{self.root}/team/job/{UID}/"
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=base + prefix)
        return [item["Key"][len(base) :] for page in pages for item in page.get("Contents", [])]

    def read(self, key: str) -> bytes:
        """Read an object. `key` is relative to the job's folder."""
        answer = self.client.get_object(Bucket=self.name, Key=f"{self.root}/team/job/{UID}/{key}")
        return bytes(answer["Body"].read())

    def put(self, key: str, data: bytes) -> None:
        """Write an object. `key` is the complete key in the bucket, not a key relative to the job's folder."""
        self.client.put_object(Bucket=self.name, Key=key, Body=data)


def new_bucket(server: S3Endpoint) -> Bucket:
    """Create a `Bucket` with a new, empty key prefix."""
    return Bucket(BUCKET_NAME, server, uuid.uuid4().hex[:12])
