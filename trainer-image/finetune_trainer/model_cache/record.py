"""`model-cache.json`: the record that the model-cache init container writes for the trainer container of the same pod."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from finetune_api.base import LenientModel
from pydantic import Field, ValidationError

from finetune_trainer.files import replace_file

FILE_NAME = "model-cache.json"


def lock_shared(file: Path) -> int | None:
    """Take a shared lock on a file, and return the file's descriptor. Return None if the file was removed or is being removed."""
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
    """A verified model: either a copy on this pod's disk, or the folder in the cache, to which the trainer container has read-only access."""

    source: str = Field(description="Source of the model, as the spec names it.")
    path: Path = Field(description="Folder of the model.")
    from_cache: bool = Field(description="Whether the cache already had the model. If False, this pod has downloaded the model into the cache.")
    size: int = Field(description="Total size of all files in bytes.")
    hub_revision: str | None = Field(default=None, description="Commit of a hub repository.")
    listing_version: str | None = Field(default=None, description="Version of the files of an S3 source.")
    sha256: dict[str, str] = Field(default_factory=dict, description="sha256 (hex) of each file whose sha256 is known, by file name.")
    in_use_file: Path | None = Field(default=None, description="File whose shared lock keeps the model in the cache. None for a copy.")

    def hold(self) -> bool:
        """Lock the model, so that it stays in the cache until this process ends. Returns False if the model was already removed.

        The locked file is never closed: the kernel releases the lock when the process ends or is killed.
        """
        if self.in_use_file is None:
            return self.path.is_dir()
        return lock_shared(self.in_use_file) is not None


class CacheRecord(LenientModel):
    """What the model-cache init container did: the models that it provides, and why it could not use the cache."""

    models: dict[str, CachedModel] = Field(default_factory=dict, description="The models, by the path of the spec field that names the source.")
    notes: list[str] = Field(default_factory=list, description="Sentences for `status.resolved.notes` that say why the cache was not used.")

    def write(self, work_folder: Path) -> None:
        """Write the record into the work folder atomically. Errors: OSError."""
        with replace_file(work_folder / FILE_NAME) as partial_file:
            partial_file.write_text(self.model_dump_json(by_alias=True))

    @staticmethod
    def read(work_folder: Path) -> CacheRecord | None:
        """Return the record. None if the pod has no cache, or if the init container was killed before it wrote the record."""
        try:
            return CacheRecord.model_validate_json((work_folder / FILE_NAME).read_bytes())
        except (OSError, ValidationError):
            return None
