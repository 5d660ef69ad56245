"""Converts exceptions of botocore to named failures. Each message says who can fix the failure, and how.

The operation shows which permission is missing, and the connection shows which spec field must be corrected. No message contains a
credential: S3's own messages are never copied, because some repeat the signed request.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass

from finetune_api.errors import (
    CredentialsError,
    FineTuneError,
    StorageError,
    StorageSetupError,
)

from finetune_trainer.failure import local_disk_full

PERMISSIONS_BY_OPERATION = {
    "PutObject": "s3:PutObject", "CreateMultipartUpload": "s3:PutObject", "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject", "GetObject": "s3:GetObject", "HeadObject": "s3:GetObject",
    "ListObjectsV2": "s3:ListBucket", "ListObjects": "s3:ListBucket", "HeadBucket": "s3:ListBucket",
    "DeleteObject": "s3:DeleteObject", "DeleteObjects": "s3:DeleteObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload", "ListMultipartUploads": "s3:ListBucketMultipartUploads",
}  # fmt: skip
"""The permission that each operation needs."""


@dataclass(frozen=True)
class Connection:
    """The parts of a connection that a message may show."""

    bucket: str
    endpoint: str | None
    region: str
    addressing_style: str
    prefix: str = ""
    """Prefix of the environment variables with the credentials: empty, `MODEL_` or `DATASET_`."""
    encryption: str | None = None
    """Type of encryption at rest in the requests."""

    @property
    def host(self) -> str:
        return self.endpoint or f"AWS S3 in {self.region}"

    @property
    def field(self) -> str:
        """The group of the spec that configures this connection."""
        return {"": "storage", "MODEL_": "model.storage", "DATASET_": "dataset.storage"}.get(self.prefix, "storage")


def explain(error: Exception, connection: Connection, *, operation: str = "", key: str = "") -> FineTuneError:
    """Return the named failure for an exception of botocore, boto3 or s3transfer."""
    from botocore import exceptions as boto

    if isinstance(error, FineTuneError):
        return error
    if isinstance(error, boto.ClientError):
        return _response_error(error, connection, operation or error.operation_name, key)
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError):
        return CredentialsError(
            "CredentialsMissing", f"there are no S3 credentials for bucket {connection.bucket} at {connection.host}",
            hint=f"name a Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in {connection.field}.credentialsSecretRef, "
            "or give the pod's ServiceAccount an identity",
        )  # fmt: skip
    if isinstance(error, boto.SSLError):
        return _tls_error(error, connection)
    if isinstance(error, OSError) and error.errno in LOCAL_DISK_ERRNOS:
        return of_local_disk(error)
    if isinstance(error, boto.HTTPClientError | boto.ConnectionError | boto.IncompleteReadError | OSError):
        return unreachable_error(connection, str(error))
    if isinstance(error, RecursionError):  # If the region is wrong, botocore follows redirects without end.
        return _wrong_region_error(connection)
    if isinstance(error, boto.ParamValidationError | ValueError):
        return StorageSetupError(
            "EndpointInvalid",
            f"{connection.field}.endpoint {connection.endpoint} cannot be used: {error}",
            hint="write https://host",
        )
    causes = [error.__cause__, error.__context__, *(arg for arg in error.args if isinstance(arg, Exception))]
    for cause in causes:
        if isinstance(cause, boto.BotoCoreError | boto.ClientError):
            return explain(cause, connection, operation=operation, key=key)
    return StorageError(
        "StorageFailed", f"{operation or 'a request'} to {connection.host} failed: {type(error).__name__}: {error}"
    )


LOCAL_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""Errno values of local file errors. Network errors never have these values."""


