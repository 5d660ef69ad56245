"""Reads, writes and deletes the objects of a job in storage from the user's machine, and verifies its checkpoints and models.

The credentials come from the AWS_ environment variables. With `--use-secret`, they come from the Secret that the job's spec names.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from finetune_api.names import Storage, parse_attempt_of_uri
from finetune_api.spec.cluster import StorageRoot

from finetune_cli.output import CommandError
from finetune_cli.transfers import write_whole_file

ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
"""Environment variables from which boto3 reads the address of the S3 server."""
CREDENTIALS_HINT = "export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"


class StorageError(CommandError):
    """Storage refused a request, or the requested object does not exist or is damaged."""


class ConnectionLost(StorageError):
    """The connection to storage failed after all retries of the S3 client. The transfer can be continued later from the point where it ended."""


@dataclass(frozen=True)
class StoredObject:
    """An object in storage: its key relative to the URI of the storage, its size in bytes, and its ETag (empty for local files)."""

    key: str
    size: int
    etag: str = ""


class JobStorage:
    """The objects below a URI: `s3://bucket/prefix` or `file:///path`."""

    def __init__(self, uri: str, storage_root: StorageRoot, credentials: dict[str, str] | None = None):
        self.uri = uri.rstrip("/")
        uri_parts = urlsplit(self.uri)
        self.local = Path(uri_parts.path) if uri_parts.scheme == "file" else None
        if uri_parts.scheme not in ("s3", "file"):
            raise StorageError(f"{uri}: this command reads only s3:// and file:// storage")
        self.bucket, self.prefix = uri_parts.netloc, uri_parts.path.strip("/")
        self.client: Any = None if self.local else _make_s3_client(storage_root, credentials)

    def open_folder(self, uri: str) -> JobStorage:
        """Return the JobStorage of another URI in the same bucket or file system. It uses the same S3 client as this JobStorage."""
        folder_storage = copy.copy(self)
        uri_parts = urlsplit(uri)
        folder_storage.uri, folder_storage.prefix = uri.rstrip("/"), uri_parts.path.strip("/")
        folder_storage.local = Path(uri_parts.path) if self.local is not None else None
        return folder_storage

    def list_objects(self, folder_path: str = "") -> Iterator[StoredObject]:
        """Yield all objects below a folder, sorted by key. Raises StorageError."""
        if self.local is not None:
            root_path = self.local / folder_path
            for path in sorted(root_path.rglob("*")) if root_path.is_dir() else []:
                if path.is_file():
                    yield StoredObject(path.relative_to(self.local).as_posix(), path.stat().st_size)
            return
        folder = "/".join(part for part in (self.prefix, folder_path.strip("/")) if part) + "/"
        with StorageErrors(self.uri):
            for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=folder):
                for entry in page.get("Contents") or []:
                    key = entry["Key"][len(self.prefix) :].lstrip("/")
                    yield StoredObject(key, int(entry["Size"]), str(entry.get("ETag", "")).strip('"'))

    def read_object(self, key: str) -> bytes:
        """Return the content of a small object. Raises StorageError."""
        if self.local is not None:
            try:
                return (self.local / key).read_bytes()
            except OSError as error:
                raise StorageError(f"{self.uri}/{key}: {error.strerror}") from None
        with StorageErrors(self.make_object_uri(key)):
            content: bytes = self.client.get_object(Bucket=self.bucket, Key=self.make_full_key(key))["Body"].read()
            return content

    def read_if_exists(self, key: str) -> bytes | None:
        """Return the content of a small object, or None if it does not exist. Raises StorageError."""
        if self.local is not None:
            return self.read_object(key) if (self.local / key).exists() else None
        with StorageErrors(self.make_object_uri(key)):
            try:
                content: bytes = self.client.get_object(Bucket=self.bucket, Key=self.make_full_key(key))["Body"].read()
            except self.client.exceptions.NoSuchKey:
                return None
            return content

    def write_object(self, key: str, content: bytes) -> None:
        """Write a small object. An existing object with this key is replaced. Raises StorageError."""
        if self.local is not None:
            try:
                write_whole_file(self.local / key, content)
            except OSError as error:
                raise StorageError(f"{self.uri}/{key}: {error.strerror}") from None
            return
        with StorageErrors(self.make_object_uri(key)):
            self.client.put_object(Bucket=self.bucket, Key=self.make_full_key(key), Body=content)

    def list_links(self, folder_path: str) -> list[str]:
        """Return the keys of the symbolic links in a folder.

        If the folder itself is a link, return its key. The result is empty for object storage, which has no links.
        """
        if self.local is None:
            return []
        root_path = self.local / folder_path
        paths = [root_path] if root_path.is_symlink() else sorted(root_path.rglob("*"))
        return [path.relative_to(self.local).as_posix() for path in paths if path.is_symlink()]

    def find_object(self, key: str) -> StoredObject | None:
        """Return an object's key, size and ETag, or None if it does not exist. Raises StorageError."""
        if self.local is not None:
            path = self.local / key
            return StoredObject(key, path.stat().st_size) if path.is_file() else None
        from botocore.exceptions import ClientError

        with StorageErrors(self.make_object_uri(key)):
            try:
                response = self.client.head_object(Bucket=self.bucket, Key=self.make_full_key(key))
            except ClientError as error:
                if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == HTTPStatus.NOT_FOUND:
                    return None
                # The response to a HEAD request has no body. A GET request follows, because its response says whether the credentials are wrong or a
                # permission is missing.
                self.client.get_object(Bucket=self.bucket, Key=self.make_full_key(key), Range="bytes=0-0")
                raise
            return StoredObject(key, int(response["ContentLength"]), str(response.get("ETag", "")).strip('"'))

    def read_chunks(self, key: str, start: int = 0, etag: str = "") -> Iterator[bytes]:
        """Yield the content of an object in chunks, from the byte `start`. If `etag` is given, the object must still have this ETag. Raises StorageError."""
        if self.local is not None:
            with (self.local / key).open("rb") as file:
                file.seek(start)
                while chunk := file.read(1 << 20):
                    yield chunk
            return
        request_options = {"Range": f"bytes={start}-"} if start else {}
        request_options |= {"IfMatch": f'"{etag}"'} if etag else {}
        with StorageErrors(self.make_object_uri(key)):
            yield from self.client.get_object(Bucket=self.bucket, Key=self.make_full_key(key), **request_options)["Body"].iter_chunks(1 << 20)

    def delete_objects(self, stored_objects: list[StoredObject]) -> None:
        """Delete objects in the given order. Raises StorageError for the first object that could not be deleted."""
        if self.local is not None:
            for stored_object in stored_objects:
                (self.local / stored_object.key).unlink(missing_ok=True)
            return
        for start in range(0, len(stored_objects), 1000):
            batch = [{"Key": self.make_full_key(stored_object.key)} for stored_object in stored_objects[start : start + 1000]]
            with StorageErrors(self.uri):
                failed_objects = (
                    self.client.delete_objects(Bucket=self.bucket, Delete={"Objects": batch, "Quiet": True}).get(
                        "Errors"
                    )
                    or []
                )
            if failed_objects:
                raise StorageError(f"{failed_objects[0].get('Key')}: {failed_objects[0].get('Message') or failed_objects[0].get('Code')}")

    def make_full_key(self, key: str) -> str:
        """Return the key of an object in its bucket."""
        return f"{self.prefix}/{key}" if self.prefix else key

    def make_object_uri(self, key: str) -> str:
        """Return the URI of an object or folder."""
        return f"{self.uri}/{key}" if key else self.uri


