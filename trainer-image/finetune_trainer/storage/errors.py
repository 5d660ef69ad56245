"""What botocore says, told apart by whose fault it is and what to do about it.

One table of S3's error codes and one of botocore's exceptions. The operation names the missing permission; the connection
names what to look at. No message carries a credential: S3's own messages are never copied, since some repeat what was signed.
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

PERMISSION = {
    "PutObject": "s3:PutObject", "CreateMultipartUpload": "s3:PutObject", "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject", "GetObject": "s3:GetObject", "HeadObject": "s3:GetObject",
    "ListObjectsV2": "s3:ListBucket", "ListObjects": "s3:ListBucket", "HeadBucket": "s3:ListBucket",
    "DeleteObject": "s3:DeleteObject", "DeleteObjects": "s3:DeleteObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload", "ListMultipartUploads": "s3:ListBucketMultipartUploads",
}  # fmt: skip
"""Permission that an operation needs."""


@dataclass(frozen=True)
class Place:
    """The connection, as far as a message may show it."""

    bucket: str
    endpoint: str | None
    region: str
    addressing: str
    prefix: str = ""
    """Prefix of the credentials' variables: which of the three connections it is."""
    encryption: str | None = None
    """What is asked for with every object."""

    @property
    def host(self) -> str:
        return self.endpoint or f"AWS S3 in {self.region}"

    @property
    def field(self) -> str:
        """The spec group that configures it."""
        return {"": "storage", "MODEL_": "model.storage", "DATASET_": "dataset.storage"}.get(self.prefix, "storage")


def explain(error: Exception, place: Place, *, operation: str = "", key: str = "") -> FineTuneError:
    """The named failure for an exception of botocore, boto3 or s3transfer."""
    from botocore import exceptions as boto

    if isinstance(error, FineTuneError):
        return error
    if isinstance(error, boto.ClientError):
        return _answered(error, place, operation or error.operation_name, key)
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError):
        return CredentialsError(
            "CredentialsMissing", f"there are no S3 credentials for bucket {place.bucket} at {place.host}",
            hint=f"name a Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in {place.field}.credentialsSecretRef, "
            "or give the pod's ServiceAccount an identity",
        )  # fmt: skip
    if isinstance(error, boto.SSLError):
        return _tls(error, place)
    if isinstance(error, OSError) and error.errno in LOCAL:
        return of_local_disk(error)
    if isinstance(error, boto.HTTPClientError | boto.ConnectionError | boto.IncompleteReadError | OSError):
        return unreachable(place, str(error))
    if isinstance(error, RecursionError):  # botocore follows a redirect to another region without end
        return _region(place)
    if isinstance(error, boto.ParamValidationError | ValueError):
        return StorageSetupError(
            "EndpointInvalid",
            f"{place.field}.endpoint {place.endpoint} cannot be used: {error}",
            hint="write https://host",
        )
    causes = [error.__cause__, error.__context__, *(arg for arg in error.args if isinstance(arg, Exception))]
    for cause in causes:
        if isinstance(cause, boto.BotoCoreError | boto.ClientError):
            return explain(cause, place, operation=operation, key=key)
    return StorageError(
        "StorageFailed", f"{operation or 'a request'} to {place.host} failed: {type(error).__name__}: {error}"
    )


LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""Errors of files, which no connection has."""


def of_local_disk(error: OSError) -> StorageError:
    """What went wrong with a file of this pod while bytes came or went: the store has no part in it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return local_disk_full()
    return StorageError("LocalDiskFailed", f"the pod's local disk failed: {error.strerror or error}")


def unreachable(place: Place, why: str = "") -> StorageError:
    """69: nobody answers."""
    short = "it refused the connection" if "refused" in why.lower() else "nobody answered"
    if "resolve" in why.lower() or "Name or service" in why or "Could not connect" in why:
        short = "its name cannot be resolved or nobody listens there"
    return StorageError(
        "EndpointUnreachable", f"S3 at {place.host} could not be reached: {short}",
        hint=f"check {place.field}.endpoint, the network policy and that the store is up",
    )  # fmt: skip


def _tls(error: Exception, place: Place) -> StorageSetupError:
    text = str(error)
    if "WRONG_VERSION_NUMBER" in text or "record layer" in text.lower():
        why, hint = (
            "it does not speak TLS on this port",
            f"write http:// in {place.field}.endpoint, or the port that speaks TLS",
        )
    elif "CERTIFICATE_VERIFY_FAILED" in text:
        why = "its certificate is not signed by anybody this pod trusts, or is for another name"
        hint = f"name the signer's certificate in {place.field}.caBundleRef"
    elif "No such file" in text or "Invalid path" in text or "invalid path" in text:
        why, hint = "the CA bundle cannot be read", f"check {place.field}.caBundleRef"
    else:
        why, hint = "the TLS handshake failed", f"check {place.field}.endpoint and {place.field}.caBundleRef"
    return StorageSetupError("TlsFailed", f"{place.host}: {why}", hint=hint)


def _region(place: Place) -> StorageSetupError:
    return StorageSetupError(
        "RegionWrong",
        f"bucket {place.bucket} at {place.host} is not in region {place.region}",
        hint=f"write the bucket's region in {place.field}.region",
    )


