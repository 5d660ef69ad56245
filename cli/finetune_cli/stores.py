"""What a job has in storage, seen from the user's machine: listed, verified, downloaded, removed.

Credentials are the user's own: the AWS_ variables, or with `--use-secret` those of the Secret that the job names.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from finetune_api.names import Storage
from finetune_api.spec.cluster import StorageRoot

from finetune_cli.output import Told


class StoreError(Told):
    """Storage refused, or does not hold what was asked for."""


@dataclass(frozen=True)
class StoredObject:
    """One object: its key relative to the root, and its size in bytes."""

    key: str
    size: int


class Store:
    """Objects below a uri: `s3://bucket/prefix` or `file:///path`."""

    def __init__(self, uri: str, connection: StorageRoot, credentials: dict[str, str] | None = None):
        self.uri = uri.rstrip("/")
        parts = urlsplit(self.uri)
        self.local = Path(parts.path) if parts.scheme == "file" else None
        if parts.scheme not in ("s3", "file"):
            raise StoreError(f"{uri}: only s3:// and file:// can be read from here")
        self.bucket, self.prefix = parts.netloc, parts.path.strip("/")
        self.client: Any = None if self.local else _client(connection, credentials)

    def objects(self, below: str = "") -> Iterator[StoredObject]:
        """All objects below a folder, by key. Raises StoreError."""
        if self.local is not None:
            root = self.local / below
            for path in sorted(root.rglob("*")) if root.is_dir() else []:
                if path.is_file():
                    yield StoredObject(path.relative_to(self.local).as_posix(), path.stat().st_size)
            return
        folder = "/".join(part for part in (self.prefix, below.strip("/")) if part) + "/"
        with _told(self.uri):
            for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=folder):
                for one in page.get("Contents") or []:
                    yield StoredObject(one["Key"][len(self.prefix) :].lstrip("/"), int(one["Size"]))

    def read(self, key: str) -> bytes:
        """A small object. Raises StoreError."""
        if self.local is not None:
            try:
                return (self.local / key).read_bytes()
            except OSError as error:
                raise StoreError(f"{self.uri}/{key}: {error.strerror}") from None
        with _told(f"{self.uri}/{key}"):
            found: bytes = self.client.get_object(Bucket=self.bucket, Key=self._key(key))["Body"].read()
            return found

    def chunks(self, key: str) -> Iterator[bytes]:
        """An object in pieces. Raises StoreError."""
        if self.local is not None:
            with (self.local / key).open("rb") as file:
                while piece := file.read(1 << 20):
                    yield piece
            return
        with _told(f"{self.uri}/{key}"):
            yield from self.client.get_object(Bucket=self.bucket, Key=self._key(key))["Body"].iter_chunks(1 << 20)

    def remove(self, objects: list[StoredObject]) -> None:
        """Remove objects. Raises StoreError with the first that could not be removed."""
        if self.local is not None:
            for one in objects:
                (self.local / one.key).unlink(missing_ok=True)
            return
        for start in range(0, len(objects), 1000):
            part = [{"Key": self._key(one.key)} for one in objects[start : start + 1000]]
            with _told(self.uri):
                failed = (
                    self.client.delete_objects(Bucket=self.bucket, Delete={"Objects": part, "Quiet": True}).get(
                        "Errors"
                    )
                    or []
                )
            if failed:
                raise StoreError(f"{failed[0].get('Key')}: {failed[0].get('Message') or failed[0].get('Code')}")

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key


def _client(connection: StorageRoot, credentials: dict[str, str] | None) -> Any:
    import boto3
    from botocore.config import Config

    style = connection.addressing_style or ("path" if connection.endpoint else "virtual")
    given = credentials or {}
    return boto3.client(
        "s3",
        endpoint_url=connection.endpoint,
        region_name=connection.region or "us-east-1",
        aws_access_key_id=given.get("AWS_ACCESS_KEY_ID"),
        aws_secret_access_key=given.get("AWS_SECRET_ACCESS_KEY"),
        aws_session_token=given.get("AWS_SESSION_TOKEN"),
        config=Config(
            s3={"addressing_style": str(style)}, retries={"max_attempts": 5, "mode": "standard"},
            request_checksum_calculation="when_required", response_checksum_validation="when_required",
        ),
    )  # fmt: skip


class _told:
    """Failures of the S3 client become StoreErrors without secrets."""

    def __init__(self, what: str):
        self.what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        if isinstance(error, ClientError):
            found = error.response.get("Error", {})
            raise StoreError(f"{self.what}: {found.get('Code')}: {found.get('Message')}") from None
        if isinstance(error, BotoCoreError):
            raise StoreError(f"{self.what}: {error}") from None


def root_of(job: dict[str, Any]) -> tuple[str, StorageRoot]:
    """Root of a job's tree and the connection to it, from its spec and status. Raises StoreError."""
    metadata = job["metadata"]
    connection = StorageRoot.model_validate((job.get("spec") or {}).get("storage") or {})
    tail = f"{metadata.get('namespace', 'default')}/{metadata['name']}/{metadata['uid']}"
    if connection.uri:
        return f"{connection.uri.rstrip('/')}/{tail}", connection
    status = job.get("status") or {}
    known = [
        status.get("latestCheckpoint"),
        (status.get("output") or {}).get("uri"),
        *(c.get("uri") for c in status.get("checkpoints") or []),
    ]
    for uri in known:
        if uri and tail in uri:
            return uri[: uri.index(tail) + len(tail)], connection
    raise StoreError(
        f"{metadata['name']} uses the operator's storage, and has written nothing that tells where it is; give --storage URI"
    )


