"""Compares files with the hashes that the source of the files reports. Each file is read once, in blocks.

An expected hash has one of these forms:

* `sha256:<hex>`: large files of the hub.
* `git-blob:<hex>`: small files of the hub. The hash is git's object id.
* `md5:<hex>`: the ETag of an S3 object.
* `md5-parts:<hex>-<n>`: the ETag of an S3 object that was uploaded in n parts. The hash is the MD5 of the MD5s of the parts (S3 user guide, "Checking
  object integrity"). The ETag does not contain the part size, so all usual part sizes are tried.
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
THREAD_COUNT = 4
MIB = 1024 * 1024
PART_SIZES_MIB = (5, 6, 8, 10, 12, 15, 16, 20, 25, 32, 50, 64, 100, 128, 256, 512, 1024)
"""Part sizes of common S3 clients. All parts of an upload have the same size, except the last one."""


@dataclass(frozen=True)
class SourceFile:
    """One file of a model, as its source lists it."""

    name: str
    """Path of the file, relative to the model's folder."""
    size: int
    """Size of the file in bytes."""
    digest: str
    """Expected hash of the file, in one of the forms of this module."""


class Hasher(Protocol):
    """Receives the bytes of a file and compares them with an expected hash."""

    def update(self, data: bytes) -> None: ...

    def matches(self) -> bool: ...


class _WholeFileHasher:
    def __init__(self, algorithm: str, expected_hash: str, head: bytes = b"") -> None:
        self._hash, self._expected_hash = hashlib.new(algorithm, head, usedforsecurity=False), expected_hash

    def update(self, data: bytes) -> None:
        self._hash.update(data)

    def matches(self) -> bool:
        return self._hash.hexdigest() == self._expected_hash


class _PartsHasher:
    """Computes the MD5 of the MD5s of all parts, for one part size."""

    def __init__(self, part_bytes: int, expected_hash: str) -> None:
        self._part_bytes, self._expected_hash = part_bytes, expected_hash
        self._whole_hash, self._part_hash, self._part_filled_bytes = _create_md5(), _create_md5(), 0

    def update(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            part_data = view[: self._part_bytes - self._part_filled_bytes]
            self._part_hash.update(part_data)
            self._part_filled_bytes, view = self._part_filled_bytes + len(part_data), view[len(part_data) :]
            if self._part_filled_bytes == self._part_bytes:
                self._end_part()

    def _end_part(self) -> None:
        self._whole_hash.update(self._part_hash.digest())
        self._part_hash, self._part_filled_bytes = _create_md5(), 0

    def matches(self) -> bool:
        if self._part_filled_bytes:
            self._end_part()
        return self._whole_hash.hexdigest() == self._expected_hash


class _UnknownPartSizeHasher:
    def __init__(self, hashers: list[_PartsHasher]) -> None:
        self._hashers = hashers

    def update(self, data: bytes) -> None:
        for hasher in self._hashers:
            hasher.update(data)

    def matches(self) -> bool:
        return any(hasher.matches() for hasher in self._hashers)


def _create_md5() -> hashlib._Hash:
    return hashlib.md5(usedforsecurity=False)


def create_hasher(file: SourceFile) -> Hasher:
    """Return a hasher for the expected hash of a file. Errors: ValueError if the form of the hash is not known."""
    form, _, expected_hash = file.digest.partition(":")
    match form:
        case "sha256" | "md5":
            return _WholeFileHasher(form, expected_hash)
        case "git-blob":
            return _WholeFileHasher("sha1", expected_hash, b"blob %d\0" % file.size)
        case "md5-parts":
            expected_parts_hash, _, part_count = expected_hash.partition("-")
            part_sizes = [size * MIB for size in PART_SIZES_MIB if -(-file.size // (size * MIB)) == int(part_count)]
            return _UnknownPartSizeHasher([_PartsHasher(size, expected_parts_hash) for size in part_sizes])
    raise ValueError(f"the hash {file.digest} has an unknown form")


def parse_etag(etag: str) -> str | None:
    """Return the expected hash that an S3 ETag contains. None if the ETag is not an MD5."""
    etag = etag.strip('"').lower()
    if re.fullmatch("[0-9a-f]{32}", etag):
        return f"md5:{etag}"
    return f"md5-parts:{etag}" if re.fullmatch("[0-9a-f]{32}-[1-9][0-9]{0,4}", etag) else None


def open_regular_file(path: Path) -> IO[bytes]:
    """Open a file for reading. Errors: OSError, also if the path is a link or a pipe, which another pod can create on a shared volume."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path.name} is not a regular file")
    return os.fdopen(descriptor, "rb")


@dataclass(frozen=True)
class CheckedFile:
    """The result of checking one file. `problem` is empty if the file has the expected hash."""

    name: str
    sha256: str = ""
    problem: str = ""


def check_files(
    folder: Path, files: tuple[SourceFile, ...], *, copy_to: Path | None = None, count_bytes: Callable[[int], None] | None = None
) -> list[CheckedFile]:
    """Compare all files of a folder with their expected hashes. `copy_to`: folder to which the files are also copied.

    `count_bytes`: receives the number of bytes of each block that was read.
    """
    with ThreadPoolExecutor(THREAD_COUNT) as pool:
        return list(pool.map(lambda file: _check_file(folder, file, copy_to, count_bytes), files))


def _check_file(folder: Path, file: SourceFile, copy_to: Path | None, count_bytes: Callable[[int], None] | None) -> CheckedFile:
    """Compare one file with its expected hash. If the file cannot be read, the result has a problem. Errors: OSError if the copy cannot be written."""
    try:
        stream = open_regular_file(folder / file.name)
    except OSError as error:
        return CheckedFile(file.name, problem=f"{file.name} cannot be read ({error.strerror or error})")
    with stream:
        if copy_to is None:
            return _compare_with_source(file, _read_blocks(stream, count_bytes))
        target = copy_to / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as copy:
            return _compare_with_source(file, _copy_blocks(copy, _read_blocks(stream, count_bytes)))


def _read_blocks(stream: IO[bytes], count_bytes: Callable[[int], None] | None) -> Iterator[bytes]:
    while block := stream.read(BLOCK_BYTES):
        if count_bytes:
            count_bytes(len(block))
        yield block


def _copy_blocks(copy_stream: IO[bytes], blocks: Iterator[bytes]) -> Iterator[bytes]:
    for block in blocks:
        copy_stream.write(block)
        yield block


def _compare_with_source(file: SourceFile, blocks: Iterator[bytes]) -> CheckedFile:
    hasher, sha256_hasher, read_bytes = create_hasher(file), hashlib.sha256(), 0
    for block in blocks:
        read_bytes += len(block)
        if read_bytes > file.size:  # The file may be endless, so the rest is neither read nor copied.
            break
        hasher.update(block)
        sha256_hasher.update(block)
    if read_bytes != file.size:
        return CheckedFile(file.name, problem=f"{file.name} has another size than at the source ({file.size} bytes)")
    if not hasher.matches():
        return CheckedFile(file.name, problem=f"{file.name} has another hash than at the source")
    return CheckedFile(file.name, sha256_hasher.hexdigest())
