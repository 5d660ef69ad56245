"""The clients' files in S3, below `<storage.uri>/<namespace>/_files/<id>/`.

The S3 key contains the name of the file, so that a listing of the keys gives all properties of the files. A file never replaces another, because
each upload gets a new id.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from finetune_cli.job_storage import JobStorage, StoredObject
from finetune_cli.openai_server.failures import bad_request
from finetune_cli.openai_server.ids import FILE_PREFIX, has_prefix, new_id, read_creation_time
from finetune_cli.transfers import SilentProgress
from finetune_cli.uploads import LocalFile, Uploader

FILES_FOLDER = "_files"
"""The folder for files in each namespace.

No job writes to this folder, because a job writes to a folder with its own name, and this name never begins with an underscore.
"""
ROWS_FILE_NAME = "rows.jsonl"
MAX_ENCODED_NAME_LENGTH = 512
"""Largest number of characters in an encoded file name. An S3 key has at most 1024 bytes."""
MAX_LINE_BYTES = 2 << 20
"""Largest size of a row, in bytes. The Python objects of a parsed row can take thirty times as much memory as the row."""


@dataclass(frozen=True)
class ClientFile:
    """A file that a client uploaded. `size` is in bytes. `key` is its S3 key, relative to `storage.uri`."""

    id: str
    name: str
    size: int
    key: str

    @property
    def created_at(self) -> int:
        """Time of the upload, in seconds since 1970."""
        return read_creation_time(self.id)


class FileStore:
    """The clients' files in the storage of the server, in all namespaces."""

    def __init__(self, storage: JobStorage):
        self._storage = storage

    def add(self, namespace: str, name: str, path: Path) -> ClientFile:
        """Store the local file `path` under a name, and return the new file. Raise RequestFailure for a name that is too long, and StorageError if S3 fails."""
        encoded_name = _encode_name(name)
        if len(encoded_name) > MAX_ENCODED_NAME_LENGTH:
            raise bad_request("the name of the file is too long: write at most 100 characters", "file")
        file_id = new_id(FILE_PREFIX)
        key = f"{namespace}/{FILES_FOLDER}/{file_id}/{encoded_name}/{ROWS_FILE_NAME}"
        Uploader(self._storage, SilentProgress()).upload_files([LocalFile(path, key)])
        return ClientFile(file_id, name, path.stat().st_size, key)

    def list_files(self, namespace: str) -> list[ClientFile]:
        """Return the files of a namespace, newest first. Raise StorageError if S3 fails."""
        files = map(_parse_stored_object, self._storage.list_objects(f"{namespace}/{FILES_FOLDER}"))
        return sorted((file for file in files if file is not None), key=lambda file: file.id, reverse=True)

    def find(self, namespace: str, file_id: str) -> ClientFile | None:
        """Return the file with this id, or None if the namespace has no such file. Raise StorageError if S3 fails."""
        if not has_prefix(file_id, FILE_PREFIX):
            return None
        files = map(_parse_stored_object, self._storage.list_objects(f"{namespace}/{FILES_FOLDER}/{file_id}"))
        return next((file for file in files if file is not None), None)

    def make_uri(self, file: ClientFile) -> str:
        """Return the S3 URI of a file."""
        return self._storage.make_object_uri(file.key)

    def read_chunks(self, file: ClientFile) -> Iterator[bytes]:
        """Yield the content of a file in chunks. Raise StorageError if S3 fails."""
        return self._storage.read_chunks(file.key)

    def read_first_lines(self, file: ClientFile) -> list[str]:
        """Return the lines in the first chunk of a file.

        If the end of the chunk cuts off the last line, leave this line out. Raise StorageError if S3 fails.
        """
        chunk = next(self.read_chunks(file), b"")
        complete_lines = chunk if len(chunk) >= file.size else chunk[: chunk.rfind(b"\n") + 1]
        # splitlines() would also split at Unicode line separators, which JSON strings may contain.
        return complete_lines.decode(errors="replace").split("\n")

    def delete(self, file: ClientFile) -> None:
        """Delete a file. Raise StorageError if S3 fails."""
        self._storage.delete_objects([StoredObject(file.key, file.size)])


def _encode_name(name: str) -> str:
    """Return a file name as a part of an S3 key: percent-encoded, but with `=` instead of `%`, because programs decode `%` in URIs."""
    encoded_name = quote(name, safe="", errors="replace").replace("%", "=")
    return encoded_name if encoded_name.strip(".") else encoded_name.replace(".", "=2E")


def _parse_stored_object(stored_object: StoredObject) -> ClientFile | None:
    key_parts = stored_object.key.split("/")
    if len(key_parts) != 5 or key_parts[1] != FILES_FOLDER or key_parts[4] != ROWS_FILE_NAME or not has_prefix(key_parts[2], FILE_PREFIX):
        return None
    return ClientFile(key_parts[2], unquote(key_parts[3].replace("=", "%")), stored_object.size, stored_object.key)


def check_jsonl(path: Path) -> None:
    """Check that a file is JSONL with one object in each line. Raise RequestFailure that names the first wrong line."""
    has_rows = False
    with path.open("rb") as file:
        line_number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            line_number += 1
            if len(line) > MAX_LINE_BYTES:
                raise bad_request(f"line {line_number} is longer than {MAX_LINE_BYTES >> 20} MiB: write one JSON object in each line", "file", "invalid_file")
            if line.strip():
                _check_row(line, line_number)
                has_rows = True
    if not has_rows:
        raise bad_request("the file has no rows: write one JSON object in each line", "file", "invalid_file")


def _check_row(line: bytes, line_number: int) -> None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise bad_request(f"line {line_number} is not valid JSON: write one JSON object in each line (JSONL)", "file", "invalid_file") from None
    if not isinstance(row, dict):
        raise bad_request(f"line {line_number} is not a JSON object: write one JSON object in each line (JSONL)", "file", "invalid_file")
