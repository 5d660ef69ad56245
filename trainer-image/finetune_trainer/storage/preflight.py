"""The first question to a store: can this job write, read and list there? Answered in seconds, before anything else starts.

Bucket, region, addressing, TLS, credentials, each permission and the clock are told apart (`storage.errors`); what the store
can do beyond plain objects is tried out and reported, never relied on.
"""

from __future__ import annotations

import contextlib
import uuid
from dataclasses import dataclass
from urllib.parse import urlsplit

from finetune_api.errors import ConfigError, CredentialsError, FineTuneError, StorageError, StorageSetupError
from finetune_api.pod import StoreTarget
from finetune_api.sources import redact_source

from finetune_trainer.storage.base import Created, Store, join
from finetune_trainer.storage.roots import open_store
from finetune_trainer.storage.s3 import S3Store

PROBES = ".probe"
IMPATIENT = {"attempts": 2, "connect_timeout": 2.0, "read_timeout": 3.0}
"""Options of a store that is asked whether it is there at all: the answer must come within 10 s."""


@dataclass(frozen=True)
class Abilities:
    """What a store can do, for `status.resolved.storage`."""

    kind: str
    conditional_writes: bool
    can_delete: bool = True

    def to_wire(self) -> dict[str, object]:
        """For the status."""
        return {"kind": self.kind, "conditionalWrites": self.conditional_writes, "canDelete": self.can_delete}


def preflight(target: StoreTarget, *, write: bool = True) -> Abilities:
    """Try everything that checkpoints need, with a small object of our own.

    Errors: StorageSetupError (67), CredentialsError (77, naming the permission), StorageError (69 EndpointUnreachable);
    ConfigError `StorageUriInvalid` (64) for a web server, which can only be read.
    """
    if target.uri.startswith("https://"):
        raise ConfigError(
            "StorageUriInvalid", f"storage.uri is {redact_source(target.uri)}: a web server can only be read, since it has neither a listing "
            "nor conditional creation",
            hint="write s3://bucket/prefix, pvc://claim/path or file:///path; checkpoint.resume, model.source and dataset.* may be https://",
        )  # fmt: skip
    store = open_store(target, **IMPATIENT)
    try:
        return _try_all(store, write)
    except StorageError as error:
        raise _sharper(error, store) from error
    finally:
        store.close()


def _try_all(store: Store, write: bool) -> Abilities:
    kind = "s3" if isinstance(store, S3Store) else "folder"
    if kind == "folder" and not write:
        return Abilities(kind, True)
    next(iter(store.list(PROBES + "/")), None)
    if not write:
        return Abilities(kind, False)
    key = join(PROBES, uuid.uuid4().hex)
    store.create(key, b"first")  # that it exists already means that the first answer was lost
    if store.get(key) != b"first":
        raise StorageError("StorageInconsistent", f"{store.uri}: an object just written cannot be read back")
    second = store.create(key, b"second")
    back = store.get(key)
    can_delete = True
    try:
        store.delete([key])
    except CredentialsError:
        can_delete = False
    conditional = not isinstance(store, S3Store) or store.conditional
    return Abilities(kind, conditional and second is Created.EXISTS and back == b"first", can_delete)


def _sharper(error: StorageError, store: Store) -> FineTuneError:
    """What is behind it: addressing, if only the bucket's own name does not answer; encryption, if plain objects can be written."""
    if error.code == "StorageFailed" and isinstance(store, S3Store) and _encryption_fails(store):
        return StorageSetupError(
            "EncryptionRefused", f"bucket {store.bucket} at {store.place.host} takes objects, and none with the encryption that is "
            f"asked for ({store.place.encryption})",
            hint=f"correct {store.place.field}.encryption, or leave it out and set the bucket's default",
        )  # fmt: skip
    if error.code != "EndpointUnreachable" or not isinstance(store, S3Store):
        return error
    place = store.place
    if place.addressing != "virtual" or not place.endpoint:
        return error
    parts = urlsplit(place.endpoint)
    if not _listens(parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)):
        return error
    return StorageSetupError(
        "AddressingWrong", f"{place.endpoint} answers, but {place.bucket}.{parts.hostname} does not",
        hint=f"write {place.field}.addressingStyle: path",
    )  # fmt: skip


def _encryption_fails(store: S3Store) -> bool:
    """Whether the same store takes an object that is not to be encrypted: many answer 500 where they hold no keys."""
    if store.target.encryption is None:
        return False
    plain = S3Store(store.target.model_copy(update={"encryption": None}), attempts=2, connect_timeout=2, read_timeout=3)
    key = join(PROBES, uuid.uuid4().hex)
    try:
        plain.put(key, b"")
        with contextlib.suppress(CredentialsError):  # no right to delete is another matter
            plain.delete([key])
    except FineTuneError:
        return False
    finally:
        plain.close()
    return True


def _listens(host: str, port: int) -> bool:
    import socket

    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=2):
        return True
    return False
