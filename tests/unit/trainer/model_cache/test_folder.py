"""Several processes share one download of a model, and the models that were used least recently are removed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finetune_trainer.model_cache import folder as subject
from finetune_trainer.model_cache.content import CheckedFile, SourceFile
from finetune_trainer.model_cache.folder import CacheEntry, CacheFolder, CacheLimits, CacheProblem, DamagedModel
from finetune_trainer.model_cache.record import CachedModel, CacheRecord

LIMITS = CacheLimits(poll_seconds=0.01, recent_seconds=0.0)
LONG_AGO = 1000.0


def list_model_files(text: str) -> tuple[SourceFile, ...]:
    data = text.encode()
    return (SourceFile("model.safetensors", len(data), "sha256:" + hashlib.sha256(data).hexdigest()),)


def make_writer(text: str, written_texts: list[str] | None = None) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        if written_texts is not None:
            written_texts.append(text)
        (folder / "model.safetensors").write_text(text)

    return write


def store_model(cache: CacheFolder, text: str, key: str | None = None) -> tuple[CacheEntry, bool]:
    return cache.provide(key or text[0], "org/model", list_model_files(text), make_writer(text))


def list_stored_names(cache_root: Path, tenant: str = "team") -> list[str]:
    """Return the keys of the complete models, and the names of the files that unfinished downloads have left."""
    names = [path.name for path in (cache_root / tenant).iterdir() if not path.name.startswith(".")]
    return sorted(names + [f".partial/{path.name}" for path in (cache_root / tenant / ".partial").iterdir()])


def release_model(entry: CacheEntry, used_at: float = LONG_AGO) -> None:
    """Release this process's lock on a model, and set the time of its last use.

    Without this call, the process would keep its lock until it ends.
    """
    for descriptor in list(Path("/proc/self/fd").iterdir()):
        try:
            target = descriptor.readlink()
        except OSError:
            continue
        if target == entry.in_use_file:
            os.close(int(descriptor.name))
    os.utime(entry.in_use_file, (used_at, used_at))


def test_the_second_use_downloads_nothing(tmp_path: Path) -> None:
    cache, downloaded_texts = CacheFolder(tmp_path, "team", LIMITS), list[str]()
    results = [cache.provide("k", "org/model", list_model_files("weights"), make_writer("weights", downloaded_texts)) for _ in range(3)]
    assert [from_cache for _, from_cache in results] == [False, True, True] and downloaded_texts == ["weights"]
    assert (results[2][0].files / "model.safetensors").read_text() == "weights"
    assert results[2][0].record.files["model.safetensors"].sha256 == hashlib.sha256(b"weights").hexdigest()
    assert list_stored_names(tmp_path) == ["k"]


def test_a_download_with_another_hash_is_not_stored(tmp_path: Path) -> None:
    cache = CacheFolder(tmp_path, "team", LIMITS)
    with pytest.raises(CacheProblem, match=r"^the downloaded file model.safetensors has another hash than at the source$"):
        cache.provide("k", "org/model", list_model_files("weights"), make_writer("waights"))
    assert list_stored_names(tmp_path) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_download_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def fail_after_three_letters(folder: Path) -> None:
        make_writer("wei")(folder)
        raise error

    cache = CacheFolder(tmp_path, "team", LIMITS)
    with pytest.raises(type(error)):
        cache.provide("k", "org/model", list_model_files("weights"), fail_after_three_letters)
    assert list_stored_names(tmp_path) == [] and store_model(cache, "weights", "k")[1] is False


# ---- several processes ----

CHILD_PROGRAM = """
import hashlib, sys, time
from pathlib import Path
sys.path[:0] = [{path!r}]
from test_folder import LIMITS, list_model_files
from finetune_trainer.model_cache.folder import CacheFolder

def download(folder):
    with open({log!r}, "a") as stream:
        stream.write("download\\n")
    (folder / "model.safetensors").write_text("wei")
    print("started", flush=True)
    sys.stdin.readline()
    (folder / "model.safetensors").write_text("weights")

