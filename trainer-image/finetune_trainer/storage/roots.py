"""Opens the store that a `StoreTarget` describes."""

from __future__ import annotations

from pathlib import Path

from finetune_api.errors import ConfigError
from finetune_api.names import PVC_MOUNT
from finetune_api.pod import StoreTarget
from finetune_api.sources import redact_source

from finetune_trainer.storage.base import Store
from finetune_trainer.storage.folder import FolderStore
from finetune_trainer.storage.s3 import S3Store
from finetune_trainer.storage.web import WebStore


def open_store(target: StoreTarget, **connection_options: float) -> Store:
    """Open a store without sending a request. `connection_options`: keyword arguments for S3Store and WebStore.

    Errors: ConfigError `StorageUriInvalid` for an unsupported scheme.
    """
    scheme, _, path = target.uri.partition("://")
    match scheme:
        case "s3":
            return S3Store(target, **connection_options)  # type: ignore[arg-type] # max_tries is an int, timeouts are floats
        case "file":
            return FolderStore(Path(path), target.uri)
        case "pvc":
            return FolderStore(Path(PVC_MOUNT, *path.split("/")), target.uri)
        case "https":
            return WebStore(target, **connection_options)  # type: ignore[arg-type] # as above
    raise ConfigError(
        "StorageUriInvalid", f"{redact_source(target.uri)!r} is not the URI of a store",
        hint="write s3://bucket/prefix, pvc://claim/path or file:///path, or https://host/path to read only",
    )  # fmt: skip
