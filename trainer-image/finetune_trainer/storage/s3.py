"""Accesses S3 and compatible stores through boto3 with its classic transfer client.

boto3's CRT client is not used, because it ignores a custom endpoint. boto3's default checksums are turned off, because some compatible
stores refuse them. Requests are retried more often than botocore's default, because a lost checkpoint costs more than a delay. Conditional
creation uses If-None-Match. If the response to a creation is lost, the retry finds that the object exists, and the caller compares the
object with its own data.
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
from finetune_trainer.storage.base import ByteCounter, CreateResult, ObjectStat, join
from finetune_trainer.storage.errors import UNKNOWN_KEY_OF_VERSITY, Connection, explain, status_of

MIB = 1024 * 1024
PART_BYTES = 8 * MIB
FORBIDDEN_STATUS = 403
RANGE_BYTES = 8 * MIB
MAX_PARTS = 9000
MAX_PARALLEL_TRANSFERS = 10
"""Number of parts or ranges that are transferred in parallel. A download keeps these ranges and one more in memory: at most 88 MiB."""
MAX_ATTEMPTS = 9
DEFAULT_REGION = "us-east-1"
CUSTOMER_KEY_BYTES = 32
MAX_DELETE_KEYS = 1000
"""Maximum number of keys in one DeleteObjects request of S3."""
CONFLICT_SECONDS = 0.2
CONDITIONS_UNSUPPORTED = ("NotImplemented", "InvalidArgument", "InvalidRequest")
"""Error codes of stores that do not support `If-None-Match` on a PUT. If the code has another cause, the plain PUT also fails."""
BATCHES_UNSUPPORTED = (
    "NotImplemented",
    "MethodNotAllowed",
    "MissingContentMD5",
    "InvalidDigest",
    "InvalidArgument",
    "InvalidRequest",
)
"""Error codes of stores that do not support DeleteObjects or the checksum of its body."""


class S3Store:
    """Objects below `s3://bucket/prefix`. Thread-safe, as boto3's clients are."""

    def __init__(
        self, target: StoreTarget, *, attempts: int = MAX_ATTEMPTS, connect_timeout: float = 5, read_timeout: float = 60
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
        """Whether the store supports conditional writes. True until a conditional write is refused."""
        self._batches = True
        """Whether the store supports DeleteObjects. True until such a request is refused."""
        self._lock = threading.Lock()
        self._encryption = encryption_arguments(target, self.connection)
        self._client = _client(target, self.connection, attempts, connect_timeout, read_timeout)
        self._client.meta.events.register("needs-retry.s3", self._count_retry)

    def _count_retry(self, attempts: int = 1, **_ignored: Any) -> None:
        if attempts > 1:
            with self._lock:
                self.retries += 1

    @property
    def client(self) -> Any:
        """The boto3 client."""
        return self._client

    def key(self, key: str) -> str:
        """The full key in the bucket."""
        return join(self.prefix, key)

    # ---- writing ----

    def put_file(self, source: Path, key: str, *, byte_counter: ByteCounter | None = None) -> None:
        size = source.stat().st_size
        if size <= PART_BYTES:
            self.put(key, source.read_bytes())
            if byte_counter:
                byte_counter(size)
            return
        try:
            self._client.upload_file(
                str(source),
                self.bucket,
                self.key(key),
                Config=_transfer_config(size),
                Callback=byte_counter,
                ExtraArgs=self._encryption.write,
            )
        except Exception as error:
            stored = self.stat(key) if _may_be_complete(error) else None
            if stored is None or stored.size != size:
                raise explain(error, self.connection, key=key) from error

    def put(self, key: str, data: bytes) -> None:
        try:
            self._client.put_object(Bucket=self.bucket, Key=self.key(key), Body=data, **self._encryption.write)
        except Exception as error:
            raise explain(error, self.connection, key=key) from error

    def create(self, key: str, data: bytes) -> CreateResult:
        for is_last_try in (False, False, False, True):
            try:
                self._client.put_object(
                    Bucket=self.bucket, Key=self.key(key), Body=data, IfNoneMatch="*", **self._encryption.write
                )
                return CreateResult.NEW
            except Exception as error:
                status, code = status_of(error)
                if status == 412 or code == "PreconditionFailed":
                    return CreateResult.EXISTS
                if status == 409 and not is_last_try:  # Another writer is creating the object.
                    time.sleep(CONFLICT_SECONDS)
                    continue
                if status == 501 or code in CONDITIONS_UNSUPPORTED:
                    self.supports_conditional_writes = False
                    break
                raise explain(error, self.connection, key=key) from error
        if self.stat(key) is not None:
            return CreateResult.EXISTS
        self.put(key, data)
        return CreateResult.NEW

    def delete(self, keys: Iterable[str]) -> None:
        names = [self.key(key) for key in keys]
        for start in range(0, len(names), MAX_DELETE_KEYS):
            batch = names[start : start + MAX_DELETE_KEYS]
            if not (self._batches and self._delete_batch(batch)):
                self._batches = False
                for name in batch:
                    self._delete_one(name)

    def _delete_batch(self, names: list[str]) -> bool:
        """Delete several objects; returns False if the store does not support this request."""
        request = {"Objects": [{"Key": name} for name in names], "Quiet": True}
        try:
            response = self._client.delete_objects(Bucket=self.bucket, Delete=request)
        except Exception as error:
            status, code = status_of(error)
            if status in (405, 501) or code in BATCHES_UNSUPPORTED:
                return False
            raise explain(error, self.connection, operation="DeleteObjects") from error
        for failed in response.get("Errors", []):
            raise _delete_failure(failed, self.connection)
        return True

    def _delete_one(self, name: str) -> None:
        try:
            self._client.delete_object(Bucket=self.bucket, Key=name)
        except Exception as error:
            if not _is_missing(error):
                raise explain(error, self.connection, operation="DeleteObject", key=name) from error

    def sweep(self, prefix: str) -> int:
        """Abort the multipart uploads that killed processes left below the prefix."""
        swept = 0
        try:
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self.bucket, Prefix=self.key(prefix)
            )
            for upload in [one for page in pages for one in page.get("Uploads", [])]:
                self._client.abort_multipart_upload(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])
                swept += 1
        except Exception as error:
            raise explain(error, self.connection, operation="ListMultipartUploads") from error
        return swept

    # ---- reading ----

    def get(self, key: str) -> bytes | None:
        for is_last_try in (False, False, True):
            try:
                body = self._client.get_object(Bucket=self.bucket, Key=self.key(key), **self._encryption.read)["Body"]
                return bytes(body.read())
            except Exception as error:
                if _is_missing(error):
                    return None
                if is_last_try or status_of(error)[0]:
                    raise explain(error, self.connection, key=key) from error
        raise AssertionError("unreachable")

    def download(self, key: str, target: Path, *, byte_counter: ByteCounter | None = None) -> str | None:
        """Download ranges in parallel and hash them in order, so that the file need not be read again."""
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            stat = self.stat(key)
            if stat is None:
                return None
            digest = hashlib.sha256()
            starts = range(0, stat.size, RANGE_BYTES)
            with target.open("wb") as writer, ThreadPoolExecutor(min(MAX_PARALLEL_TRANSFERS, max(1, len(starts)))) as pool:
                pending: deque[Future[bytes]] = deque()
                for start in starts:
                    pending.append(pool.submit(self._get_range, key, stat, start))
                    if len(pending) > MAX_PARALLEL_TRANSFERS:
                        _append_bytes(pending.popleft().result(), digest, writer, byte_counter)
                while pending:
                    _append_bytes(pending.popleft().result(), digest, writer, byte_counter)
        except Exception as error:
            if _is_missing(error):
                return None
            raise explain(error, self.connection, operation="GetObject", key=key) from error
        return digest.hexdigest()

    def _get_range(self, key: str, stat: ObjectStat, start: int) -> bytes:
        """Download one byte range of an object. An interrupted download is repeated. Errors: StorageError `ObjectChanged`."""
        end = min(start + RANGE_BYTES, stat.size) - 1
        tries_left = 4
        while True:
            tries_left -= 1
            try:
                response = self._client.get_object(
                    Bucket=self.bucket, Key=self.key(key), Range=f"bytes={start}-{end}", **self._encryption.read
                )
                if stat.tag and str(response.get("ETag", "")).strip('"') != stat.tag:
                    raise StorageError("ObjectChanged", f"{self.uri}/{key} changed during its download")
                data = bytes(response["Body"].read())
                if len(data) != end - start + 1:
                    raise ConnectionError(f"{len(data)} of {end - start + 1} bytes were received")
                return data
            except Exception as error:
                if tries_left == 0 or status_of(error)[0] or isinstance(error, StorageError):
                    raise

    def stat(self, key: str) -> ObjectStat | None:
        try:
            response = self._client.head_object(Bucket=self.bucket, Key=self.key(key), **self._encryption.read)
        except Exception as error:
            if _is_missing(error):
                return None
            raise explain(self._with_reason(error, key), self.connection, operation="HeadObject", key=key) from error
        return ObjectStat(key, int(response["ContentLength"]), str(response.get("ETag", "")).strip('"'))

    def has_requested_encryption(self, key: str) -> bool:
        """Whether an object is encrypted as requested. Some stores accept requests with encryption, but store the object without it.

        An object with a customer's key must not be readable without the key. For the other kinds, the store must report the encryption.
        """
        try:
            response = self._client.head_object(Bucket=self.bucket, Key=self.key(key))
        except Exception as error:
            if self.target.encryption is EncryptionType.CUSTOMER_KEY and status_of(error)[0] in (400, FORBIDDEN_STATUS):
                return True
            raise explain(self._with_reason(error, key), self.connection, operation="HeadObject", key=key) from error
        reported = str(response.get("ServerSideEncryption", ""))
        return {
            None: True, EncryptionType.S3: bool(reported), EncryptionType.KMS: reported.startswith("aws:kms"), EncryptionType.CUSTOMER_KEY: False,
        }[self.target.encryption]  # fmt: skip

    def _with_reason(self, error: Exception, key: str) -> Exception:
        """After a refused HEAD request, send a GET request and return its error: only the response to GET has a body with the reason."""
        if status_of(error)[0] != FORBIDDEN_STATUS:
            return error
        try:
            self._client.get_object(Bucket=self.bucket, Key=self.key(key), Range="bytes=0-0", **self._encryption.read)
        except Exception as repeated:
            return repeated if status_of(repeated)[0] == FORBIDDEN_STATUS else error
        return error

    def list(self, prefix: str) -> Iterator[ObjectStat]:
        prefix_length = len(self.prefix) + 1 if self.prefix else 0
        full = f"{self.prefix}/{prefix}" if self.prefix else prefix
        try:
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=full):
                for entry in page.get("Contents", []):
                    tag = str(entry.get("ETag", "")).strip('"')
                    yield ObjectStat(entry["Key"][prefix_length:], int(entry["Size"]), tag, entry.get("LastModified"))
        except Exception as error:
            raise explain(error, self.connection, operation="ListObjectsV2") from error

    def list_folders(self) -> tuple[str, ...]:
        prefix = f"{self.prefix}/" if self.prefix else ""
        try:
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix, Delimiter="/")
            return tuple(sorted(entry["Prefix"][len(prefix) : -1] for page in pages for entry in page.get("CommonPrefixes", [])))
        except Exception as error:
            raise explain(error, self.connection, operation="ListObjectsV2") from error

    def close(self) -> None:
        self._client.close()


