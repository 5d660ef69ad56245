"""Server-side encryption: the headers of each request, and the failures of stores that do not support it."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from botocore.exceptions import ClientError
from finetune_api.errors import ConfigError, FineTuneError, StorageSetupError
from finetune_api.pod import StoreTarget
from finetune_trainer.checkpoint.restore import restore
from finetune_trainer.storage import s3
from finetune_trainer.storage.errors import convert_error
from finetune_trainer.storage.preflight import preflight
from finetune_trainer.storage.s3 import S3Store

CUSTOMER_KEY = bytes(range(32))
KMS_KEY_ARN = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd"
CUSTOMER_KEY_HEADERS = {
    "x-amz-server-side-encryption-customer-algorithm": "AES256",
    "x-amz-server-side-encryption-customer-key": base64.b64encode(CUSTOMER_KEY).decode(),
    "x-amz-server-side-encryption-customer-key-md5": base64.b64encode(hashlib.md5(CUSTOMER_KEY).digest()).decode(),
}
BODY = b"body"


class Body(io.BytesIO):
    """The body of a response, with the `stream` method of urllib3."""

    def stream(self, *_: object) -> Iterator[bytes]:
        yield self.read()


class StubbedStore:
    """An S3 store with stub responses. `sent_headers` contains the encryption headers of the requests, by operation.

    The store returns the object of the newest PUT, without encryption. `head_response`: the status and the additional headers of each response to HEAD.
    """

    def __init__(self, **target: Any) -> None:
        self.object = BODY
        self.head_response: tuple[int, dict[str, str]] = (200, {})
        self.store = S3Store(StoreTarget(uri="s3://bucket/root", region="eu-central-1", **target), max_tries=1)
        self.store.client.meta.events.register("before-send.s3", self._answer)
        self.sent_headers: dict[str, dict[str, str]] = {}

    def _answer(self, request: AWSPreparedRequest, event_name: str, **_: Any) -> AWSResponse:
        operation = event_name.rpartition(".")[2]
        headers = {name.lower(): _to_text(value) for name, value in request.headers.items()}
        self.sent_headers[operation] = {name: value for name, value in headers.items() if "encryption" in name}
        bodies = {
            "CreateMultipartUpload": b"<R><Bucket>bucket</Bucket><Key>k</Key><UploadId>7</UploadId></R>",
            "CompleteMultipartUpload": b'<R><ETag>"t"</ETag></R>',
            "GetObject": self.object,
        }
        data = bodies.get(operation, b"")
        assert operation != "UploadPart" or parse_qs(urlsplit(request.url).query)["uploadId"] == ["7"]
        if operation == "PutObject":
            self.object = request.body if isinstance(request.body, bytes) else request.body.read()
        status, added_headers = self.head_response if operation == "HeadObject" else (200, {})
        return AWSResponse(request.url, status, {"content-length": str(len(self.object)), "etag": '"t"', **added_headers}, Body(data))

    def send_all_operations(self, folder: Path) -> None:
        """Send one request of each type that transfers an object."""
        large_file = folder / "large"
        large_file.write_bytes(b"\0" * (11 * s3.MIB))
        self.store.put("small", BODY)
        self.store.create("marker", BODY)
        self.store.put_file(large_file, "large")
        self.store.get("small")
        self.store.stat("small")
        self.store.download("small", folder / "back")


def _to_text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * s3.MIB)


def test_requests_have_no_encryption_headers_by_default(tmp_path: Path) -> None:
    stubbed_store = StubbedStore()
    stubbed_store.send_all_operations(tmp_path)
    assert set(stubbed_store.sent_headers) == {
        "PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload", "GetObject", "HeadObject"
    }  # fmt: skip
    assert not any(stubbed_store.sent_headers.values())


@pytest.mark.parametrize(
    ("target", "headers"),
    [
        ({"encryption": "s3"}, {"x-amz-server-side-encryption": "AES256"}),
        ({"encryption": "kms"}, {"x-amz-server-side-encryption": "aws:kms"}),
        (
            {"encryption": "kms", "kms_key_id": KMS_KEY_ARN},
            {"x-amz-server-side-encryption": "aws:kms", "x-amz-server-side-encryption-aws-kms-key-id": KMS_KEY_ARN},
        ),
    ],
)
def test_encryption_by_the_store_is_requested_when_an_object_is_created(
    tmp_path: Path, target: dict[str, str], headers: dict[str, str]
) -> None:
    stubbed_store = StubbedStore(**target)
    stubbed_store.send_all_operations(tmp_path)
    for operation in ("PutObject", "CreateMultipartUpload"):
        assert stubbed_store.sent_headers.pop(operation) == headers
    assert not any(stubbed_store.sent_headers.values()), "S3 refuses these headers in requests that upload a part or read an object"


def test_a_customer_key_is_sent_with_every_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SSE_CUSTOMER_KEY", base64.b64encode(CUSTOMER_KEY).decode() + "\n")
    stubbed_store = StubbedStore(encryption="customerKey", customer_key_variable="AWS_SSE_CUSTOMER_KEY")
    stubbed_store.send_all_operations(tmp_path)
    for operation in ("PutObject", "CreateMultipartUpload", "UploadPart", "GetObject", "HeadObject"):
        assert stubbed_store.sent_headers[operation] == CUSTOMER_KEY_HEADERS, operation


def test_each_connection_has_its_own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SSE_CUSTOMER_KEY", base64.b64encode(b"x" * 32).decode())
    monkeypatch.setenv("MODEL_AWS_SSE_CUSTOMER_KEY", base64.b64encode(CUSTOMER_KEY).decode())
    stubbed_store = StubbedStore(encryption="customerKey", customer_key_variable="MODEL_AWS_SSE_CUSTOMER_KEY")
    stubbed_store.store.get("small")
    assert stubbed_store.sent_headers["GetObject"] == CUSTOMER_KEY_HEADERS


@pytest.mark.parametrize("text", ["", "not base64!", base64.b64encode(b"too short").decode(), "very-secret-word"])
def test_an_invalid_key_is_reported_and_never_shown(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("AWS_SSE_CUSTOMER_KEY", text)
    with pytest.raises(ConfigError) as caught:
        StubbedStore(encryption="customerKey", customer_key_variable="AWS_SSE_CUSTOMER_KEY")
    assert (caught.value.code, caught.value.exit_code) == ("CustomerKeyInvalid", 64)
    assert "storage.encryption.customerKeySecretRef" in caught.value.message
    assert not text or text not in f"{caught.value} {caught.value.hint}"


def test_a_checkpoint_named_by_uri_is_read_with_the_same_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune_api.pod import ResumeConfig
    from finetune_trainer.checkpoint.manifest import RunFacts
    from finetune_trainer.checkpoint.tree import CheckpointTree

    monkeypatch.setenv("AWS_SSE_CUSTOMER_KEY", base64.b64encode(CUSTOMER_KEY).decode())
    stubbed_store, opened_targets = StubbedStore(encryption="customerKey", customer_key_variable="AWS_SSE_CUSTOMER_KEY"), []

    def record_target(target: StoreTarget) -> S3Store:
        opened_targets.append(target)
        return stubbed_store.store

    monkeypatch.setattr("finetune_trainer.checkpoint.restore.open_store", record_target)
    uri = "s3://other/team/job/uid/checkpoints/step-00000005"
    with pytest.raises(FineTuneError, match="no committed checkpoint"):
        restore(CheckpointTree(stubbed_store.store), ResumeConfig(mode=uri), RunFacts(), tmp_path)
    assert opened_targets == [stubbed_store.store.target.model_copy(update={"uri": "s3://other/team/job/uid"})]


@pytest.mark.parametrize(
    ("target", "head_response", "is_encrypted"),
    [
        ({}, (200, {}), True),
        ({"encryption": "s3"}, (200, {}), False),
        ({"encryption": "s3"}, (200, {"x-amz-server-side-encryption": "AES256"}), True),
        ({"encryption": "kms"}, (200, {"x-amz-server-side-encryption": "AES256"}), False),
        ({"encryption": "kms"}, (200, {"x-amz-server-side-encryption": "aws:kms:dsse"}), True),
        ({"encryption": "customerKey"}, (200, {}), False),
        ({"encryption": "customerKey"}, (400, {}), True),
    ],
)
def test_the_preflight_refuses_a_store_that_ignores_the_encryption(
    monkeypatch: pytest.MonkeyPatch, target: dict[str, str], head_response: tuple[int, dict[str, str]], is_encrypted: bool
) -> None:
    """The Versity gateway, for example, accepts requests with encryption, but stores the objects without it."""
    monkeypatch.setenv("AWS_SSE_CUSTOMER_KEY", base64.b64encode(CUSTOMER_KEY).decode())
    stubbed_store = StubbedStore(endpoint="https://store.example", **target)
    stubbed_store.head_response = head_response
    monkeypatch.setattr("finetune_trainer.storage.preflight.open_store", lambda *_, **__: stubbed_store.store)
    if is_encrypted:
        assert preflight(stubbed_store.store.target).store_kind == "s3"
    else:
        with pytest.raises(StorageSetupError) as caught:
            preflight(stubbed_store.store.target)
        assert (caught.value.code, caught.value.exit_code) == ("EncryptionRefused", 67)
        assert f"({target['encryption']}), but stores objects without it" in caught.value.message
        assert (caught.value.hint or "").startswith("remove storage.encryption ")
    assert "x-amz-server-side-encryption-customer-key" not in stubbed_store.sent_headers["HeadObject"]


def convert_response(status: int, code: str, message: str = "", operation: str = "PutObject", **target: Any) -> FineTuneError:
    store = S3Store(StoreTarget(uri="s3://bucket/root", **target))
    response: Any = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return convert_error(ClientError(response, operation), store.connection)


def test_a_missing_permission_on_the_key_service_is_named() -> None:
    message = f"User: arn:aws:iam::1:user/u is not authorized to perform: kms:GenerateDataKey on resource: {KMS_KEY_ARN}"
    error = convert_response(403, "AccessDenied", message, encryption="kms")
    assert (error.exit_code, error.code) == (77, "PermissionDenied")
    assert "kms:GenerateDataKey" in error.message and "arn:aws:iam" not in f"{error} {error.hint}"


@pytest.mark.parametrize(
    ("status", "code", "operation", "target"),
    [
        (400, "KMS.NotFoundException", "PutObject", {"encryption": "kms", "kms_key_id": KMS_KEY_ARN}),
        (400, "KMS.DisabledException", "GetObject", {}),
        (501, "NotImplemented", "PutObject", {"encryption": "s3", "endpoint": "https://store.example"}),
        (400, "InvalidArgument", "PutObject", {"encryption": "kms", "endpoint": "http://store.example"}),
        (400, "InvalidEncryptionAlgorithmError", "PutObject", {"encryption": "s3"}),
        (400, "400", "HeadObject", {}),
        (400, "InvalidRequest", "GetObject", {}),
        (400, "InvalidArgument", "GetObject", {"endpoint": "http://store.example"}),
    ],
)
def test_a_store_that_refuses_encryption_is_reported_as_a_wrong_setting(
    status: int, code: str, operation: str, target: dict[str, str]
) -> None:
    error = convert_response(status, code, operation=operation, **target)
    assert (error.exit_code, error.code) == (67, "EncryptionRefused")
    assert "storage.encryption" in (error.hint or "")
