"""Probes S3 servers with real requests, and records which features of S3 each server has.

`python -m tests.support.store_features` starts every server of `stores.py`, writes the results to store_features.json, and writes the table in
docs/reference/stores.md. Tests check that both files agree with the behaviour of the servers.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

from localcluster.s3 import S3Endpoint
from tests.support.stores import StoreName, chosen_store, running_store

RESULTS_FILE = Path(__file__).with_name("store_features.json")
PAGE = Path(__file__).parents[2] / "docs/reference/stores.md"
TABLE_START, TABLE_END = "<!-- seen: begin -->", "<!-- seen: end -->"
BUCKET = "features"
MIB = 1024 * 1024
WRITERS = 8
UNUSUAL_KEYS = ("with space", "ümlaut-雪", "100%25 +plus", "a#b?c&d", ".hidden")
YES, NO, IGNORED = "yes", "no", "ignored"
"""Results of a probe. `yes`: the feature works. `no`: the feature does not work. `ignored`: the server accepts the request, but does not do what the request
asks for.
"""
SSE_S3 = "encryption with the store's key (SSE-S3)"
SSE_KMS = "encryption with a key service (SSE-KMS)"
SSE_C = "encryption with the customer's key (SSE-C)"
CLOCK = "a clock that is 20 minutes wrong is refused"
UNFINISHED_UPLOADS = "unfinished uploads and their parts are listed below a prefix"
MD5 = "a wrong `Content-MD5` is refused"
UNKNOWN_KEY = "an unknown access key is refused"
Probe = Callable[[S3Endpoint], str]
PROBE_BY_FEATURE: dict[str, Probe] = {}


def feature(text: str) -> Callable[[Probe], Probe]:
    """Register the decorated function as the probe of a feature. `text` is the feature's name in the table."""

    def register(probe: Probe) -> Probe:
        PROBE_BY_FEATURE[text] = probe
        return probe

    return register


def describe_answer(request: Callable[[], object]) -> str:
    """Send a request. Returns `yes` if the request succeeds, otherwise the status code and the error code of the response."""
    from botocore.exceptions import ClientError

    try:
        request()
    except ClientError as error:
        status, code = error.response["ResponseMetadata"]["HTTPStatusCode"], error.response["Error"]["Code"]
        return f"{status} {code}" if str(status) != code else str(status)
    return YES


def describe_refusal(request: Callable[[], object]) -> str:
    """Send a request that a server should refuse. Returns `yes` and the error if the server refuses the request, or `ignored` if the request succeeds."""
    answer = describe_answer(request)
    return IGNORED if answer == YES else f"yes ({answer})"


def put(server: S3Endpoint, key: str, body: bytes = b"body", **arguments: Any) -> Any:
    return server.client().put_object(Bucket=BUCKET, Key=key, Body=body, **arguments)


def read(server: S3Endpoint, key: str, **arguments: Any) -> bytes:
    return bytes(server.client().get_object(Bucket=BUCKET, Key=key, **arguments)["Body"].read())


@feature("create only if absent (`If-None-Match: *`)")
def _probe_create_if_absent(server: S3Endpoint) -> str:
    put(server, "absent", IfNoneMatch="*")
    return describe_refusal(lambda: put(server, "absent", b"other", IfNoneMatch="*"))


@feature(f"of {WRITERS} simultaneous creations, one succeeds")
def _probe_creation_is_atomic(server: S3Endpoint) -> str:
    for round_number in range(10):
        key = f"atomic-{round_number}"
        with ThreadPoolExecutor(WRITERS) as pool:
            answers = list(pool.map(lambda writer: describe_answer(lambda: put(server, key, str(writer).encode(), IfNoneMatch="*")), range(WRITERS)))  # noqa: B023
        if answers.count(YES) != 1:
            return NO
    return YES


