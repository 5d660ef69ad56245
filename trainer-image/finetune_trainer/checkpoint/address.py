"""Parses the URI of a job, of one checkpoint or of the final model, and downloads the committed files.

No listing of storage is needed to find a single checkpoint or the model, because the key of its marker follows from the URI.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from finetune_api.errors import NotFoundError
from finetune_api.names import Storage, parse_attempt_of_uri

from finetune_trainer.checkpoint.manifest import checkpoint_folder_key, parse_step
from finetune_trainer.checkpoint.restore import fetch_verified
from finetune_trainer.checkpoint.tree import CheckpointTree, CommittedCheckpoint
from finetune_trainer.storage.base import ByteCounter, join_key
from finetune_trainer.storage.web import split_query


@dataclass(frozen=True)
class JobAddress:
    """What a URI names: a job, one of its checkpoints or its final model."""

    job_uri: str
    """URI of the job's folder. A web address keeps its query."""
    step: int | None = None
    """The step of the checkpoint that the URI names; None if the URI names no checkpoint."""
    is_model: bool = False
    """Whether the URI names the final model."""

    @property
    def is_whole_job(self) -> bool:
        """Whether the URI names a job, and neither a checkpoint nor the model."""
        return self.step is None and not self.is_model


def parse_address(uri: str) -> JobAddress:
    """Parse a URI from a job's status. The last part of the URI may be the folder of an incarnation."""
    address, query = split_query(uri)
    uri_parts = address.rstrip("/").split("/")
    for index in range(len(uri_parts) - 1, 2, -1):
        step = parse_step(uri_parts[index])
        if step is not None and uri_parts[index - 1] == Storage.CHECKPOINTS:
            return JobAddress("/".join(uri_parts[: index - 1]) + query, step)
        if uri_parts[index] == Storage.MODEL and (
            index == len(uri_parts) - 1 or (index == len(uri_parts) - 2 and parse_attempt_of_uri(address.rstrip("/")) is not None)
        ):
            return JobAddress("/".join(uri_parts[:index]) + query, is_model=True)
        if uri_parts[index] == Storage.CHECKPOINTS and index == len(uri_parts) - 1:
            return JobAddress("/".join(uri_parts[:index]) + query)
    return JobAddress("/".join(uri_parts) + query)


def find_committed(tree: CheckpointTree, job_address: JobAddress) -> Iterator[CommittedCheckpoint]:
    """Yield the committed checkpoints at the address, newest first, then the committed model. Errors: NotFoundError `NothingCommitted`."""
    if job_address.is_whole_job:
        checkpoints = [*tree.list_committed(), tree.get_committed(None)]
    else:
        checkpoints = [_get_checkpoint_or_model(tree, job_address.step)]
    committed_checkpoints = [checkpoint for checkpoint in checkpoints if checkpoint is not None]
    if not committed_checkpoints:
        raise NotFoundError(
            "NothingCommitted", f"nothing is committed at {tree.store.uri if job_address.is_whole_job else tree.uri(checkpoint_folder_key(job_address.step))}",
            hint="check the URI; `list` shows everything that a job has stored",
        )  # fmt: skip
    yield from committed_checkpoints


def _get_checkpoint_or_model(tree: CheckpointTree, step: int | None) -> CommittedCheckpoint | None:
    if step is None:
        return tree.get_committed(None)
    return tree.get_committed(step, is_healthy=tree.store.get(join_key(checkpoint_folder_key(step), Storage.HEALTHY)) is not None)


def download_committed(
    tree: CheckpointTree, checkpoint: CommittedCheckpoint, target_folder: Path, *, byte_counter: ByteCounter | None = None,
    check_space: ByteCounter | None = None, is_needed: Callable[[str], bool] = lambda path: True,
) -> str | None:  # fmt: skip
    """Download the needed files and compare them with the manifest. Return the first problem, or None if there is none.

    Before the download, `check_space` is called with the total size of the needed files in bytes. `is_needed` gets the path of a file, and returns
    whether the file is needed.
    """
    manifest = tree.read_manifest(checkpoint)
    if manifest is None:
        return f"{tree.uri(join_key(checkpoint.folder, Storage.MANIFEST))} is missing or is not the manifest that was committed"
    if check_space:
        check_space(sum(file.size for file in manifest.files if is_needed(file.path)))
    return fetch_verified(tree, checkpoint.folder, manifest, target_folder, is_needed, byte_counter)
