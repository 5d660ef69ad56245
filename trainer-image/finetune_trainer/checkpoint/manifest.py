"""The contents of `manifest.json` and of the marker `_COMMITTED`, for checkpoints and for the final model.

Only the files that the manifest lists belong to a checkpoint. A folder is a checkpoint only if a marker names the sha256 of its
manifest.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from finetune_api.base import LenientModel, WireModel
from finetune_api.names import Storage, checkpoint_folder
from finetune_api.spec.enums import OutputKind
from pydantic import Field

from finetune_trainer.file_entry import FileEntry, sha256_file
from finetune_trainer.storage.base import join_key

_STEP_FOLDER_PATTERN = re.compile(r"^step-(\d{8,})$")


class RunFacts(LenientModel):
    """Facts about the run that saved a checkpoint. `restore.check_compatible` compares them with the facts of the run that resumes."""

    model_revision: str = ""
    dataset_digest: str = ""
    method: str = ""
    trainer: str = ""
    strategy: str = ""
    seed: int = 0
    world_size: int = 1
    micro_batch: int = 1
    accumulation: int = 1
    effective_batch: int = 1
    learning_rate: float | None = None
    settings: dict[str, str] = Field(
        default_factory=dict, description="Hash of each part of the spec that influences the computed numbers, by the name of its top-level field."
    )
    other_inputs: dict[str, str] = Field(
        default_factory=dict,
        alias="beside",  # Version 0.1.0 stored the field under this name.
        description="Hash of each input besides the base model and the training data: tokenizer, reference model, adapter, held-out data, images, ConfigMaps.",
    )
    source_versions: dict[str, str] = Field(
        default_factory=dict,
        description="Version of each model at its source, by spec path. The version can be computed without the weights. "
        "A resuming run does not compare these versions.",
    )
    config_sha256: str = ""
    versions: dict[str, str] = Field(default_factory=dict)


class Manifest(LenientModel):
    """`manifest.json` of a checkpoint or of the final model."""

    version: int = 1
    job: str = Field(default="", description="namespace/name/uid.")
    attempt: int = 1
    incarnation: str = ""
    step: int = Field(description="Optimizer steps done.")
    epoch: float | None = None
    samples: int | None = None
    tokens: int | None = None
    eval_loss: float | None = None
    graceful: bool = Field(default=False, description="Saved because of a stop request.")
    kind: OutputKind | None = Field(default=None, description="Kind of a final artefact; absent in checkpoints.")
    facts: RunFacts = Field(default_factory=RunFacts)
    extra: dict[str, Any] = Field(default_factory=dict)
    files: list[FileEntry] = Field(default_factory=list)

    def to_bytes(self) -> bytes:
        """Return the manifest as JSON with sorted keys. The marker contains the sha256 of these bytes."""
        return json.dumps(self.to_wire(), sort_keys=True, separators=(",", ":")).encode()

    @property
    def total_bytes(self) -> int:
        """Size of all files in bytes."""
        return sum(file.size for file in self.files)


class CommitMarker(WireModel):
    """The content of an object `_COMMITTED`. A checkpoint exists if and only if it has a valid marker."""

    attempt: int
    path: str = Field(description="Name of the incarnation's folder, which is next to the marker.")
    manifest_sha256: str

    def to_bytes(self) -> bytes:
        return json.dumps(self.to_wire(), sort_keys=True).encode()

    @staticmethod
    def parse(data: bytes) -> CommitMarker | None:
        """Return the marker, or None if the bytes are not a valid marker."""
        try:
            return CommitMarker.model_validate_json(data)
        except ValueError:
            return None


class UploadedPart(LenientModel):
    """The files of a checkpoint that one pod has uploaded, in a job with several pods.

    The list is stored as `<incarnation>/.parts/node-<n>.json` until the commit.
    """

    node: int
    dropped: bool = Field(
        default=False, description="Whether this pod skipped the checkpoint. A skipped checkpoint cannot be committed."
    )
    files: list[FileEntry] = Field(default_factory=list)


def sha256_bytes(data: bytes) -> str:
    """Return the sha256 (hex) of the bytes."""
    return hashlib.sha256(data).hexdigest()


def list_file_entries(folder: Path) -> list[FileEntry]:
    """Return the path, size and sha256 of every file below a folder, sorted by path."""
    return [
        FileEntry(path=path.relative_to(folder).as_posix(), size=path.stat().st_size, sha256=sha256_file(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]


def parse_step(folder_name: str) -> int | None:
    """Return the step in the name of a folder, such as 100 for `step-00000100`; None if it is not the name of a checkpoint's folder."""
    match = _STEP_FOLDER_PATTERN.match(folder_name)
    return int(match[1]) if match else None


def checkpoint_folder_key(step: int | None) -> str:
    """Return the key of the folder of a checkpoint, or of the final model (step None)."""
    return str(Storage.MODEL) if step is None else join_key(Storage.CHECKPOINTS, checkpoint_folder(step))