entry, from_cache = CacheFolder(Path({top!r}), "team", LIMITS).provide("k", "org/model", list_model_files("weights"), download)
print("done", from_cache, flush=True)
"""


def start_process(tmp_path: Path) -> subprocess.Popen[str]:
    """Start a process that provides the model. Its download ends when the process reads a line (see `end_download`)."""
    code = CHILD_PROGRAM.format(path=str(Path(__file__).parent), log=str(tmp_path / "log"), top=str(tmp_path / "cache"))
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end_download(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def count_downloads(tmp_path: Path) -> int:
    return len((tmp_path / "log").read_text().splitlines())


def test_of_several_processes_one_downloads_and_the_others_wait(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    first_process = start_process(tmp_path)
    assert read_line(first_process) == "started"
    other_processes = [start_process(tmp_path) for _ in range(3)]
    end_download(first_process)
    assert read_line(first_process) == "done False" and [read_line(process) for process in other_processes] == ["done True"] * 3
    assert count_downloads(tmp_path) == 1
    assert [process.wait() for process in (first_process, *other_processes)] == [0] * 4


def test_a_killed_download_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    first_process = start_process(tmp_path)
    assert read_line(first_process) == "started"
    second_process = start_process(tmp_path)
    first_process.kill()
    assert read_line(second_process) == "started"
    end_download(second_process)
    assert read_line(second_process) == "done False" and count_downloads(tmp_path) == 2
    assert second_process.wait() == 0 and first_process.wait() == -9
    assert list_stored_names(tmp_path / "cache") == ["k"]


def test_a_pod_stops_waiting_for_a_download_without_progress(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    first_process = start_process(tmp_path)
    assert read_line(first_process) == "started"
    cache = CacheFolder(tmp_path / "cache", "team", CacheLimits(poll_seconds=0.01, stalled_seconds=0.2))
    with pytest.raises(CacheProblem, match=r"^another pod downloads the model, but has made no progress for 0 s$"):
        cache.provide("k", "org/model", list_model_files("weights"), make_writer("weights"))
    end_download(first_process)
    assert read_line(first_process) == "done False" and first_process.wait() == 0


def test_a_download_with_progress_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ten polls take several times as long as the limit. The download counts as active, because its file grows between any two polls."""
    (tmp_path / "cache").mkdir()
    first_process = start_process(tmp_path)
    assert read_line(first_process) == "started"
    partial_file, poll_times, progress_bytes = tmp_path / "cache/team/.partial/k/files/other", list[float](), list[int]()

    def sleep(_seconds: float) -> None:
        poll_times.append(len(poll_times) * 200.0)
        partial_file.write_text("x" * len(poll_times))
        if len(poll_times) == 10:
            partial_file.unlink()
            end_download(first_process)
            assert read_line(first_process) == "done False"

    monkeypatch.setattr(subject.time, "sleep", sleep)
    monkeypatch.setattr(subject.time, "monotonic", lambda: poll_times[-1] if poll_times else 0.0)
    cache = CacheFolder(tmp_path / "cache", "team", LIMITS)
    assert cache.provide("k", "org/model", list_model_files("weights"), make_writer("weights"), log_progress=progress_bytes.append)[1] is True
    assert len(poll_times) == 10 and progress_bytes[:2] == [6, 7] and first_process.wait() == 0


