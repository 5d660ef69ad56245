"""Downloads objects from storage to local files.

A download writes to a hidden part file, and renames it when the content is complete and checked. The name of the part file contains a hash of the
object's sha256 or ETag, so that an interrupted download continues only if the object is unchanged. Files of a checkpoint or model are checked against
the sha256 in the manifest, and other files against the MD5 digests in the ETag of the object.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from finetune_api.names import Storage

from finetune_cli.job_storage import (
    CommittedFolder,
    ConnectionLost,
    JobStorage,
    StorageError,
    StorageErrors,
    parse_manifest,
    read_file_list,
    read_manifest_bytes,
)
from finetune_cli.transfers import (
    PARALLEL_TRANSFERS,
    PART_SUFFIX,
    Check,
    FileState,
    Progress,
    TransferredFile,
    choose_part_bytes,
    compute_sha256_of_file,
    digest_file,
    write_whole_file,
)

MAX_LOST_CONNECTIONS = 5
"""A download fails after this number of consecutive lost connections, if none of them delivered a byte."""
_MULTIPART_ETAG_PATTERN = re.compile(r"^[0-9a-f]{32}-(\d+)$")
_MD5_ETAG_PATTERN = re.compile(r"^[0-9a-f]{32}$")


@dataclass(frozen=True)
class RemoteFile:
    """An object to download: its key in storage, its path below the local target folder, its size, and either its sha256 (from a manifest) or its ETag."""

    key: str
    path: str
    size: int
    sha256: str = ""
    etag: str = ""

    @property
    def version(self) -> str:
        """A short hash that changes if the content of the object changes: a hash of the sha256 or, without a sha256, of the ETag and the size."""
        return hashlib.sha256((self.sha256 or f"{self.etag} {self.size}").encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Source:
    """The files to download from a storage. `manifest`: the manifest's bytes for a checkpoint or model, otherwise None."""

    storage: JobStorage
    files: tuple[RemoteFile, ...]
    manifest: bytes | None = None


def make_committed_source(storage: JobStorage, committed_folder: CommittedFolder) -> Source:
    """Return the files of a committed checkpoint or model. Raises StorageError if the manifest is damaged."""
    manifest_bytes = read_manifest_bytes(storage, committed_folder)
    folder = f"{committed_folder.folder}/{committed_folder.path}"
    entries = read_file_list(storage.make_object_uri(folder), parse_manifest(manifest_bytes))
    files = tuple(RemoteFile(f"{folder}/{entry['path']}", str(entry["path"]), int(entry["size"]), sha256=str(entry["sha256"])) for entry in entries)
    return Source(storage, files, manifest_bytes)


def make_plain_source(storage: JobStorage, key: str) -> Source:
    """Return the object with this key, or all objects below it, as files to download. Raises StorageError if there is no object."""
    single_object = storage.find_object(key) if key else None
    stored_objects = [single_object] if single_object is not None else list(storage.list_objects(key))
    folder = "" if not key else f"{key}/" if single_object is None else key[: -len(key.rpartition("/")[2])]
    files = []
    for stored_object in stored_objects:
        path = stored_object.key.removeprefix(folder)
        if path.endswith("/") or not path:  # an empty object that stands for a folder
            continue
        if path.startswith("/") or ".." in path.split("/"):
            raise StorageError(f"{storage.make_object_uri(stored_object.key)}: the name of the object would be a file outside the target folder")
        etag = stored_object.etag if storage.local is None else digest_file(storage.local / stored_object.key).etag
        files.append(RemoteFile(stored_object.key, path, stored_object.size, etag=etag))
    if not files:
        raise StorageError(f"{storage.make_object_uri(key)}: there is no object at this URI or below it")
    return Source(storage, tuple(files))


def download(source: Source, folder: Path, progress: Progress, *, overwrite: bool = False) -> list[TransferredFile]:
    """Download all files of a source into a folder, and write the manifest after all other files. Raises StorageError, OSError.

    If a local file exists already and has other content, it is replaced if `overwrite` is true. Otherwise the download fails.
    """
    _require_disk_space(source, folder)
    pool = ThreadPoolExecutor(PARALLEL_TRANSFERS)
    try:
        files = list(pool.map(lambda file: Download(source.storage, file, folder / file.path).run(progress, overwrite), source.files))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    if source.manifest is not None:
        write_whole_file(folder / Storage.MANIFEST, source.manifest)
    return files


def _require_disk_space(source: Source, folder: Path) -> None:
    existing_folder = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    needed_bytes = sum(file.size for file in source.files if not (folder / file.path).exists() and not _make_part_file_path(folder / file.path, file).exists())
    free_bytes = shutil.disk_usage(existing_folder).free
    if needed_bytes > free_bytes:
        raise StorageError(
            f"{existing_folder} has {free_bytes / 1e9:.1f} GB free, but the download needs {needed_bytes / 1e9:.1f} GB; choose another folder with --to"
        )


def _make_part_file_path(target: Path, file: RemoteFile) -> Path:
    return target.with_name(f".{target.name}.{file.version}{PART_SUFFIX}")


