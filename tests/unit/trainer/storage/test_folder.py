"""A folder as a store, on file systems that are full, read-only, without hard links, or unreadable for this user."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from finetune_api.errors import FineTuneError
from finetune_api.pod import StoreTarget
from finetune_trainer.storage.base import CreateResult
from finetune_trainer.storage.folder import FolderStore
from finetune_trainer.storage.preflight import preflight
from finetune_trainer.supervisor.staging import hard_link_tree


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "root", f"file://{tmp_path}/root")


def make_os_error_raiser(errno_value: int) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno_value, os.strerror(errno_value))

    return fail


@pytest.mark.parametrize("errno_value", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_only_one_writer_creates_an_object_without_hard_links(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch, errno_value: int
) -> None:
    monkeypatch.setattr(Path, "hardlink_to", make_os_error_raiser(errno_value))
    results: list[CreateResult] = []
    start_barrier = threading.Barrier(8)

    def create(data: bytes) -> None:
        start_barrier.wait()
        results.append(store.create("a/_COMMITTED", data))

    threads = [threading.Thread(target=create, args=(b"%d" % number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result.value for result in results) == ["exists"] * 7 + ["new"]
    assert [stat.key for stat in store.list("")] == ["a/_COMMITTED"]
    assert preflight(StoreTarget(uri=store.uri)).has_conditional_writes


def test_a_read_only_volume_is_reported_as_a_wrong_setting(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", make_os_error_raiser(errno.EROFS))
    with pytest.raises(FineTuneError) as caught:
        preflight(StoreTarget(uri=store.uri))
    assert (caught.value.exit_code, caught.value.code) == (67, "StorageReadOnly")


def test_a_full_local_disk_is_not_reported_as_a_failure_of_the_store(store: FolderStore, tmp_path: Path) -> None:
    store.put("weights", b"x" * 100_000)
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(FineTuneError) as caught:
        store.download("weights", tmp_path / "full")
    assert (caught.value.code, caught.value.hint) == (
        "LocalDiskFull", "raise resources.ephemeralStorage, or checkpoint less often"
    )  # fmt: skip


def test_a_full_volume_is_reported_as_a_storage_failure(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", make_os_error_raiser(errno.ENOSPC))
    with pytest.raises(FineTuneError) as caught:
        store.put("weights", b"x")
    assert (caught.value.exit_code, caught.value.code) == (69, "StorageFull")
    assert list(store.list("")) == []


def test_listing_an_unreadable_folder_raises_an_error(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run must not start from step 0 because another user owns its checkpoints."""
    store.put("checkpoints/step-00000005/_COMMITTED", b"{}")
    original_scandir = os.scandir

    def refuse_step_5(path: Any) -> Any:
        if str(path).endswith("step-00000005"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return original_scandir(path)

    monkeypatch.setattr(os, "scandir", refuse_step_5)
    with pytest.raises(FineTuneError) as caught:
        list(store.list("checkpoints/"))
    assert (caught.value.exit_code, caught.value.code) == (77, "PermissionDenied")


def test_a_folder_that_is_removed_during_a_listing_is_ignored(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (5, 10):
        store.put(f"checkpoints/step-{step}/_COMMITTED", b"{}")
    original_scandir = os.scandir

    def scan_without_step_5(path: Any) -> Any:
        if str(path).endswith("step-5"):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        return original_scandir(path)

    monkeypatch.setattr(os, "scandir", scan_without_step_5)
    assert [stat.key for stat in store.list("checkpoints/")] == ["checkpoints/step-10/_COMMITTED"]
    assert list(store.list("nothing/")) == []


def test_partial_files_of_killed_writers_are_neither_listed_nor_kept_by_a_sweep(store: FolderStore) -> None:
    store.put("checkpoints/step-5/weights", b"w")
    partial_file = store.root / "checkpoints/step-5/.partial-0123456789ab"
    partial_file.write_bytes(b"half")
    assert [stat.key for stat in store.list("")] == ["checkpoints/step-5/weights"]
    assert store.sweep("checkpoints/") == 1
    assert not partial_file.exists() and store.get("checkpoints/step-5/weights") == b"w"


UNUSUAL_NAMES = ["with space", "ümlaut-雪", "100%25 +plus", "a#b?c&d", "empty", ".hidden", "sub folder/x"]


def test_objects_with_unusual_names_and_empty_objects_are_stored(store: FolderStore, tmp_path: Path) -> None:
    for name in UNUSUAL_NAMES:
        store.put(name, b"")
    assert sorted(stat.key for stat in store.list("")) == sorted(UNUSUAL_NAMES)
    assert [store.download(name, tmp_path / "back" / name) is not None for name in UNUSUAL_NAMES] == [True] * len(UNUSUAL_NAMES)


def test_a_symbolic_link_in_a_checkpoint_is_staged_as_its_target(tmp_path: Path) -> None:
    """A relative link would be broken in the staging folder, and the checkpoint would lack the linked file."""
    checkpoint_folder = tmp_path / "checkpoint"
    (checkpoint_folder / "sub").mkdir(parents=True)
    (checkpoint_folder / "weights").write_text("w")
    (checkpoint_folder / "sub" / "latest").symlink_to("../weights")
    hard_link_tree(checkpoint_folder, tmp_path / "elsewhere" / "staged")
    staged_file = tmp_path / "elsewhere" / "staged" / "sub" / "latest"
    assert not staged_file.is_symlink() and staged_file.read_text() == "w"
    assert staged_file.stat().st_ino == (checkpoint_folder / "weights").stat().st_ino
