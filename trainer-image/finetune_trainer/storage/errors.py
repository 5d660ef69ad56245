"""Converts exceptions of botocore to errors with a code. Each error says who can fix the failure, and how.

The failed S3 operation determines which permission the error names, and the connection determines which spec field the error names. No message contains a
credential: S3's own messages are never copied, because some of them repeat the signed request.
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

from finetune_trainer.failure import local_disk_full_error

PERMISSION_BY_OPERATION = {
    "PutObject": "s3:PutObject", "CreateMultipartUpload": "s3:PutObject", "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject", "GetObject": "s3:GetObject", "HeadObject": "s3:GetObject",
    "ListObjectsV2": "s3:ListBucket", "ListObjects": "s3:ListBucket", "HeadBucket": "s3:ListBucket",
    "DeleteObject": "s3:DeleteObject", "DeleteObjects": "s3:DeleteObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload", "ListMultipartUploads": "s3:ListBucketMultipartUploads",
}  # fmt: skip
"""The S3 permission that each S3 operation needs."""


@dataclass(frozen=True)
class BucketConnection:
    """How a bucket is accessed. No field is secret, so messages may show all fields."""

    bucket: str
    endpoint: str | None
    region: str
    addressing_style: str
    credentials_prefix: str = ""
    """Prefix of the environment variables that hold the credentials: empty, `MODEL_` or `DATASET_`."""
    encryption: str | None = None
    """The encryption at rest that write requests ask for, or None if they do not ask for encryption."""

    @property
    def host(self) -> str:
        """The address of the store, as messages show it."""
        return self.endpoint or f"AWS S3 in {self.region}"

    @property
    def spec_field(self) -> str:
        """The spec field that configures this connection."""
        return {"": "storage", "MODEL_": "model.storage", "DATASET_": "dataset.storage"}.get(self.credentials_prefix, "storage")


def convert_error(error: Exception, connection: BucketConnection, *, operation: str = "", key: str = "") -> FineTuneError:
    """Convert an exception of botocore, boto3 or s3transfer to an error with a code. A FineTuneError is returned unchanged.

    `operation`: the S3 operation that failed. `key`: key of the object that the operation was for.
    """
    from botocore import exceptions as boto

    if isinstance(error, FineTuneError):
        return error
    if isinstance(error, boto.ClientError):
        return _convert_response_error(error, connection, operation or error.operation_name, key)
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError):
        return CredentialsError(
            "CredentialsMissing", f"there are no S3 credentials for bucket {connection.bucket} at {connection.host}",
            hint=f"name a Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in {connection.spec_field}.credentialsSecretRef, "
            "or give the pod's ServiceAccount an identity",
        )  # fmt: skip
    if isinstance(error, boto.SSLError):
        return _convert_tls_error(error, connection)
    if isinstance(error, OSError) and error.errno in LOCAL_DISK_ERRNOS:
        return local_disk_error(error)
    if isinstance(error, boto.HTTPClientError | boto.ConnectionError | boto.IncompleteReadError | OSError):
        return unreachable_error(connection, str(error))
    if isinstance(error, RecursionError):  # If the region is wrong, botocore follows redirects without end.
        return _build_wrong_region_error(connection)
    if isinstance(error, boto.ParamValidationError | ValueError):
        return StorageSetupError(
            "EndpointInvalid",
            f"{connection.spec_field}.endpoint {connection.endpoint} cannot be used: {error}",
            hint="write https://host",
        )
    causes = [error.__cause__, error.__context__, *(arg for arg in error.args if isinstance(arg, Exception))]
    for cause in causes:
        if isinstance(cause, boto.BotoCoreError | boto.ClientError):
            return convert_error(cause, connection, operation=operation, key=key)
    return StorageError(
        "StorageFailed", f"{operation or 'a request'} to {connection.host} failed: {type(error).__name__}: {error}"
    )


LOCAL_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""Values of `errno` that only errors of local files have. Network errors never have these values."""