class _Comparison(NamedTuple):
    """The result of comparing a local file with an object in storage."""

    check: Check
    """What was compared: sha256, ETag, or only the size."""
    sha256: str
    """The sha256 of the local file. It is empty if the target file and the object differ in size, because the sha256 is not needed in this case."""
    is_equal: bool
    """Whether the check found no difference."""


class Download:
    """The download of one file."""

    def __init__(self, storage: JobStorage, file: RemoteFile, target: Path):
        self._storage, self._file, self._target = storage, file, target
        self._part_file = _make_part_file_path(target, file)

    def run(self, progress: Progress, overwrite: bool) -> TransferredFile:
        """Download the object to the target file, unless the target file already has the content of the object. Raises StorageError, OSError."""
        report_bytes = progress.begin_file(self._file.path, self._file.size)
        if self._target.exists():
            comparison = self._compare(self._target)
            if comparison.is_equal and comparison.check is not Check.SIZE:
                report_bytes(self._file.size)
                return self._make_result(comparison.sha256, FileState.UNCHANGED, comparison.check)
            if not overwrite:
                problem = "and cannot be compared, because the store gives no digest" if comparison.is_equal else "with other content"
                raise StorageError(f"{self._target} exists already {problem}; choose another folder with --to, or replace files with --overwrite")
        self._target.parent.mkdir(parents=True, exist_ok=True)
        is_resumed = self._part_file.exists() and self._part_file.stat().st_size > 0
        self._fetch(report_bytes)
        comparison = self._compare(self._part_file)
        if not comparison.is_equal:
            size = self._part_file.stat().st_size
            self._part_file.unlink()
            expected_text = f"the manifest lists {self._file.size} bytes and {self._file.sha256[:12]}..."
            if not self._file.sha256:
                expected_text = f"the store lists {self._file.size} bytes and the ETag {self._file.etag}"
            uri = self._storage.make_object_uri(self._file.key)
            raise StorageError(f"{uri} is damaged: the file has {size} bytes and sha256 {comparison.sha256[:12]}..., but {expected_text}")
        self._part_file.replace(self._target)
        return self._make_result(comparison.sha256, FileState.RESUMED if is_resumed else FileState.TRANSFERRED, comparison.check)

    def _make_result(self, sha256: str, state: FileState, check: Check) -> TransferredFile:
        return TransferredFile(self._target, self._storage.make_object_uri(self._file.key), self._file.size, sha256, state, check)

    def _fetch(self, report_bytes: Callable[[int], None]) -> None:
        """Append the missing bytes to the part file. After a lost connection, the download continues with the next missing byte."""
        with self._part_file.open("ab") as file:
            if file.tell() > self._file.size:
                file.seek(0)
                file.truncate()
            report_bytes(file.tell())
            lost_connection_count = 0
            while file.tell() < self._file.size:
                start_offset = file.tell()
                try:
                    for chunk in self._storage.read_chunks(self._file.key, start_offset, self._file.etag):
                        file.write(chunk)
                        report_bytes(len(chunk))
                except ConnectionLost:
                    lost_connection_count = lost_connection_count + 1 if file.tell() == start_offset else 0
                    if lost_connection_count >= MAX_LOST_CONNECTIONS:
                        raise
                else:
                    if file.tell() < self._file.size:
                        break  # the object is shorter than its size in the manifest

    def _compare(self, path: Path) -> _Comparison:
        """Compare a local file with the object."""
        if path.stat().st_size != self._file.size:
            return _Comparison(Check.SIZE, compute_sha256_of_file(path) if path == self._part_file else "", False)
        if self._file.sha256:
            sha256 = compute_sha256_of_file(path)
            return _Comparison(Check.SHA256, sha256, sha256 == self._file.sha256)
        part_bytes = self._find_part_bytes()
        if part_bytes is None:
            return _Comparison(Check.SIZE, compute_sha256_of_file(path), True)
        local_digest = digest_file(path, part_bytes)
        return _Comparison(Check.ETAG, local_digest.sha256, local_digest.etag == self._file.etag)

    def _find_part_bytes(self) -> int | None:
        """Return the size in bytes of the parts in which the object was uploaded.

        The store computes the ETag of such an object from the MD5 digests of the parts.

        Return None if the ETag contains no digest of the content, or if the part size is unknown.
        """
        if _MD5_ETAG_PATTERN.match(self._file.etag):
            return max(1, self._file.size)
        match = _MULTIPART_ETAG_PATTERN.match(self._file.etag)
        if match is None:
            return None
        default_part_bytes = choose_part_bytes(self._file.size)
        if -(-self._file.size // default_part_bytes) == int(match[1]):
            return default_part_bytes
        with StorageErrors(self._storage.make_object_uri(self._file.key)):
            response = self._storage.client.head_object(Bucket=self._storage.bucket, Key=self._storage.make_full_key(self._file.key), PartNumber=1)
        first_part_bytes = int(response["ContentLength"])
        return first_part_bytes if -(-self._file.size // max(1, first_part_bytes)) == int(match[1]) else None
