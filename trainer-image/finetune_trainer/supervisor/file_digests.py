"""Remembers the sha256 of downloaded files, so that large files need not be read a second time for their hash."""

from __future__ import annotations

from pathlib import Path

from finetune_trainer.file_entry import sha256_file


class FileDigests:
    """Returns the sha256 (hex) of local files. The digest of a downloaded file is remembered until the file changes."""

    def __init__(self) -> None:
        self._known_digests: dict[Path, tuple[tuple[int, ...], str]] = {}

    def add_download(self, path: Path, sha256: str) -> None:
        """Record the digest of a file that was just downloaded."""
        self._known_digests[path] = (_read_file_state(path), sha256)

    def get_known_sha256(self, path: Path) -> str | None:
        """Return the digest of a downloaded file; None if the file was not downloaded or has changed since its download. Errors: OSError."""
        recorded_state, sha256 = self._known_digests.get(path, (None, None))
        return sha256 if recorded_state is not None and recorded_state == _read_file_state(path) else None

    def get_sha256(self, path: Path) -> str:
        """Return the digest of a file. The file is read unless its digest is known. Errors: OSError."""
        return self.get_known_sha256(path) or sha256_file(path)


def _read_file_state(path: Path) -> tuple[int, ...]:
    """Return values that change when the content of a file changes.

    One of the values is ctime, because programs can set the modification time of a file, but not its ctime.
    """
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
