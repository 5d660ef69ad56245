"""Manages the folders and locks of a cache of models.

`<top>` is the folder of the whole cache, and `<entries>` is its folder for one namespace. `<key>` is a hash of the model's source, of the version
at the source and of the files' hashes.

```
<entries>/<key>/files/...        the files of one model at one version
<entries>/<key>/entry.json       sizes and modification times of the verified files; written before the folder gets its final name
<entries>/<key>/in-use           readers of the model hold a shared lock on this file; its modification time is the time of the last use
<entries>/.partial/<key>/        a download that is not complete
<entries>/.locks/<key>           the process that downloads the model holds a lock on this file
<top>/.locks/space               a process that reserves space for a download holds a lock on this file
```

All locks are `flock` locks. The kernel releases the locks of a process when the process ends, so a killed download leaves no lock behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from finetune_api.base import LenientModel
from pydantic import Field, ValidationError

from finetune_trainer.model_cache.content import CheckedFile, SourceFile, check_files
from finetune_trainer.model_cache.record import lock_shared

log = logging.getLogger(__name__)

RECENT_SECONDS = 900.0
"""A model is removed only if no pod has used it for this time. The pause is needed because a pod that needs the model holds no lock between the end of
its init container and the start of its trainer container."""
STALLED_SECONDS = 300.0
"""How long a pod waits for another pod's download that makes no progress."""
LONGEST_WAIT_SECONDS = 3 * 3600.0
LOG_INTERVAL_SECONDS = 15.0
MAX_ENTRY_BYTES = 4 * 1024 * 1024
PARTIAL, LOCKS, IN_USE, ENTRY, FILES, SIZE = ".partial", ".locks", "in-use", "entry.json", "files", "size"


class CacheProblem(Exception):
    """The cache cannot be used. The message says why; the pod downloads the model without the cache."""


class DamagedModel(CacheProblem):
    """A file in the cache has another hash than at its source."""


class StoredFile(LenientModel):
    """What `entry.json` records about a file whose hash was verified."""

    size: int
    modified_ns: int
    sha256: str


class EntryRecord(LenientModel):
    """The contents of `entry.json`."""

    source: str = Field(description="Source of the model. Only people read this field.")
    size: int = Field(description="Total size of all files in bytes.")
    files: dict[str, StoredFile]


@dataclass(frozen=True)
class CacheEntry:
    """A complete model in the cache. A shared lock keeps the model in the cache until this process ends."""

    folder: Path
    record: EntryRecord
    lock: int
    """Descriptor of the file with the shared lock. The descriptor stays open until this process ends."""

    @property
    def files(self) -> Path:
        """Folder with the files of the model."""
        return self.folder / FILES

    @property
    def in_use_file(self) -> Path:
        return self.folder / IN_USE


@dataclass(frozen=True)
class CacheLimits:
    """How large the cache may become, and how long a pod waits for other pods."""

    size_bytes: int | None = None
    """Maximum size of all models together, in bytes. None: only the size of the volume limits the cache."""
    free_share: float = 0.0
    """Share of the volume that must stay free, because a node evicts pods if its disk is almost full."""
    poll_seconds: float = 0.5
    stalled_seconds: float = STALLED_SECONDS
    recent_seconds: float = RECENT_SECONDS


