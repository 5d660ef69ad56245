"""A fault proxy in front of an S3 server. A test chooses requests by S3 operation and key.

    with S3Proxy(endpoint.host_url) as proxy:
        client = boto3.client("s3", endpoint_url=proxy.url, ...)
        with proxy.fault(Status(503, "SlowDown"), operation="PutObject", key="checkpoints/", max_hits=2) as slow: ...
        assert slow.hits == 2

Clients must use path-style addresses, in which the first path segment is the bucket. Signatures stay valid, because clients sign the proxy's address as
`Host` and the proxy forwards this header unchanged.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from aiohttp import web

from localcluster.s3 import S3Endpoint
from tests.support.faultproxy import (
    Bandwidth,
    Blackhole,
    DelayResponse,
    Exchange,
    Fault,
    FaultProxy,
    FlipByte,
    Latency,
    LostResponse,
    Reset,
    Rule,
    Status,
    StatusAfterApply,
    Truncate,
    active_rules,
)

__all__ = [
    "Bandwidth", "Blackhole", "Exchange", "Fault", "FlipByte", "DelayResponse", "Latency", "LostResponse", "Reset", "Rule",
    "S3Operation", "S3Proxy", "Status", "StatusAfterApply", "Truncate", "active_rules",
]  # fmt: skip

ERROR_BY_CODE = {
    400: "BadRequest", 403: "AccessDenied", 404: "NoSuchKey", 412: "PreconditionFailed", 500: "InternalError",
    503: "SlowDown",
}  # fmt: skip


@dataclass(frozen=True)
class S3Operation:
    """What an S3 request does: the name of the API operation, the bucket and the key."""

    label: str
    bucket: str
    key: str
    is_endless: bool = False


class S3Proxy(FaultProxy[S3Operation]):
    """A proxy between clients and an S3 server. The module's docstring has an example. `upstream` is the server's URL."""

    def fault(
        self, fault: Fault, *, operation: str | None = None, key: str = "",
        max_hits: int | None = None, skipped_matches: int = 0, probability: float = 1.0,
    ) -> Rule[S3Operation]:  # fmt: skip
        """Apply `fault` to the requests of an operation (such as `PutObject`; None means all) whose key contains a match of the regular expression `key`."""
        key_pattern = re.compile(key)
        return self.add_rule(
            fault, lambda request: operation in (None, request.label) and bool(key_pattern.search(request.key)),
            max_hits=max_hits, skipped_matches=skipped_matches, probability=probability,
        )  # fmt: skip

    def endpoint_through(self, endpoint: S3Endpoint) -> S3Endpoint:
        """Return a copy of the endpoint in which the proxy's URL replaces the server's URL."""
        return replace(endpoint, host_url=self.url, cluster_url=self.url)

    def parse_operation(self, request: web.BaseRequest) -> S3Operation:
        bucket, _, key = request.path.lstrip("/").partition("/")
        return S3Operation(_find_operation_name(request, bucket, key), bucket, key)

    def error_response(self, code: int, reason: str) -> tuple[bytes, dict[str, str]]:
        error_code = reason or ERROR_BY_CODE.get(code, "InternalError")
        body = f'<?xml version="1.0"?><Error><Code>{error_code}</Code><Message>injected by a test</Message></Error>'
        return body.encode(), {"Content-Type": "application/xml", "x-amz-request-id": "proxy"}


def _find_operation_name(request: web.BaseRequest, bucket: str, key: str) -> str:
    """Return botocore's name of the S3 operation that the request performs."""
    method, query = request.method, request.query
    is_copy = "x-amz-copy-source" in request.headers
    match method:
        case "PUT" if key and "partNumber" in query:
            return "UploadPartCopy" if is_copy else "UploadPart"
        case "PUT" if key:
            return "CopyObject" if is_copy else "PutObject"
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
    bucket_operations = {"PUT": "CreateBucket", "DELETE": "DeleteBucket", "HEAD": "HeadBucket", "GET": "ListBuckets"}
    return bucket_operations.get(method, method)
