"""Storage connections."""

from __future__ import annotations

from finetune_api.rules.base import ExecutionTarget, Findings, rule
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import (
    EncryptionType,
)


@rule("EncryptionContradiction")
def encryption(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    """What the API server checks inside the group, and whether there is anything to encrypt."""
    connections = {
        "storage": spec.storage,
        "model.storage": spec.model.storage,
        "dataset.storage": spec.dataset.storage,
    }
    for path, connection in connections.items():
        asked = connection.encryption if connection else None
        if connection is None or asked is None:
            continue
        if asked.kms_key_id is not None and asked.type is not EncryptionType.KMS:
            yield (
                f"{path}.encryption.kmsKeyId",
                f"a key of the key service, but type is {asked.type}",
                "write `type: kms`, or remove kmsKeyId",
            )
        if (asked.customer_key_secret_ref is not None) != (asked.type is EncryptionType.CUSTOMER_KEY):
            yield (
                f"{path}.encryption.customerKeySecretRef",
                f"type is {asked.type}, and a Secret with the key is {'given' if asked.customer_key_secret_ref else 'missing'}",
                "write `{type: customerKey, customerKeySecretRef: {name: s3-customer-key, key: key}}`, or another type without it",
            )
        if asked.type is EncryptionType.CUSTOMER_KEY and (connection.endpoint or "").startswith("http://"):
            yield (
                f"{path}.endpoint",
                f"{connection.endpoint} is not encrypted, and a customer's key is sent with every request",
                "write https://, or another encryption.type",
            )
    if spec.storage.encryption is not None and (spec.storage.uri or "s3://").partition("://")[0] != "s3":
        yield (
            "storage.encryption",
            f"storage.uri is {spec.storage.uri}, and only an S3 store encrypts on request",
            "remove it, or write s3:// in storage.uri",
        )
