"""The clients' files in S3, below `<storage.uri>/<namespace>/_files/<id>/`. The name of the file is in the key, so that one listing gives all properties.

A file never replaces another, because each upload gets a new id.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from finetune_cli.job_storage import JobStorage, StoredObject
from finetune_cli.openai_server.failures import bad_request
from finetune_cli.openai_server.ids import FILE_PREFIX, created_at, has_prefix, new_id
from finetune_cli.transfers import SilentProgress
from finetune_cli.uploads import LocalFile, Uploader

FILES_FOLDER = "_files"
"""Jobs write below `<namespace>/<name>/`, and no name of a job begins with an underscore."""
ROWS_NAME = "rows.jsonl"
MAX_NAME_LENGTH = 512
"""Longest encoded name. S3 allows keys of 1024 bytes."""
MAX_LINE_BYTES = 2 << 20
"""Longest row. Its Python objects can take thirty times as much memory."""


@dataclass(frozen=True)
class ClientFile:
    """A file that a client uploaded. `key` is relative to the storage of the server."""

    id: str
    name: str
    size: int
    key: str

    @property
    def created_at(self) -> int:
        """Time of the upload, in seconds since 1970."""
        return created_at(self.id)


class FileStore:
    """The files of all namespaces."""

    def __init__(self, storage: JobStorage):
        self._storage = storage

    def add(self, namespace: str, name: str, path: Path) -> ClientFile:
        """Store a local file. Errors: RequestFailure for a name that is too long, StorageError."""
        encoded = _encode_name(name)
        if len(encoded) > MAX_NAME_LENGTH:
            raise bad_request("the name of the file is too long: write at most 100 characters", "file")
        file_id = new_id(FILE_PREFIX)
        key = f"{namespace}/{FILES_FOLDER}/{file_id}/{encoded}/{ROWS_NAME}"
        Uploader(self._storage, SilentProgress()).upload_files([LocalFile(path, key)])
        return ClientFile(file_id, name, path.stat().st_size, key)

    def list_files(self, namespace: str) -> list[ClientFile]:
        """Return the files of a namespace, newest first. Errors: StorageError."""
        files = map(_parse_object, self._storage.list_objects(f"{namespace}/{FILES_FOLDER}"))
        return sorted((file for file in files if file is not None), key=lambda file: file.id, reverse=True)

    def find(self, namespace: str, file_id: str) -> ClientFile | None:
        """Return a file of the namespace, or None if there is no such file. Errors: StorageError."""
        if not has_prefix(file_id, FILE_PREFIX):
            return None
        files = map(_parse_object, self._storage.list_objects(f"{namespace}/{FILES_FOLDER}/{file_id}"))
        return next((file for file in files if file is not None), None)

    def uri(self, file: ClientFile) -> str:
        """Return the S3 address of a file."""
        return self._storage.object_uri(file.key)

    def read_chunks(self, file: ClientFile) -> Iterator[bytes]:
        """Yield the content of a file in chunks. Errors: StorageError."""
        return self._storage.read_chunks(file.key)

    def read_first_lines(self, file: ClientFile) -> list[str]:
        """Return the complete lines in the first chunk of a file. Errors: StorageError."""
        chunk = next(self.read_chunks(file), b"")
        complete = chunk if len(chunk) >= file.size else chunk[: chunk.rfind(b"\n") + 1]
        # Not splitlines(): it also splits at Unicode line separators, which JSON strings may contain.
        return complete.decode(errors="replace").split("\n")

    def delete(self, file: ClientFile) -> None:
        """Delete a file. Errors: StorageError."""
        self._storage.delete_objects([StoredObject(file.key, file.size)])


def _encode_name(name: str) -> str:
    """Return a name as a part of a key, with `=` instead of `%`, because programs decode `%` in addresses."""
    encoded = quote(name, safe="", errors="replace").replace("%", "=")
    return encoded if encoded.strip(".") else encoded.replace(".", "=2E")


def _parse_object(stored: StoredObject) -> ClientFile | None:
    parts = stored.key.split("/")
    if len(parts) != 5 or parts[1] != FILES_FOLDER or parts[4] != ROWS_NAME or not has_prefix(parts[2], FILE_PREFIX):
        return None
    return ClientFile(parts[2], unquote(parts[3].replace("=", "%")), stored.size, stored.key)


def check_rows(path: Path) -> None:
    """Check that a file is JSONL with one object in each line. Errors: RequestFailure that names the first wrong line."""
    has_rows = False
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise bad_request(f"line {number} is longer than {MAX_LINE_BYTES >> 20} MiB: write one JSON object in each line", "file", "invalid_file")
            if line.strip():
                _check_row(line, number)
                has_rows = True
    if not has_rows:
        raise bad_request("the file has no rows: write one JSON object in each line", "file", "invalid_file")


def _check_row(line: bytes, number: int) -> None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise bad_request(f"line {number} is not valid JSON: write one JSON object in each line (JSONL)", "file", "invalid_file") from None
    if not isinstance(row, dict):
        raise bad_request(f"line {number} is not a JSON object: write one JSON object in each line (JSONL)", "file", "invalid_file")
