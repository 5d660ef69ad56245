"""The free space of a pod is the file system's free space or what is left of the pod's limit, whichever is smaller."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from finetune_api.errors import ConfigError
from finetune_api.names import Env
from finetune_trainer.disk import free_bytes
from finetune_trainer.supervisor import fetch
from finetune_trainer.supervisor.fetch import RESERVE_BYTES, Fetcher

MIB = 1024 * 1024


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A work folder with 3 MiB in two files. The second file also has a hard link, which must not count."""
    folder = tmp_path / "work"
    (folder / "output").mkdir(parents=True)
    (folder / "one").write_bytes(b"1" * MIB)
    (folder / "output" / "two").write_bytes(b"2" * 2 * MIB)
    (folder / "output" / "again").hardlink_to(folder / "output" / "two")
    return folder


def test_a_file_with_two_names_counts_once_against_the_limit(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(Env.DISK_LIMIT, str(8 * MIB))
    assert free_bytes(work) == 5 * MIB
    monkeypatch.setenv(Env.DISK_LIMIT, str(2 * MIB))
    assert free_bytes(work) == -MIB


def test_the_free_space_of_the_file_system_counts_if_it_is_smaller_than_what_is_left_of_the_limit(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=MIB))
    monkeypatch.setenv(Env.DISK_LIMIT, str(8 * MIB))
    assert free_bytes(work) == MIB


def test_without_a_limit_only_the_file_system_counts(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(Env.DISK_LIMIT, raising=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=MIB))
    assert free_bytes(work) == MIB


def test_a_missing_work_folder_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(Env.DISK_LIMIT, str(MIB))
    assert free_bytes(tmp_path / "no" / "such" / "folder") == MIB


def test_a_download_beyond_the_limit_is_refused_before_it_starts(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "free_bytes", lambda folder: 5_000_000_000 + RESERVE_BYTES if folder == work else 0)
    fetcher = Fetcher(None, work)  # type: ignore[arg-type] # the run is not used
    fetcher.require_space(5_000_000_000, "model.source")
    with pytest.raises(ConfigError, match=r"model.source needs 6\.00 GB, but the pod's disk has only 5\.07 GB left"):
        fetcher.require_space(6_000_000_000, "model.source")
