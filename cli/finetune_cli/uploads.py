"""Uploads files and folders to storage.

An object becomes visible only when it is complete: a small file is uploaded with one request, and S3 shows a multipart upload of a large file only
after its completion. Each part is sent with its MD5 digest, so that the store refuses a damaged part. After an interruption, the uploaded parts stay
in the store, and the next run uploads only the missing parts. If the local folder is a checkpoint or model, its files are compared with its manifest,
and the commit marker is uploaded after all files.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.names import Storage, checkpoint_folder

from finetune_cli.job_storage import (
    ConnectionLost,
    JobStorage,
    StorageError,
    StorageErrors,
    StoredObject,
    find_committed_folder,
    is_folder_name,
    read_file_list,
)
from finetune_cli.transfers import (
    PARALLEL_TRANSFERS,
    PART_SUFFIX,
    Check,
    FileState,
    LocalDigest,
    Progress,
    TransferredFile,
    compute_sha256_of_file,
    digest_file,
)

FILES_UPLOADED_LAST = ("config.json", "adapter_config.json")
"""Files without which no program can load a model. They are uploaded after all other files, so that no program loads an incomplete model."""


@dataclass(frozen=True)
class LocalFile:
    """A file to upload: its path, the key of its object (relative to the storage's URI), and the sha256 in the manifest, or None without a manifest."""

    path: Path
    key: str
    expected_sha256: str | None = None


@dataclass(frozen=True)
class CommittedUpload:
    """A checkpoint or model to upload. `folder`: key of its folder in storage. `incarnation`: name of the folder inside `folder` that holds the files."""

    folder: str
    incarnation: str
    attempt: int
    manifest: bytes
    files: tuple[LocalFile, ...]

    @property
    def manifest_sha256(self) -> str:
        """sha256 (hex) of the manifest."""
        return hashlib.sha256(self.manifest).hexdigest()

    @property
    def marker(self) -> bytes:
        """The commit marker, as the trainer writes it."""
        return json.dumps({"attempt": self.attempt, "path": self.incarnation, "manifestSha256": self.manifest_sha256}, sort_keys=True).encode()


def list_plain_files(source: Path) -> list[LocalFile]:
    """Return the files of a folder, or the file itself with its name as key. Links are followed. Raises StorageError if the folder contains no file."""
    if source.is_file():
        return [LocalFile(source, source.name)]
    paths = [path for path in sorted(source.rglob("*")) if path.is_file() and not path.name.endswith(PART_SUFFIX)]
    if not paths:
        raise StorageError(f"{source}: the folder contains no files")
    return [LocalFile(path, path.relative_to(source).as_posix()) for path in sorted(paths, key=lambda path: path.name in FILES_UPLOADED_LAST)]


def read_committed_upload(source: Path) -> CommittedUpload | None:
    """Return the checkpoint or model in a folder, or None if the folder has no manifest of the trainer. Raises StorageError."""
    manifest_path = source / Storage.MANIFEST
    if not manifest_path.is_file():
        return None
    manifest_bytes = manifest_path.read_bytes()
    try:
        manifest = json.loads(manifest_bytes)
    except ValueError:
        return None
    if not isinstance(manifest, dict) or not {"files", "step", "incarnation"} <= manifest.keys():
        return None
    step, incarnation = manifest["step"], manifest["incarnation"]
    if not manifest.get("kind") and (not isinstance(step, int) or isinstance(step, bool)):
        raise StorageError(f"{manifest_path}: step is {step!r}, which is not a number; download the checkpoint again")
    if not is_folder_name(incarnation):
        raise StorageError(f"{manifest_path}: incarnation is {incarnation!r}, which is not the name of a folder; download the checkpoint again")
    folder = Storage.MODEL.value if manifest.get("kind") else f"{Storage.CHECKPOINTS}/{checkpoint_folder(step)}"
    files = tuple(
        LocalFile(source / str(entry["path"]), f"{folder}/{incarnation}/{entry['path']}", str(entry["sha256"]))
        for entry in read_file_list(str(manifest_path), manifest)
    )
    missing_paths = [str(file.path) for file in files if not file.path.is_file()]
    if missing_paths:
        raise StorageError(
            f"{missing_paths[0]} is missing, but {manifest_path} lists it ({len(missing_paths)} of {len(files)} files are missing); download the folder again"
        )
    return CommittedUpload(folder, incarnation, int(manifest.get("attempt") or 1), manifest_bytes, files)


class Uploader:
    """Uploads files to one storage location."""

    def __init__(self, storage: JobStorage, progress: Progress):
        self._storage = storage
        self._progress = progress

    def upload_files(self, files: list[LocalFile]) -> list[TransferredFile]:
        """Upload files in the given order. Raises StorageError, OSError."""
        return [self._upload_file(file) for file in files]

    def upload_committed(self, upload: CommittedUpload) -> list[TransferredFile]:
        """Upload the files of a checkpoint or model, then its manifest, then its commit marker. Raises StorageError, OSError."""
        existing_folder = find_committed_folder(self._storage, upload.folder)
        if existing_folder is not None and existing_folder.manifest_sha256 != upload.manifest_sha256:
            raise StorageError(f"{self._storage.make_object_uri(upload.folder)} already contains another checkpoint or model; choose another target")
        uploaded_files = self.upload_files(list(upload.files))
        self._storage.write_object(f"{upload.folder}/{upload.incarnation}/{Storage.MANIFEST}", upload.manifest)
        self._storage.write_object(f"{upload.folder}/{Storage.COMMITTED}", upload.marker)
        return uploaded_files

    def _upload_file(self, file: LocalFile) -> TransferredFile:
        report_bytes = self._progress.begin_file(file.path.name, file.path.stat().st_size)
        digest = digest_file(file.path)
        if file.expected_sha256 not in (None, digest.sha256):
            raise StorageError(
                f"{file.path} is damaged: its sha256 is {digest.sha256[:12]}..., but the manifest lists {str(file.expected_sha256)[:12]}...; "
                "download the folder again"
            )
        if self._storage.local is not None:
            state = _copy_file(self._storage, file, digest, report_bytes)
        else:
            state = self._upload_to_s3(file, digest, report_bytes)
        check = Check.SHA256 if file.expected_sha256 else Check.ETAG if self._storage.local is None else Check.SIZE
        return TransferredFile(file.path, self._storage.make_object_uri(file.key), digest.size, digest.sha256, state, check)

    def _upload_to_s3(self, file: LocalFile, digest: LocalDigest, report_bytes: Callable[[int], None]) -> FileState:
        stored_object = self._find_stored_object(file)
        if stored_object is not None and (stored_object.size, stored_object.etag) == (digest.size, digest.etag):
            report_bytes(digest.size)
            return FileState.UNCHANGED
        if len(digest.part_md5s) == 1:
            with StorageErrors(self._storage.make_object_uri(file.key)):
                self._storage.client.put_object(
                    **self._make_location(file), Body=file.path.read_bytes(), ContentMD5=base64.b64encode(digest.part_md5s[0]).decode()
                )
            report_bytes(digest.size)
            return FileState.TRANSFERRED
        upload = MultipartUpload(self._storage, file, digest)
        return upload.run(report_bytes)

    def _find_stored_object(self, file: LocalFile) -> StoredObject | None:
        """Return the stored object of a file, or None if the object does not exist or the credentials may not read it.

        Wrong credentials make the upload itself fail.
        """
        try:
            return self._storage.find_object(file.key)
        except ConnectionLost:
            raise
        except StorageError:
            return None

    def _make_location(self, file: LocalFile) -> dict[str, str]:
        return {"Bucket": self._storage.bucket, "Key": self._storage.make_full_key(file.key)}


class MultipartUpload:
    """The upload of one large file to S3. It reuses the parts of an interrupted upload if their content is equal."""

    def __init__(self, storage: JobStorage, file: LocalFile, digest: LocalDigest):
        self._file, self._digest = file, digest
        self._client = storage.client
        self._uri = storage.make_object_uri(file.key)
        self._location = {"Bucket": storage.bucket, "Key": storage.make_full_key(file.key)}

    def run(self, report_bytes: Callable[[int], None]) -> FileState:
        """Upload the missing parts and complete the upload. Raises StorageError. After an interruption, the uploaded parts stay in the store."""
        with StorageErrors(self._uri):
            upload_id, etags = self._find_unfinished_upload()
            state = FileState.RESUMED if etags else FileState.TRANSFERRED
            if upload_id is None:
                upload_id = str(self._client.create_multipart_upload(**self._location)["UploadId"])
            report_bytes(sum(self._compute_part_bytes(part_number) for part_number in etags))
            missing_part_numbers = [part_number for part_number in range(1, len(self._digest.part_md5s) + 1) if part_number not in etags]
            for part_number, etag in self._upload_parts(upload_id, missing_part_numbers, report_bytes):
                etags[part_number] = etag
            parts = [{"PartNumber": part_number, "ETag": etags[part_number]} for part_number in sorted(etags)]
            self._client.complete_multipart_upload(**self._location, UploadId=upload_id, MultipartUpload={"Parts": parts})
        return state

    def _upload_parts(self, upload_id: str, part_numbers: list[int], report_bytes: Callable[[int], None]) -> list[tuple[int, str]]:
        def upload_part(part_number: int) -> tuple[int, str]:
            with self._file.path.open("rb") as file:
                file.seek((part_number - 1) * self._digest.part_bytes)
                body = file.read(self._digest.part_bytes)
            # `self._digest` was computed before the upload, so the store refuses the part if the file has changed since then.
            md5 = base64.b64encode(self._digest.part_md5s[part_number - 1]).decode()
            response = self._client.upload_part(**self._location, UploadId=upload_id, PartNumber=part_number, Body=body, ContentMD5=md5)
            report_bytes(len(body))
            return part_number, str(response["ETag"])

        pool = ThreadPoolExecutor(PARALLEL_TRANSFERS)
        try:
            return list(pool.map(upload_part, part_numbers))
        finally:
            # After a failure or Ctrl-C, no further part is started.
            pool.shutdown(wait=True, cancel_futures=True)

    def _compute_part_bytes(self, part_number: int) -> int:
        return min(self._digest.part_bytes, self._digest.size - (part_number - 1) * self._digest.part_bytes)

    def _find_unfinished_upload(self) -> tuple[str | None, dict[int, str]]:
        """Return the ID of the unfinished upload that has the most parts, and the ETags of its parts.

        Ignore an upload if one of its parts differs from the file. Return None and no ETags if no upload remains, or if the user may not list uploads.
        Then the whole file is uploaded.
        """
        from botocore.exceptions import ClientError

        best_upload: tuple[str | None, dict[int, str]] = (None, {})
        try:
            for page in self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self._location["Bucket"], Prefix=self._location["Key"]):
                for entry in page.get("Uploads") or []:
                    etags = self._read_matching_etags(entry) if entry["Key"] == self._location["Key"] else None
                    if etags and len(etags) > len(best_upload[1]):
                        best_upload = (str(entry["UploadId"]), etags)
        except ClientError:
            return None, {}
        return best_upload

    def _read_matching_etags(self, upload: dict[str, Any]) -> dict[int, str] | None:
        """Return the ETag of each part of an unfinished upload by part number, or None if a part differs from the file."""
        etags: dict[int, str] = {}
        for page in self._client.get_paginator("list_parts").paginate(**self._location, UploadId=upload["UploadId"]):
            for part in page.get("Parts") or []:
                part_number, md5s = int(part["PartNumber"]), self._digest.part_md5s
                has_same_size = int(part["Size"]) == self._compute_part_bytes(part_number)
                if part_number > len(md5s) or str(part["ETag"]).strip('"') != md5s[part_number - 1].hex() or not has_same_size:
                    return None
                etags[part_number] = str(part["ETag"])
        return etags


def _copy_file(storage: JobStorage, file: LocalFile, digest: LocalDigest, report_bytes: Callable[[int], None]) -> FileState:
    """Copy a file into a local storage folder, unless the folder already has this file. The copy gets its final name when it is complete. Raises OSError."""
    assert storage.local is not None
    target = storage.local / file.key
    is_equal = target.is_file() and target.stat().st_size == digest.size and compute_sha256_of_file(target) == digest.sha256
    if not is_equal:
        target.parent.mkdir(parents=True, exist_ok=True)
        part_path = target.with_name(f".{target.name}{PART_SUFFIX}")
        shutil.copyfile(file.path, part_path)
        part_path.replace(target)
    report_bytes(digest.size)
    return FileState.UNCHANGED if is_equal else FileState.TRANSFERRED
