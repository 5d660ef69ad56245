"""A fault proxy in front of an S3 server: faults by S3 operation and key.

    with S3Proxy(endpoint.host_url) as proxy:
        client = boto3.client("s3", endpoint_url=proxy.url, ...)
        with proxy.fault(Status(503, "SlowDown"), operation="PutObject", key="checkpoints/", times=2) as slow: ...
        assert slow.hits == 2

Works with path-style addressing, whose first path segment is the bucket. Signatures hold: clients sign the proxy's own
address as `Host`, and the server behind sees it unchanged.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from aiohttp import web

from localcluster.s3 import S3Endpoint
from tests.support.faultproxy import (
    Bandwidth,
    Blackhole,
    Exchange,
    Fault,
    FaultProxy,
    FlipByte,
    LateAnswer,
    Latency,
    LostResponse,
    Reset,
    Rule,
    Status,
    StatusAfter,
    Truncate,
    all_of,
)

__all__ = [
    "Bandwidth", "Blackhole", "Exchange", "Fault", "FlipByte", "LateAnswer", "Latency", "LostResponse", "Reset", "Rule",
    "S3Operation", "S3Proxy", "Status", "StatusAfter", "Truncate", "all_of",
]  # fmt: skip

REASONS = {
    400: "BadRequest", 403: "AccessDenied", 404: "NoSuchKey", 412: "PreconditionFailed", 500: "InternalError",
    503: "SlowDown",
}  # fmt: skip


@dataclass(frozen=True)
class S3Operation:
    """An S3 request: its name in the API, its bucket and its key."""

    label: str
    bucket: str
    key: str
    endless: bool = False


class S3Proxy(FaultProxy[S3Operation]):
    """See the module. `upstream` is the server's address."""

    def fault(
        self, fault: Fault, *, operation: str | None = None, key: str = "",
        times: int | None = None, skip: int = 0, probability: float = 1.0,
    ) -> Rule[S3Operation]:  # fmt: skip
        """Apply `fault` to requests of an operation (`PutObject`; None: any) with the expression `key` in their key."""
        wanted = re.compile(key)
        return self.strike(
            fault, lambda request: operation in (None, request.label) and bool(wanted.search(request.key)),
            times=times, skip=skip, probability=probability,
        )  # fmt: skip

    def through(self, endpoint: S3Endpoint) -> S3Endpoint:
        """The endpoint with this proxy's address."""
        return replace(endpoint, host_url=self.url, cluster_url=self.url)

    def describe(self, request: web.BaseRequest) -> S3Operation:
        bucket, _, key = request.path.lstrip("/").partition("/")
        return S3Operation(_name(request, bucket, key), bucket, key)

    def refusal(self, code: int, reason: str) -> tuple[bytes, dict[str, str]]:
        word = reason or REASONS.get(code, "InternalError")
        body = f'<?xml version="1.0"?><Error><Code>{word}</Code><Message>put there by a test</Message></Error>'
        return body.encode(), {"Content-Type": "application/xml", "x-amz-request-id": "proxy"}


def _name(request: web.BaseRequest, bucket: str, key: str) -> str:
    """Name of the operation, as botocore spells it."""
    method, query = request.method, request.query
    copied = "x-amz-copy-source" in request.headers
    match method:
        case "PUT" if key and "partNumber" in query:
            return "UploadPartCopy" if copied else "UploadPart"
        case "PUT" if key:
            return "CopyObject" if copied else "PutObject"
        case "POST" if key and "uploads" in query:
            return "CreateMultipartUpload"
        case "POST" if key and "uploadId" in query:
            return "CompleteMultipartUpload"
        case "POST" if "delete" in query:
            return "DeleteObjects"
        case "DELETE" if key:
            return "AbortMultipartUpload" if "uploadId" in query else "DeleteObject"
        case "GET" if key:
            return "ListParts" if "uploadId" in query else "GetObject"
        case "HEAD" if key:
            return "HeadObject"
        case "GET" if bucket and "list-type" in query:
            return "ListObjectsV2"
        case "GET" if bucket and "uploads" in query:
            return "ListMultipartUploads"
        case "GET" if bucket and "location" in query:
            return "GetBucketLocation"
        case "GET" if bucket:
            return "ListObjects"
    whole = {"PUT": "CreateBucket", "DELETE": "DeleteBucket", "HEAD": "HeadBucket", "GET": "ListBuckets"}
    return whole.get(method, method)
