"""Parses the URI of a job, of one checkpoint or of the final model, and downloads the committed files.

To find one checkpoint or the model, no listing is needed: the key of its marker follows from the URI.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from finetune_api.errors import NotFoundError
from finetune_api.names import Storage, attempt_of_uri

from finetune_trainer.checkpoint.manifest import prefix_of, step_of
from finetune_trainer.checkpoint.restore import fetch_verified
from finetune_trainer.checkpoint.tree import CheckpointTree, CommittedCheckpoint
from finetune_trainer.storage.base import ByteCounter, join
from finetune_trainer.storage.web import split_query


@dataclass(frozen=True)
class JobAddress:
    """A parsed URI. `root` includes the query of a web address. `step` or `model` is set if the URI names a checkpoint or the model."""

    root: str
    step: int | None = None
    model: bool = False

    @property
    def whole_job(self) -> bool:
        return self.step is None and not self.model


def parse_address(uri: str) -> JobAddress:
    """Parse a URI from a job's status. The last part may be the incarnation's folder."""
    address, query = split_query(uri)
    parts = address.rstrip("/").split("/")
    for index in range(len(parts) - 1, 2, -1):
        step = step_of(parts[index])
        if step is not None and parts[index - 1] == Storage.CHECKPOINTS:
            return JobAddress("/".join(parts[: index - 1]) + query, step)
        if parts[index] == Storage.MODEL and (
            index == len(parts) - 1 or (index == len(parts) - 2 and attempt_of_uri(address.rstrip("/")) is not None)
        ):
            return JobAddress("/".join(parts[:index]) + query, model=True)
        if parts[index] == Storage.CHECKPOINTS and index == len(parts) - 1:
            return JobAddress("/".join(parts[:index]) + query)
    return JobAddress("/".join(parts) + query)


def find_committed(tree: CheckpointTree, address: JobAddress) -> Iterator[CommittedCheckpoint]:
    """Yield the committed checkpoints at the address, newest first, then the committed model. Errors: NotFoundError `NothingCommitted`."""
    checkpoints = tree.list_committed() if address.whole_job else [one for one in [_get_committed_step(tree, address.step)] if one]
    if address.whole_job:
        checkpoints += [model] if (model := tree.get_committed(None)) else []
    if not checkpoints:
        raise NotFoundError(
            "NothingCommitted", f"nothing is committed at {tree.uri(prefix_of(address.step)) if not address.whole_job else tree.store.uri}",
            hint="check the URI; `list` shows everything that a job has stored",
        )  # fmt: skip
    yield from checkpoints


def _get_committed_step(tree: CheckpointTree, step: int | None) -> CommittedCheckpoint | None:
    if step is None:
        return tree.get_committed(None)
    return tree.get_committed(step, healthy=tree.store.get(join(prefix_of(step), Storage.HEALTHY)) is not None)


def download_committed(
    tree: CheckpointTree, checkpoint: CommittedCheckpoint, folder: Path, *, byte_counter: ByteCounter | None = None, check_space: ByteCounter | None = None,
    is_needed: Callable[[str], bool] = lambda path: True,
) -> str | None:  # fmt: skip
    """Call `check_space` with the size in bytes, then download and verify the files that are needed. Return the first problem, or None."""
    manifest = tree.read_manifest(checkpoint)
    if manifest is None:
        return f"{tree.uri(join(checkpoint.folder, Storage.MANIFEST))} is missing or is not the manifest that was committed"
    if check_space:
        check_space(sum(file.size for file in manifest.files if is_needed(file.path)))
    return fetch_verified(tree, checkpoint.folder, manifest, folder, is_needed, byte_counter)
