"""`model-cache.json`: the record that the init container with the cache writes for the trainer container of the same pod."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from finetune_api.base import LenientModel
from pydantic import Field, ValidationError

FILE_NAME = "model-cache.json"


def lock_shared(file: Path) -> int | None:
    """Take a shared lock on a file, and return its descriptor. None: the file is gone, or is being removed."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), file.stat()):
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None


class CachedModel(LenientModel):
    """A verified model on this pod's disk, or in the cache, which the trainer container can only read."""

    source: str = Field(description="Text of the field of the spec.")
    path: Path = Field(description="Folder of the model.")
    from_cache: bool = Field(description="Whether the cache had the model. False: this pod has downloaded it into the cache.")
    size: int = Field(description="Bytes of all files.")
    hub_revision: str | None = Field(default=None, description="Commit of a hub repository.")
    listing_version: str | None = Field(default=None, description="Version of the files of an S3 source.")
    sha256: dict[str, str] = Field(default_factory=dict, description="sha256 (hex) of the files, if known, by name.")
    in_use_file: Path | None = Field(default=None, description="File whose shared lock keeps the model in the cache. None for a copy.")

    def hold(self) -> bool:
        """Keep the model in the cache until this process ends. Returns False if the model was removed in the meantime.

        The descriptor stays open on purpose: the kernel releases the lock when the process ends, also if it is killed.
        """
        if self.in_use_file is None:
            return self.path.is_dir()
        return lock_shared(self.in_use_file) is not None


class CacheRecord(LenientModel):
    """What the init container did."""

    models: dict[str, CachedModel] = Field(default_factory=dict, description="The models, by path of the spec field.")
    notes: list[str] = Field(default_factory=list, description="Sentences for `status.resolved.notes`: why the cache was not used.")

    def write(self, work: Path) -> None:
        """Write the record into the work folder atomically. Errors: OSError."""
        partial = work / f".{FILE_NAME}"
        partial.write_text(self.model_dump_json(by_alias=True))
        partial.rename(work / FILE_NAME)

    @staticmethod
    def read(work: Path) -> CacheRecord | None:
        """Return the record. None: the pod has no cache, or its init container was killed before it wrote the record."""
        try:
            return CacheRecord.model_validate_json((work / FILE_NAME).read_bytes())
        except (OSError, ValidationError):
            return None