def credentials_of(secret: dict[str, Any]) -> dict[str, str]:
    """Values of a Secret."""
    return {key: base64.b64decode(value).decode() for key, value in (secret.get("data") or {}).items()}


@dataclass(frozen=True)
class Committed:
    """A committed checkpoint or model in storage."""

    folder: str
    path: str
    manifest_sha256: str
    healthy: bool


def committed(store: Store) -> list[Committed]:
    """Everything that has its marker: checkpoints by step, then the model. Raises StoreError."""
    keys = [one.key for one in store.objects()]
    found = []
    for key in keys:
        folder, _, name = key.rpartition("/")
        if name != Storage.COMMITTED:
            continue
        try:
            marker = json.loads(store.read(key))
            found.append(
                Committed(
                    folder, str(marker["path"]), str(marker["manifestSha256"]), f"{folder}/{Storage.HEALTHY}" in keys
                )
            )
        except (ValueError, KeyError, TypeError):
            raise StoreError(f"{store.uri}/{key} is damaged: it is not the marker of a commit") from None
    return sorted(found, key=lambda one: (one.folder.startswith(Storage.MODEL), one.folder))


def files_of(store: Store, one: Committed) -> list[dict[str, Any]]:
    """Files of a commit by its manifest, whose own hash is checked first. Raises StoreError."""
    key = f"{one.folder}/{one.path}/{Storage.MANIFEST}"
    data = store.read(key)
    if hashlib.sha256(data).hexdigest() != one.manifest_sha256:
        raise StoreError(f"{store.uri}/{key} is damaged: its sha256 is not the one of the marker")
    found: list[dict[str, Any]] = json.loads(data)["files"]
    return found


def fetch(store: Store, one: Committed, target: Path | None) -> int:
    """Read every file of a commit, compare its sha256, and write it below `target` if one is given; returns bytes read."""
    total = 0
    for file in files_of(store, one):
        name = str(file["path"])
        if name.startswith("/") or ".." in name.split("/"):
            raise StoreError(f"{store.uri}: the manifest names {name}, outside its folder")
        total += _copy(store, f"{one.folder}/{one.path}/{name}", file, target / name if target else None)
    return total


def _copy(store: Store, key: str, file: dict[str, Any], path: Path | None) -> int:
    digest, count = hashlib.sha256(), 0
    part = None
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
    handle = part.open("wb") if part else None
    try:
        for piece in store.chunks(key):
            digest.update(piece)
            count += len(piece)
            if handle:
                handle.write(piece)
    finally:
        if handle:
            handle.close()
    if digest.hexdigest() != file["sha256"] or count != file["size"]:
        raise StoreError(
            f"{store.uri}/{key} is damaged: {count} bytes with sha256 {digest.hexdigest()[:12]}..., "
            f"the manifest says {file['size']} and {file['sha256'][:12]}..."
        )
    if part and path:
        part.replace(path)
    return count
