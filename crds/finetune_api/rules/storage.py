"""Rules for `spec.storage`, `spec.model.storage` and `spec.dataset.storage`."""

from __future__ import annotations

from finetune_api.rules.base import ExecutionTarget, Findings, rule
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.common import StorageConnection
from finetune_api.spec.enums import EncryptionType


@rule("StorageUriInvalid")
def check_storage_uri(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    uri = spec.storage.uri or ""
    if ".." in uri.split("/"):
        yield "storage.uri", f"{uri} contains `..` and may therefore point outside of the volume or bucket", "write the path without `..`"


@rule("EncryptionContradiction")
def check_encryption(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    connection_by_path = {
        "storage": spec.storage,
        "model.storage": spec.model.storage,
        "dataset.storage": spec.dataset.storage,
    }
    for path, connection in connection_by_path.items():
        if connection is not None:
            yield from _check_connection_encryption(connection, path)
    if spec.storage.encryption is not None and (spec.storage.uri or "s3://").partition("://")[0] != "s3":
        yield (
            "storage.encryption",
            f"encryption needs an S3 store, but storage.uri is {spec.storage.uri}",
            "remove encryption, or write s3:// in storage.uri",
        )


def _check_connection_encryption(connection: StorageConnection, path: str) -> Findings:
    encryption = connection.encryption
    if encryption is None:
        return
    if encryption.kms_key_id is not None and encryption.type is not EncryptionType.KMS:
        yield (
            f"{path}.encryption.kmsKeyId",
            f"kmsKeyId requires `type: kms`, but type is {encryption.type}",
            "write `type: kms`, or remove kmsKeyId",
        )
    if (encryption.customer_key_secret_ref is not None) != (encryption.type is EncryptionType.CUSTOMER_KEY):
        yield (
            f"{path}.encryption.customerKeySecretRef",
            f"type is {encryption.type}, but customerKeySecretRef is {'set' if encryption.customer_key_secret_ref else 'missing'}",
            "write `{type: customerKey, customerKeySecretRef: {name: s3-customer-key, key: key}}`, or write another type and remove customerKeySecretRef",
        )
    if encryption.type is EncryptionType.CUSTOMER_KEY and (connection.endpoint or "").startswith("http://"):
        yield (
            f"{path}.endpoint",
            f"{connection.endpoint} is an unencrypted connection, but every request contains the customer's key",
            "write an https:// endpoint, or another encryption.type",
        )
