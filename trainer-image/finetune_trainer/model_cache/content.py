"""Compares files with the hashes that their source names. All files are read once, in blocks.

Forms of an expected hash: `sha256:<hex>` (large files of the hub), `git-blob:<hex>` (small files of the hub: git's object id), `md5:<hex>`
(the ETag of an S3 object) and `md5-parts:<hex>-<n>` (the ETag of an S3 object that was uploaded in n parts: the MD5 of the MD5s of its
parts). Source of the last form: the S3 user guide, "Checking object integrity". The part size is not part of the ETag, so usual sizes are tried.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

BLOCK_BYTES = 1024 * 1024
THREADS = 4
MIB = 1024 * 1024
PART_SIZES_MIB = (5, 6, 8, 10, 12, 15, 16, 20, 25, 32, 50, 64, 100, 128, 256, 512, 1024)
"""Part sizes of common S3 clients. The first part of an upload has the same size as all others but the last."""


@dataclass(frozen=True)
class SourceFile:
    """One file of a model at its source: name relative to the model's folder, size in bytes, and the hash that the source names."""

    name: str
    size: int
    digest: str


class Hasher(Protocol):
    """Receives the bytes of a file and compares them with an expected hash."""

    def update(self, data: bytes) -> None: ...

    def matches(self) -> bool: ...


class _OneHash:
    def __init__(self, algorithm: str, expected: str, head: bytes = b"") -> None:
        self._hash, self._expected = hashlib.new(algorithm, head, usedforsecurity=False), expected

    def update(self, data: bytes) -> None:
        self._hash.update(data)

    def matches(self) -> bool:
        return self._hash.hexdigest() == self._expected


class _PartHash:
    """The MD5 of the MD5s of all parts, for one part size."""

    def __init__(self, part_bytes: int, expected: str) -> None:
        self._part_bytes, self._expected = part_bytes, expected
        self._whole, self._part, self._filled = _md5(), _md5(), 0

    def update(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            taken = view[: self._part_bytes - self._filled]
            self._part.update(taken)
            self._filled, view = self._filled + len(taken), view[len(taken) :]
            if self._filled == self._part_bytes:
                self._end_part()

    def _end_part(self) -> None:
        self._whole.update(self._part.digest())
        self._part, self._filled = _md5(), 0

    def matches(self) -> bool:
        if self._filled:
            self._end_part()
        return self._whole.hexdigest() == self._expected


class _AnyOf:
    def __init__(self, hashers: list[_PartHash]) -> None:
        self._hashers = hashers

    def update(self, data: bytes) -> None:
        for hasher in self._hashers:
            hasher.update(data)

    def matches(self) -> bool:
        return any(hasher.matches() for hasher in self._hashers)


def _md5() -> hashlib._Hash:
    return hashlib.md5(usedforsecurity=False)


def hasher_for(file: SourceFile) -> Hasher:
    """Return a hasher for the expected hash of a file. Errors: ValueError if the form of the hash is not known."""
    form, _, value = file.digest.partition(":")
    match form:
        case "sha256" | "md5":
            return _OneHash(form, value)
        case "git-blob":
            return _OneHash("sha1", value, b"blob %d\0" % file.size)
        case "md5-parts":
            expected, _, count = value.partition("-")
            sizes = [size * MIB for size in PART_SIZES_MIB if -(-file.size // (size * MIB)) == int(count)]
            return _AnyOf([_PartHash(size, expected) for size in sizes])
    raise ValueError(f"the hash {file.digest} has an unknown form")


def digest_of_etag(tag: str) -> str | None:
    """Return the expected hash that an S3 ETag names. None: the ETag is not an MD5."""
    tag = tag.strip('"').lower()
    if re.fullmatch("[0-9a-f]{32}", tag):
        return f"md5:{tag}"
    return f"md5-parts:{tag}" if re.fullmatch("[0-9a-f]{32}-[1-9][0-9]{0,4}", tag) else None


def open_regular_file(path: Path) -> IO[bytes]:
    """Open a file for reading. On a shared volume, another pod can put a link or a pipe there: both are refused. Errors: OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path.name} is not a regular file")
    return os.fdopen(descriptor, "rb")


@dataclass(frozen=True)
class CheckedFile:
    """The result of reading one file. `problem` is empty if the file has the expected hash."""

    name: str
    sha256: str = ""
    problem: str = ""


def check_files(
    folder: Path, files: tuple[SourceFile, ...], *, copy_to: Path | None = None, count_bytes: Callable[[int], None] | None = None
) -> list[CheckedFile]:
    """Compare all files of a folder with their expected hashes. `copy_to`: also write the bytes that were read to this folder."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda file: _check_file(folder, file, copy_to, count_bytes), files))


def _check_file(folder: Path, file: SourceFile, copy_to: Path | None, count_bytes: Callable[[int], None] | None) -> CheckedFile:
    """Errors: OSError of the copy. An original that cannot be read is a problem of the file."""
    try:
        stream = open_regular_file(folder / file.name)
    except OSError as error:
        return CheckedFile(file.name, problem=f"{file.name} cannot be read ({error.strerror or error})")
    with stream:
        if copy_to is None:
            return _compare(file, _blocks(stream, count_bytes))
        target = copy_to / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as copy:
            return _compare(file, _written_blocks(copy, _blocks(stream, count_bytes)))


def _blocks(stream: IO[bytes], count_bytes: Callable[[int], None] | None) -> Iterator[bytes]:
    while block := stream.read(BLOCK_BYTES):
        if count_bytes:
            count_bytes(len(block))
        yield block


def _written_blocks(copy: IO[bytes], blocks: Iterator[bytes]) -> Iterator[bytes]:
    for block in blocks:
        copy.write(block)
        yield block


def _compare(file: SourceFile, blocks: Iterator[bytes]) -> CheckedFile:
    hasher, sha256, size = hasher_for(file), hashlib.sha256(), 0
    for block in blocks:
        size += len(block)
        if size > file.size:  # do not read, and do not copy, a file without end
            break
        hasher.update(block)
        sha256.update(block)
    if size != file.size:
        return CheckedFile(file.name, problem=f"{file.name} has another size than at the source ({file.size} bytes)")
    if not hasher.matches():
        return CheckedFile(file.name, problem=f"{file.name} has another hash than at the source")
    return CheckedFile(file.name, sha256.hexdigest())
