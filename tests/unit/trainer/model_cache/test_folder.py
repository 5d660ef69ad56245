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


def model_files(text: str) -> tuple[SourceFile, ...]:
    data = text.encode()
    return (SourceFile("model.safetensors", len(data), "sha256:" + hashlib.sha256(data).hexdigest()),)


def writer(text: str, calls: list[str] | None = None) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        if calls is not None:
            calls.append(text)
        (folder / "model.safetensors").write_text(text)

    return write


def store_model(cache: CacheFolder, text: str, key: str | None = None) -> tuple[CacheEntry, bool]:
    return cache.provide(key or text[0], "org/model", model_files(text), writer(text))


def list_stored(top: Path, tenant: str = "team") -> list[str]:
    """Return the keys of the complete models, and the names of the files that unfinished downloads have left."""
    names = [path.name for path in (top / tenant).iterdir() if not path.name.startswith(".")]
    return sorted(names + [f".partial/{path.name}" for path in (top / tenant / ".partial").iterdir()])


def release(entry: CacheEntry, used_at: float = LONG_AGO) -> None:
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
    cache, calls = CacheFolder(tmp_path, "team", LIMITS), list[str]()
    results = [cache.provide("k", "org/model", model_files("weights"), writer("weights", calls)) for _ in range(3)]
    assert [from_cache for _, from_cache in results] == [False, True, True] and calls == ["weights"]
    assert (results[2][0].files / "model.safetensors").read_text() == "weights"
    assert results[2][0].record.files["model.safetensors"].sha256 == hashlib.sha256(b"weights").hexdigest()
    assert list_stored(tmp_path) == ["k"]


def test_a_download_with_another_hash_is_not_stored(tmp_path: Path) -> None:
    cache = CacheFolder(tmp_path, "team", LIMITS)
    with pytest.raises(CacheProblem, match=r"^the downloaded file model.safetensors has another hash than at the source$"):
        cache.provide("k", "org/model", model_files("weights"), writer("waights"))
    assert list_stored(tmp_path) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_download_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def fail(folder: Path) -> None:
        writer("wei")(folder)
        raise error

    cache = CacheFolder(tmp_path, "team", LIMITS)
    with pytest.raises(type(error)):
        cache.provide("k", "org/model", model_files("weights"), fail)
    assert list_stored(tmp_path) == [] and store_model(cache, "weights", "k")[1] is False


# ---- several processes ----

CHILD = """
import hashlib, sys, time
from pathlib import Path
sys.path[:0] = [{path!r}]
from test_folder import LIMITS, model_files
from finetune_trainer.model_cache.folder import CacheFolder

def download(folder):
    with open({log!r}, "a") as stream:
        stream.write("download\\n")
    (folder / "model.safetensors").write_text("wei")
    print("started", flush=True)
    sys.stdin.readline()
    (folder / "model.safetensors").write_text("weights")

entry, from_cache = CacheFolder(Path({top!r}), "team", LIMITS).provide("k", "org/model", model_files("weights"), download)
print("done", from_cache, flush=True)
"""


