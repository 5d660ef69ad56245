"""Reads and commits the checkpoints and the final model of a job in storage.

An incarnation is one start of an attempt (`a2-1f3c9a2b`: attempt 2, begun in pod 1f3c9a2b). Each incarnation writes to its own folder, so that
the files of two incarnations never mix. A commit writes the data and then the manifest, and checks that every object exists with the right size. Then,
it creates the marker, on condition that no marker exists. If the existing marker names this incarnation's manifest, an earlier request of this
incarnation created it, but the response was lost. If the existing marker names another manifest, this incarnation is fenced out and must end.
"""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune_api.attempt_secret import sign_manifest
from finetune_api.errors import FineTuneError, PeerError, StorageError
from finetune_api.names import RUN_FILE_NAME, Storage, make_attempt_folder_name, parse_attempt_of_folder

from finetune_trainer.checkpoint.manifest import (
    CommitMarker,
    FileEntry,
    Manifest,
    UploadedPart,
    checkpoint_folder_key,
    list_file_entries,
    parse_step,
    sha256_bytes,
)
from finetune_trainer.storage.base import ByteCounter, CreateResult, ObjectStat, Store, join_key

log = logging.getLogger(__name__)
PARTS_FOLDER = ".parts"
UPLOAD_INCOMPLETE_CODE = "UploadIncomplete"
PART_POLL_SECONDS = 0.2
MAX_MARKER_TRIES = 10
"""Maximum number of tries to create or read a marker. Several tries are needed because, in some stores, a new object can be read only after a delay."""


@dataclass(frozen=True)
class CommittedFolder:
    """A committed folder outside the folders of jobs, for example a folder with prepared rows."""

    marker_folder: str
    """Key of the folder that holds the marker."""
    marker: CommitMarker

    @property
    def folder(self) -> str:
        """Key of the folder that holds the files."""
        return join_key(self.marker_folder, self.marker.path)


@dataclass(frozen=True)
class CommittedCheckpoint:
    """A committed checkpoint, the final model (step None), or the merged model."""

    step: int | None
    marker: CommitMarker
    is_healthy: bool = False
    is_merged: bool = False
    """Whether this is the merged model. Its step is None."""

    @property
    def folder(self) -> str:
        """Key of the folder that holds the files."""
        return join_key(Storage.MERGED if self.is_merged else checkpoint_folder_key(self.step), self.marker.path)


@dataclass(frozen=True)
class SweepResult:
    """The number of objects and unfinished uploads that a sweep removed, and the first error of the sweep."""

    removed_count: int
    first_error: FineTuneError | None = None


class FencedOutError(PeerError):
    """This incarnation must end, because another incarnation has replaced it."""


