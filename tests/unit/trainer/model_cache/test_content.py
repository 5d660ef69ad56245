"""Files are compared with the hashes of the hub and of S3, and a copy contains exactly the bytes whose hash was compared."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from finetune_trainer.model_cache import content
from finetune_trainer.model_cache.content import (
    MIB,
    CheckedFile,
    SourceFile,
    check_files,
    create_hasher,
    open_regular_file,
    parse_etag,
)

DATA = bytes(range(256)) * 4096 * 9  # 9 MiB


def compute_parts_hash(data: bytes, part_bytes: int) -> str:
    parts = [data[start : start + part_bytes] for start in range(0, len(data), part_bytes)]
    combined_hash = hashlib.md5(b"".join(hashlib.md5(part, usedforsecurity=False).digest() for part in parts), usedforsecurity=False)
    return f"md5-parts:{combined_hash.hexdigest()}-{len(parts)}"


def compute_git_blob_hash(data: bytes) -> str:
    return "git-blob:" + hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def compute_hashes(data: bytes) -> list[str]:
    return [
        "sha256:" + hashlib.sha256(data).hexdigest(), "md5:" + hashlib.md5(data, usedforsecurity=False).hexdigest(), compute_git_blob_hash(data),
        compute_parts_hash(data, 8 * MIB), compute_parts_hash(data, 16 * MIB), compute_parts_hash(data, 6 * MIB),
    ]  # fmt: skip


@pytest.mark.parametrize("form_index", range(6))
def test_each_form_of_a_hash_matches_only_the_same_bytes(tmp_path: Path, form_index: int) -> None:
    file = SourceFile("model.safetensors", len(DATA), compute_hashes(DATA)[form_index])
    (tmp_path / file.name).write_bytes(DATA)
    assert check_files(tmp_path, (file,)) == [CheckedFile(file.name, hashlib.sha256(DATA).hexdigest())]
    for position in (0, len(DATA) - 1):
        changed_data = bytearray(DATA)
        changed_data[position] ^= 1
        (tmp_path / file.name).write_bytes(changed_data)
        assert check_files(tmp_path, (file,)) == [CheckedFile(file.name, problem="model.safetensors has another hash than at the source")]


def test_a_git_blob_has_the_id_that_git_computes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": 1}\n')
    expected_id = subprocess.run(["git", "hash-object", "config.json"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()
    assert compute_git_blob_hash(b'{"a": 1}\n') == f"git-blob:{expected_id}"


def test_parts_of_an_unusual_size_do_not_match(tmp_path: Path) -> None:
    hasher = create_hasher(SourceFile("x", len(DATA), compute_parts_hash(DATA, 7 * MIB)))
    hasher.update(DATA)
    assert not hasher.matches()


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="the hash crc32:00 has an unknown form"):
        create_hasher(SourceFile("x", 1, "crc32:00"))


@pytest.mark.parametrize(
    ("etag", "digest"),
    [
        ('"D41D8CD98F00B204E9800998ECF8427E"', "md5:d41d8cd98f00b204e9800998ecf8427e"),
        ("d41d8cd98f00b204e9800998ecf8427e-12", "md5-parts:d41d8cd98f00b204e9800998ecf8427e-12"),
        ("d41d8cd98f00b204e9800998ecf8427e-0", None), ("", None), ("W/\"abc\"", None), ("16a3f", None),
    ],
)  # fmt: skip
def test_only_an_etag_that_is_an_md5_is_used_as_a_hash(etag: str, digest: str | None) -> None:
    assert parse_etag(etag) == digest


def write_longer_file(file: Path) -> None:
    file.write_bytes(b"rows and more")


def write_shorter_file(file: Path) -> None:
    file.write_bytes(b"ro")


def write_link(file: Path) -> None:
    (file.parent / "elsewhere").write_bytes(b"rows")
    file.symlink_to("elsewhere")


SIZE_PROBLEM = "x has another size than at the source (4 bytes)"


@pytest.mark.parametrize(
    ("write_file", "problem"),
    [
        (write_longer_file, SIZE_PROBLEM), (write_shorter_file, SIZE_PROBLEM), (lambda file: None, "x cannot be read (No such file or directory)"),
        (os.mkfifo, "x cannot be read (x is not a regular file)"), (write_link, "x cannot be read (Too many levels of symbolic links)"),
        (lambda file: file.mkdir(), "x cannot be read (x is not a regular file)"),
    ],
)  # fmt: skip
def test_a_file_of_another_size_or_kind_is_a_problem_and_never_blocks(tmp_path: Path, write_file: Callable[[Path], object], problem: str) -> None:
    write_file(tmp_path / "x")
    source_file = SourceFile("x", 4, compute_hashes(b"rows")[0])
    assert check_files(tmp_path, (source_file,)) == [CheckedFile("x", problem=problem)]


def test_a_copy_has_the_compared_bytes(tmp_path: Path) -> None:
    (tmp_path / "from/part").mkdir(parents=True)
    (tmp_path / "from/part/x").write_bytes(DATA)
    checked_files = check_files(tmp_path / "from", (SourceFile("part/x", len(DATA), compute_hashes(DATA)[0]),), copy_to=tmp_path / "to")
    assert checked_files[0].problem == "" and (tmp_path / "to/part/x").read_bytes() == DATA


def test_a_file_that_is_too_long_is_not_copied_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "BLOCK_BYTES", 4)
    (tmp_path / "x").write_bytes(b"rows" * 1000)
    check_files(tmp_path, (SourceFile("x", 4, compute_hashes(b"rows")[0]),), copy_to=tmp_path / "to")
    assert (tmp_path / "to/x").stat().st_size <= 8


def test_a_regular_file_is_opened_in_blocking_mode(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"rows")
    with open_regular_file(tmp_path / "x") as stream:
        assert stream.read() == b"rows"
