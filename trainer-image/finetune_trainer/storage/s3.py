"""Accesses S3 and compatible stores through boto3 with its classic transfer client.

boto3's CRT client is not used, because it ignores a custom endpoint. boto3's default checksums are turned off, because some compatible
stores refuse them. Requests are retried more often than botocore's default, because a lost checkpoint costs more than a delay. To create an object
only if it does not exist, the header If-None-Match is used. If the response to this request is lost, the retry finds that the object exists. The
caller must therefore compare the existing object with its own data.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from finetune_api.errors import ConfigError, StorageError
from finetune_api.names import Env
from finetune_api.pod import StoreTarget
from finetune_api.spec.enums import AddressingStyle, EncryptionType

from finetune_trainer.addresses import refuse_metadata_address
from finetune_trainer.storage.base import ByteCounter, CreateResult, ObjectStat, join_key
from finetune_trainer.storage.errors import (
    VERSITY_UNKNOWN_ACCESS_KEY_CODE,
    BucketConnection,
    convert_error,
    get_status_and_code,
)

MIB = 1024 * 1024
PART_BYTES = 8 * MIB
HTTP_FORBIDDEN = 403
RANGE_BYTES = 8 * MIB
MAX_UPLOAD_PARTS = 9000
MAX_PARALLEL_TRANSFERS = 10
"""Number of parts of an upload, or ranges of a download, that are transferred in parallel. A download keeps these ranges and one more in memory: at
most 88 MiB."""
MAX_TRIES = 9
DEFAULT_REGION = "us-east-1"
CUSTOMER_KEY_BYTES = 32
MAX_DELETE_KEYS = 1000
"""Maximum number of keys in one DeleteObjects request of S3."""
CONFLICT_PAUSE_SECONDS = 0.2
"""Pause before a creation is retried because another writer was creating the same object."""
CONDITIONAL_WRITE_REFUSED_CODES = ("NotImplemented", "InvalidArgument", "InvalidRequest")
"""Error codes with which stores refuse a PUT with `If-None-Match`. The PUT is repeated without this header. If the header was not the cause, the
repeated PUT fails too."""
BATCH_DELETION_REFUSED_CODES = (
    "NotImplemented",
    "MethodNotAllowed",
    "MissingContentMD5",
    "InvalidDigest",
    "InvalidArgument",
    "InvalidRequest",
)
"""Error codes with which stores refuse DeleteObjects or the checksum of its body."""


class S3Store:
    """Objects below `s3://bucket/prefix`. Thread-safe, as boto3's clients are."""

    def __init__(
        self, target: StoreTarget, *, max_tries: int = MAX_TRIES, connect_timeout: float = 5, read_timeout: float = 60
    ) -> None:
        match = re.fullmatch(r"s3://([^/]+)(?:/(.*))?", target.uri)
        if match is None:
            raise ValueError(f"not an S3 uri: {target.uri}")
        self.bucket, self.prefix = match[1], (match[2] or "").strip("/")
        self.uri = target.uri.rstrip("/")
        self.target = target
        self.connection = describe_connection(target, self.bucket)
        self.retries = 0
        self.supports_conditional_writes = True
        """Whether the store supports conditional writes. The value is True until the store refuses a conditional write."""
        self._supports_batch_deletion = True
        """Whether the store supports DeleteObjects. The value is True until the store refuses a DeleteObjects request."""
        self._lock = threading.Lock()
        self._encryption = build_encryption_arguments(target, self.connection)
        self._client = _create_client(target, self.connection, max_tries, connect_timeout, read_timeout)
        self._client.meta.events.register("needs-retry.s3", self._count_retry)

    def _count_retry(self, attempts: int = 1, **_ignored: Any) -> None:
        if attempts > 1:
            with self._lock:
                self.retries += 1

    @property
    def client(self) -> Any:
        """The boto3 client."""
        return self._client

    def full_key(self, key: str) -> str:
        """Return the key in the bucket: the store's prefix, followed by the given key."""
        return join_key(self.prefix, key)

    # ---- writing ----

    def put_file(self, source_file: Path, key: str, *, byte_counter: ByteCounter | None = None) -> None:
        size = source_file.stat().st_size
        if size <= PART_BYTES:
            self.put(key, source_file.read_bytes())
            if byte_counter:
                byte_counter(size)
            return
        try:
            self._client.upload_file(
                str(source_file),
                self.bucket,
                self.full_key(key),
                Config=_create_transfer_config(size),
                Callback=byte_counter,
                ExtraArgs=self._encryption.write_arguments,
            )
        except Exception as error:
            stored_object = self.stat(key) if _upload_may_be_complete(error) else None
            if stored_object is None or stored_object.size != size:
                raise convert_error(error, self.connection, key=key) from error

    def put(self, key: str, data: bytes) -> None:
        try:
            self._client.put_object(Bucket=self.bucket, Key=self.full_key(key), Body=data, **self._encryption.write_arguments)
        except Exception as error:
            raise convert_error(error, self.connection, key=key) from error

    def create(self, key: str, data: bytes) -> CreateResult:
        for is_last_try in (False, False, False, True):
            try:
                self._client.put_object(
                    Bucket=self.bucket, Key=self.full_key(key), Body=data, IfNoneMatch="*", **self._encryption.write_arguments
                )
                return CreateResult.NEW
            except Exception as error:
                status, code = get_status_and_code(error)
                if status == 412 or code == "PreconditionFailed":
                    return CreateResult.EXISTS
                if status == 409 and not is_last_try:  # Another writer is creating the object.
                    time.sleep(CONFLICT_PAUSE_SECONDS)
                    continue
                if status == 501 or code in CONDITIONAL_WRITE_REFUSED_CODES:
                    self.supports_conditional_writes = False
                    break
                raise convert_error(error, self.connection, key=key) from error
        if self.stat(key) is not None:
            return CreateResult.EXISTS
        self.put(key, data)
        return CreateResult.NEW

    def delete(self, keys: Iterable[str]) -> None:
        full_keys = [self.full_key(key) for key in keys]
        for start in range(0, len(full_keys), MAX_DELETE_KEYS):
            batch = full_keys[start : start + MAX_DELETE_KEYS]
            if not (self._supports_batch_deletion and self._delete_batch(batch)):
                self._supports_batch_deletion = False
                for full_key in batch:
                    self._delete_object(full_key)

    def _delete_batch(self, full_keys: list[str]) -> bool:
        """Delete several objects with one request. Returns False if the store does not support such requests."""
        request = {"Objects": [{"Key": full_key} for full_key in full_keys], "Quiet": True}
        try:
            response = self._client.delete_objects(Bucket=self.bucket, Delete=request)
        except Exception as error:
            status, code = get_status_and_code(error)
            if status in (405, 501) or code in BATCH_DELETION_REFUSED_CODES:
                return False
            raise convert_error(error, self.connection, operation="DeleteObjects") from error
        for failed_deletion in response.get("Errors", []):
            raise _build_deletion_error(failed_deletion, self.connection)
        return True

    def _delete_object(self, full_key: str) -> None:
        try:
            self._client.delete_object(Bucket=self.bucket, Key=full_key)
        except Exception as error:
            if not _is_missing(error):
                raise convert_error(error, self.connection, operation="DeleteObject", key=full_key) from error

    def sweep(self, key_prefix: str) -> int:
        """Abort the unfinished multipart uploads that killed processes have left below the prefix. Returns the number of aborted uploads."""
        swept_count = 0
        try:
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self.bucket, Prefix=self.full_key(key_prefix)
            )
            for upload in [upload for page in pages for upload in page.get("Uploads", [])]:
                self._client.abort_multipart_upload(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])
                swept_count += 1
        except Exception as error:
            raise convert_error(error, self.connection, operation="ListMultipartUploads") from error
        return swept_count

    # ---- reading ----

    def get(self, key: str) -> bytes | None:
        for is_last_try in (False, False, True):
            try:
                body = self._client.get_object(Bucket=self.bucket, Key=self.full_key(key), **self._encryption.read_arguments)["Body"]
                return bytes(body.read())
            except Exception as error:
                if _is_missing(error):
                    return None
                if is_last_try or get_status_and_code(error)[0]:
                    raise convert_error(error, self.connection, key=key) from error
        raise AssertionError("unreachable")

    def download(self, key: str, target_file: Path, *, byte_counter: ByteCounter | None = None) -> str | None:
        """Download byte ranges in parallel and hash them in order, so that the file need not be read again to compute its hash."""
        try:
            target_file.parent.mkdir(parents=True, exist_ok=True)
            stat = self.stat(key)
            if stat is None:
                return None
            digest = hashlib.sha256()
            range_starts = range(0, stat.size, RANGE_BYTES)
            with target_file.open("wb") as writer, ThreadPoolExecutor(min(MAX_PARALLEL_TRANSFERS, max(1, len(range_starts)))) as pool:
                pending_ranges: deque[Future[bytes]] = deque()
                for start in range_starts:
                    pending_ranges.append(pool.submit(self._download_range, key, stat, start))
                    if len(pending_ranges) > MAX_PARALLEL_TRANSFERS:
                        _append_bytes(pending_ranges.popleft().result(), digest, writer, byte_counter)
                while pending_ranges:
                    _append_bytes(pending_ranges.popleft().result(), digest, writer, byte_counter)
        except Exception as error:
            if _is_missing(error):
                return None
            raise convert_error(error, self.connection, operation="GetObject", key=key) from error
        return digest.hexdigest()

    def _download_range(self, key: str, stat: ObjectStat, start: int) -> bytes:
        """Download one byte range of an object, and retry interrupted downloads. Errors: StorageError `ObjectChanged`."""
        end = min(start + RANGE_BYTES, stat.size) - 1
        tries_left = 4
        while True:
            tries_left -= 1
            try:
                response = self._client.get_object(
                    Bucket=self.bucket, Key=self.full_key(key), Range=f"bytes={start}-{end}", **self._encryption.read_arguments
                )
                if stat.tag and str(response.get("ETag", "")).strip('"') != stat.tag:
                    raise StorageError("ObjectChanged", f"{self.uri}/{key} changed during its download")
                data = bytes(response["Body"].read())
                if len(data) != end - start + 1:
                    raise ConnectionError(f"{len(data)} of {end - start + 1} bytes were received")
                return data
            except Exception as error:
                if tries_left == 0 or get_status_and_code(error)[0] or isinstance(error, StorageError):
                    raise

    def stat(self, key: str) -> ObjectStat | None:
        try:
            response = self._client.head_object(Bucket=self.bucket, Key=self.full_key(key), **self._encryption.read_arguments)
        except Exception as error:
            if _is_missing(error):
                return None
            raise convert_error(self._fetch_error_with_reason(error, key), self.connection, operation="HeadObject", key=key) from error
        return ObjectStat(key, int(response["ContentLength"]), str(response.get("ETag", "")).strip('"'))

    def has_requested_encryption(self, key: str) -> bool:
        """Whether an object is encrypted as requested. Some stores accept requests for encryption, but store the object without encryption.

        An object encrypted with a customer's key must not be readable without the key. For the other types of encryption, the store must report that
        the object is encrypted.
        """
        try:
            response = self._client.head_object(Bucket=self.bucket, Key=self.full_key(key))
        except Exception as error:
            if self.target.encryption is EncryptionType.CUSTOMER_KEY and get_status_and_code(error)[0] in (400, HTTP_FORBIDDEN):
                return True
            raise convert_error(self._fetch_error_with_reason(error, key), self.connection, operation="HeadObject", key=key) from error
        reported_encryption = str(response.get("ServerSideEncryption", ""))
        return {
            None: True, EncryptionType.S3: bool(reported_encryption),
            EncryptionType.KMS: reported_encryption.startswith("aws:kms"), EncryptionType.CUSTOMER_KEY: False,
        }[self.target.encryption]  # fmt: skip

    def _fetch_error_with_reason(self, error: Exception, key: str) -> Exception:
        """Repeat a refused HEAD request as a GET request and return the error of GET, because only a response to GET has a body with the reason."""
        if get_status_and_code(error)[0] != HTTP_FORBIDDEN:
            return error
        try:
            self._client.get_object(Bucket=self.bucket, Key=self.full_key(key), Range="bytes=0-0", **self._encryption.read_arguments)
        except Exception as get_error:
            return get_error if get_status_and_code(get_error)[0] == HTTP_FORBIDDEN else error
        return error

    def list(self, key_prefix: str) -> Iterator[ObjectStat]:
        prefix_length = len(self.prefix) + 1 if self.prefix else 0
        full_prefix = f"{self.prefix}/{key_prefix}" if self.prefix else key_prefix
        try:
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=full_prefix):
                for entry in page.get("Contents", []):
                    tag = str(entry.get("ETag", "")).strip('"')
                    yield ObjectStat(entry["Key"][prefix_length:], int(entry["Size"]), tag, entry.get("LastModified"))
        except Exception as error:
            raise convert_error(error, self.connection, operation="ListObjectsV2") from error

    def list_folders(self) -> tuple[str, ...]:
        prefix = f"{self.prefix}/" if self.prefix else ""
        try:
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix, Delimiter="/")
            return tuple(sorted(entry["Prefix"][len(prefix) : -1] for page in pages for entry in page.get("CommonPrefixes", [])))
        except Exception as error:
            raise convert_error(error, self.connection, operation="ListObjectsV2") from error

    def close(self) -> None:
        self._client.close()


