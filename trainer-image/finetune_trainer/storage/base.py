"""The interface of a store, with methods that read and write whole objects, create an object only if it does not exist, and list objects.

Keys are relative to the store's root, with `/` between parts. A store raises only FineTuneErrors, whose exit codes show who can fix the
failure (`storage.errors`). If an object is missing, methods return None instead of raising an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Protocol

CHUNK_BYTES = 4 * 1024 * 1024
ByteCounter = Callable[[int], None]
"""A function that is called with a number of bytes, for example the size of the chunk that was just transferred."""


@dataclass(frozen=True)
class ObjectStat:
    """What a store reports about an object without reading its content."""

    key: str
    """Key relative to the store's root."""
    size: int
    """Size in bytes."""
    tag: str = ""
    """A text that changes when the object is replaced: its ETag, or the modification time of its file. Empty if the store reports neither."""
    modified_at: datetime | None = field(default=None, compare=False)
    """When the object was written; None if the store does not report it."""


class CreateResult(Enum):
    """The result of a conditional creation: the object was created, or it already existed."""

    NEW = "new"
    EXISTS = "exists"


class Store(Protocol):
    """The objects below one root of a store."""

    uri: str
    retries: int
    """Number of requests that were retried since the store was opened."""

    def put_file(self, source_file: Path, key: str, *, byte_counter: ByteCounter | None = None) -> None:
        """Upload a file atomically: a reader gets either the old object or the complete new object."""

    def put(self, key: str, data: bytes) -> None:
        """Write a small object, replacing an existing one."""

    def create(self, key: str, data: bytes) -> CreateResult:
        """Write a small object unless it exists. A store without conditional writes checks and writes in separate requests (`preflight.StoreAbilities`)."""

    def get(self, key: str) -> bytes | None:
        """Return the bytes of a small object, or None if it does not exist."""

    def download(self, key: str, target_file: Path, *, byte_counter: ByteCounter | None = None) -> str | None:
        """Download an object to a file. Returns the sha256 (hex) of its bytes, or None if it does not exist."""

    def stat(self, key: str) -> ObjectStat | None:
        """Return the size and the tag of an object, or None if it does not exist."""

    def list(self, key_prefix: str) -> Iterator[ObjectStat]:
        """Yield all objects whose key starts with the prefix, in the order of their keys."""

    def list_folders(self) -> tuple[str, ...]:
        """Return the names of the folders directly below the root, in order."""

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects. Missing objects are ignored."""

    def sweep(self, key_prefix: str) -> int:
        """Remove unfinished uploads of objects whose key starts with the prefix. Returns the number of removed uploads."""

    def close(self) -> None:
        """Close the connections to the store."""


def join_key(*parts: str) -> str:
    """Join the parts of a key with `/`; empty parts are left out."""
    return "/".join(part.strip("/") for part in parts if part.strip("/"))
