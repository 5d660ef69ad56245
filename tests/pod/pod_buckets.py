"""A bucket in the session's S3 server, and a separate prefix for each test."""

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
    """A separate prefix in the session's bucket. All tests share one bucket, because SeaweedFS reserves volumes for each bucket."""

    name: str
    endpoint: S3Endpoint
    root: str

    @property
    def client(self) -> Any:
        return self.endpoint.client()

    @property
    def env(self) -> dict[str, str]:
        """Credentials for a pod."""
        return {"AWS_ACCESS_KEY_ID": self.endpoint.access_key, "AWS_SECRET_ACCESS_KEY": self.endpoint.secret_key}

    def target(self, **change: Any) -> StoreTarget:
        """The storage target with the job's prefix."""
        values = {"uri": f"s3://{self.name}/{self.root}/team/job/{UID}", "endpoint": self.endpoint.host_url} | change
        return StoreTarget.model_validate(values)

    def keys(self, prefix: str = "") -> list[str]:
        """Keys below the job's prefix, relative to the prefix."""
        base = f"{self.root}/team/job/{UID}/"
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=base + prefix)
        return [item["Key"][len(base) :] for page in pages for item in page.get("Contents", [])]

    def read(self, key: str) -> bytes:
        """Read an object below the job's prefix."""
        answer = self.client.get_object(Bucket=self.name, Key=f"{self.root}/team/job/{UID}/{key}")
        return bytes(answer["Body"].read())

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=data)


def new_bucket(server: S3Endpoint) -> Bucket:
    """A new, empty prefix."""
    return Bucket(BUCKET_NAME, server, uuid.uuid4().hex[:12])
