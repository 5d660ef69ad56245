"""Listing, verifying, downloading and deleting the files of a job in storage."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from finetune_api.spec.cluster import StorageRoot
from finetune_cli.downloads import download, make_committed_source
from finetune_cli.job_storage import (
    CommittedFolder,
    JobStorage,
    StorageError,
    list_committed_folders,
    locate_job_folder,
    verify_files,
)
from finetune_cli.transfers import SilentProgress


def commit_folder(
    root: Path, folder: str, data_by_name: dict[str, bytes], incarnation: str = "a1-00000000", manifest: dict[str, Any] | None = None
) -> Path:
    """Write files and their manifest to a folder of the storage, as the trainer does when it commits the folder."""
    files_folder = root / folder / incarnation
    files_folder.mkdir(parents=True)
    for name, data in data_by_name.items():
        (files_folder / name).write_bytes(data)
    file_entries = [
        {"path": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in data_by_name.items()
    ]
    manifest_data = json.dumps({"files": file_entries, **(manifest or {})}).encode()
    (files_folder / "manifest.json").write_bytes(manifest_data)
    marker = {"attempt": 1, "path": incarnation, "manifestSha256": hashlib.sha256(manifest_data).hexdigest()}
    (root / folder / "_COMMITTED").write_text(json.dumps(marker), encoding="utf-8")
    return files_folder


def download_commit(storage: JobStorage, committed_folder: CommittedFolder, folder: Path) -> int:
    """Download a committed folder of the storage into a local folder, and return the total size of its files in bytes."""
    return sum(file.size for file in download(make_committed_source(storage, committed_folder), folder, SilentProgress()))


@pytest.fixture
def storage(tmp_path: Path) -> JobStorage:
    """Return the storage of a job with the model and three checkpoints. Step 10 is committed and marked as healthy, step 20 is committed, step 30 is not
    committed.
    """
    root = tmp_path / "tree"
    commit_folder(root, "checkpoints/step-00000010", {"a.bin": b"one"})
    (root / "checkpoints/step-00000010/_HEALTHY").write_text("")
    commit_folder(root, "checkpoints/step-00000020", {"a.bin": b"two", "b.bin": b"x" * 100})
    (root / "checkpoints/step-00000030/a1-1").mkdir(parents=True)
    (root / "checkpoints/step-00000030/a1-1/a.bin").write_bytes(b"half")
    commit_folder(root, "model", {"w.bin": b"weights"})
    return JobStorage(f"file://{root}", StorageRoot())


def test_only_committed_folders_are_listed(storage: JobStorage) -> None:
    assert [(committed_folder.folder, committed_folder.is_healthy) for committed_folder in list_committed_folders(storage)] == [
        ("checkpoints/step-00000010", True), ("checkpoints/step-00000020", False), ("model", False),
    ]  # fmt: skip


def test_download_is_complete_and_verified(storage: JobStorage, tmp_path: Path) -> None:
    assert download_commit(storage, list_committed_folders(storage)[1], tmp_path / "out") == 103
    assert (tmp_path / "out" / "a.bin").read_bytes() == b"two"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.bin", "b.bin", "manifest.json"]


def test_flipped_byte_is_detected(storage: JobStorage, tmp_path: Path) -> None:
    (tmp_path / "tree/checkpoints/step-00000020/a1-00000000/b.bin").write_bytes(b"y" + b"x" * 99)
    committed_folder = list_committed_folders(storage)[1]
    with pytest.raises(StorageError, match=r"b\.bin is damaged: the file has 100 bytes"):
        verify_files(storage, committed_folder)
    with pytest.raises(StorageError, match=r"b\.bin is damaged: the file has 100 bytes"):
        download_commit(storage, committed_folder, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith((".b", "b", "manifest"))] == []


def test_changed_manifest_is_detected(storage: JobStorage, tmp_path: Path) -> None:
    path = tmp_path / "tree/model/a1-00000000/manifest.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(StorageError, match=r"manifest\.json is damaged"):
        verify_files(storage, list_committed_folders(storage)[2])


def test_manifest_cannot_name_files_outside_its_folder(tmp_path: Path) -> None:
    files_folder = commit_folder(tmp_path / "t", "model", {"a": b"x"})
    manifest = json.dumps({"files": [{"path": "../../evil", "size": 1, "sha256": "0"}]}).encode()
    (files_folder / "manifest.json").write_bytes(manifest)
    marker = {"path": files_folder.name, "manifestSha256": hashlib.sha256(manifest).hexdigest()}
    (tmp_path / "t/model/_COMMITTED").write_text(json.dumps(marker))
    storage = JobStorage(f"file://{tmp_path / 't'}", StorageRoot())
    with pytest.raises(StorageError, match="which lies outside the checkpoint's folder"):
        download_commit(storage, list_committed_folders(storage)[0], tmp_path / "out")


def test_delete_removes_all_objects(storage: JobStorage) -> None:
    storage.delete_objects(list(storage.list_objects()))
    assert list(storage.list_objects()) == []


def test_root_comes_from_spec_or_status() -> None:
    metadata = {"name": "bot", "namespace": "team", "uid": "u1"}
    job: dict[str, Any] = {"metadata": metadata, "spec": {"storage": {"uri": "s3://models/x/"}}}
    assert locate_job_folder(job)[0] == "s3://models/x/team/bot/u1"
    job_with_status = {
        "metadata": metadata,
        "spec": {},
        "status": {"checkpoints": [{"uri": "s3://b/y/team/bot/u1/checkpoints/step-1/a"}]},
    }
    assert locate_job_folder(job_with_status)[0] == "s3://b/y/team/bot/u1"
    with pytest.raises(StorageError, match="with --storage URI"):
        locate_job_folder({"metadata": metadata, "spec": {}})
    adopting_status = {"output": {"uri": "s3://b/y/team/bot/u0/model/a1-12345678", "adoptedUid": "u0"}}
    assert locate_job_folder({"metadata": metadata, "spec": {}, "status": adopting_status})[0] == "s3://b/y/team/bot/u0"
    assert locate_job_folder({"metadata": metadata, "spec": {"storage": {"uri": "s3://bucket/y"}}, "status": adopting_status})[0] == "s3://bucket/y/team/bot/u0"
    forged_status = {"output": {"uri": "s3://b/y/team/bot/u1/model/a1-12345678", "adoptedUid": "../../other"}}
    assert locate_job_folder({"metadata": metadata, "spec": {"storage": {"uri": "s3://bucket/y"}}, "status": forged_status})[0] == "s3://bucket/y/team/bot/u1"