def local_disk_error(error: OSError) -> StorageError:
    """Return the error for a local file that could not be read or written during a transfer."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return local_disk_full_error()
    return StorageError("LocalDiskFailed", f"the pod's local disk failed: {error.strerror or error}")


def unreachable_error(connection: BucketConnection, exception_text: str = "") -> StorageError:
    """Return the error for a store that could not be reached (exit code 69)."""
    reason = "it refused the connection" if "refused" in exception_text.lower() else "it did not respond"
    if "resolve" in exception_text.lower() or "Name or service" in exception_text or "Could not connect" in exception_text:
        reason = "its name cannot be resolved, or no server listens there"
    return StorageError(
        "EndpointUnreachable", f"S3 at {connection.host} could not be reached: {reason}",
        hint=f"check {connection.spec_field}.endpoint, the network policy and whether the store is running",
    )  # fmt: skip


def _convert_tls_error(error: Exception, connection: BucketConnection) -> StorageSetupError:
    error_text = str(error)
    if "WRONG_VERSION_NUMBER" in error_text or "record layer" in error_text.lower():
        reason, hint = (
            "it does not use TLS on this port",
            f"write http:// in {connection.spec_field}.endpoint, or the port that uses TLS",
        )
    elif "CERTIFICATE_VERIFY_FAILED" in error_text:
        reason = "its certificate is for another name, or this pod does not trust its CA"
        hint = f"write the CA's certificate in {connection.spec_field}.caBundleRef"
    elif "No such file" in error_text or "Invalid path" in error_text or "invalid path" in error_text:
        reason, hint = "the CA bundle cannot be read", f"check {connection.spec_field}.caBundleRef"
    else:
        reason, hint = "the TLS handshake failed", f"check {connection.spec_field}.endpoint and {connection.spec_field}.caBundleRef"
    return StorageSetupError("TlsFailed", f"{connection.host}: {reason}", hint=hint)


def _build_wrong_region_error(connection: BucketConnection) -> StorageSetupError:
    return StorageSetupError(
        "RegionWrong",
        f"bucket {connection.bucket} at {connection.host} is not in region {connection.region}",
        hint=f"write the bucket's region in {connection.spec_field}.region",
    )


def _convert_response_error(error: Exception, connection: BucketConnection, operation: str, key: str) -> FineTuneError:
    response = getattr(error, "response", {})
    code = str(response.get("Error", {}).get("Code", ""))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    message = str(response.get("Error", {}).get("Message", ""))
    location = f"bucket {connection.bucket} at {connection.host}"
    named_error = _to_encryption_error(code, status, message, connection, location, operation) or _to_known_error(
        code, status, message, connection, location, operation, key
    )
    if named_error is not None:
        return named_error
    if status >= 500 or code in ("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException"):
        return StorageError("StorageFailed", f"{location} answered {operation} with {status} {code} after all retries")
    return StorageError("StorageFailed", f"{location} answered {operation} with {status} {code}")


def _to_encryption_error(
    error_code: str, http_status: int, server_message: str, connection: BucketConnection, location: str, operation: str
) -> FineTuneError | None:
    """Return the error for a response about encryption: a missing permission, a wrong key or an unsupported type.

    Return None if the response is not about encryption.
    """
    if http_status == 403 and (permission := _KMS_PERMISSION_PATTERN.search(server_message)):
        return CredentialsError(
            "PermissionDenied", f"{location} refuses {permission[0]}: the key service does not allow these credentials to use the key",
            hint=f"grant {permission[0]} on the key in {connection.spec_field}.encryption.kmsKeyId, or on the bucket's own key",
        )  # fmt: skip
    uses_http = (connection.endpoint or "https").startswith("http://")
    is_invalid_request = error_code in ("InvalidArgument", "InvalidRequest") or (error_code == "400" and not uses_http)
    if operation in ("HeadObject", "GetObject") and http_status == 400 and is_invalid_request:
        return StorageSetupError(
            "EncryptionRefused", f"{location} cannot return an object with the given encryption: the object is encrypted with a customer's "
            "key that was not given, with another customer's key, or without a customer's key",
            hint=f"correct {connection.spec_field}.encryption",
        )  # fmt: skip
    is_encryption_code = error_code.startswith("KMS.") or error_code in _ENCRYPTION_ERROR_CODES
    if not is_encryption_code and not (
        connection.encryption and (error_code in ("InvalidArgument", "InvalidRequest") or http_status == 501)
    ):
        return None
    requested_encryption = connection.encryption or "the bucket's own"
    return StorageSetupError(
        "EncryptionRefused", f"{location} does not support the requested encryption ({requested_encryption}): {error_code or http_status}",
        hint=f"correct {connection.spec_field}.encryption, or remove it and set the bucket's default encryption",
    )  # fmt: skip


_KMS_PERMISSION_PATTERN = re.compile(r"\bkms:[A-Za-z]+\b")
_ENCRYPTION_ERROR_CODES = (
    "InvalidEncryptionAlgorithmError", "InvalidEncryptionMethod", "ServerSideEncryptionConfigurationNotFoundError",
    "InvalidSSECustomerKey", "InvalidCustomerKey", "KmsKeyNotFound", "XMinioKMSNotConfigured",
)  # fmt: skip


VERSITY_UNKNOWN_ACCESS_KEY_CODE = "XAdminUserNotFound"
"""The Versity gateway answers an unknown access key with this error code and status 404, as if the object did not exist."""
REJECTED_CREDENTIALS_CODES = (
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidClientTokenId", "AuthFailure", "Unauthorized", VERSITY_UNKNOWN_ACCESS_KEY_CODE,
)  # fmt: skip


def _to_known_error(
    error_code: str, http_status: int, server_message: str, connection: BucketConnection, location: str, operation: str, key: str
) -> FineTuneError | None:
    spec_field = connection.spec_field
    if error_code == "NoSuchBucket":
        return StorageSetupError(
            "BucketNotFound", f"there is no {location}", hint=f"create it, or correct the bucket in {spec_field}.uri"
        )
    if error_code in REJECTED_CREDENTIALS_CODES:
        return CredentialsError(
            "CredentialsRejected", f"{location} does not accept the credentials ({error_code})",
            hint=f"correct the Secret named in {spec_field}.credentialsSecretRef",
        )  # fmt: skip
    if error_code in ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"):
        return CredentialsError(
            "CredentialsExpired", f"the credentials for {location} have expired",
            hint=f"renew the Secret named in {spec_field}.credentialsSecretRef, or use the pod's identity",
        )  # fmt: skip
    if error_code in ("RequestTimeTooSkewed",):
        return StorageSetupError(
            "ClockSkew", f"{location} refuses requests: the clock of this node differs too much from the clock of the store",
            hint="set the node's clock (NTP)",
        )  # fmt: skip
    if (
        error_code
        in (
            "PermanentRedirect",
            "AuthorizationHeaderMalformed",
            "IllegalLocationConstraintException",
            "301",
            "TemporaryRedirect",
        )
        or http_status == 301
    ):
        if http_status == 301 and connection.endpoint and "endpoint" in server_message.lower():
            return StorageSetupError(
                "AddressingWrong", f"{location} does not support {connection.addressing_style} addressing at this endpoint",
                hint=f"write {spec_field}.addressingStyle: {'path' if connection.addressing_style == 'virtual' else 'virtual'}, or the bucket's own endpoint",
            )  # fmt: skip
        return StorageSetupError(
            "RegionWrong",
            f"{location} is not in region {connection.region}",
            hint=f"write the bucket's region in {spec_field}.region",
        )
    if error_code in ("AccessDenied", "AllAccessDisabled", "403", "Forbidden", "AccountProblem") or http_status == 403:
        permission = PERMISSION_BY_OPERATION.get(operation, operation)
        return CredentialsError(
            "PermissionDenied",
            f"{location} refuses {permission}" + (f" on {key}" if key else ""),
            hint=f"grant {permission} on {connection.bucket}",
        )
    if error_code == "InvalidBucketName" or (error_code == "400" and "bucket" in server_message.lower()):
        return StorageSetupError(
            "AddressingWrong",
            f"{location}: the store expects the bucket's name in another part of the address",
            hint=f"try {spec_field}.addressingStyle: path",
        )
    if http_status == 400 and ("HTTPS" in server_message or "HTTP request" in server_message or error_code == "400"):
        return StorageSetupError(
            "TlsFailed",
            f"{connection.host} requires TLS, and the request did not use it",
            hint=f"write https:// in {spec_field}.endpoint",
        )
    return None


def get_status_and_code(error: Exception) -> tuple[int, str]:
    """Return the HTTP status and the S3 error code of a ClientError; (0, "") for other errors."""
    response = getattr(error, "response", None) or {}
    return (
        int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)),
        str(response.get("Error", {}).get("Code", "")),
    )
