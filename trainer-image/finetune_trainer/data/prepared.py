"""Prepared rows of a run: a folder with the shards of each split, and a manifest that lists and describes them.

The manifest contains the size and the sha256 of each shard, the number of rows and tokens of each split, a histogram of the row lengths, and a
digest of all inputs of the preparation. Equal rows always give equal bytes. So the files can be stored under a name with the digest, and compared by
their hashes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api.base import LenientModel
from finetune_api.errors import StorageError
from pydantic import Field, ValidationError

from finetune_trainer.data.shards import ShardWriter, SplitManifest
from finetune_trainer.file_entry import FileEntry, sha256_file

if TYPE_CHECKING:
    import pyarrow

LAYOUT_VERSION = 2
"""Version of the layout of a prepared folder. A folder with another version is not read."""
TOKENS_FOLDER = "tokens"
"""Name of the folder for prepared rows, in the work folder of a pod."""
MANIFEST_FILE = "prepared.json"
"""File name of the manifest. The name differs from that of a commit's manifest, because storage keeps both manifests in one folder."""


class PreparedManifest(LenientModel):
    """The manifest of a prepared folder: the content of `prepared.json`."""

    version: int = LAYOUT_VERSION
    inputs_digest: str = Field(description="Hash of everything that determines the rows: data, options, tokenizer, template and code version.")
    splits: dict[str, SplitManifest] = Field(description="The splits by name: train, validation, test.")
    summary: dict[str, Any] = Field(default_factory=dict, description="Counts and notes from the objective that prepared the rows.")

    def to_bytes(self) -> bytes:
        """Return the content of `prepared.json`."""
        return self.model_dump_json(by_alias=True, indent=1).encode()

    @property
    def files(self) -> list[FileEntry]:
        """The shards of all splits."""
        return [file for split in self.splits.values() for file in split.files]


@dataclass(frozen=True)
class PreparedFolder:
    """A folder with prepared rows and its manifest."""

    folder: Path
    manifest: PreparedManifest

    def shard_paths(self, split: str) -> list[Path]:
        """Return the shard files of a split in row order, or an empty list if the folder has no such split."""
        return [self.folder / file.path for file in self.manifest.splits[split].files] if split in self.manifest.splits else []

    @property
    def rows(self) -> int:
        """The number of stored rows in all splits together."""
        return sum(split.rows for split in self.manifest.splits.values())

    def verify(self) -> None:
        """Read all shards and compare their sha256 with the manifest. Errors: StorageError PreparedDataDamaged."""
        for file in self.manifest.files:
            if sha256_file(self.folder / file.path) != file.sha256:
                raise _damaged_error(self.folder, f"{file.path} does not have the sha256 of the manifest")


def write_prepared(
    folder: Path, splits: Mapping[str, Iterable[pyarrow.RecordBatch]], *, inputs_digest: str, summary: Mapping[str, Any]
) -> PreparedFolder:
    """Write the rows of each split and the manifest. A reader sees either the complete folder or no folder.

    `splits`: the batches of rows of each split, by split name. Each split has at least one batch. The iterables are read once, one after the other.
    """
    temporary_folder = partial_folder(folder)
    manifest_by_split: dict[str, SplitManifest] = {}
    for name, batches in splits.items():
        with ShardWriter(temporary_folder, name) as writer:
            for batch in batches:
                writer.add(batch)
        manifest_by_split[name] = writer.manifest()
    manifest = PreparedManifest(inputs_digest=inputs_digest, splits=manifest_by_split, summary=dict(summary))
    (temporary_folder / MANIFEST_FILE).write_bytes(manifest.to_bytes())
    shutil.rmtree(folder, ignore_errors=True)
    temporary_folder.rename(folder)
    return PreparedFolder(folder, manifest)


def open_prepared(folder: Path, inputs_digest: str | None = None) -> PreparedFolder:
    """Open a prepared folder, and check that all shards exist and have the right size. `PreparedFolder.verify` also checks their content.

    `inputs_digest`: the digest that the manifest must contain; None accepts any digest.
    Errors: StorageError PreparedDataMissing, PreparedDataDamaged, PreparedDataDiffers.
    """
    try:
        manifest = PreparedManifest.model_validate_json((folder / MANIFEST_FILE).read_bytes())
    except OSError:
        raise StorageError(
            "PreparedDataMissing", f"{folder.name} has no {MANIFEST_FILE}, so it holds no prepared rows", hint="prepare the data again"
        ) from None
    except ValidationError:
        raise _damaged_error(folder, f"{MANIFEST_FILE} is not readable") from None
    if manifest.version != LAYOUT_VERSION or inputs_digest not in (None, manifest.inputs_digest):
        raise StorageError(
            "PreparedDataDiffers", f"the rows in {folder.name} were prepared from other inputs or by another version", hint="prepare the data again"
        )
    for file in manifest.files:
        shard_file = folder / file.path
        if not shard_file.resolve().is_relative_to(folder.resolve()) or not shard_file.is_file() or shard_file.stat().st_size != file.size:
            raise _damaged_error(folder, f"{file.path} is missing or has another size")
    return PreparedFolder(folder, manifest)


def prepared_folder(cache_folder: Path, digest: str) -> Path:
    """Return the folder for the rows whose inputs have this digest."""
    return cache_folder / digest[:24]


def partial_folder(folder: Path) -> Path:
    """Return the temporary folder in which `write_prepared` builds `folder`. The temporary folder is renamed to `folder` when it is complete."""
    return folder.with_name(folder.name + ".part")


def _damaged_error(folder: Path, problem: str) -> StorageError:
    return StorageError("PreparedDataDamaged", f"the prepared rows in {folder.name} are damaged: {problem}", hint="prepare the data again")