def start_process(tmp_path: Path) -> subprocess.Popen[str]:
    """Start a process that provides the model. Its download ends when the process reads a line (see `end_download`)."""
    code = CHILD.format(path=str(Path(__file__).parent), log=str(tmp_path / "log"), top=str(tmp_path / "cache"))
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end_download(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def downloads(tmp_path: Path) -> int:
    return len((tmp_path / "log").read_text().splitlines())


def test_of_several_processes_one_downloads_and_the_others_wait(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    first = start_process(tmp_path)
    assert read_line(first) == "started"
    others = [start_process(tmp_path) for _ in range(3)]
    end_download(first)
    assert read_line(first) == "done False" and [read_line(process) for process in others] == ["done True"] * 3
    assert downloads(tmp_path) == 1
    assert [process.wait() for process in (first, *others)] == [0] * 4


def test_a_killed_download_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    first = start_process(tmp_path)
    assert read_line(first) == "started"
    second = start_process(tmp_path)
    first.kill()
    assert read_line(second) == "started"
    end_download(second)
    assert read_line(second) == "done False" and downloads(tmp_path) == 2
    assert second.wait() == 0 and first.wait() == -9
    assert list_stored(tmp_path / "cache") == ["k"]


def test_a_pod_stops_waiting_for_a_download_without_progress(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    first = start_process(tmp_path)
    assert read_line(first) == "started"
    cache = CacheFolder(tmp_path / "cache", "team", CacheLimits(poll_seconds=0.01, stalled_seconds=0.2))
    with pytest.raises(CacheProblem, match=r"^another pod downloads the model, but has made no progress for 0 s$"):
        cache.provide("k", "org/model", model_files("weights"), writer("weights"))
    end_download(first)
    assert read_line(first) == "done False" and first.wait() == 0


def test_a_download_with_progress_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ten polls take several times as long as the limit. The download counts as active, because its file grows between any two polls."""
    (tmp_path / "cache").mkdir()
    first = start_process(tmp_path)
    assert read_line(first) == "started"
    partial, polls, progress = tmp_path / "cache/team/.partial/k/files/other", list[float](), list[int]()

    def sleep(_seconds: float) -> None:
        polls.append(len(polls) * 200.0)
        partial.write_text("x" * len(polls))
        if len(polls) == 10:
            partial.unlink()
            end_download(first)
            assert read_line(first) == "done False"

    monkeypatch.setattr(subject.time, "sleep", sleep)
    monkeypatch.setattr(subject.time, "monotonic", lambda: polls[-1] if polls else 0.0)
    cache = CacheFolder(tmp_path / "cache", "team", LIMITS)
    assert cache.provide("k", "org/model", model_files("weights"), writer("weights"), log_progress=progress.append)[1] is True
    assert len(polls) == 10 and progress[:2] == [6, 7] and first.wait() == 0


def test_two_models_are_downloaded_at_the_same_time(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    first = start_process(tmp_path)
    assert read_line(first) == "started"
    assert store_model(CacheFolder(tmp_path / "cache", "team", LIMITS), "other")[1] is False
    end_download(first)
    assert read_line(first) == "done False" and first.wait() == 0


# ---- damaged models ----


def test_an_unchanged_model_is_not_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = CacheFolder(tmp_path, "team", LIMITS)
    store_model(cache, "weights", "k")
    monkeypatch.setattr(subject, "check_files", lambda *_, **__: pytest.fail("the files were read"))
    assert cache.find("k", model_files("weights")) is not None


def test_a_changed_model_is_found_and_removed(tmp_path: Path) -> None:
    cache = CacheFolder(tmp_path, "team", LIMITS)
    entry, _ = store_model(cache, "weights", "k")
    (entry.files / "model.safetensors").write_text("waights")
    with pytest.raises(DamagedModel, match="^model.safetensors has another hash than at the source$"):
        cache.find("k", model_files("weights"))
    assert list_stored(tmp_path) == [] and store_model(cache, "weights", "k")[1] is False


def test_a_damaged_model_that_another_pod_has_replaced_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pods find the damage of the same model. The slower pod must not remove the model that the faster pod has downloaded again."""
    slow, fast = CacheFolder(tmp_path, "team", LIMITS), CacheFolder(tmp_path, "team", LIMITS)
    entry, _ = store_model(slow, "weights", "k")
    (entry.files / "model.safetensors").write_text("waights")
    check = subject.check_files

    def check_slowly(*arguments: Any, **options: Any) -> list[CheckedFile]:
        checked = check(*arguments, **options)
        monkeypatch.setattr(subject, "check_files", check)
        with pytest.raises(DamagedModel):
            fast.find("k", model_files("weights"))
        assert store_model(fast, "weights", "k")[1] is False
        return checked

    monkeypatch.setattr(subject, "check_files", check_slowly)
    with pytest.raises(DamagedModel):
        slow.find("k", model_files("weights"))
    assert list_stored(tmp_path) == ["k"] and store_model(slow, "weights", "k")[1] is True


def test_a_damaged_model_is_removed_although_hidden_folders_are_missing(tmp_path: Path) -> None:
    """The hidden folders are missing, for example, in a copy of the volume that contains only the visible folders."""
    cache = CacheFolder(tmp_path, "team", LIMITS)
    entry, _ = store_model(cache, "weights", "k")
    (entry.files / "model.safetensors").write_text("waights")
    shutil.rmtree(tmp_path / "team/.partial")
    with pytest.raises(DamagedModel):
        cache.find("k", model_files("weights"))
    assert list_stored(tmp_path) == []


def test_a_model_with_another_time_but_the_same_bytes_is_used(tmp_path: Path) -> None:
    cache = CacheFolder(tmp_path, "team", LIMITS)
    entry, _ = store_model(cache, "weights", "k")
    os.utime(entry.files / "model.safetensors", (1.0, 1.0))
    assert cache.find("k", model_files("weights")) is not None


@pytest.mark.parametrize("text", ["", "{}", "no json", '{"source": "x", "size": -1, "files": 3}', "x" * (5 * 1024 * 1024)])
def test_a_model_without_a_valid_record_is_replaced(tmp_path: Path, text: str) -> None:
    cache = CacheFolder(tmp_path, "team", LIMITS)
    entry, _ = store_model(cache, "weights", "k")
    (entry.folder / "entry.json").write_text(text)
    assert store_model(cache, "weights", "k")[1] is False and list_stored(tmp_path) == ["k"]


# ---- space ----


def limited_cache(tmp_path: Path, size: int) -> CacheFolder:
    return CacheFolder(tmp_path, "team", CacheLimits(size_bytes=size, poll_seconds=0.01, recent_seconds=100.0))


def test_the_models_that_were_used_least_recently_are_removed(tmp_path: Path) -> None:
    cache = limited_cache(tmp_path, 20)
    for used_at, text in ((3000.0, "a" * 6), (1000.0, "b" * 6), (2000.0, "c" * 6)):
        release(store_model(cache, text)[0], used_at)
    store_model(cache, "d" * 8)  # 18 + 8 bytes exceed the limit of 20 bytes, so a model of 6 bytes is removed
    assert list_stored(tmp_path) == ["a", "c", "d"]
    store_model(cache, "e" * 6)
    assert list_stored(tmp_path) == ["a", "d", "e"]


def test_a_model_in_use_is_never_removed(tmp_path: Path) -> None:
    cache = limited_cache(tmp_path, 20)
    entry, _ = store_model(cache, "a" * 12)
    os.utime(entry.in_use_file, (LONG_AGO, LONG_AGO))
    with pytest.raises(CacheProblem, match=r"^the cache has no space for 0.00 GB: 0.00 GB are missing, and the models that are not in use have 0.00 GB$"):
        store_model(cache, "b" * 12)
    assert list_stored(tmp_path) == ["a"]
    release(entry)
    assert store_model(cache, "b" * 12)[1] is False and list_stored(tmp_path) == ["b"]


def test_a_trainer_container_keeps_its_model(tmp_path: Path) -> None:
    """The pod's init container has ended, so its lock on the model is gone.

    The trainer container takes its own lock. It needs no write access to the file for this lock.
    """
    cache = limited_cache(tmp_path, 20)
    entry, _ = store_model(cache, "a" * 12)
    release(entry)
    entry.in_use_file.chmod(0o444)
    model = CachedModel(source="org/model", path=entry.files, from_cache=True, size=12, in_use_file=entry.in_use_file)
    assert model.hold() is True
    entry.in_use_file.chmod(0o644)
    with pytest.raises(CacheProblem):
        store_model(cache, "b" * 12)
    release(entry)
    store_model(cache, "b" * 12)
    assert model.hold() is False


def test_a_model_between_init_container_and_trainer_container_is_kept(tmp_path: Path) -> None:
    cache = limited_cache(tmp_path, 20)
    entry, _ = store_model(cache, "a" * 12)
    release(entry, time.time())
    with pytest.raises(CacheProblem):
        store_model(cache, "b" * 12)
    assert list_stored(tmp_path) == ["a"]


def test_nothing_is_removed_if_it_would_not_be_enough(tmp_path: Path) -> None:
    cache = limited_cache(tmp_path, 20)
    release(store_model(cache, "a" * 6)[0])
    with pytest.raises(CacheProblem):
        store_model(cache, "b" * 21)
    assert list_stored(tmp_path) == ["a"]


def test_all_namespaces_of_a_node_share_the_limit(tmp_path: Path) -> None:
    limits = CacheLimits(size_bytes=20, poll_seconds=0.01)
    release(store_model(CacheFolder(tmp_path, "first", limits), "a" * 12)[0])
    assert store_model(CacheFolder(tmp_path, "second", limits), "b" * 12)[1] is False
    assert (list_stored(tmp_path, "first"), list_stored(tmp_path, "second")) == ([], ["b"])


def test_running_downloads_count_as_complete_and_those_of_killed_processes_are_removed(tmp_path: Path) -> None:
    cache, problems = limited_cache(tmp_path, 20), list[str]()

    def download_other(folder: Path) -> None:
        try:
            store_model(cache, "b" * 12)
        except CacheProblem as problem:
            problems.append(str(problem))
        writer("a" * 12)(folder)

    cache.provide("a", "org/model", model_files("a" * 12), download_other)
    assert len(problems) == 1 and list_stored(tmp_path) == ["a"]
    shutil.copytree(tmp_path / "team/a", tmp_path / "team/.partial/killed")
    (tmp_path / "team/.partial/killed/size").write_text("1000")
    store_model(cache, "c" * 6)
    assert list_stored(tmp_path) == ["a", "c"]


def test_the_wait_for_the_space_lock_ends_if_another_process_keeps_it(tmp_path: Path) -> None:
    (tmp_path / ".locks").mkdir()
    cache = CacheFolder(tmp_path, "team", CacheLimits(poll_seconds=0.01, stalled_seconds=0.05))
    with (tmp_path / ".locks/space").open("w") as held:
        subject.fcntl.flock(held, subject.fcntl.LOCK_EX)
        with pytest.raises(CacheProblem, match=r"^another pod has held the lock for the space of the cache for more than 0 s$"):
            store_model(cache, "weights")
    assert store_model(cache, "weights")[1] is False


def test_a_folder_that_cannot_be_read_is_not_part_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is mounted at the folder of the cache has `lost+found`, which only root can read.

    The test simulates the missing permission, because the test may run as root.
    """
    (tmp_path / "lost+found").mkdir()
    scandir, stat = os.scandir, os.stat

    def check_path(path: object, inside: str) -> None:
        if inside in str(path):
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", lambda path: check_path(path, "lost+found") or scandir(path))
    monkeypatch.setattr(os, "stat", lambda path, **options: check_path(path, "lost+found/") or stat(path, **options))
    assert store_model(limited_cache(tmp_path, 20), "weights")[1] is False


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(("free", "share", "is_stored"), [(50, 0.0, True), (11, 0.0, False), (27, 0.15, True), (26, 0.15, False)])
def test_a_share_of_the_disk_stays_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, share: float, is_stored: bool) -> None:
    monkeypatch.setattr(subject.shutil, "disk_usage", lambda _: Usage(100, 100 - free, free))
    cache = CacheFolder(tmp_path, "team", CacheLimits(free_share=share))
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
    cache, calls, results = CacheFolder(tmp_path, "team", LIMITS), list[str](), list[bool]()

    def provide_model() -> None:
        results.append(cache.provide("k", "org/model", model_files("weights"), writer("weights", calls))[1])

    threads = [threading.Thread(target=provide_model) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == ["weights"] and sorted(results) == [False] + [True] * 7


def test_a_written_record_is_read_back_and_an_invalid_one_is_ignored(tmp_path: Path) -> None:
    assert CacheRecord.read(tmp_path) is None
    model = CachedModel(source="org/model", path=tmp_path, from_cache=True, size=3, hub_revision="abc", sha256={"x": "y"})
    record = CacheRecord(models={"model.source": model}, notes=["a note"])
    record.write(tmp_path)
    assert CacheRecord.read(tmp_path) == record
    (tmp_path / "model-cache.json").write_text("{")
    assert CacheRecord.read(tmp_path) is None