def of_local_disk(error: OSError) -> StorageError:
    """Return the failure for an error of a local file during a transfer."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return local_disk_full()
    return StorageError("LocalDiskFailed", f"the pod's local disk failed: {error.strerror or error}")


def unreachable_error(connection: Connection, text: str = "") -> StorageError:
    """Return the failure for a store that does not respond (69)."""
    reason = "it refused the connection" if "refused" in text.lower() else "it did not respond"
    if "resolve" in text.lower() or "Name or service" in text or "Could not connect" in text:
        reason = "its name cannot be resolved, or no server listens there"
    return StorageError(
        "EndpointUnreachable", f"S3 at {connection.host} could not be reached: {reason}",
        hint=f"check {connection.field}.endpoint, the network policy and whether the store is running",
    )  # fmt: skip


def _tls_error(error: Exception, connection: Connection) -> StorageSetupError:
    text = str(error)
    if "WRONG_VERSION_NUMBER" in text or "record layer" in text.lower():
        reason, hint = (
            "it does not use TLS on this port",
            f"write http:// in {connection.field}.endpoint, or the port that uses TLS",
        )
    elif "CERTIFICATE_VERIFY_FAILED" in text:
        reason = "its certificate is not signed by a CA that this pod trusts, or is for another name"
        hint = f"write the CA's certificate in {connection.field}.caBundleRef"
    elif "No such file" in text or "Invalid path" in text or "invalid path" in text:
        reason, hint = "the CA bundle cannot be read", f"check {connection.field}.caBundleRef"
    else:
        reason, hint = "the TLS handshake failed", f"check {connection.field}.endpoint and {connection.field}.caBundleRef"
    return StorageSetupError("TlsFailed", f"{connection.host}: {reason}", hint=hint)


def _wrong_region_error(connection: Connection) -> StorageSetupError:
    return StorageSetupError(
        "RegionWrong",
        f"bucket {connection.bucket} at {connection.host} is not in region {connection.region}",
        hint=f"write the bucket's region in {connection.field}.region",
    )


def _response_error(error: Exception, connection: Connection, operation: str, key: str) -> FineTuneError:
    response = getattr(error, "response", {})
    code = str(response.get("Error", {}).get("Code", ""))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    message = str(response.get("Error", {}).get("Message", ""))
    location = f"bucket {connection.bucket} at {connection.host}"
    named_error = _encryption_failure(code, status, message, connection, location, operation) or _known_failure(
        code, status, message, connection, location, operation, key
    )
    if named_error is not None:
        return named_error
    if status >= 500 or code in ("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException"):
        return StorageError("StorageFailed", f"{location} answered {operation} with {status} {code} after all retries")
    return StorageError("StorageFailed", f"{location} answered {operation} with {status} {code}")


def _encryption_failure(
    code: str, status: int, message: str, connection: Connection, location: str, operation: str
) -> FineTuneError | None:
    """Return the failure for a response about encryption: missing permission, wrong key or unsupported kind. Otherwise None."""
    if status == 403 and (permission := _KMS_PERMISSION.search(message)):
        return CredentialsError(
            "PermissionDenied", f"{location} refuses {permission[0]}: the key service does not allow these credentials to use the key",
            hint=f"grant {permission[0]} on the key in {connection.field}.encryption.kmsKeyId, or on the bucket's own key",
        )  # fmt: skip
    uses_http = (connection.endpoint or "https").startswith("http://")
    unreadable = code in ("InvalidArgument", "InvalidRequest") or (code == "400" and not uses_http)
    if operation in ("HeadObject", "GetObject") and status == 400 and unreadable:
        return StorageSetupError(
            "EncryptionRefused", f"{location} cannot return an object with the given encryption: it is encrypted with a customer's "
            "key that was not given, with another customer's key, or without a customer's key",
            hint=f"correct {connection.field}.encryption",
        )  # fmt: skip
    is_encryption_code = code.startswith("KMS.") or code in _ENCRYPTION_CODES
    if not is_encryption_code and not (
        connection.encryption and (code in ("InvalidArgument", "InvalidRequest") or status == 501)
    ):
        return None
    requested = connection.encryption or "the bucket's own"
    return StorageSetupError(
        "EncryptionRefused", f"{location} does not support the requested encryption ({requested}): {code or status}",
        hint=f"correct {connection.field}.encryption, or remove it and set the bucket's default",
    )  # fmt: skip


_KMS_PERMISSION = re.compile(r"\bkms:[A-Za-z]+\b")
_ENCRYPTION_CODES = (
    "InvalidEncryptionAlgorithmError", "InvalidEncryptionMethod", "ServerSideEncryptionConfigurationNotFoundError",
    "InvalidSSECustomerKey", "InvalidCustomerKey", "KmsKeyNotFound", "XMinioKMSNotConfigured",
)  # fmt: skip


UNKNOWN_KEY_OF_VERSITY = "XAdminUserNotFound"
"""Error code with which the Versity gateway answers an unknown access key. Its status is 404, as if the object did not exist."""
REJECTED_CREDENTIALS = (
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidClientTokenId", "AuthFailure", "Unauthorized", UNKNOWN_KEY_OF_VERSITY,
)  # fmt: skip


def _known_failure(
    code: str, status: int, message: str, connection: Connection, location: str, operation: str, key: str
) -> FineTuneError | None:
    group = connection.field
    if code == "NoSuchBucket":
        return StorageSetupError(
            "BucketNotFound", f"there is no {location}", hint=f"create it, or correct the bucket in {group}.uri"
        )
    if code in REJECTED_CREDENTIALS:
        return CredentialsError(
            "CredentialsRejected", f"{location} does not accept the credentials ({code})",
            hint=f"correct the Secret named in {group}.credentialsSecretRef",
        )  # fmt: skip
    if code in ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"):
        return CredentialsError(
            "CredentialsExpired", f"the credentials for {location} have expired",
            hint=f"renew the Secret named in {group}.credentialsSecretRef, or use the pod's identity",
        )  # fmt: skip
    if code in ("RequestTimeTooSkewed",):
        return StorageSetupError(
            "ClockSkew", f"{location} refuses requests: the clock of this node differs too much from the clock of the store",
            hint="set the node's clock (NTP)",
        )  # fmt: skip
    if (
        code
        in (
            "PermanentRedirect",
            "AuthorizationHeaderMalformed",
            "IllegalLocationConstraintException",
            "301",
            "TemporaryRedirect",
        )
        or status == 301
    ):
        if status == 301 and connection.endpoint and "endpoint" in message.lower():
            return StorageSetupError(
                "AddressingWrong", f"{location} does not support {connection.addressing_style} addressing at this endpoint",
                hint=f"write {group}.addressingStyle: {'path' if connection.addressing_style == 'virtual' else 'virtual'}, or the bucket's own endpoint",
            )  # fmt: skip
        return StorageSetupError(
            "RegionWrong",
            f"{location} is not in region {connection.region}",
            hint=f"write the bucket's region in {group}.region",
        )
    if code in ("AccessDenied", "AllAccessDisabled", "403", "Forbidden", "AccountProblem") or status == 403:
        permission = PERMISSIONS_BY_OPERATION.get(operation, operation)
        return CredentialsError(
            "PermissionDenied",
            f"{location} refuses {permission}" + (f" on {key}" if key else ""),
            hint=f"grant {permission} on {connection.bucket}",
        )
    if code == "InvalidBucketName" or (code == "400" and "bucket" in message.lower()):
        return StorageSetupError(
            "AddressingWrong",
            f"{location}: the store reads the bucket's name from another part of the address",
            hint=f"try {group}.addressingStyle: path",
        )
    if status == 400 and ("HTTPS" in message or "HTTP request" in message or code == "400"):
        return StorageSetupError(
            "TlsFailed",
            f"{connection.host} requires TLS, and the request did not use it",
            hint=f"write https:// in {group}.endpoint",
        )
    return None


def status_of(error: Exception) -> tuple[int, str]:
    """Return the HTTP status and the S3 error code of a ClientError; (0, "") for other errors."""
    response = getattr(error, "response", None) or {}
    return (
        int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)),
        str(response.get("Error", {}).get("Code", "")),
    )
