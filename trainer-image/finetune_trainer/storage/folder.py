"""A store in a folder: `file:///path` on a laptop, `pvc://claim/path` in a pod.

An object is written to a hidden file in its folder, flushed to disk and renamed. Conditional creation uses a hard link:
if two writers create the same object at once, only one succeeds.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from finetune_api.errors import CredentialsError, FineTuneError, StorageError, StorageSetupError

from finetune_trainer.storage.base import CHUNK_BYTES, ByteCounter, CreateResult, ObjectStat
from finetune_trainer.storage.errors import local_disk_error

PARTIAL_FILE_PREFIX = ".partial-"
HARD_LINK_REFUSED_ERRNOS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)
"""Values of `errno` with which file systems without hard links (SMB, many FUSE file systems) refuse a hard link."""


class FolderStore:
    """A store whose objects are files below `root`."""

    def __init__(self, root: Path, uri: str) -> None:
        self.root = root
        self.uri = uri.rstrip("/")
        self.retries = 0

    def put_file(self, source_file: Path, key: str, *, byte_counter: ByteCounter | None = None) -> None:
        with self._prepare_partial_file(key) as partial_file:
            with source_file.open("rb") as reader, partial_file.open("wb") as writer:
                while chunk := reader.read(CHUNK_BYTES):
                    writer.write(chunk)
                    if byte_counter:
                        byte_counter(len(chunk))
                writer.flush()
                os.fsync(writer.fileno())
            partial_file.rename(self.root / key)

    def put(self, key: str, data: bytes) -> None:
        with self._prepare_partial_file(key) as partial_file:
            _write_and_sync(partial_file, data)
            partial_file.rename(self.root / key)

    def create(self, key: str, data: bytes) -> CreateResult:
        with self._prepare_partial_file(key) as partial_file:
            _write_and_sync(partial_file, data)
            try:
                (self.root / key).hardlink_to(partial_file)
            except FileExistsError:
                return CreateResult.EXISTS
            except OSError as error:
                if error.errno not in HARD_LINK_REFUSED_ERRNOS:
                    raise
                return _create_in_place(self.root / key, data)
        return CreateResult.NEW

    def get(self, key: str) -> bytes | None:
        with self._translate_os_errors(f"read {key}"):
            try:
                return (self.root / key).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def download(self, key: str, target_file: Path, *, byte_counter: ByteCounter | None = None) -> str | None:
        digest = hashlib.sha256()
        with self._translate_os_errors(f"read {key}"), contextlib.ExitStack() as stack:
            try:
                reader = stack.enter_context((self.root / key).open("rb"))
            except (FileNotFoundError, NotADirectoryError):
                return None
            with _translate_local_errors():
                target_file.parent.mkdir(parents=True, exist_ok=True)
                writer = stack.enter_context(target_file.open("wb"))
            while chunk := reader.read(CHUNK_BYTES):
                digest.update(chunk)
                with _translate_local_errors():
                    writer.write(chunk)
                if byte_counter:
                    byte_counter(len(chunk))
            with _translate_local_errors():
                writer.flush()
        return digest.hexdigest()

    def stat(self, key: str) -> ObjectStat | None:
        with self._translate_os_errors(f"read {key}"):
            try:
                file_status = (self.root / key).stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
        return ObjectStat(key, file_status.st_size, str(file_status.st_mtime_ns), datetime.fromtimestamp(file_status.st_mtime, UTC))

    def list(self, key_prefix: str) -> Iterator[ObjectStat]:
        base_folder = self.root / key_prefix.rpartition("/")[0]
        with self._translate_os_errors(f"list {key_prefix}"):
            for path in sorted(path for path in _walk_files(base_folder) if not path.name.startswith(PARTIAL_FILE_PREFIX)):
                key = path.relative_to(self.root).as_posix()
                if key.startswith(key_prefix) and (stat := self.stat(key)):
                    yield stat

    def list_folders(self) -> tuple[str, ...]:
        with self._translate_os_errors("list the folders"):
            try:
                return tuple(sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir()))
            except (FileNotFoundError, NotADirectoryError):
                return ()

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            with self._translate_os_errors(f"delete {key}"):
                (self.root / key).unlink(missing_ok=True)
                self._remove_empty_folders((self.root / key).parent)

    def sweep(self, key_prefix: str) -> int:
        with self._translate_os_errors(f"delete partial files of {key_prefix}"):
            partial_files = [path for path in _walk_files(self.root / key_prefix) if path.name.startswith(PARTIAL_FILE_PREFIX)]
            for path in partial_files:
                path.unlink(missing_ok=True)
        return len(partial_files)

    def close(self) -> None:
        """Do nothing: there are no connections."""

    def _remove_empty_folders(self, folder: Path) -> None:
        while folder != self.root and self.root in folder.parents:
            try:
                folder.rmdir()
            except OSError:  # The folder is not empty, or another process removed it.
                return
            folder = folder.parent

    @contextlib.contextmanager
    def _prepare_partial_file(self, key: str) -> Iterator[Path]:
        """Yield the path of a hidden file in the folder of `key`. At the end of the context, remove the hidden file unless it was renamed."""
        target_file = self.root / key
        partial_file = target_file.parent / f"{PARTIAL_FILE_PREFIX}{uuid.uuid4().hex[:12]}"
        with self._translate_os_errors(f"write {key}"):
            target_file.parent.mkdir(parents=True, exist_ok=True)
            try:
                yield partial_file
            finally:
                partial_file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _translate_os_errors(self, action: str) -> Iterator[None]:
        try:
            yield
        except FineTuneError:
            raise
        except PermissionError as error:
            raise CredentialsError(
                "PermissionDenied", f"cannot {action} below {self.uri}: the file system refuses it for user {os.getuid()}",
                hint=f"make the folder writable for user and group {os.getuid()}",
            ) from error  # fmt: skip
        except OSError as error:
            if error.errno == errno.EROFS:
                raise StorageSetupError(
                    "StorageReadOnly", f"cannot {action} below {self.uri}: the volume is mounted read-only",
                    hint="use a volume that can be written to",
                ) from error  # fmt: skip
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageError(
                    "StorageFull",
                    f"cannot {action} below {self.uri}: the disk is full",
                    hint="free space, or use a larger volume",
                ) from error
            raise StorageError("StorageFailed", f"cannot {action} below {self.uri}: {error.strerror or error}") from error


def _walk_files(base_folder: Path) -> Iterator[Path]:
    """Yield the files below a folder. Folders that another process removes in the meantime are skipped.

    Errors: OSError if a folder cannot be read, because such a folder must not look empty.
    """

    def raise_if_unreadable(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    for folder, _, file_names in os.walk(base_folder, onerror=raise_if_unreadable):
        yield from (Path(folder, name) for name in file_names)


def _create_in_place(target: Path, data: bytes) -> CreateResult:
    """Create a file unless it exists, on a file system without hard links. Until the content is written, another process can read an empty file."""
    try:
        descriptor = os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return CreateResult.EXISTS
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return CreateResult.NEW


@contextlib.contextmanager
def _translate_local_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise local_disk_error(error) from error


def _write_and_sync(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