def _append_bytes(data: bytes, digest: Any, writer: IO[bytes], byte_counter: ByteCounter | None) -> None:
    digest.update(data)
    writer.write(data)
    if byte_counter:
        byte_counter(len(data))


def describe_connection(target: StoreTarget, bucket: str) -> BucketConnection:
    """Return the connection that a target describes. Missing fields come from AWS_ variables or get defaults."""
    endpoint = target.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    addressing_style = target.addressing_style or (AddressingStyle.PATH if endpoint else AddressingStyle.VIRTUAL)
    region = target.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or DEFAULT_REGION
    encryption = target.encryption.value if target.encryption else None
    return BucketConnection(bucket, endpoint, region, addressing_style.value, target.credentials_prefix, encryption)


@dataclass(frozen=True)
class EncryptionArguments:
    """Additional arguments of write and read requests for encryption. Read requests need arguments only for a customer's key."""

    write_arguments: dict[str, Any]
    read_arguments: dict[str, Any]


def build_encryption_arguments(target: StoreTarget, connection: BucketConnection) -> EncryptionArguments:
    """Return the request arguments for the encryption at rest that the target asks for.

    Errors: ConfigError `CustomerKeyInvalid` if the customer's key in the environment is not 32 bytes in base64.
    """
    match target.encryption:
        case EncryptionType.S3:
            return EncryptionArguments({"ServerSideEncryption": "AES256"}, {})
        case EncryptionType.KMS:
            key_id_argument = {"SSEKMSKeyId": target.kms_key_id} if target.kms_key_id else {}
            return EncryptionArguments({"ServerSideEncryption": "aws:kms", **key_id_argument}, {})
        case EncryptionType.CUSTOMER_KEY:
            key_arguments = {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": _read_customer_key(target, connection)}
            return EncryptionArguments(key_arguments, key_arguments)
    return EncryptionArguments({}, {})


def _read_customer_key(target: StoreTarget, connection: BucketConnection) -> bytes:
    base64_text = os.environ.get(target.customer_key_variable or Env.STORAGE_CUSTOMER_KEY, "")
    try:
        key = base64.b64decode(base64_text.strip(), validate=True)
    except ValueError:
        key = b""
    if len(key) != CUSTOMER_KEY_BYTES:
        raise ConfigError(
            "CustomerKeyInvalid",
            f"the Secret of {connection.spec_field}.encryption.customerKeySecretRef does not hold {CUSTOMER_KEY_BYTES} bytes in base64",
            hint="create a key with `openssl rand -base64 32`",
        )
    return key


def _create_client(
    target: StoreTarget, connection: BucketConnection, max_tries: int, connect_timeout: float, read_timeout: float
) -> Any:
    import boto3
    from botocore.config import Config

    if connection.endpoint:  # This is the only address to check, because the client follows no HTTP redirects.
        refuse_metadata_address(connection.endpoint, f"{connection.spec_field}.endpoint")
    checksum_options = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
    config = Config(
        s3={"addressing_style": connection.addressing_style},
        retries={"total_max_attempts": max_tries, "mode": "standard"},
        connect_timeout=connect_timeout, read_timeout=read_timeout, tcp_keepalive=True, max_pool_connections=4 * MAX_PARALLEL_TRANSFERS,
        signature_version="s3v4", **(checksum_options if connection.endpoint else {}),
    )  # fmt: skip
    variable_prefix = target.credentials_prefix
    credentials_in_environment = {
        "aws_access_key_id": os.environ.get(variable_prefix + Env.STORAGE_ACCESS_KEY),
        "aws_secret_access_key": os.environ.get(variable_prefix + Env.STORAGE_SECRET_KEY),
        "aws_session_token": os.environ.get(variable_prefix + Env.STORAGE_SESSION_TOKEN),
    }
    credentials = {name: value for name, value in credentials_in_environment.items() if value} if variable_prefix else {}
    try:
        return boto3.session.Session().client(
            "s3", endpoint_url=connection.endpoint, region_name=connection.region, config=config,
            verify=target.ca_bundle or None, **credentials,
        )  # fmt: skip
    except Exception as error:
        raise convert_error(error, connection) from error


def _create_transfer_config(size_bytes: int) -> Any:
    """Return the transfer settings for a file of `size_bytes` bytes. The parts of a large file are larger, so that their number stays below S3's limit."""
    from boto3.s3.transfer import TransferConfig

    part_bytes = max(PART_BYTES, -(-size_bytes // MAX_UPLOAD_PARTS // MIB) * MIB)
    return TransferConfig(
        multipart_threshold=PART_BYTES,
        multipart_chunksize=part_bytes,
        max_concurrency=MAX_PARALLEL_TRANSFERS,
        preferred_transfer_client="classic",
    )


def _is_missing(error: Exception) -> bool:
    status, code = get_status_and_code(error)
    return code in ("NoSuchKey", "404", "NotFound") or (status == 404 and code not in ("NoSuchBucket", VERSITY_UNKNOWN_ACCESS_KEY_CODE))


def _upload_may_be_complete(error: Exception) -> bool:
    """Whether a multipart upload may have succeeded although its response was lost."""
    return "NoSuchUpload" in str(error) or isinstance(error, StorageError)


def _build_deletion_error(failed_deletion: dict[str, Any], connection: BucketConnection) -> Exception:
    from botocore.exceptions import ClientError

    response = {"Error": {"Code": failed_deletion.get("Code", ""), "Message": ""}, "ResponseMetadata": {"HTTPStatusCode": 0}}
    return convert_error(ClientError(response, "DeleteObjects"), connection, key=str(failed_deletion.get("Key", "")))