class CacheFolder:
    """The cached models of one namespace.

    `top`: the folder whose size is limited. If the cache is on a node's disk, `top` contains the folders of all namespaces. `tenant`: name of the
    namespace's folder.
    """

    def __init__(self, top: Path, tenant: str, limits: CacheLimits) -> None:
        self._top_folder, self._entries_folder, self._limits = top, top / tenant, limits

    # ---- finding a model ----

    def find(self, model_key: str, files: tuple[SourceFile, ...]) -> CacheEntry | None:
        """Return a complete model, and lock it so that it stays in the cache. None if the cache does not have the model.

        If the size or the modification time of a file has changed since its verification, the hashes are verified again.
        Errors: DamagedModel if a hash differs; the model is then removed from the cache.
        """
        folder = self._entries_folder / model_key
        record = _read_record(folder)
        lock = lock_shared(folder / IN_USE) if record is not None else None
        if record is None or lock is None:
            return None
        entry = CacheEntry(folder, record, lock)
        if not _is_unchanged(folder / FILES, record, files):
            problem = _find_first_problem(check_files(folder / FILES, files))
            if problem:
                self.remove(entry)
                os.close(lock)
                raise DamagedModel(problem)
        with contextlib.suppress(OSError):
            os.utime(folder / IN_USE)
        return entry

    def remove(self, entry: CacheEntry) -> None:
        """Remove a damaged model, unless another pod has already replaced it. If the removal fails, the failure is only logged.

        A process that is reading the model can still read the files that it has opened.
        """
        try:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(entry.lock), entry.in_use_file.stat()):
                    _discard(entry.folder, self._entries_folder / PARTIAL)
        except OSError as error:
            log.warning("a model could not be removed from the cache: %s", error)

    # ---- filling the cache ----

    def provide(
        self, model_key: str, source: str, files: tuple[SourceFile, ...], download: Callable[[Path], None], *, log_progress: Callable[[int], None] | None = None
    ) -> tuple[CacheEntry, bool]:
        """Return the model, and whether the cache had it. If several pods need the same model, one of them downloads it, and the others wait.

        `download` writes the files to the given folder. If `download` raises an error, the incomplete files are removed before the error is raised again.
        `log_progress`: receives the number of bytes that another pod has downloaded so far. Errors: CacheProblem, OSError; errors of `download`.
        """
        entry = self.find(model_key, files)
        if entry is not None:
            return entry, True
        for folder in (self._entries_folder / PARTIAL, self._entries_folder / LOCKS, self._top_folder / LOCKS):
            folder.mkdir(parents=True, exist_ok=True)
        with self._hold_download_lock(model_key, log_progress):
            entry = self.find(model_key, files)
            if entry is not None:
                return entry, True
            partial_folder = self._reserve_space(model_key, sum(file.size for file in files))
            try:
                download(partial_folder / FILES)
                self._commit(model_key, source, files, partial_folder)
            except BaseException:
                shutil.rmtree(partial_folder, ignore_errors=True)
                raise
            entry = self.find(model_key, files)
        if entry is None:
            raise CacheProblem("another pod removed the model from the cache immediately")
        return entry, False

    def _commit(self, model_key: str, source: str, files: tuple[SourceFile, ...], partial_folder: Path) -> None:
        progress_file = _ProgressFile(partial_folder / SIZE)
        checked_files = check_files(partial_folder / FILES, files, count_bytes=progress_file.count)
        problem = _find_first_problem(checked_files)
        if problem:
            raise CacheProblem(f"the downloaded file {problem}")
        sizes = {file.name: file.size for file in files}
        stored_files = {
            checked_file.name: StoredFile(
                size=sizes[checked_file.name], modified_ns=(partial_folder / FILES / checked_file.name).stat().st_mtime_ns,
                sha256=checked_file.sha256,
            )
            for checked_file in checked_files
        }
        record = EntryRecord(source=source, size=sum(sizes.values()), files=stored_files)
        (partial_folder / ENTRY).write_text(record.model_dump_json(by_alias=True))
        (partial_folder / IN_USE).touch()
        with contextlib.suppress(FileNotFoundError):
            _discard(self._entries_folder / model_key, self._entries_folder / PARTIAL)  # If this folder exists, its record is not valid.
        partial_folder.rename(self._entries_folder / model_key)

    @contextlib.contextmanager
    def _hold_download_lock(self, model_key: str, log_progress: Callable[[int], None] | None) -> Iterator[None]:
        """Wait until this process may download the model. Errors: CacheProblem if the download of another process stalls or takes too long."""
        partial_folder = self._entries_folder / PARTIAL / model_key
        with _open_lock(self._entries_folder / LOCKS / model_key) as descriptor:
            started_at = changed_at = logged_at = time.monotonic()
            last_progress: tuple[int, int] | None = None
            while not _try_lock(descriptor):
                now, progress = time.monotonic(), _measure_progress(partial_folder)
                if progress != last_progress:
                    last_progress, changed_at = progress, now
                elif now - changed_at > self._limits.stalled_seconds:
                    raise CacheProblem(f"another pod downloads the model, but has made no progress for {self._limits.stalled_seconds:.0f} s")
                if now - started_at > LONGEST_WAIT_SECONDS:
                    raise CacheProblem(f"another pod has downloaded the model for more than {LONGEST_WAIT_SECONDS:.0f} s")
                if log_progress and now - logged_at > LOG_INTERVAL_SECONDS:
                    logged_at = now
                    log_progress(progress[0])
                time.sleep(self._limits.poll_seconds)
            yield

    # ---- space ----

    def _reserve_space(self, model_key: str, size: int) -> Path:
        """Return an empty folder for a download of `size` bytes. If space is missing, remove models that are not in use. Errors: CacheProblem."""
        partial_folder = self._entries_folder / PARTIAL / model_key
        with _open_lock(self._top_folder / LOCKS / "space") as descriptor:
            self._wait_for_space_lock(descriptor)
            shutil.rmtree(partial_folder, ignore_errors=True)
            missing_bytes = self._compute_missing_bytes(size)
            if missing_bytes > 0:
                self._evict(missing_bytes, size)
            (partial_folder / FILES).mkdir(parents=True)
            (partial_folder / SIZE).write_text(str(size))
        return partial_folder

    def _wait_for_space_lock(self, descriptor: int) -> None:
        """Wait for the lock. Errors: CacheProblem if another process does not release the lock, for example because the volume hangs on its node."""
        started_at = time.monotonic()
        while not _try_lock(descriptor):
            if time.monotonic() - started_at > self._limits.stalled_seconds:
                raise CacheProblem(f"another pod has held the lock for the space of the cache for more than {self._limits.stalled_seconds:.0f} s")
            time.sleep(self._limits.poll_seconds)

    def _compute_missing_bytes(self, size: int) -> int:
        """Return by how many bytes a further download of `size` bytes would exceed the free space of the volume or the cache's limit.

        Running downloads count as complete.
        """
        pending_bytes, unwritten_bytes = self._measure_running_downloads()
        usage = shutil.disk_usage(self._top_folder)
        missing_bytes = size + unwritten_bytes - (usage.free - int(usage.total * self._limits.free_share))
        if self._limits.size_bytes is None:
            return missing_bytes
        stored_bytes = sum(record.size for _, record in self._list_stored_models())
        return max(missing_bytes, stored_bytes + pending_bytes + size - self._limits.size_bytes)

    def _measure_running_downloads(self) -> tuple[int, int]:
        """Return the total size of all running downloads, and how many of these bytes are not written yet. Removes downloads of killed processes."""
        total_bytes = unwritten_bytes = 0
        for partial_folder in [folder for namespace_folder in self._list_namespace_folders() for folder in (namespace_folder / PARTIAL).glob("*")]:
            with _open_lock(partial_folder.parents[1] / LOCKS / partial_folder.name) as descriptor:
                if _try_lock(descriptor):
                    shutil.rmtree(partial_folder, ignore_errors=True)
                    continue
            with contextlib.suppress(OSError, ValueError):
                size = int((partial_folder / SIZE).read_text())
                total_bytes, unwritten_bytes = total_bytes + size, unwritten_bytes + max(0, size - _measure_progress(partial_folder)[0])
        return total_bytes, unwritten_bytes

    def _list_namespace_folders(self) -> list[Path]:
        """Return the folders of all namespaces. A folder that this process cannot read, such as a disk's `lost+found`, is left out."""
        folders = [folder for folder in self._top_folder.iterdir() if not folder.name.startswith(".")]
        return [folder for folder in folders if folder.is_dir() and not folder.is_symlink() and _is_readable(folder)]

    def _list_stored_models(self) -> list[tuple[Path, EntryRecord]]:
        folders = [folder for namespace_folder in self._list_namespace_folders() for folder in namespace_folder.glob("*") if not folder.name.startswith(".")]
        return [(folder, record) for folder in folders if (record := _read_record(folder)) is not None]

    def _evict(self, missing_bytes: int, size: int) -> None:
        """Remove the least recently used models until `missing_bytes` are free. Errors: CacheProblem, before any model is removed, if this is impossible."""
        with contextlib.ExitStack() as locks:
            evicted_folders: list[Path] = []
            freed_bytes = 0
            for folder, record in sorted(self._list_stored_models(), key=lambda folder_and_record: _read_last_use_time(folder_and_record[0])):
                if freed_bytes >= missing_bytes:
                    break
                if time.time() - _read_last_use_time(folder) > self._limits.recent_seconds and _lock_if_unused(folder, locks):
                    evicted_folders.append(folder)
                    freed_bytes += record.size
            if freed_bytes < missing_bytes:
                raise CacheProblem(
                    f"the cache has no space for {size / 1e9:.2f} GB: {missing_bytes / 1e9:.2f} GB are missing, and the models that are not in use have "
                    f"{freed_bytes / 1e9:.2f} GB"
                )
            for folder in evicted_folders:
                log.info("the model %s is removed from the cache", folder.name)
                _discard(folder, folder.parent / PARTIAL)


