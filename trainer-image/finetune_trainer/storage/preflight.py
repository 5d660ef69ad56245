"""Checks within seconds, before any download, that the job can write, read and list objects in its store.

Each cause has its own error: a wrong bucket, region, addressing style, TLS setting, credential, permission or clock (`storage.errors`).
Conditional writes and deletion are tested and reported, but the store need not support them.
"""

from __future__ import annotations

import contextlib
import uuid
from dataclasses import dataclass
from urllib.parse import urlsplit

from finetune_api.errors import ConfigError, CredentialsError, FineTuneError, StorageError, StorageSetupError
from finetune_api.pod import StoreTarget
from finetune_api.sources import redact_source

from finetune_trainer.storage.base import CreateResult, Store, join_key
from finetune_trainer.storage.roots import open_store
from finetune_trainer.storage.s3 import S3Store

PROBE_FOLDER = ".probe"
PREFLIGHT_OPTIONS = {"max_tries": 2, "connect_timeout": 2.0, "read_timeout": 3.0}
"""Options of S3Store with which a request succeeds or fails within about 10 s."""


@dataclass(frozen=True)
class StoreAbilities:
    """Features that a store supports, as shown in `status.resolved.storage`."""

    store_kind: str
    """`s3` or `folder`."""
    has_conditional_writes: bool
    can_delete: bool = True

    def to_wire(self) -> dict[str, object]:
        """Return the value of `status.resolved.storage`."""
        return {"kind": self.store_kind, "conditionalWrites": self.has_conditional_writes, "canDelete": self.can_delete}


def preflight(target: StoreTarget, *, needs_write: bool = True) -> StoreAbilities:
    """Try every type of request that checkpoints need, with a small object. If `needs_write` is False, only list objects.

    Errors and exit codes: StorageSetupError (67); CredentialsError (77), whose message names the permission; StorageError
    `EndpointUnreachable` (69); ConfigError `StorageUriInvalid` (64) for a web server, because it is read-only.
    """
    if target.uri.startswith("https://"):
        raise ConfigError(
            "StorageUriInvalid", f"storage.uri is {redact_source(target.uri)}, but a web server is read-only: it has no listing and no "
            "conditional creation",
            hint="write s3://bucket/prefix, pvc://claim/path or file:///path; checkpoint.resume, model.source and dataset.* may be https://",
        )  # fmt: skip
    store = open_store(target, **PREFLIGHT_OPTIONS)
    try:
        return _try_all_requests(store, needs_write)
    except StorageError as error:
        raise _find_cause(error, store) from error
    finally:
        store.close()


def _try_all_requests(store: Store, needs_write: bool) -> StoreAbilities:
    kind = "s3" if isinstance(store, S3Store) else "folder"
    if kind == "folder" and not needs_write:
        return StoreAbilities(kind, True)
    next(iter(store.list(PROBE_FOLDER + "/")), None)
    if not needs_write:
        return StoreAbilities(kind, False)
    key = join_key(PROBE_FOLDER, uuid.uuid4().hex)
    store.create(key, b"first")  # The result EXISTS means that an earlier try succeeded, but its response was lost.
    if store.get(key) != b"first":
        raise StorageError("StorageInconsistent", f"{store.uri}: an object that was just written cannot be read")
    second_creation = store.create(key, b"second")
    stored_data = store.get(key)
    is_encrypted = not isinstance(store, S3Store) or store.has_requested_encryption(key)
    can_delete = True
    try:
        store.delete([key])
    except CredentialsError:
        can_delete = False
    if not is_encrypted:
        raise _build_ignored_encryption_error(store)
    is_conditional = not isinstance(store, S3Store) or store.supports_conditional_writes
    return StoreAbilities(kind, is_conditional and second_creation is CreateResult.EXISTS and stored_data == b"first", can_delete)


def _build_ignored_encryption_error(store: Store) -> StorageSetupError:
    assert isinstance(store, S3Store) and store.target.encryption is not None
    spec_field = store.connection.spec_field
    return StorageSetupError(
        "EncryptionRefused", f"bucket {store.bucket} at {store.connection.host} accepts the requested encryption ({store.connection.encryption}), but "
        "stores objects without it",
        hint=f"remove {spec_field}.encryption and set the bucket's default encryption or encrypt the store's disks; or use a store that supports it",
    )  # fmt: skip


def _find_cause(error: StorageError, store: Store) -> FineTuneError:
    """Return an error that names the cause of `error`, or `error` itself if the cause is unknown.

    The code of the result is AddressingWrong if the endpoint accepts connections, but the host name that contains the bucket does not. The code is
    EncryptionRefused if the store accepts objects only without the requested encryption.
    """
    if error.code == "StorageFailed" and isinstance(store, S3Store) and _only_encryption_fails(store):
        return StorageSetupError(
            "EncryptionRefused", f"bucket {store.bucket} at {store.connection.host} accepts objects, but not with the requested "
            f"encryption ({store.connection.encryption})",
            hint=f"correct {store.connection.spec_field}.encryption, or remove it and set the bucket's default encryption",
        )  # fmt: skip
    if error.code != "EndpointUnreachable" or not isinstance(store, S3Store):
        return error
    connection = store.connection
    if connection.addressing_style != "virtual" or not connection.endpoint:
        return error
    endpoint_parts = urlsplit(connection.endpoint)
    if not _accepts_connections(endpoint_parts.hostname or "", endpoint_parts.port or (443 if endpoint_parts.scheme == "https" else 80)):
        return error
    return StorageSetupError(
        "AddressingWrong", f"{connection.endpoint} responds, but {connection.bucket}.{endpoint_parts.hostname} does not",
        hint=f"write {connection.spec_field}.addressingStyle: path",
    )  # fmt: skip


def _only_encryption_fails(store: S3Store) -> bool:
    """Whether encryption was requested and the store accepts an object without encryption.

    Many stores that have no encryption keys answer requests for encryption with status 500.
    """
    if store.target.encryption is None:
        return False
    unencrypted_store = S3Store(store.target.model_copy(update={"encryption": None}), max_tries=2, connect_timeout=2, read_timeout=3)
    key = join_key(PROBE_FOLDER, uuid.uuid4().hex)
    try:
        unencrypted_store.put(key, b"")
        with contextlib.suppress(CredentialsError):  # The preflight check itself reports that the permission to delete is missing.
            unencrypted_store.delete([key])
    except FineTuneError:
        return False
    finally:
        unencrypted_store.close()
    return True


def _accepts_connections(host: str, port: int) -> bool:
    import socket

    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=2):
        return True
    return False