@feature("replace only one version (`If-Match` on PUT)")
def _probe_replace_if_match(server: S3Endpoint) -> str:
    etag = put(server, "replace")["ETag"]
    answer = describe_answer(lambda: put(server, "replace", b"second", IfMatch=etag))
    return answer if answer != YES else describe_refusal(lambda: put(server, "replace", b"third", IfMatch=etag))


@feature("read only one version (`If-Match` on GET)")
def _probe_read_if_match(server: S3Endpoint) -> str:
    etag = put(server, "read")["ETag"]
    put(server, "read", b"second")
    return describe_refusal(lambda: read(server, "read", IfMatch=etag))


@feature(MD5)
def _probe_wrong_md5(server: S3Endpoint) -> str:
    return describe_refusal(lambda: put(server, "md5", ContentMD5=base64.b64encode(hashlib.md5(b"x").digest()).decode()))


@feature("a wrong SHA-256 checksum is refused")
def _probe_wrong_sha256(server: S3Endpoint) -> str:
    return describe_refusal(lambda: put(server, "sha256", ChecksumSHA256=base64.b64encode(hashlib.sha256(b"x").digest()).decode()))


@feature("boto3's default checksums (CRC in a trailer)")
def _probe_default_checksums(server: S3Endpoint) -> str:
    client = server.client(request_checksum_calculation="when_supported", response_checksum_validation="when_supported")
    answer = describe_answer(lambda: client.put_object(Bucket=BUCKET, Key="crc", Body=b"body"))
    return answer if answer != YES else YES if read(server, "crc") == b"body" else "stores other bytes"


@feature("ETag of an object is its MD5")
def _probe_etag_is_md5(server: S3Endpoint) -> str:
    return YES if put(server, "etag")["ETag"].strip('"') == hashlib.md5(b"body").hexdigest() else NO


def _upload_parts(server: S3Endpoint, key: str, parts: list[bytes]) -> Any:
    client = server.client()
    object_arguments = {"Bucket": BUCKET, "Key": key}
    upload_id = client.create_multipart_upload(**object_arguments)["UploadId"]
    etags = [client.upload_part(**object_arguments, UploadId=upload_id, PartNumber=number, Body=part)["ETag"] for number, part in enumerate(parts, 1)]
    part_entries = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, 1)]
    return client.complete_multipart_upload(**object_arguments, UploadId=upload_id, MultipartUpload={"Parts": part_entries})


@feature("multipart upload; its ETag is the MD5 of the parts' MD5")
def _probe_multipart(server: S3Endpoint) -> str:
    parts = [b"a" * 5 * MIB, b"b" * 100]
    etag = _upload_parts(server, "parts", parts)["ETag"].strip('"')
    if read(server, "parts") != b"".join(parts):
        return NO
    return YES if etag == hashlib.md5(b"".join(hashlib.md5(part).digest() for part in parts)).hexdigest() + "-2" else "other ETag"


@feature("a part below 5 MiB that is not the last is refused")
def _probe_small_part(server: S3Endpoint) -> str:
    return describe_refusal(lambda: _upload_parts(server, "small-parts", [b"a" * 100, b"b" * 100]))


@feature("size of a part (`partNumber` on HEAD)")
def _probe_part_size(server: S3Endpoint) -> str:
    _upload_parts(server, "sized", [b"a" * 5 * MIB, b"b" * 100])
    try:
        size = server.client().head_object(Bucket=BUCKET, Key="sized", PartNumber=1)["ContentLength"]
    except Exception as error:
        return type(error).__name__
    return YES if size == 5 * MIB else IGNORED


