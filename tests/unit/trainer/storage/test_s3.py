"""S3: the size of upload parts, and responses that must not count as success."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from finetune_api.errors import CredentialsError, FineTuneError, StorageError
from finetune_api.pod import StoreTarget
from finetune_trainer.storage import s3
from finetune_trainer.storage.s3 import MIB, PART_BYTES, RANGE_BYTES, S3Store, _create_transfer_config

MAX_PARTS = 10_000
"""Maximum number of parts of an S3 object."""
MAX_PART_BYTES = 5 * 1024 * MIB
"""Maximum size of a part in bytes."""
Response = tuple[int, dict[str, str], bytes]


class Body(io.BytesIO):
    """The body of a response, with the `stream` method of urllib3."""

    def stream(self, *_: object) -> Iterator[bytes]:
        yield self.read()


def make_store(respond: Callable[[str, AWSPreparedRequest], Response]) -> S3Store:
    """A store that gets the response `respond(operation, request)` to each request."""
    store = S3Store(StoreTarget(uri="s3://bucket/root", region="eu-central-1"), max_tries=1)

    def send(request: AWSPreparedRequest, event_name: str, **_: Any) -> AWSResponse:
        status, headers, body = respond(event_name.rpartition(".")[2], request)
        return AWSResponse(request.url, status, {"content-length": str(len(body))} | headers, Body(body))

    store.client.meta.events.register("before-send.s3", send)
    return store


@pytest.mark.parametrize(
    ("size", "part_size"),
    [
        (9 * MIB, 8 * MIB), (10 * 1024 * MIB, 8 * MIB), (70 * 1024 * MIB, 8 * MIB), (100 * 1024 * MIB, 12 * MIB),
        (5 * 1024 * 1024 * MIB, 583 * MIB),
    ],
)  # fmt: skip
def test_the_part_size_keeps_the_number_of_parts_below_the_limit(size: int, part_size: int) -> None:
    config = _create_transfer_config(size)
    assert config.multipart_chunksize == part_size
    assert -(-size // part_size) <= MAX_PARTS and PART_BYTES <= part_size <= MAX_PART_BYTES
    assert config.preferred_transfer_client == "classic", "boto3's CRT client ignores a custom endpoint"


@pytest.mark.parametrize(("response_code", "error_type"), [("AccessDenied", CredentialsError), ("InternalError", StorageError)])
def test_a_refused_deletion_of_one_key_raises_an_error(response_code: str, error_type: type[FineTuneError]) -> None:
    """The response of DeleteObjects has status 200 and lists the keys that were not deleted."""

    def respond(operation: str, request: AWSPreparedRequest) -> Response:
        return 200, {}, f"<DeleteResult><Error><Key>root/b</Key><Code>{response_code}</Code></Error></DeleteResult>".encode()

    with pytest.raises(error_type) as caught:
        make_store(respond).delete(["a", "b"])
    assert response_code == "InternalError" or "root/b" in caught.value.message


@pytest.mark.parametrize(
    ("get_response", "code"),
    [
        ((403, "InvalidAccessKeyId"), "CredentialsRejected"),
        ((403, "SignatureDoesNotMatch"), "CredentialsRejected"),
        ((403, "AccessDenied"), "PermissionDenied"),
        ((500, "InternalError"), "PermissionDenied"),
        ((206, ""), "PermissionDenied"),
    ],
)
def test_a_refused_head_is_repeated_as_get_to_distinguish_wrong_keys_from_missing_permissions(get_response: tuple[int, str], code: str) -> None:
    """A HEAD response has no body, so a response with status 403 does not contain the reason."""

    def respond(operation: str, request: AWSPreparedRequest) -> Response:
        if operation == "HeadObject":
            return 403, {}, b""
        return get_response[0], {}, f"<Error><Code>{get_response[1]}</Code></Error>".encode()

    with pytest.raises(CredentialsError) as caught:
        make_store(respond).stat("model/config.json")
    assert caught.value.code == code


def test_a_download_fails_if_the_object_changes(tmp_path: Path) -> None:
    """A download must not combine ranges of two versions of an object."""
    etags = iter(['"old"', '"old"', '"new"'])

    def respond(operation: str, request: AWSPreparedRequest) -> Response:
        size = 2 * RANGE_BYTES
        if operation == "HeadObject":
            return 200, {"content-length": str(size), "etag": next(etags)}, b""
        return 206, {"etag": next(etags)}, b"x" * RANGE_BYTES

    with pytest.raises(StorageError) as caught:
        make_store(respond).download("weights", tmp_path / "weights")
    assert caught.value.code == "ObjectChanged"


@pytest.mark.parametrize("stored_size", [11 * MIB, 11 * MIB - 1], ids=["complete", "another-size"])
def test_an_upload_without_a_response_succeeds_only_if_the_stored_size_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored_size: int
) -> None:
    """The response to CompleteMultipartUpload is lost. The response to the retry is NoSuchUpload."""
    monkeypatch.setattr(s3, "PART_BYTES", 5 * MIB)

    def respond(operation: str, request: AWSPreparedRequest) -> Response:
        if operation == "CompleteMultipartUpload":
            return 404, {}, b"<Error><Code>NoSuchUpload</Code><Message>The upload does not exist</Message></Error>"
        if operation == "CreateMultipartUpload":
            return 200, {}, b"<R><Bucket>bucket</Bucket><Key>k</Key><UploadId>7</UploadId></R>"
        return (
            200,
            {"content-length": str(stored_size), "etag": '"t"'} if operation == "HeadObject" else {"etag": '"t"'},
            b"",
        )

    (tmp_path / "large").write_bytes(b"\0" * (11 * MIB))
    store = make_store(respond)
    if stored_size == 11 * MIB:
        store.put_file(tmp_path / "large", "large")
    else:
        with pytest.raises(StorageError):
            store.put_file(tmp_path / "large", "large")


def test_a_download_is_hashed_in_order(tmp_path: Path) -> None:
    data = bytes(range(256)) * (2 * RANGE_BYTES // 256) + b"end"

    def respond(operation: str, request: AWSPreparedRequest) -> Response:
        if operation == "HeadObject":
            return 200, {"content-length": str(len(data)), "etag": '"t"'}, b""
        range_header = request.headers["Range"]
        first_byte, last_byte = (range_header.decode() if isinstance(range_header, bytes) else range_header).removeprefix("bytes=").split("-")
        return 206, {"etag": '"t"'}, data[int(first_byte) : int(last_byte) + 1]

    sha256 = make_store(respond).download("weights", tmp_path / "weights")
    assert sha256 == hashlib.sha256(data).hexdigest() and (tmp_path / "weights").read_bytes() == data