def _make_s3_client(storage_root: StorageRoot, credentials: dict[str, str] | None) -> Any:
    import boto3
    from botocore.config import Config

    has_endpoint = storage_root.endpoint or any(os.environ.get(name) for name in ENDPOINT_VARIABLES)
    addressing_style = storage_root.addressing_style or ("path" if has_endpoint else "virtual")
    given_credentials = credentials or {}
    return boto3.session.Session().client(
        "s3",
        endpoint_url=storage_root.endpoint,
        region_name=storage_root.region or "us-east-1",
        aws_access_key_id=given_credentials.get("AWS_ACCESS_KEY_ID"),
        aws_secret_access_key=given_credentials.get("AWS_SECRET_ACCESS_KEY"),
        aws_session_token=given_credentials.get("AWS_SESSION_TOKEN"),
        config=Config(
            s3={"addressing_style": str(addressing_style)}, retries={"max_attempts": 5, "mode": "standard"},
            request_checksum_calculation="when_required", response_checksum_validation="when_required",
        ),
    )  # fmt: skip


class StorageErrors:
    """A context manager that turns each error of the S3 client into a StorageError, whose message contains no secret."""

    def __init__(self, location: str):
        self.location = location

    def __enter__(self) -> None:
        return None

    def __exit__(self, error_type: Any, error: BaseException | None, traceback: Any) -> None:
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            HTTPClientError,
            IncompleteReadError,
            NoCredentialsError,
        )
        from botocore.exceptions import ConnectionError as ConnectionFailure

        if isinstance(error, ClientError):
            details = error.response.get("Error", {})
            raise StorageError(f"{self.location}: {details.get('Code')}: {details.get('Message')}") from None
        if isinstance(error, NoCredentialsError):
            raise StorageError(f"{self.location}: there are no S3 credentials; {CREDENTIALS_HINT}") from None
        if isinstance(error, ConnectionFailure | HTTPClientError | IncompleteReadError):
            raise ConnectionLost(f"{self.location}: {error}") from None
        if isinstance(error, BotoCoreError):
            raise StorageError(f"{self.location}: {error}") from None