def _append_bytes(data: bytes, digest: Any, writer: IO[bytes], byte_counter: ByteCounter | None) -> None:
    digest.update(data)
    writer.write(data)
    if byte_counter:
        byte_counter(len(data))


def describe_connection(target: StoreTarget, bucket: str) -> Connection:
    """Return the connection that a target describes. Missing fields come from AWS_ variables or get defaults."""
    endpoint = target.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    style = target.addressing_style or (AddressingStyle.PATH if endpoint else AddressingStyle.VIRTUAL)
    region = target.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or DEFAULT_REGION
    encryption = target.encryption.value if target.encryption else None
    return Connection(bucket, endpoint, region, style.value, target.credentials_prefix, encryption)


@dataclass(frozen=True)
class EncryptionArguments:
    """Additional arguments for write and read requests. Read requests only need arguments for a customer's key."""

    write: dict[str, Any]
    read: dict[str, Any]


def encryption_arguments(target: StoreTarget, connection: Connection) -> EncryptionArguments:
    """Return the request arguments for the encryption at rest of the target.

    Errors: ConfigError `CustomerKeyInvalid` if the Secret does not hold 32 bytes in base64.
    """
    match target.encryption:
        case EncryptionType.S3:
            return EncryptionArguments({"ServerSideEncryption": "AES256"}, {})
        case EncryptionType.KMS:
            key_id = {"SSEKMSKeyId": target.kms_key_id} if target.kms_key_id else {}
            return EncryptionArguments({"ServerSideEncryption": "aws:kms", **key_id}, {})
        case EncryptionType.CUSTOMER_KEY:
            key = {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": _customer_key(target, connection)}
            return EncryptionArguments(key, key)
    return EncryptionArguments({}, {})


def _customer_key(target: StoreTarget, connection: Connection) -> bytes:
    text = os.environ.get(target.customer_key_variable or Env.STORAGE_CUSTOMER_KEY, "")
    try:
        key = base64.b64decode(text.strip(), validate=True)
    except ValueError:
        key = b""
    if len(key) != CUSTOMER_KEY_BYTES:
        raise ConfigError(
            "CustomerKeyInvalid",
            f"the Secret of {connection.field}.encryption.customerKeySecretRef does not hold {CUSTOMER_KEY_BYTES} bytes in base64",
            hint="create a key with `openssl rand -base64 32`",
        )
    return key


def _client(
    target: StoreTarget, connection: Connection, attempts: int, connect_timeout: float, read_timeout: float
) -> Any:
    import boto3
    from botocore.config import Config

    if connection.endpoint:  # the client follows no redirects
        refuse_metadata_address(connection.endpoint, f"{connection.field}.endpoint")
    checksum_options = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
    config = Config(
        s3={"addressing_style": connection.addressing_style},
        retries={"total_max_attempts": attempts, "mode": "standard"},
        connect_timeout=connect_timeout, read_timeout=read_timeout, tcp_keepalive=True, max_pool_connections=4 * MAX_PARALLEL_TRANSFERS,
        signature_version="s3v4", **(checksum_options if connection.endpoint else {}),
    )  # fmt: skip
    prefix = target.credentials_prefix
    keys = {
        "aws_access_key_id": os.environ.get(prefix + Env.STORAGE_ACCESS_KEY),
        "aws_secret_access_key": os.environ.get(prefix + Env.STORAGE_SECRET_KEY),
        "aws_session_token": os.environ.get(prefix + Env.STORAGE_SESSION_TOKEN),
    }
    credentials = {name: value for name, value in keys.items() if value} if prefix else {}
    try:
        return boto3.session.Session().client(
            "s3", endpoint_url=connection.endpoint, region_name=connection.region, config=config,
            verify=target.ca_bundle or None, **credentials,
        )  # fmt: skip
    except Exception as error:
        raise explain(error, connection) from error


def _transfer_config(size: int) -> Any:
    """Return the transfer settings for a file of `size` bytes. The part size grows so that the number of parts stays below S3's limit."""
    from boto3.s3.transfer import TransferConfig

    part = max(PART_BYTES, -(-size // MAX_PARTS // MIB) * MIB)
    return TransferConfig(
        multipart_threshold=PART_BYTES,
        multipart_chunksize=part,
        max_concurrency=MAX_PARALLEL_TRANSFERS,
        preferred_transfer_client="classic",
    )


def _is_missing(error: Exception) -> bool:
    status, code = status_of(error)
    return code in ("NoSuchKey", "404", "NotFound") or (status == 404 and code not in ("NoSuchBucket", UNKNOWN_KEY_OF_VERSITY))


def _may_be_complete(error: Exception) -> bool:
    """Whether a multipart upload may have succeeded although the response was lost."""
    return "NoSuchUpload" in str(error) or isinstance(error, StorageError)


def _delete_failure(failed_delete: dict[str, Any], connection: Connection) -> Exception:
    from botocore.exceptions import ClientError

    response = {"Error": {"Code": failed_delete.get("Code", ""), "Message": ""}, "ResponseMetadata": {"HTTPStatusCode": 0}}
    return explain(ClientError(response, "DeleteObjects"), connection, key=str(failed_delete.get("Key", "")))