def test_two_models_are_downloaded_at_the_same_time(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    first_process = start_process(tmp_path)
    assert read_line(first_process) == "started"
    assert store_model(CacheFolder(tmp_path / "cache", "team", LIMITS), "other")[1] is False
    end_download(first_process)
    assert read_line(first_process) == "done False" and first_process.wait() == 0


# ---- damaged models ----


def test_an_unchanged_model_is_not_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = CacheFolder(tmp_path, "team", LIMITS)
    store_model(cache, "weights", "k")
    monkeypatch.setattr(subject, "check_files", lambda *_, **__: pytest.fail("the files were read"))
    assert cache.find("k", list_model_files("weights")) is not None


def test_a_changed_model_is_found_and_removed(tmp_path: Path) -> None:
    cache = CacheFolder(tmp_path, "team", LIMITS)
    entry, _ = store_model(cache, "weights", "k")
    (entry.files / "model.safetensors").write_text("waights")
    with pytest.raises(DamagedModel, match="^model.safetensors has another hash than at the source$"):
        cache.find("k", list_model_files("weights"))
    assert list_stored_names(tmp_path) == [] and store_model(cache, "weights", "k")[1] is False


def test_a_damaged_model_that_another_pod_has_replaced_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pods find the damage of the same model. The slower pod must not remove the model that the faster pod has downloaded again."""
    slow_cache, fast_cache = CacheFolder(tmp_path, "team", LIMITS), CacheFolder(tmp_path, "team", LIMITS)
    entry, _ = store_model(slow_cache, "weights", "k")
    (entry.files / "model.safetensors").write_text("waights")
    original_check = subject.check_files

    def check_slowly(*arguments: Any, **options: Any) -> list[CheckedFile]:
        checked_files = original_check(*arguments, **options)
        monkeypatch.setattr(subject, "check_files", original_check)
        with pytest.raises(DamagedModel):
            fast_cache.find("k", list_model_files("weights"))
        assert store_model(fast_cache, "weights", "k")[1] is False
        return checked_files

    monkeypatch.setattr(subject, "check_files", check_slowly)
    with pytest.raises(DamagedModel):
        slow_cache.find("k", list_model_files("weights"))
    assert list_stored_names(tmp_path) == ["k"] and store_model(slow_cache, "weights", "k")[1] is True


def test_a_damaged_model_is_removed_although_hidden_folders_are_missing(tmp_path: Path) -> None:
    """The hidden folders are missing, for example, in a copy of the volume that contains only the visible folders."""
    cache = CacheFolder(tmp_path, "team", LIMITS)
    entry, _ = store_model(cache, "weights", "k")
    (entry.files / "model.safetensors").write_text("waights")
    shutil.rmtree(tmp_path / "team/.partial")
    with pytest.raises(DamagedModel):
        cache.find("k", list_model_files("weights"))
    assert list_stored_names(tmp_path) == []


def test_a_model_with_another_time_but_the_same_bytes_is_used(tmp_path: Path) -> None:
    cache = CacheFolder(tmp_path, "team", LIMITS)
    entry, _ = store_model(cache, "weights", "k")
    os.utime(entry.files / "model.safetensors", (1.0, 1.0))
    assert cache.find("k", list_model_files("weights")) is not None


@pytest.mark.parametrize("record_text", ["", "{}", "no json", '{"source": "x", "size": -1, "files": 3}', "x" * (5 * 1024 * 1024)])
def test_a_model_without_a_valid_record_is_replaced(tmp_path: Path, record_text: str) -> None:
    cache = CacheFolder(tmp_path, "team", LIMITS)
    entry, _ = store_model(cache, "weights", "k")
    (entry.folder / "entry.json").write_text(record_text)
    assert store_model(cache, "weights", "k")[1] is False and list_stored_names(tmp_path) == ["k"]


# ---- space ----


def make_limited_cache(tmp_path: Path, size_bytes: int) -> CacheFolder:
    return CacheFolder(tmp_path, "team", CacheLimits(size_bytes=size_bytes, poll_seconds=0.01, recent_seconds=100.0))


def test_the_models_that_were_used_least_recently_are_removed(tmp_path: Path) -> None:
    cache = make_limited_cache(tmp_path, 20)
    for used_at, text in ((3000.0, "a" * 6), (1000.0, "b" * 6), (2000.0, "c" * 6)):
        release_model(store_model(cache, text)[0], used_at)
    store_model(cache, "d" * 8)  # 18 + 8 bytes exceed the limit of 20 bytes, so a model of 6 bytes is removed
    assert list_stored_names(tmp_path) == ["a", "c", "d"]
    store_model(cache, "e" * 6)
    assert list_stored_names(tmp_path) == ["a", "d", "e"]


def test_a_model_in_use_is_never_removed(tmp_path: Path) -> None:
    cache = make_limited_cache(tmp_path, 20)
    entry, _ = store_model(cache, "a" * 12)
    os.utime(entry.in_use_file, (LONG_AGO, LONG_AGO))
    with pytest.raises(CacheProblem, match=r"^the cache has no space for 0.00 GB: 0.00 GB are missing, and the models that are not in use have 0.00 GB$"):
        store_model(cache, "b" * 12)
    assert list_stored_names(tmp_path) == ["a"]
    release_model(entry)
    assert store_model(cache, "b" * 12)[1] is False and list_stored_names(tmp_path) == ["b"]


def test_a_trainer_container_keeps_its_model(tmp_path: Path) -> None:
    """The pod's init container has ended, so its lock on the model is gone.

    The trainer container takes its own lock. It needs no write access to the file for this lock.
    """
    cache = make_limited_cache(tmp_path, 20)
    entry, _ = store_model(cache, "a" * 12)
    release_model(entry)
    entry.in_use_file.chmod(0o444)
    model = CachedModel(source="org/model", path=entry.files, from_cache=True, size=12, in_use_file=entry.in_use_file)
    assert model.hold() is True
    entry.in_use_file.chmod(0o644)
    with pytest.raises(CacheProblem):
        store_model(cache, "b" * 12)
    release_model(entry)
    store_model(cache, "b" * 12)
    assert model.hold() is False


def test_a_model_between_init_container_and_trainer_container_is_kept(tmp_path: Path) -> None:
    cache = make_limited_cache(tmp_path, 20)
    entry, _ = store_model(cache, "a" * 12)
    release_model(entry, time.time())
    with pytest.raises(CacheProblem):
        store_model(cache, "b" * 12)
    assert list_stored_names(tmp_path) == ["a"]


def test_nothing_is_removed_if_it_would_not_be_enough(tmp_path: Path) -> None:
    cache = make_limited_cache(tmp_path, 20)
    release_model(store_model(cache, "a" * 6)[0])
    with pytest.raises(CacheProblem):
        store_model(cache, "b" * 21)
    assert list_stored_names(tmp_path) == ["a"]


def test_all_namespaces_of_a_node_share_the_limit(tmp_path: Path) -> None:
    limits = CacheLimits(size_bytes=20, poll_seconds=0.01)
    release_model(store_model(CacheFolder(tmp_path, "first", limits), "a" * 12)[0])
    assert store_model(CacheFolder(tmp_path, "second", limits), "b" * 12)[1] is False
    assert (list_stored_names(tmp_path, "first"), list_stored_names(tmp_path, "second")) == ([], ["b"])


def test_running_downloads_count_as_complete_and_those_of_killed_processes_are_removed(tmp_path: Path) -> None:
    cache, problems = make_limited_cache(tmp_path, 20), list[str]()

    def download_other(folder: Path) -> None:
        try:
            store_model(cache, "b" * 12)
        except CacheProblem as problem:
            problems.append(str(problem))
        make_writer("a" * 12)(folder)

    cache.provide("a", "org/model", list_model_files("a" * 12), download_other)
    assert len(problems) == 1 and list_stored_names(tmp_path) == ["a"]
    shutil.copytree(tmp_path / "team/a", tmp_path / "team/.partial/killed")
    (tmp_path / "team/.partial/killed/size").write_text("1000")
    store_model(cache, "c" * 6)
    assert list_stored_names(tmp_path) == ["a", "c"]


def test_the_wait_for_the_space_lock_ends_if_another_process_keeps_it(tmp_path: Path) -> None:
    (tmp_path / ".locks").mkdir()
    cache = CacheFolder(tmp_path, "team", CacheLimits(poll_seconds=0.01, stalled_seconds=0.05))
    with (tmp_path / ".locks/space").open("w") as lock_file:
        subject.fcntl.flock(lock_file, subject.fcntl.LOCK_EX)
        with pytest.raises(CacheProblem, match=r"^another pod has held the lock for the space of the cache for more than 0 s$"):
            store_model(cache, "weights")
    assert store_model(cache, "weights")[1] is False


def test_a_folder_that_cannot_be_read_is_not_part_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is mounted at the folder of the cache has `lost+found`, which only root can read.

    The test simulates the missing permission, because the test may run as root.
    """
    (tmp_path / "lost+found").mkdir()
    original_scandir, original_stat = os.scandir, os.stat

    def check_path(path: object, forbidden_part: str) -> None:
        if forbidden_part in str(path):
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", lambda path: check_path(path, "lost+found") or original_scandir(path))
    monkeypatch.setattr(os, "stat", lambda path, **options: check_path(path, "lost+found/") or original_stat(path, **options))
    assert store_model(make_limited_cache(tmp_path, 20), "weights")[1] is False


DiskUsage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(("free_bytes", "free_share", "is_stored"), [(50, 0.0, True), (11, 0.0, False), (27, 0.15, True), (26, 0.15, False)])
def test_a_share_of_the_disk_stays_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_bytes: int, free_share: float, is_stored: bool) -> None:
    monkeypatch.setattr(subject.shutil, "disk_usage", lambda _: DiskUsage(100, 100 - free_bytes, free_bytes))
    cache = CacheFolder(tmp_path, "team", CacheLimits(free_share=free_share))
    try:
        store_model(cache, "a" * 12)
    except CacheProblem:
        assert not is_stored
    else:
        assert is_stored


