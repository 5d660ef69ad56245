"""What checkpoints need from a store: whole objects, conditional creation, listings. Nothing else.

Keys are relative to the store's root, with `/` between parts. Every failure leaves a store as a FineTuneError with a code
that says whose fault it is (`storage.errors`); a missing object is no failure, it is None.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

CHUNK_BYTES = 4 * 1024 * 1024
Counter = Callable[[int], None]
"""Called with the number of bytes that just moved."""


@dataclass(frozen=True)
class Stat:
    """An object: key relative to the root, size in bytes, and the store's own version mark (ETag or mtime)."""

    key: str
    size: int
    tag: str = ""


class Created(Enum):
    """What a conditional creation found."""

    NEW = "new"
    EXISTS = "exists"


class Store(Protocol):
    """A root in a store."""

    uri: str
    retries: int
    """Requests that had to be repeated."""

    def put_file(self, source: Path, key: str, *, count: Counter | None = None) -> None:
        """Write a file as an object, replacing what is there. Readers see all of it or nothing."""

    def put(self, key: str, data: bytes) -> None:
        """Write a small object, replacing what is there."""

    def create(self, key: str, data: bytes) -> Created:
        """Write a small object unless one is there. Stores that cannot do this atomically replace it (see `abilities`)."""

    def get(self, key: str) -> bytes | None:
        """A small object's bytes, or None if there is none."""

    def download(self, key: str, target: Path, *, count: Counter | None = None) -> str | None:
        """Bring an object to a file; returns the sha256 (hex) of the bytes written, or None if there is no such object."""

    def stat(self, key: str) -> Stat | None:
        """Size of an object, or None if there is none."""

    def list(self, prefix: str) -> Iterator[Stat]:
        """All objects whose key starts with the prefix, in key order."""

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; missing ones are no failure."""

    def sweep(self, prefix: str) -> int:
        """Remove what half-finished uploads left below the prefix; returns how many there were."""

    def close(self) -> None:
        """Let go of connections."""


def sha256_file(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def join(*parts: str) -> str:
    """A key from parts, without empty ones."""
    return "/".join(part.strip("/") for part in parts if part.strip("/"))
