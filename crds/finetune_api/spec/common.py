"""Types shared by several groups of the spec: references, sources, storage connections."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field, StringConstraints

from finetune_api.base import CelRule, Group, spec_field
from finetune_api.patterns import DATA_KEY, NO_SPACE, OBJECT_NAME, STORE_URL
from finetune_api.spec.enums import AddressingStyle, EncryptionType

ObjectName = Annotated[
    str, StringConstraints(pattern=OBJECT_NAME, min_length=1, max_length=253)
]
Key = Annotated[str, StringConstraints(pattern=DATA_KEY, min_length=1, max_length=253)]
Source = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
Text = Annotated[str, StringConstraints(max_length=16384)]
Line = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
ShortText = Annotated[str, StringConstraints(min_length=1, max_length=253)]
ColumnName = Annotated[str, StringConstraints(min_length=1, max_length=128)]
StringMap = Annotated[dict[ShortText, Annotated[str, StringConstraints(max_length=4096)]], Field(max_length=64)]


def make_one_of_validator(*allowed_values: int) -> AfterValidator:
    """Return a validator that accepts only these integers. The `enum` in the field's schema must list the same integers."""

    def check_value(value: int) -> int:
        if value not in allowed_values:
            raise ValueError(f"should be {' or '.join(map(str, allowed_values))}")
        return value

    return AfterValidator(check_value)


class SecretKeyRef(Group):
    """One key of a Secret in the job's namespace."""

    name: ObjectName = Field(description="Name of the Secret in the job's namespace. Required. Example: `hub-token`.")
    key: Key = Field(description="Key in the Secret. Required. Example: `token`.")


class SecretRef(Group):
    """A Secret in the job's namespace."""

    name: ObjectName = Field(
        description="Name of the Secret in the job's namespace. Required. Example: `s3-credentials`."
    )


class ConfigMapKeyRef(Group):
    """One key of a ConfigMap in the job's namespace."""

    name: ObjectName = Field(
        description="Name of the ConfigMap in the job's namespace. Required. Example: `my-config`."
    )
    key: Key = Field(description="Key in the ConfigMap. Required. Example: `data.jsonl`.")


class Encryption(Group):
    """Server-side encryption of objects in an S3 store."""

    cel = (
        CelRule(
            "!has(self.kmsKeyId) || self.type == 'kms'",
            "kmsKeyId requires type kms: write `type: kms`, or remove kmsKeyId",
            "EncryptionContradiction",
        ),
        CelRule(
            "has(self.customerKeySecretRef) == (self.type == 'customerKey')",
            "type customerKey and customerKeySecretRef require each other: write both, or remove both",
            "EncryptionContradiction",
        ),
    )

    type: EncryptionType = Field(description="Kind of encryption, named after the owner of the key. Required. Example: `kms`.")
    kms_key_id: Annotated[str, StringConstraints(pattern=NO_SPACE, max_length=2048)] | None = spec_field(
        "ID, ARN or alias of a key in the key management service. Only with type kms. Default: the account's default key.",
        example="arn:aws:kms:eu-central-1:111122223333:key/1234abcd",
    )
    customer_key_secret_ref: SecretKeyRef | None = spec_field(
        "Key of a Secret that contains 32 random bytes in base64 (`openssl rand -base64 32`). Allowed only with type customerKey. Default: none.",
        example={"name": "s3-customer-key", "key": "key"},
    )


class StorageConnection(Group):
    """Connection to an S3 store, for `storage`, `model.storage` and `dataset.storage`."""

    cel: ClassVar[tuple[CelRule, ...]] = (
        CelRule(
            "!has(self.encryption) || self.encryption.type != 'customerKey' || !has(self.endpoint) || self.endpoint.startsWith('https://')",
            "every request contains the customer's key: write https:// in endpoint, or another encryption.type",
            "EncryptionContradiction",
        ),
    )

    endpoint: Annotated[str, StringConstraints(pattern=STORE_URL, max_length=512)] | None = spec_field(
        "URL of an S3-compatible store: scheme and host, without user, password or path.",
        default_text="the endpoint in the operator's configuration, otherwise AWS",
        example="https://s3.example.com",
    )
    region: ShortText | None = spec_field(
        "Region of the store, which is part of each request's signature.",
        default_text="the region in the operator's configuration, otherwise us-east-1",
        example="eu-central-1",
    )
    addressing_style: AddressingStyle | None = spec_field(
        "Where the bucket's name is in URLs: in the path or in the host name.",
        default_text="path if endpoint is set, otherwise virtual",
        example="path",
    )
    credentials_secret_ref: SecretRef | None = spec_field(
        "Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and optionally AWS_SESSION_TOKEN.",
        default_text="the Secret in the operator's configuration, otherwise the pod's own identity",
        example={"name": "s3-credentials"},
    )
    ca_bundle_ref: ConfigMapKeyRef | None = spec_field(
        "Key of a ConfigMap that contains the trusted CA certificates (PEM) of the endpoint. `https://` sources also trust the CA certificates of "
        "the image.",
        default_text="the CA certificates of the image",
        example={"name": "ca", "key": "ca.crt"},
    )
    encryption: Encryption | None = spec_field(
        "Server-side encryption of every object that the job writes.",
        default_text="the setting of the bucket",
        example={"type": "s3"},
    )