@feature(UNFINISHED_UPLOADS)
def _probe_unfinished_uploads(server: S3Endpoint) -> str:
    client = server.client()
    object_arguments = {"Bucket": BUCKET, "Key": "unfinished/one"}
    upload_id = client.create_multipart_upload(**object_arguments)["UploadId"]
    client.upload_part(**object_arguments, UploadId=upload_id, PartNumber=1, Body=b"a" * 5 * MIB)
    client.create_multipart_upload(Bucket=BUCKET, Key="elsewhere/one")
    listed_ids = [listed_upload["UploadId"] for listed_upload in client.list_multipart_uploads(Bucket=BUCKET, Prefix="unfinished/").get("Uploads", [])]
    part_sizes = [part["Size"] for part in client.list_parts(**object_arguments, UploadId=upload_id).get("Parts", [])]
    client.abort_multipart_upload(**object_arguments, UploadId=upload_id)
    is_gone = not client.list_multipart_uploads(Bucket=BUCKET, Prefix="unfinished/").get("Uploads")
    return YES if (listed_ids, part_sizes, is_gone) == ([upload_id], [5 * MIB], True) else NO


@feature("listing in pages, in the order of the keys' bytes")
def _probe_listing(server: S3Endpoint) -> str:
    keys = [f"list/{name}" for name in ("-", "a", "a/b", "a0", "B", "z")]
    for key in [key for key in keys if key != "list/a"]:
        put(server, key)
    pages = list(server.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix="list/", PaginationConfig={"PageSize": 2}))
    listed_keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    expected_keys = sorted((key for key in keys if key != "list/a"), key=str.encode)
    return YES if listed_keys == expected_keys and len(pages) >= 3 else "other order" if sorted(listed_keys) == sorted(expected_keys) else NO


@feature("objects `a` and `a/b` at the same time")
def _probe_object_and_folder(server: S3Endpoint) -> str:
    put(server, "both/a")
    answer = describe_answer(lambda: put(server, "both/a/b"))
    return answer if answer != YES else YES if read(server, "both/a") == b"body" else NO


@feature("unusual characters in keys")
def _probe_unusual_keys(server: S3Endpoint) -> str:
    for key in UNUSUAL_KEYS:
        put(server, f"names/{key}", key.encode())
    listed_keys = {entry["Key"] for entry in server.client().list_objects_v2(Bucket=BUCKET, Prefix="names/").get("Contents", [])}
    return YES if listed_keys == {f"names/{key}" for key in UNUSUAL_KEYS} and all(read(server, f"names/{key}") == key.encode() for key in UNUSUAL_KEYS) else NO


@feature("ranges of an object")
def _probe_ranges(server: S3Endpoint) -> str:
    put(server, "range", b"0123456789")
    parts = read(server, "range", Range="bytes=2-4"), read(server, "range", Range="bytes=-3"), read(server, "range", Range="bytes=8-")
    is_refused = describe_answer(lambda: read(server, "range", Range="bytes=20-")).startswith("416")
    return YES if parts == (b"234", b"789", b"89") and is_refused else NO


@feature("deletion of many objects in one request")
def _probe_batch_delete(server: S3Endpoint) -> str:
    put(server, "batch/a")
    keys = [{"Key": "batch/a"}, {"Key": "batch/missing"}]
    answer = describe_answer(lambda: server.client().delete_objects(Bucket=BUCKET, Delete={"Objects": keys, "Quiet": True}))
    return answer if answer != YES else NO if "Contents" in server.client().list_objects_v2(Bucket=BUCKET, Prefix="batch/") else YES


def _fetch(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=20) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


@feature("presigned URLs; one with another signature is refused")
def _probe_presigned(server: S3Endpoint) -> str:
    put(server, "presigned")
    object_arguments = {"Bucket": BUCKET, "Key": "presigned"}
    url = server.client(signature_version="s3v4").generate_presigned_url("get_object", Params=object_arguments)
    wrong_url = replace(server, secret_key="0" * 40).client(signature_version="s3v4").generate_presigned_url("get_object", Params=object_arguments)
    if _fetch(url) != 200:
        return NO
    return YES if _fetch(wrong_url) == 403 else "yes, but every signature is accepted"


@feature("a wrong secret key is refused")
def _probe_wrong_keys(server: S3Endpoint) -> str:
    return describe_refusal(lambda: put(replace(server, secret_key="0" * 40), "wrong"))


