"""Code that uploads and downloads share: part sizes, digests of local files, and the progress of a transfer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

MIB = 1 << 20
PART_BYTES = 8 * MIB
"""Smallest part size of a multipart upload in bytes. A file of at most this size is uploaded with one request, as in the trainer."""
MAX_PARTS = 9000
"""Maximum number of parts of an upload. S3 allows 10000."""
PARALLEL_TRANSFERS = 4
"""Number of parts (uploads) or files (downloads) that are transferred at the same time."""
PART_SUFFIX = ".part"
"""Suffix of files whose content is not complete yet."""


class FileState(StrEnum):
    """What a transfer did with a file."""

    TRANSFERRED = "transferred"
    """The whole file was transferred."""
    RESUMED = "resumed"
    """An earlier, interrupted transfer was continued."""
    UNCHANGED = "unchanged"
    """The destination already has the same content."""


class Check(StrEnum):
    """How the content of a transferred file was checked."""

    SHA256 = "sha256"
    """The file has the sha256 that the manifest lists for it."""
    ETAG = "etag"
    """The MD5 digests of the file agree with the ETag of the object."""
    SIZE = "size"
    """The content could not be compared, for example because the ETag of the object contains no MD5 digest. The size of the file is correct."""


@dataclass(frozen=True)
class TransferredFile:
    """The result of the transfer of one file. `path` is the local file, `uri` the object in storage."""

    path: Path
    uri: str
    size: int
    sha256: str
    state: FileState
    check: Check


class Progress(Protocol):
    """Receives the progress of a transfer. The methods are called from several threads."""

    def begin_file(self, name: str, size: int) -> Callable[[int], None]:
        """Announce the transfer of a file. The caller must call the returned function with the size of each part that has reached its destination."""


class SilentProgress:
    """A `Progress` that shows nothing."""

    def begin_file(self, name: str, size: int) -> Callable[[int], None]:
        """Return a function that does nothing."""
        return lambda byte_count: None


@dataclass(frozen=True)
class LocalDigest:
    """Digests of a local file: its sha256 (hex), and the MD5 digest of each part of `part_bytes` bytes."""

    size: int
    part_bytes: int
    sha256: str
    part_md5s: tuple[bytes, ...]

    @property
    def etag(self) -> str:
        """The ETag that the store gives to an object that is uploaded in these parts.

        If the store encrypts the object with KMS keys, the object has another ETag.
        """
        if self.size <= self.part_bytes:
            return self.part_md5s[0].hex()
        return f"{hashlib.md5(b''.join(self.part_md5s), usedforsecurity=False).hexdigest()}-{len(self.part_md5s)}"


def choose_part_bytes(size: int) -> int:
    """Return the part size in bytes for the upload of a file.

    The part size depends on nothing but the file's size, so that a later run can reuse uploaded parts.
    """
    return max(PART_BYTES, -(-size // MAX_PARTS // MIB) * MIB)


def compute_sha256_of_file(path: Path) -> str:
    """Return the sha256 (hex) of a local file.

    This function is faster than `digest_file`, which also computes the MD5 digest of each part. Raises OSError.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole_file(path: Path, content: bytes) -> None:
    """Write a small file under a temporary name, then rename it, so that the file is never incomplete. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part_path = path.with_name(f".{path.name}{PART_SUFFIX}")
    part_path.write_bytes(content)
    part_path.replace(path)


def digest_file(path: Path, part_bytes: int | None = None) -> LocalDigest:
    """Read a local file and return its digests. Raises OSError."""
    size = path.stat().st_size
    effective_part_bytes = part_bytes or choose_part_bytes(size)
    file_digest, part_md5s = hashlib.sha256(), []
    with path.open("rb") as file:
        while part := file.read(effective_part_bytes):
            file_digest.update(part)
            part_md5s.append(hashlib.md5(part, usedforsecurity=False).digest())
    return LocalDigest(size, effective_part_bytes, file_digest.hexdigest(), tuple(part_md5s) or (hashlib.md5(usedforsecurity=False).digest(),))
