"""What an address means: a whole job, one checkpoint, or the final model; and how that is brought to local disk.

A step or the model has its marker at a known key, so that it is found without a listing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from finetune_api.errors import NotFoundError
from finetune_api.names import Storage, attempt_of_uri

from finetune_trainer.checkpoint.manifest import base_of, step_of
from finetune_trainer.checkpoint.restore import fetch_verified
from finetune_trainer.checkpoint.tree import Committed, Tree
from finetune_trainer.storage.base import Counter, join
from finetune_trainer.storage.web import apart


@dataclass(frozen=True)
class Address:
    """A job's root (with the query, if it is a web address that has one) and what of it is meant."""

    root: str
    step: int | None = None
    model: bool = False

    @property
    def everything(self) -> bool:
        """The whole job is meant."""
        return self.step is None and not self.model


def address(uri: str) -> Address:
    """Split a uri as a person copies it from status: with or without the incarnation's folder."""
    place, query = apart(uri)
    parts = place.rstrip("/").split("/")
    for index in range(len(parts) - 1, 2, -1):
        step = step_of(parts[index])
        if step is not None and parts[index - 1] == Storage.CHECKPOINTS:
            return Address("/".join(parts[: index - 1]) + query, step)
        if parts[index] == Storage.MODEL and (
            index == len(parts) - 1 or (index == len(parts) - 2 and attempt_of_uri(place.rstrip("/")) is not None)
        ):
            return Address("/".join(parts[:index]) + query, model=True)
        if parts[index] == Storage.CHECKPOINTS and index == len(parts) - 1:
            return Address("/".join(parts[:index]) + query)
    return Address("/".join(parts) + query)


def meant(tree: Tree, where: Address) -> Iterator[Committed]:
    """What the address means, newest first; the model last. Errors: NotFoundError NothingCommitted."""
    found = tree.committed() if where.everything else [one for one in [_at(tree, where.step)] if one]
    if where.everything:
        found += [model] if (model := tree.marker(None)) else []
    if not found:
        raise NotFoundError(
            "NothingCommitted", f"nothing is committed at {tree.uri(base_of(where.step)) if not where.everything else tree.store.uri}",
            hint="check the uri; `list` shows a job's tree",
        )  # fmt: skip
    yield from found


def _at(tree: Tree, step: int | None) -> Committed | None:
    if step is None:
        return tree.marker(None)
    return tree.marker(step, healthy=tree.store.get(join(base_of(step), Storage.HEALTHY)) is not None)


def bring(
    tree: Tree, one: Committed, folder: Path, *, count: Counter | None = None, room: Counter | None = None
) -> str | None:
    """Download into a folder and compare; returns what is wrong, naming the object. `room` is told the size in bytes before."""
    manifest = tree.manifest(one)
    if manifest is None:
        return f"{tree.uri(join(one.folder, Storage.MANIFEST))} is missing or not the one that was committed"
    if room:
        room(manifest.total_bytes)
    return fetch_verified(tree, one.folder, manifest, folder, lambda path: True, count)
