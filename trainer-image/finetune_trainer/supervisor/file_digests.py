"""Keeps the sha256 of downloaded files, so that later steps need not read large files again."""

from __future__ import annotations

from pathlib import Path

from finetune_trainer.file_entry import sha256_file


class FileDigests:
    """The sha256 (hex) of local files. The digest of a download is used as long as the file has not changed since then."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, ...], str]] = {}

    def add_download(self, path: Path, sha256: str) -> None:
        """Record the digest of a file that was just downloaded."""
        self._known[path] = (_state_of(path), sha256)

    def known(self, path: Path) -> str | None:
        """Return the digest of a download. None if the file was not downloaded, or has changed since. Errors: OSError."""
        recorded = self._known.get(path)
        return recorded[1] if recorded is not None and recorded[0] == _state_of(path) else None

    def of(self, path: Path) -> str:
        """Return the digest of a file. The file is read unless its digest is known. Errors: OSError."""
        return self.known(path) or sha256_file(path)


def _state_of(path: Path) -> tuple[int, ...]:
    """Return values that change when the content of a file changes. ctime is one of them, because programs cannot set it, unlike the modification time."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