def test_a_volume_without_file_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(subject.fcntl, "flock", refuse)
    with pytest.raises(CacheProblem, match=r"^the volume does not support file locks \(Operation not supported\)$"):
        store_model(CacheFolder(tmp_path, "team", LIMITS), "weights")


def test_threads_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    cache, downloaded_texts, from_cache_flags = CacheFolder(tmp_path, "team", LIMITS), list[str](), list[bool]()

    def provide_model() -> None:
        from_cache_flags.append(cache.provide("k", "org/model", list_model_files("weights"), make_writer("weights", downloaded_texts))[1])

    threads = [threading.Thread(target=provide_model) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert downloaded_texts == ["weights"] and sorted(from_cache_flags) == [False] + [True] * 7


def test_a_written_record_is_read_back_and_an_invalid_one_is_ignored(tmp_path: Path) -> None:
    assert CacheRecord.read(tmp_path) is None
    model = CachedModel(source="org/model", path=tmp_path, from_cache=True, size=3, hub_revision="abc", sha256={"x": "y"})
    record = CacheRecord(models={"model.source": model}, notes=["a note"])
    record.write(tmp_path)
    assert CacheRecord.read(tmp_path) == record
    (tmp_path / "model-cache.json").write_text("{")
    assert CacheRecord.read(tmp_path) is None