def to_job_folder_uri(uri: str) -> str:
    """Return the URI of a job's folder in storage. `uri` is the URI of this folder, or of a model, checkpoint or lineage statement inside it."""
    folder = uri.rstrip("/")
    if parse_attempt_of_uri(folder) is not None:
        folder = folder.rpartition("/")[0]
    return _INNER_PATH_PATTERN.sub("", folder)


_INNER_PATH_PATTERN = re.compile(rf"(?<=[^/:])/({Storage.MODEL}|{Storage.MERGED}|{Storage.CHECKPOINTS}(/step-\d+)?|{Storage.LINEAGE}(/statement\.[a-z.]+)?)$")


def locate_job_folder(job: dict[str, Any]) -> tuple[str, StorageRoot]:
    """Return the URI of a job's folder in storage and the connection settings, from spec and status. Raises StorageError.

    If the job adopted the result of an earlier job with the same name, the URI is the folder of the earlier job.
    """
    metadata = job["metadata"]
    connection = StorageRoot.model_validate((job.get("spec") or {}).get("storage") or {})
    status = job.get("status") or {}
    adopted_uid = (status.get("output") or {}).get("adoptedUid")
    uid = adopted_uid if is_folder_name(adopted_uid) else metadata["uid"]
    inner_path = f"{metadata.get('namespace', 'default')}/{metadata['name']}/{uid}"
    if connection.uri:
        return f"{connection.uri.rstrip('/')}/{inner_path}", connection
    known_uris = [
        status.get("latestCheckpoint"),
        (status.get("output") or {}).get("uri"),
        *(checkpoint.get("uri") for checkpoint in status.get("checkpoints") or []),
    ]
    for uri in known_uris:
        if uri and inner_path in uri:
            return uri[: uri.index(inner_path) + len(inner_path)], connection
    raise StorageError(
        f"{metadata['name']} uses the operator's default storage, and the job's status contains no storage URI yet; give the storage root with --storage URI"
    )


def decode_secret(secret: dict[str, Any]) -> dict[str, str]:
    """Return the decoded values of a Secret."""
    return {key: base64.b64decode(value).decode() for key, value in (secret.get("data") or {}).items()}


@dataclass(frozen=True)
class CommittedFolder:
    """A committed checkpoint or model in storage."""

    folder: str
    """Key of the folder that holds the commit marker."""
    path: str
    """Name of the folder inside `folder` that holds the files."""
    manifest_sha256: str
    is_healthy: bool
    """Whether the folder contains the marker of a healthy checkpoint. Only `list_committed_folders` looks for this marker. Otherwise, the value is false."""


def list_committed_folders(storage: JobStorage) -> list[CommittedFolder]:
    """Return every folder with a commit marker: checkpoints by step, then the model. Raises StorageError."""
    keys = {stored_object.key for stored_object in storage.list_objects()}
    marked_folders = [key.rpartition("/")[0] for key in sorted(keys) if key.rpartition("/")[2] == Storage.COMMITTED]
    committed_folders = [
        parse_marker(storage, folder, storage.read_object(f"{folder}/{Storage.COMMITTED}"), f"{folder}/{Storage.HEALTHY}" in keys) for folder in marked_folders
    ]
    return sorted(committed_folders, key=lambda committed_folder: (committed_folder.folder.startswith(Storage.MODEL), committed_folder.folder))