class CheckpointTree:
    """Reads and commits the checkpoints and the final model of one job below one storage root. Safe to use from several threads.

    `signing_key` is the secret that signs checkpoints and prepared rows. The final model is not signed. Without the key, nothing is signed.
    """

    def __init__(self, store: Store, signing_key: str | None = None) -> None:
        self.store = store
        self._signing_key = signing_key

    def uri(self, key: str) -> str:
        """Return the URI of a key."""
        return f"{self.store.uri}/{key}"

    # ---- reading ----

    def list_committed(self) -> list[CommittedCheckpoint]:
        """Return every committed checkpoint, newest first."""
        return self.list_committed_and_damaged()[0]

    def list_committed_and_damaged(self) -> tuple[list[CommittedCheckpoint], list[int]]:
        """Return every committed checkpoint, and the steps whose marker cannot be read, both newest first."""
        is_healthy_by_step: dict[int, bool] = {}
        for stat in self.store.list(f"{Storage.CHECKPOINTS}/"):
            _, folder, *names_below = stat.key.split("/")
            step = parse_step(folder)
            if step is None or len(names_below) != 1:
                continue
            if names_below[0] == Storage.COMMITTED:
                is_healthy_by_step.setdefault(step, False)
            elif names_below[0] == Storage.HEALTHY:
                is_healthy_by_step[step] = True
        committed_checkpoints, damaged_steps = [], []
        for step, is_healthy in sorted(is_healthy_by_step.items(), reverse=True):
            data = self.store.get(join_key(checkpoint_folder_key(step), Storage.COMMITTED))
            marker = CommitMarker.parse(data) if data is not None else None
            if marker is not None:
                committed_checkpoints.append(CommittedCheckpoint(step, marker, is_healthy))
            elif data is not None:
                damaged_steps.append(step)
        return committed_checkpoints, damaged_steps

    @property
    def can_sign(self) -> bool:
        """Whether this tree can sign checkpoints and check their signatures."""
        return self._signing_key is not None

    def is_signed(self, checkpoint: CommittedCheckpoint | CommittedFolder) -> bool:
        """Whether the manifest that the marker names is signed with this tree's key. A pod that can write to the store but has no key cannot sign."""
        if self._signing_key is None:
            return False
        expected_signature = sign_manifest(self._signing_key, checkpoint.folder, checkpoint.marker.manifest_sha256)
        return hmac.compare_digest(self.store.get(join_key(checkpoint.folder, Storage.SIGNATURE)) or b"", expected_signature.encode())

    def get_committed(self, step: int | None, is_healthy: bool = False) -> CommittedCheckpoint | None:
        """Return the committed checkpoint of a step, or the final model if `step` is None. Return None if it is not committed."""
        marker = self._read_marker(checkpoint_folder_key(step))
        return CommittedCheckpoint(step, marker, is_healthy) if marker else None

    def get_merged(self) -> CommittedCheckpoint | None:
        """Return the committed merged model, or None if there is none."""
        marker = self._read_marker(Storage.MERGED)
        return CommittedCheckpoint(None, marker, is_merged=True) if marker else None

    def get_committed_folder(self, folder_key: str) -> CommittedFolder | None:
        """Return the committed folder below a prefix, or None if nothing is committed there."""
        marker = self._read_marker(folder_key)
        return CommittedFolder(folder_key, marker) if marker else None

    def _read_marker(self, folder_key: str) -> CommitMarker | None:
        data = self.store.get(join_key(folder_key, Storage.COMMITTED))
        return CommitMarker.parse(data) if data is not None else None

    def read_manifest(self, checkpoint: CommittedCheckpoint | CommittedFolder) -> Manifest | None:
        """Return the manifest that the marker names, or None if the manifest is missing or its sha256 differs from the one in the marker."""
        data = self.store.get(join_key(checkpoint.folder, Storage.MANIFEST))
        if data is None or sha256_bytes(data) != checkpoint.marker.manifest_sha256:
            return None
        try:
            return Manifest.model_validate_json(data)
        except ValueError:
            return None

    def is_complete(self, checkpoint: CommittedCheckpoint) -> bool:
        """Whether the manifest that the marker names exists, and every file in the manifest exists with the right size. No file is downloaded."""
        manifest = self.read_manifest(checkpoint)
        return manifest is not None and not self._is_swept(checkpoint.folder, manifest)

    # ---- writing ----

    def upload(self, folder_key: str, incarnation: str, local_folder: Path, *, byte_counter: ByteCounter | None = None) -> list[FileEntry]:
        """Upload the files of a local folder to the incarnation's folder. Returns the manifest entries of the files."""
        entries = list_file_entries(local_folder)
        for entry in entries:
            self.store.put_file(local_folder / entry.path, join_key(folder_key, incarnation, entry.path), byte_counter=byte_counter)
        return entries

    def report_part(self, folder_key: str, incarnation: str, node_rank: int, entries: list[FileEntry] | None) -> None:
        """Report to rank 0's pod which files this pod has uploaded. If `entries` is None, report that this pod skips the checkpoint."""
        part = UploadedPart(node=node_rank, files=entries or [], dropped=entries is None)
        self.store.put(
            join_key(folder_key, incarnation, PARTS_FOLDER, f"node-{node_rank}.json"), part.model_dump_json(by_alias=True).encode()
        )

    def wait_for_parts(
        self, folder_key: str, incarnation: str, node_count: int, timeout_seconds: float, must_give_up: Callable[[], bool]
    ) -> list[FileEntry]:
        """Wait until all pods except rank 0's pod have uploaded their files. Returns the manifest entries of these files.

        Errors: PeerError `PartMissing` if a pod skips the checkpoint or does not report within `timeout_seconds` seconds, or if
        `must_give_up` returns True.
        """
        deadline = time.monotonic() + timeout_seconds
        entries: list[FileEntry] = []
        for node in range(1, node_count):
            key = join_key(folder_key, incarnation, PARTS_FOLDER, f"node-{node}.json")
            while (data := self.store.get(key)) is None:
                if time.monotonic() > deadline or must_give_up():
                    raise PeerError(
                        "PartMissing", f"pod {node} did not write its part of {folder_key} within {timeout_seconds:.0f} s"
                    )
                time.sleep(PART_POLL_SECONDS)
            part = UploadedPart.model_validate_json(data)
            if part.dropped:
                raise PeerError("PartMissing", f"pod {node} skipped {folder_key}, or could not store its part")
            entries += part.files
        return entries

    @staticmethod
    def merge_parts(folder_key: str, own_entries: list[FileEntry], other_entries: list[FileEntry]) -> list[FileEntry]:
        """Return the manifest entries of all pods, with one entry for each path.

        Errors: StorageError `PartsDiffer` if two pods wrote different contents to one path.
        """
        entries_by_path: dict[str, FileEntry] = {}
        for entry in (*own_entries, *other_entries):
            first_entry = entries_by_path.setdefault(entry.path, entry)
            if first_entry.sha256 != entry.sha256:
                raise StorageError("PartsDiffer", f"two pods wrote {entry.path} of {folder_key}, with different contents")
        return list(entries_by_path.values())

    def commit(self, folder_key: str, manifest: Manifest, *, replaceable_marker: CommitMarker | None = None) -> CommitMarker:
        """Write the manifest, check that every object exists, and create the marker.

        An existing marker is replaced if it equals `replaceable_marker` (the marker of a checkpoint that this attempt skipped at its start), if it is not
        valid, or if an earlier attempt created it. (An earlier attempt may still run on a node that the operator cannot reach.)
        Errors: StorageError `UploadIncomplete` if an object is missing or has another size; FencedOutError if a later attempt has
        begun, or if another incarnation of this attempt has committed the step.
        """
        folder = join_key(folder_key, manifest.incarnation)
        data = manifest.to_bytes()
        marker = CommitMarker(attempt=manifest.attempt, path=manifest.incarnation, manifest_sha256=sha256_bytes(data))
        self.store.put(join_key(folder, Storage.MANIFEST), data)
        if self._signing_key is not None and folder_key not in (Storage.MODEL, Storage.MERGED):
            self.store.put(join_key(folder, Storage.SIGNATURE), sign_manifest(self._signing_key, folder, marker.manifest_sha256).encode())
        self._check_objects(folder, manifest)
        self.require_newest_attempt(manifest.attempt)
        self._create_marker(folder_key, marker, replaceable_marker)
        try:
            if self._is_swept(folder, manifest):
                self._remove_marker(folder_key, marker)
                raise FencedOutError(
                    "FencedOut", f"another incarnation has removed {folder_key}; this incarnation, {marker.path}, must end"
                )
            self.store.delete([stat.key for stat in self.store.list(join_key(folder, PARTS_FOLDER) + "/")])
        except FencedOutError:
            raise
        except FineTuneError as error:  # The checkpoint is committed, even if a request after the commit fails.
            log.warning("%s is committed, but could not be checked again: %s", folder_key, error)
        return marker

    def begin_attempt(self, attempt: int, run_json: bytes) -> None:
        """Store the attempt's run configuration (`run.json`). After this call, earlier attempts can no longer commit."""
        self.store.put(join_key(Storage.RUN, make_attempt_folder_name(attempt), RUN_FILE_NAME), run_json)

    def require_newest_attempt(self, attempt: int) -> None:
        """Check that no later attempt has begun. Errors: FencedOutError if a later attempt has begun."""
        if self.is_superseded(attempt):
            raise FencedOutError("FencedOut", f"a later attempt has begun; this attempt, {attempt}, must end")

    def is_superseded(self, attempt: int) -> bool:
        """Whether a later attempt has begun. An attempt begins when it stores its run configuration."""
        begun_attempts = (parse_attempt_of_folder(stat.key.split("/")[1]) for stat in self.store.list(f"{Storage.RUN}/"))
        return any(number is not None and number > attempt for number in begun_attempts)

    def _remove_marker(self, folder_key: str, marker: CommitMarker) -> None:
        """Remove the marker of a checkpoint or model whose files were removed, unless another marker has replaced it."""
        if self._read_marker(folder_key) == marker:
            self.store.delete([join_key(folder_key, Storage.COMMITTED)])

    def _create_marker(self, folder_key: str, marker: CommitMarker, replaceable_marker: CommitMarker | None) -> None:
        """Create the marker, or replace an existing marker (see `commit`). Errors: FencedOutError; StorageError `MarkerUnreadable`."""
        key = join_key(folder_key, Storage.COMMITTED)
        for _ in range(MAX_MARKER_TRIES):
            if self.store.create(key, marker.to_bytes()) is CreateResult.NEW:
                return
            data = self.store.get(key)
            if data is None:
                time.sleep(PART_POLL_SECONDS)
                continue
            existing_marker = CommitMarker.parse(data)
            if existing_marker is not None and existing_marker.manifest_sha256 == marker.manifest_sha256:
                return
            if existing_marker is None or existing_marker == replaceable_marker or existing_marker.attempt < marker.attempt:
                self._replace_marker(folder_key, marker)
                return
            raise FencedOutError("FencedOut", f"{folder_key} was committed by {existing_marker.path}; this incarnation, {marker.path}, must end")
        raise StorageError("MarkerUnreadable", f"{self.uri(key)} exists, but cannot be read")

    def _replace_marker(self, folder_key: str, marker: CommitMarker) -> None:
        """Replace an existing marker. Remove the `_HEALTHY` object first, because it belongs to the replaced checkpoint."""
        try:
            self.store.delete([join_key(folder_key, Storage.HEALTHY)])
        except FineTuneError as error:
            log.warning("%s keeps the %s object of the replaced checkpoint: %s", folder_key, Storage.HEALTHY, error)
        self.store.put(join_key(folder_key, Storage.COMMITTED), marker.to_bytes())

    def _check_objects(self, folder: str, manifest: Manifest) -> None:
        """Check that every object exists with the right size. Errors: StorageError `UploadIncomplete`."""
        stats_by_key: dict[str, ObjectStat] = {stat.key: stat for stat in self.store.list(folder + "/")}
        for entry in manifest.files:
            stat = stats_by_key.get(join_key(folder, entry.path))
            if stat is None or stat.size != entry.size:  # Some stores list new objects only after a delay.
                stat = self.store.stat(join_key(folder, entry.path))
            if stat is None or stat.size != entry.size:
                problem = "is missing" if stat is None else f"has {stat.size} bytes instead of {entry.size}"
                raise StorageError(UPLOAD_INCOMPLETE_CODE, f"{self.uri(join_key(folder, entry.path))} {problem} after its upload")

    def _is_swept(self, folder: str, manifest: Manifest) -> bool:
        """Whether the sweep of another incarnation removed an object of this checkpoint, so that the object is missing."""
        if self.store.stat(join_key(folder, Storage.MANIFEST)) is None:
            return True
        try:
            self._check_objects(folder, manifest)
        except StorageError as error:
            if error.code == UPLOAD_INCOMPLETE_CODE:
                return True
            raise
        return False

    def mark_healthy(self, step: int) -> None:
        """Mark a checkpoint as healthy. Call this when the losses after the checkpoint were finite."""
        self.store.put(join_key(checkpoint_folder_key(step), Storage.HEALTHY), b"{}")

    def remove(self, step: int) -> None:
        """Remove a checkpoint. The marker is removed first, so that no reader uses the incomplete folder as a checkpoint."""
        folder_key = checkpoint_folder_key(step)
        self.store.delete([join_key(folder_key, Storage.COMMITTED)])
        self.store.delete([join_key(folder_key, Storage.HEALTHY)])
        keys = [stat.key for stat in self.store.list(folder_key + "/")]
        manifest_keys = [key for key in keys if key.endswith("/" + Storage.MANIFEST)]
        self.store.delete(manifest_keys)
        self.store.delete([key for key in keys if key not in manifest_keys])

    def sweep(self) -> SweepResult:
        """Remove the leftovers of killed incarnations: files that do not belong to a committed checkpoint or model, and unfinished uploads.

        Call this only while no other incarnation can commit. Errors are returned instead of raised, because leftovers only cost space.
        """
        removed_count, first_error = 0, None
        for run_sweep in (self._sweep_uploads, self._sweep_files):
            try:
                removed_count += run_sweep()
            except FineTuneError as error:
                first_error = first_error or error
        return SweepResult(removed_count, first_error)

    def _sweep_uploads(self) -> int:
        return sum(self.store.sweep(f"{prefix}/") for prefix in (Storage.CHECKPOINTS, Storage.MODEL, Storage.MERGED))

    def _sweep_files(self) -> int:
        unreferenced_keys_by_folder = {
            folder_key: keys
            for folder_key, keys_below in self._list_keys_by_folder().items()
            if (keys := self._find_unreferenced_keys(folder_key, keys_below))
        }
        self.store.delete([key for keys in unreferenced_keys_by_folder.values() for key in keys])
        for folder_key, keys in unreferenced_keys_by_folder.items():
            self._remove_marker_of_swept_files(folder_key, keys)
        return sum(map(len, unreferenced_keys_by_folder.values()))

    def _remove_marker_of_swept_files(self, folder_key: str, swept_keys: list[str]) -> None:
        """Remove the marker that a fenced incarnation created while this sweep removed the files of the incarnation.

        The fenced incarnation checks its files after it has created the marker. This sweep checks the marker after it has deleted the files.
        So the incarnation, the sweep or both detect the conflict.
        """
        marker = self._read_marker(folder_key)
        if marker is not None and any(key.startswith(join_key(folder_key, marker.path) + "/") for key in swept_keys):
            self._remove_marker(folder_key, marker)

    def _list_keys_by_folder(self) -> dict[str, list[str]]:
        """Return all keys below the folders of checkpoints, of the final model and of the merged model, grouped by the folder's key."""
        keys_by_folder: dict[str, list[str]] = {}
        for prefix in (Storage.CHECKPOINTS, Storage.MODEL, Storage.MERGED):
            for stat in self.store.list(f"{prefix}/"):
                key_parts = stat.key.split("/")
                if prefix is not Storage.CHECKPOINTS:
                    keys_by_folder.setdefault(prefix, []).append(stat.key)
                elif (step := parse_step(key_parts[1])) is not None and len(key_parts) > 2:
                    keys_by_folder.setdefault(checkpoint_folder_key(step), []).append(stat.key)
        return keys_by_folder

    def _find_unreferenced_keys(self, folder_key: str, keys: list[str]) -> list[str]:
        """Return the keys among `keys` that do not belong to the committed checkpoint or model.

        The marker is read even if `keys` does not contain it, because some stores list new objects only after a delay.
        """
        marker_key = join_key(folder_key, Storage.COMMITTED)
        keys = [key for key in keys if key != join_key(folder_key, Storage.PROMOTED)]
        data = self.store.get(marker_key)
        if data is None:
            return keys if marker_key not in keys else []  # A marker that is listed, but not readable yet, may be valid.
        marker = CommitMarker.parse(data)
        if marker is None or join_key(folder_key, marker.path, Storage.MANIFEST) not in keys:
            return []  # If the marker or the manifest is damaged, the files of the checkpoint are not known, so no file is removed.
        own_keys = (marker_key, join_key(folder_key, Storage.HEALTHY))
        return [key for key in keys if key not in own_keys and not key.startswith(join_key(folder_key, marker.path) + "/")]
