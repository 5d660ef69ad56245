"""Reads the reference values of a committed model from storage, for the stage `verifying`.

A job that does not train reads the values from the folder of the job that trained the model.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from finetune_api.sources import redact_source
from pydantic import ValidationError

from finetune_trainer.checkpoint.tree import CheckpointTree, CommittedCheckpoint
from finetune_trainer.verification.reference import FILE_NAME, MANIFEST_KEY, ReferenceValues, reference_values_key


def copy_reference_values(tree: CheckpointTree, committed_checkpoint: CommittedCheckpoint | None, folder: Path) -> str | None:
    """Copy the reference values of a committed model to `folder`. Returns None, or the reason if no usable reference values exist.

    Errors: those of storage.
    """
    manifest = tree.read_manifest(committed_checkpoint) if committed_checkpoint is not None else None
    if committed_checkpoint is None or manifest is None:
        return "the manifest of the model cannot be read"
    if committed_checkpoint.step is not None:
        return "the model is a checkpoint, and a trainer records reference values only for its final model"
    digest = manifest.extra.get(MANIFEST_KEY)
    if not isinstance(digest, str):
        return "the job that trained the model recorded no reference values: its output.verify was false, or its trainer is older than 0.2.0"
    key = reference_values_key(digest)
    data, shown_uri = tree.store.get(key), redact_source(tree.uri(key))
    if data is None:
        return f"the reference values {shown_uri} are missing"
    if hashlib.sha256(data).hexdigest() != digest:
        return f"the reference values {shown_uri} are damaged"
    try:
        ReferenceValues.model_validate_json(data)
    except ValidationError:
        return f"the reference values {shown_uri} cannot be read by this trainer; a later version may have written them"
    (folder / FILE_NAME).write_bytes(data)
    return None