def find_committed_folder(storage: JobStorage, folder: str) -> CommittedFolder | None:
    """Return the committed checkpoint or model in a folder, or None if the folder has no commit marker. Raises StorageError."""
    marker_bytes = storage.read_if_exists(f"{folder}/{Storage.COMMITTED}")
    return None if marker_bytes is None else parse_marker(storage, folder, marker_bytes)


def parse_marker(storage: JobStorage, folder: str, content: bytes, is_healthy: bool = False) -> CommittedFolder:
    """Return the checkpoint or model that a commit marker describes. Raises StorageError if the marker is damaged."""
    try:
        marker = json.loads(content)
        if not is_folder_name(marker["path"]):
            raise ValueError
        return CommittedFolder(folder, marker["path"], str(marker["manifestSha256"]), is_healthy)
    except (ValueError, KeyError, TypeError):
        raise StorageError(f"{storage.uri}/{folder}/{Storage.COMMITTED} is damaged: the content is not a valid commit marker") from None


def is_folder_name(value: object) -> bool:
    """Whether the value is the name of one folder, not a longer path."""
    return isinstance(value, str) and "/" not in value and value not in ("", ".", "..")


def read_manifest(storage: JobStorage, committed_folder: CommittedFolder) -> dict[str, Any]:
    """Return the manifest of a checkpoint or model. Raises StorageError if the sha256 of the manifest differs from the sha256 in the commit marker."""
    return parse_manifest(read_manifest_bytes(storage, committed_folder))


def read_manifest_bytes(storage: JobStorage, committed_folder: CommittedFolder) -> bytes:
    """Return the manifest's bytes as they are stored. Raises StorageError if the sha256 of these bytes differs from the sha256 in the commit marker."""
    key = f"{committed_folder.folder}/{committed_folder.path}/{Storage.MANIFEST}"
    manifest_bytes = storage.read_object(key)
    if hashlib.sha256(manifest_bytes).hexdigest() != committed_folder.manifest_sha256:
        raise StorageError(f"{storage.uri}/{key} is damaged: the commit marker contains another sha256")
    return manifest_bytes


def parse_manifest(content: bytes) -> dict[str, Any]:
    """Parse the JSON text of a manifest."""
    manifest: dict[str, Any] = json.loads(content)
    return manifest


def read_file_list(location: str, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the files that a manifest lists. Raises StorageError if the list is invalid or a file lies outside the folder; the message names `location`."""
    files: list[dict[str, Any]] = manifest.get("files") or []
    is_valid_list = isinstance(files, list) and files and all(isinstance(entry, dict) and {"path", "size", "sha256"} <= entry.keys() for entry in files)
    if not is_valid_list:
        raise StorageError(f"{location}: the manifest is damaged: it has no list of files with path, size and sha256")
    for entry in files:
        name = str(entry["path"])
        if name.startswith("/") or ".." in name.split("/"):
            raise StorageError(f"{location}: the manifest lists the file {name}, which lies outside the checkpoint's folder")
    return files


def verify_files(storage: JobStorage, committed_folder: CommittedFolder) -> int:
    """Read every file of a checkpoint or model and compare it with the manifest. Returns the number of bytes read. Raises StorageError."""
    total_bytes = 0
    for entry in read_file_list(storage.uri, read_manifest(storage, committed_folder)):
        key = f"{committed_folder.folder}/{committed_folder.path}/{entry['path']}"
        sha256, byte_count = hash_object(storage, key)
        if sha256 != entry["sha256"] or byte_count != entry["size"]:
            raise StorageError(
                f"{storage.uri}/{key} is damaged: the file has {byte_count} bytes and sha256 {sha256[:12]}..., "
                f"but the manifest lists {entry['size']} bytes and {entry['sha256'][:12]}..."
            )
        total_bytes += byte_count
    return total_bytes


def hash_object(storage: JobStorage, object_key: str) -> tuple[str, int]:
    """Read an object. Returns its sha256 (hex) and its size in bytes."""
    digest, byte_count = hashlib.sha256(), 0
    for chunk in storage.read_chunks(object_key):
        digest.update(chunk)
        byte_count += len(chunk)
    return digest.hexdigest(), byte_count