class _ProgressFile:
    """Touches a file while bytes are read, so that waiting pods see the progress."""

    def __init__(self, file: Path) -> None:
        self._file, self._touched_at = file, time.monotonic()

    def count(self, _bytes: int) -> None:
        if time.monotonic() - self._touched_at > 1:
            self._touched_at = time.monotonic()
            os.utime(self._file)


def _find_first_problem(checked_files: list[CheckedFile]) -> str:
    return next((file.problem for file in checked_files if file.problem), "")


def _read_record(folder: Path) -> EntryRecord | None:
    """Return the record of the model in a folder; None if the folder has no valid record."""
    file = folder / ENTRY
    try:
        if file.is_symlink() or not file.is_file() or file.stat().st_size > MAX_ENTRY_BYTES:
            return None
        return EntryRecord.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


def _is_unchanged(folder: Path, record: EntryRecord, files: tuple[SourceFile, ...]) -> bool:
    """Whether all files have the size and the modification time that were recorded after their verification."""
    for file in files:
        stored_file = record.files.get(file.name)
        try:
            file_status = (folder / file.name).lstat()
        except OSError:
            return False
        if stored_file is None or stored_file.size != file.size:
            return False
        if (file_status.st_size, file_status.st_mtime_ns) != (stored_file.size, stored_file.modified_ns):
            return False
    return True