@feature(UNKNOWN_KEY)
def _probe_unknown_key(server: S3Endpoint) -> str:
    return describe_refusal(lambda: put(replace(server, access_key="AKUNKNOWN"), "unknown"))


@feature("a wrong region is refused")
def _probe_wrong_region(server: S3Endpoint) -> str:
    return describe_refusal(lambda: put(replace(server, region="eu-west-9"), "region"))


@feature(CLOCK)
def _probe_wrong_clock(server: S3Endpoint) -> str:
    from botocore import auth

    get_true_time = auth.get_current_datetime
    with mock.patch.object(auth, "get_current_datetime", lambda *args, **options: get_true_time(*args, **options) + timedelta(minutes=20)):
        return describe_refusal(lambda: put(server, "clock"))


def _probe_encryption(server: S3Endpoint, key: str, **arguments: Any) -> str:
    answer = describe_answer(lambda: put(server, key, **arguments))
    if answer != YES:
        return answer
    reported_encryption = server.client().head_object(Bucket=BUCKET, Key=key).get("ServerSideEncryption")
    return YES if reported_encryption == arguments["ServerSideEncryption"] else IGNORED


@feature(SSE_S3)
def _probe_encryption_s3(server: S3Endpoint) -> str:
    return _probe_encryption(server, "sse-s3", ServerSideEncryption="AES256")


@feature(SSE_KMS)
def _probe_encryption_kms(server: S3Endpoint) -> str:
    return _probe_encryption(server, "sse-kms", ServerSideEncryption="aws:kms")


@feature(SSE_C)
def _probe_encryption_customer(server: S3Endpoint) -> str:
    key_arguments = {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": bytes(range(32))}
    answer = describe_answer(lambda: put(server, "sse-c", **key_arguments))
    if answer != YES:
        return answer
    return NO if read(server, "sse-c", **key_arguments) != b"body" else YES if describe_answer(lambda: read(server, "sse-c")) != YES else IGNORED


def probe_all_features(server: S3Endpoint) -> dict[str, str]:
    """Return the result of every probe on a running server, by feature."""
    server.client().create_bucket(Bucket=BUCKET)
    return {text: probe(server) for text, probe in PROBE_BY_FEATURE.items()}


def load_results() -> dict[str, dict[str, str]]:
    """Return the recorded result of each feature, by server name and feature."""
    return dict(json.loads(RESULTS_FILE.read_text()))


def read_result_of_chosen_store(text: str) -> str:
    """Return the recorded result of a feature on the server that FINETUNE_TEST_STORE names."""
    return load_results()[chosen_store()][text]


def render_table(results: dict[str, dict[str, str]]) -> str:
    """Return the table of docs/reference/stores.md, with a row for each feature and a column for each server."""
    lines = ["| feature | " + " | ".join(StoreName(name).title for name in results) + " |", "|---|" + "---|" * len(results)]
    lines += [f"| {text} | " + " | ".join(server_results.get(text, "?") for server_results in results.values()) + " |" for text in PROBE_BY_FEATURE]
    return "\n".join(lines)


def replace_table(page: str, results: dict[str, dict[str, str]]) -> str:
    """Return the text of the page after its table was replaced by a table of `results`."""
    text_before, rest = page.split(TABLE_START)
    text_after = rest.split(TABLE_END)[1]
    return f"{text_before}{TABLE_START}\n{render_table(results)}\n{TABLE_END}{text_after}"


def main(names: list[str]) -> None:
    """Probe the named servers (by default all servers), and write the JSON file of the results and the table in the documentation."""
    results = load_results() if RESULTS_FILE.exists() else {}
    for name in [StoreName(name) for name in names] or list(StoreName):
        with tempfile.TemporaryDirectory() as folder, running_store(Path(folder) / "store", name) as server:
            results[name] = probe_all_features(server)
    results = {name: results[name] for name in StoreName if name in results}
    RESULTS_FILE.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(replace_table(PAGE.read_text(), results))


if __name__ == "__main__":
    main(sys.argv[1:])