def _answered(error: Exception, place: Place, operation: str, key: str) -> FineTuneError:
    response = getattr(error, "response", {})
    code = str(response.get("Error", {}).get("Code", ""))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    said = str(response.get("Error", {}).get("Message", ""))
    where = f"bucket {place.bucket} at {place.host}"
    named = _of_encryption(code, status, said, place, where, operation) or _named(
        code, status, said, place, where, operation, key
    )
    if named is not None:
        return named
    if status >= 500 or code in ("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException"):
        return StorageError("StorageFailed", f"{where} answered {operation} with {status} {code} after all retries")
    return StorageError("StorageFailed", f"{where} answered {operation} with {status} {code}")


def _of_encryption(code: str, status: int, said: str, place: Place, where: str, operation: str) -> FineTuneError | None:
    """What a store says about keys: the right on the key service by name, a key that is not there, no such thing here."""
    if status == 403 and (right := _KMS_RIGHT.search(said)):
        return CredentialsError(
            "PermissionDenied", f"{where} refuses {right[0]}: the key service does not let these credentials use the key",
            hint=f"grant {right[0]} on the key in {place.field}.encryption.kmsKeyId, or on the bucket's own key",
        )  # fmt: skip
    plain = (place.endpoint or "https").startswith("http://")
    unreadable = code in ("InvalidArgument", "InvalidRequest") or (code == "400" and not plain)
    if operation in ("HeadObject", "GetObject") and status == 400 and unreadable:
        return StorageSetupError(
            "EncryptionRefused", f"{where} does not show an object as it is asked for: it is encrypted with a customer's key "
            "and none was given, with another key, or not with a customer's key at all",
            hint=f"correct {place.field}.encryption",
        )  # fmt: skip
    about_keys = code.startswith("KMS.") or code in _ENCRYPTION_CODES
    if not about_keys and not (place.encryption and (code in ("InvalidArgument", "InvalidRequest") or status == 501)):
        return None
    asked = place.encryption or "the bucket's own"
    return StorageSetupError(
        "EncryptionRefused", f"{where} does not do the encryption that is asked for ({asked}): {code or status}",
        hint=f"correct {place.field}.encryption, or leave it out and set the bucket's default",
    )  # fmt: skip


_KMS_RIGHT = re.compile(r"\bkms:[A-Za-z]+\b")
_ENCRYPTION_CODES = (
    "InvalidEncryptionAlgorithmError", "InvalidEncryptionMethod", "ServerSideEncryptionConfigurationNotFoundError",
    "InvalidSSECustomerKey", "InvalidCustomerKey", "KmsKeyNotFound", "XMinioKMSNotConfigured",
)  # fmt: skip


def _named(
    code: str, status: int, said: str, place: Place, where: str, operation: str, key: str
) -> FineTuneError | None:
    group = place.field
    if code == "NoSuchBucket":
        return StorageSetupError(
            "BucketNotFound", f"there is no {where}", hint=f"create it, or correct the bucket in {group}.uri"
        )
    if code in (
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "InvalidToken",
        "InvalidClientTokenId",
        "AuthFailure",
        "Unauthorized",
    ):
        return CredentialsError(
            "CredentialsRejected", f"{where} does not accept the credentials ({code})",
            hint=f"correct the Secret named in {group}.credentialsSecretRef",
        )  # fmt: skip
    if code in ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"):
        return CredentialsError(
            "CredentialsExpired", f"the credentials for {where} have expired",
            hint=f"renew the Secret named in {group}.credentialsSecretRef, or use the pod's identity",
        )  # fmt: skip
    if code in ("RequestTimeTooSkewed",):
        return StorageSetupError(
            "ClockSkew", f"{where} refuses requests: this node's clock differs from the store's by too much",
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
        if status == 301 and place.endpoint and "endpoint" in said.lower():
            return StorageSetupError(
                "AddressingWrong", f"{where} must be addressed differently than {place.addressing}",
                hint=f"write {group}.addressingStyle: {'path' if place.addressing == 'virtual' else 'virtual'}, or the bucket's own endpoint",
            )  # fmt: skip
        return StorageSetupError(
            "RegionWrong",
            f"{where} is not in region {place.region}",
            hint=f"write the bucket's region in {group}.region",
        )
    if code in ("AccessDenied", "AllAccessDisabled", "403", "Forbidden", "AccountProblem") or status == 403:
        right = PERMISSION.get(operation, operation)
        return CredentialsError(
            "PermissionDenied",
            f"{where} refuses {right}" + (f" on {key}" if key else ""),
            hint=f"grant {right} on {place.bucket}",
        )
    if code == "InvalidBucketName" or (code == "400" and "bucket" in said.lower()):
        return StorageSetupError(
            "AddressingWrong",
            f"{where}: the store takes another word for the bucket's name",
            hint=f"try {group}.addressingStyle: path",
        )
    if status == 400 and ("HTTPS" in said or "HTTP request" in said or code == "400"):
        return StorageSetupError(
            "TlsFailed",
            f"{place.host} wants TLS, and was spoken to without",
            hint=f"write https:// in {group}.endpoint",
        )
    return None


def status_of(error: Exception) -> tuple[int, str]:
    """HTTP status and S3 error code of a ClientError, else (0, "")."""
    response = getattr(error, "response", None) or {}
    return (
        int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)),
        str(response.get("Error", {}).get("Code", "")),
    )