def _is_readable(folder: Path) -> bool:
    try:
        os.scandir(folder).close()
    except OSError:
        return False
    return True


def _discard(folder: Path, partial_parent: Path) -> None:
    """Remove a folder. The folder is first moved into the folder `partial_parent`, so that no process finds an incomplete model. Errors: OSError."""
    partial_parent.mkdir(exist_ok=True)
    removed_folder = partial_parent / f".removed-{folder.name}-{os.urandom(4).hex()}"
    folder.rename(removed_folder)
    shutil.rmtree(removed_folder, ignore_errors=True)


@contextlib.contextmanager
def _open_lock(file: Path) -> Iterator[int]:
    """Yield the descriptor of a lock file. At the end of the context, the file is closed, which releases the lock."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise CacheProblem(f"the volume does not support file locks ({error.strerror})") from error
    return True


def _lock_if_unused(folder: Path, locks: contextlib.ExitStack) -> bool:
    """Try to take the exclusive lock of a model, and keep it until `locks` is closed. Returns False if a pod uses the model."""
    try:
        descriptor = os.open(folder / IN_USE, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    locks.callback(os.close, descriptor)
    return _try_lock(descriptor)


def _read_last_use_time(folder: Path) -> float:
    """Return when the model was used last, in seconds since 1970; 0 if this is not known."""
    try:
        return (folder / IN_USE).lstat().st_mtime
    except OSError:
        return 0.0


def _measure_progress(folder: Path) -> tuple[int, int]:
    """Return the total size of all files below a folder in bytes, and the newest modification time of these files in ns."""
    total_bytes = newest_change_ns = 0
    for parent, _, file_names in os.walk(folder):
        for name in file_names:
            with contextlib.suppress(OSError):
                file_status = Path(parent, name).lstat()
                total_bytes, newest_change_ns = total_bytes + file_status.st_size, max(newest_change_ns, file_status.st_mtime_ns)
    return total_bytes, newest_change_ns
