"""The entry of a file in the manifest of a checkpoint, of the final model, or of prepared rows."""

from __future__ import annotations

import hashlib
from pathlib import Path

from finetune_api.base import LenientModel
from pydantic import Field


class FileEntry(LenientModel):
    """One file in a manifest."""

    path: str = Field(description="Path of the file, relative to the folder of the manifest.")
    size: int = Field(description="Size of the file in bytes.")
    sha256: str = Field(description="SHA-256 of the file's contents, in hex.")


def sha256_file(path: Path) -> str:
    """Return the sha256 (hex) of a file's bytes. Errors: OSError."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
