"""The folders and locks of a cache of models.

```
<entries>/<key>/files/...        the files of one model at one version; the key is a hash of the source, its version and the files' hashes
<entries>/<key>/entry.json       written before the folder gets its name: sizes and modification times of the verified files
<entries>/<key>/in-use           readers hold a shared lock on it; its modification time is the time of the last use
<entries>/.partial/<key>/        a download that is not complete
<entries>/.locks/<key>           held by the process that downloads
<top>/.locks/space               held while space is assigned to a download
```

All locks are `flock` locks: the kernel releases them when their process ends, so a killed download needs no repair.
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
"""A model that was used more recently is not removed: its pod may be between its init container and its trainer container."""
STALLED_SECONDS = 300.0
"""How long a pod waits for the download of another pod that makes no progress."""
LONGEST_WAIT_SECONDS = 3 * 3600.0
LOG_SECONDS = 15.0
MAX_ENTRY_BYTES = 4 * 1024 * 1024
PARTIAL, LOCKS, IN_USE, ENTRY, FILES, SIZE = ".partial", ".locks", "in-use", "entry.json", "files", "size"


class CacheProblem(Exception):
    """The cache cannot be used. The message says why; the pod downloads the model without the cache."""


class DamagedModel(CacheProblem):
    """A file in the cache has another hash than at its source."""


class StoredFile(LenientModel):
    """What was recorded about a file after its hash was verified."""

    size: int
    modified_ns: int
    sha256: str


class EntryRecord(LenientModel):
    """The content of `entry.json`."""

    source: str = Field(description="Source of the model, for people.")
    size: int = Field(description="Bytes of all files.")
    files: dict[str, StoredFile]


@dataclass(frozen=True)
class CacheEntry:
    """A complete model in the cache, with a shared lock that keeps it there until this process ends."""

    folder: Path
    record: EntryRecord
    lock: int
    """Descriptor of the file with the shared lock. It stays open until this process ends."""

    @property
    def files(self) -> Path:
        """Folder with the files of the model."""
        return self.folder / FILES

    @property
    def in_use_file(self) -> Path:
        return self.folder / IN_USE


@dataclass(frozen=True)
class Limits:
    """How large a cache may become, and how long a pod waits for others."""

    size_bytes: int | None = None
    """Maximum bytes of all models. None: only the size of the volume limits the cache."""
    free_share: float = 0.0
    """Share of the volume that stays free. A node evicts pods if its disk is almost full."""
    poll_seconds: float = 0.5
    stalled_seconds: float = STALLED_SECONDS
    recent_seconds: float = RECENT_SECONDS


class CacheFolder:
    """The models of one namespace. `top` is the folder whose size is limited: on a node, it contains the folders of all namespaces."""

    def __init__(self, top: Path, tenant: str, limits: Limits) -> None:
        self._top, self._entries, self._limits = top, top / tenant, limits

    # ---- finding a model ----

    def find(self, key: str, files: tuple[SourceFile, ...]) -> CacheEntry | None:
        """Return a complete model and keep it in the cache. None: the cache does not have it.

        Sizes and modification times are compared with those after the verification. If they differ, the hashes are verified again. Errors: DamagedModel;
        the model was then removed.
        """
        folder = self._entries / key
        record = _read_record(folder)
        lock = lock_shared(folder / IN_USE) if record is not None else None
        if record is None or lock is None:
            return None
        entry = CacheEntry(folder, record, lock)
        if not _is_unchanged(folder / FILES, record, files):
            problem = _problem_of(check_files(folder / FILES, files))
            if problem:
                self.remove(entry)
                os.close(lock)
                raise DamagedModel(problem)
        with contextlib.suppress(OSError):
            os.utime(folder / IN_USE)
        return entry

    def remove(self, entry: CacheEntry) -> None:
        """Remove a damaged model, unless another pod has already replaced it. Processes that read it keep their open files. A failure is only logged."""
        try:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(entry.lock), entry.in_use_file.stat()):
                    _discard(entry.folder, self._entries / PARTIAL)
        except OSError as error:
            log.warning("a model could not be removed from the cache: %s", error)

    # ---- filling the cache ----

    def provide(
        self, key: str, source: str, files: tuple[SourceFile, ...], download: Callable[[Path], None], *, log_progress: Callable[[int], None] | None = None
    ) -> tuple[CacheEntry, bool]:
        """Return the model, and whether the cache had it. Of several pods, one downloads, and the others wait.

        `download` writes the files to a folder. Its errors are raised after the incomplete download was removed. Errors: CacheProblem, OSError.
        """
        entry = self.find(key, files)
        if entry is not None:
            return entry, True
        for folder in (self._entries / PARTIAL, self._entries / LOCKS, self._top / LOCKS):
            folder.mkdir(parents=True, exist_ok=True)
        with self._download_lock(key, log_progress):
            entry = self.find(key, files)
            if entry is not None:
                return entry, True
            partial = self._reserve_space(key, sum(file.size for file in files))
            try:
                download(partial / FILES)
                self._commit(key, source, files, partial)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            entry = self.find(key, files)
        if entry is None:
            raise CacheProblem("another pod removed the model from the cache immediately")
        return entry, False

    def _commit(self, key: str, source: str, files: tuple[SourceFile, ...], partial: Path) -> None:
        touched = _ProgressFile(partial / SIZE)
        checked = check_files(partial / FILES, files, count_bytes=touched.count)
        problem = _problem_of(checked)
        if problem:
            raise CacheProblem(f"the downloaded file {problem}")
        sizes = {file.name: file.size for file in files}
        stored = {
            one.name: StoredFile(size=sizes[one.name], modified_ns=(partial / FILES / one.name).stat().st_mtime_ns, sha256=one.sha256) for one in checked
        }
        record = EntryRecord(source=source, size=sum(sizes.values()), files=stored)
        (partial / ENTRY).write_text(record.model_dump_json(by_alias=True))
        (partial / IN_USE).touch()
        with contextlib.suppress(FileNotFoundError):
            _discard(self._entries / key, self._entries / PARTIAL)  # a folder without a valid record
        partial.rename(self._entries / key)

    @contextlib.contextmanager
    def _download_lock(self, key: str, log_progress: Callable[[int], None] | None) -> Iterator[None]:
        """Wait until this process may download the model. Errors: CacheProblem if another process downloads, but makes no progress."""
        partial = self._entries / PARTIAL / key
        with _open_lock(self._entries / LOCKS / key) as descriptor:
            started = changed_at = logged_at = time.monotonic()
            seen: tuple[int, int] | None = None
            while not _try_lock(descriptor):
                now, state = time.monotonic(), _state_of(partial)
                if state != seen:
                    seen, changed_at = state, now
                elif now - changed_at > self._limits.stalled_seconds:
                    raise CacheProblem(f"another pod downloads the model, but has made no progress for {self._limits.stalled_seconds:.0f} s")
                if now - started > LONGEST_WAIT_SECONDS:
                    raise CacheProblem(f"another pod has downloaded the model for more than {LONGEST_WAIT_SECONDS:.0f} s")
                if log_progress and now - logged_at > LOG_SECONDS:
                    logged_at = now
                    log_progress(state[0])
                time.sleep(self._limits.poll_seconds)
            yield

    # ---- space ----

    def _reserve_space(self, key: str, size: int) -> Path:
        """Return an empty folder for a download of `size` bytes, after the removal of models that are not in use. Errors: CacheProblem."""
        partial = self._entries / PARTIAL / key
        with _open_lock(self._top / LOCKS / "space") as descriptor:
            self._wait_for_space_lock(descriptor)
            shutil.rmtree(partial, ignore_errors=True)
            missing = self._missing_bytes(size)
            if missing > 0:
                self._evict(missing, size)
            (partial / FILES).mkdir(parents=True)
            (partial / SIZE).write_text(str(size))
        return partial

    def _wait_for_space_lock(self, descriptor: int) -> None:
        """Errors: CacheProblem if a process does not release the lock, for example because the volume hangs where this process runs."""
        started = time.monotonic()
        while not _try_lock(descriptor):
            if time.monotonic() - started > self._limits.stalled_seconds:
                raise CacheProblem(f"another pod has held the lock for the space of the cache for more than {self._limits.stalled_seconds:.0f} s")
            time.sleep(self._limits.poll_seconds)

    def _missing_bytes(self, size: int) -> int:
        """The bytes by which `size` more bytes exceed the volume or the limit of the cache. Downloads that run count as if they were complete."""
        pending_size, unwritten = self._pending_bytes()
        usage = shutil.disk_usage(self._top)
        missing = size + unwritten - (usage.free - int(usage.total * self._limits.free_share))
        if self._limits.size_bytes is None:
            return missing
        stored = sum(record.size for _, record in self._stored())
        return max(missing, stored + pending_size + size - self._limits.size_bytes)

    def _pending_bytes(self) -> tuple[int, int]:
        """The bytes of all downloads that run, and how many of them are not written yet. Downloads of killed processes are removed."""
        total = unwritten = 0
        for partial in [folder for entries in self._all_entries() for folder in (entries / PARTIAL).glob("*")]:
            with _open_lock(partial.parents[1] / LOCKS / partial.name) as descriptor:
                if _try_lock(descriptor):
                    shutil.rmtree(partial, ignore_errors=True)
                    continue
            with contextlib.suppress(OSError, ValueError):
                size = int((partial / SIZE).read_text())
                total, unwritten = total + size, unwritten + max(0, size - _state_of(partial)[0])
        return total, unwritten

    def _all_entries(self) -> list[Path]:
        """The folders of all namespaces. Folders that this process cannot read are not part of the cache, for example `lost+found` of a disk."""
        folders = [folder for folder in self._top.iterdir() if not folder.name.startswith(".")]
        return [folder for folder in folders if folder.is_dir() and not folder.is_symlink() and _is_readable(folder)]

    def _stored(self) -> list[tuple[Path, EntryRecord]]:
        folders = [folder for entries in self._all_entries() for folder in entries.glob("*") if not folder.name.startswith(".")]
        return [(folder, record) for folder in folders if (record := _read_record(folder)) is not None]

    def _evict(self, missing: int, size: int) -> None:
        """Remove the models that were used least recently, until `missing` bytes are free. Errors: CacheProblem; then nothing was removed."""
        with contextlib.ExitStack() as locks:
            chosen: list[Path] = []
            freed = 0
            for folder, record in sorted(self._stored(), key=lambda item: _used_at(item[0])):
                if freed >= missing:
                    break
                if time.time() - _used_at(folder) > self._limits.recent_seconds and _lock_if_unused(folder, locks):
                    chosen.append(folder)
                    freed += record.size
            if freed < missing:
                raise CacheProblem(
                    f"the cache has no space for {size / 1e9:.2f} GB: {missing / 1e9:.2f} GB are missing, and the models that are not in use have "
                    f"{freed / 1e9:.2f} GB"
                )
            for folder in chosen:
                log.info("the model %s is removed from the cache", folder.name)
                _discard(folder, folder.parent / PARTIAL)


class _ProgressFile:
    """A file whose modification time changes while bytes are read, so that waiting pods see the progress."""

    def __init__(self, file: Path) -> None:
        self._file, self._touched_at = file, time.monotonic()

    def count(self, _bytes: int) -> None:
        if time.monotonic() - self._touched_at > 1:
            self._touched_at = time.monotonic()
            os.utime(self._file)


def _problem_of(checked: list[CheckedFile]) -> str:
    return next((one.problem for one in checked if one.problem), "")


def _read_record(folder: Path) -> EntryRecord | None:
    """Return the record of a complete model; None if there is no valid record."""
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
        stored = record.files.get(file.name)
        try:
            status = (folder / file.name).lstat()
        except OSError:
            return False
        if stored is None or (status.st_size, status.st_mtime_ns) != (stored.size, stored.modified_ns) or stored.size != file.size:
            return False
    return True


def _is_readable(folder: Path) -> bool:
    try:
        os.scandir(folder).close()
    except OSError:
        return False
    return True


def _discard(folder: Path, partial: Path) -> None:
    """Remove a folder. It first gets another name, so that no process finds an incomplete model. Errors: OSError."""
    partial.mkdir(exist_ok=True)
    removed = partial / f".removed-{folder.name}-{os.urandom(4).hex()}"
    folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


@contextlib.contextmanager
def _open_lock(file: Path) -> Iterator[int]:
    """Open a file for locks; closing it releases the lock."""
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
    """Take the exclusive lock of a model until the removal is done. False: a pod uses the model."""
    try:
        descriptor = os.open(folder / IN_USE, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    locks.callback(os.close, descriptor)
    return _try_lock(descriptor)


def _used_at(folder: Path) -> float:
    """When the model was used last, in seconds since the epoch; 0 if that is not known."""
    try:
        return (folder / IN_USE).lstat().st_mtime
    except OSError:
        return 0.0


def _state_of(folder: Path) -> tuple[int, int]:
    """Bytes of all files below a folder, and the newest modification time of one of them."""
    size = newest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                status = Path(parent, name).lstat()
                size, newest = size + status.st_size, max(newest, status.st_mtime_ns)
    return size, newest
