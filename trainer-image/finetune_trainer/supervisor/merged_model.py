"""Commits the merged model to storage in the same steps as a checkpoint: files, manifest, check of every object, marker."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from finetune_api.errors import NoCheckpointError
from finetune_api.names import ADAPTER_SHA256, Storage
from finetune_api.spec.enums import OutputKind
from finetune_api.status import Output

from finetune_trainer.checkpoint.address import download_committed
from finetune_trainer.checkpoint.manifest import Manifest, list_file_entries
from finetune_trainer.checkpoint.tree import CheckpointTree
from finetune_trainer.storage.base import ByteCounter, join_key

log = logging.getLogger(__name__)


def find_merged_model_uri(tree: CheckpointTree, output: Output) -> str | None:
    """Return the URI of the committed merged model if it was made from the adapter `output`, otherwise None."""
    merged_model = tree.get_merged()
    manifest = tree.read_manifest(merged_model) if merged_model is not None else None
    if merged_model is None or manifest is None or manifest.extra.get(ADAPTER_SHA256) != output.sha256:
        return None
    return tree.uri(merged_model.folder)


def commit_merged_model(
    tree: CheckpointTree, output: Output, folder: Path, *, attempt: int, incarnation: str, before_each_file: Callable[[int, int], None],
    byte_counter: ByteCounter | None = None,
) -> str:  # fmt: skip
    """Upload and commit the files of a local folder. Returns the URI of the merged model.

    `before_each_file` is called with the number of uploaded bytes and the number of all bytes. Both callbacks may raise an error to end the
    upload. Errors: those of storage; FencedOutError if a later attempt has begun.
    """
    committed_adapter = tree.get_committed(None)
    adapter_manifest = tree.read_manifest(committed_adapter) if committed_adapter is not None else None
    entries = list_file_entries(folder)
    total_bytes, uploaded_bytes = sum(entry.size for entry in entries), 0
    for entry in entries:
        before_each_file(uploaded_bytes, total_bytes)
        tree.store.put_file(folder / entry.path, join_key(Storage.MERGED, incarnation, entry.path), byte_counter=byte_counter)
        uploaded_bytes += entry.size
    manifest_changes = {
        "attempt": attempt, "incarnation": incarnation, "kind": OutputKind.MODEL, "files": entries,
        "extra": {ADAPTER_SHA256: output.sha256, "adapter": output.uri},
    }  # fmt: skip
    manifest = (adapter_manifest or Manifest(step=0)).model_copy(update=manifest_changes)
    existing_commit = tree.get_merged()
    tree.commit(Storage.MERGED, manifest, replaceable_marker=existing_commit.marker if existing_commit else None)
    log.info("committed %s/%s (%d bytes)", Storage.MERGED, incarnation, manifest.total_bytes)
    return tree.uri(join_key(Storage.MERGED, incarnation))


def fetch_merged_model(tree: CheckpointTree, target: Path, *, byte_counter: ByteCounter | None = None) -> Path:
    """Download and verify the committed merged model. Returns `target`. Errors: NoCheckpointError ModelDamaged; those of storage."""
    merged_model = tree.get_merged()
    partial_folder = target.with_name(f"{target.name}.part")
    shutil.rmtree(partial_folder, ignore_errors=True)
    problem = "the marker is missing" if merged_model is None else download_committed(tree, merged_model, partial_folder, byte_counter=byte_counter)
    if problem is not None:
        raise NoCheckpointError("ModelDamaged", f"the merged model cannot be read: {problem}")
    partial_folder.rename(target)
    return target
