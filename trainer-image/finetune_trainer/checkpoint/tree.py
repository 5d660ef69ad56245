"""Reads and commits the checkpoints and the final model of a job in storage.

Each incarnation writes to its own folder, so that the files of two incarnations never mix. A commit writes the data and then
the manifest, checks that every object exists with the right size, and creates the marker last, on condition that no marker
exists. If a marker exists and names this incarnation's manifest, an earlier request succeeded, but its response was lost. If an existing
marker names another manifest, this incarnation is fenced out and must end.
"""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune_api.attempt_secret import sign_checkpoint
from finetune_api.errors import FineTuneError, PeerError, StorageError
from finetune_api.names import RUN_FILE_NAME, Storage, attempt_folder, attempt_of_folder

from finetune_trainer.checkpoint.manifest import (
    CommitMarker,
    FileEntry,
    Manifest,
    UploadedPart,
    entries_of,
    prefix_of,
    sha256_bytes,
    step_of,
)
from finetune_trainer.storage.base import ByteCounter, CreateResult, ObjectStat, Store, join

log = logging.getLogger(__name__)
PARTS_FOLDER = ".parts"
UPLOAD_INCOMPLETE = "UploadIncomplete"
PART_POLL_SECONDS = 0.2
MARKER_READS = 10
"""How many times to try to read an existing marker: in some stores, new objects are readable only after a delay."""


@dataclass(frozen=True)
class CommittedFolder:
    """A committed folder that is no part of a job, for example prepared rows. `prefix`: key of the folder with the marker."""

    prefix: str
    marker: CommitMarker

    @property
    def folder(self) -> str:
        """Key of the folder that holds the files."""
        return join(self.prefix, self.marker.path)


@dataclass(frozen=True)
class CommittedCheckpoint:
    """A committed checkpoint, the final model (step None), or the merged model."""

    step: int | None
    marker: CommitMarker
    healthy: bool = False
    is_merged: bool = False
    """Whether this is the merged model. Its step is None."""

    @property
    def folder(self) -> str:
        """Key of the folder that holds the files."""
        return join(Storage.MERGED if self.is_merged else prefix_of(self.step), self.marker.path)


@dataclass(frozen=True)
class SweepResult:
    """The number of objects and unfinished uploads that a sweep removed, and its first error."""

    count: int
    problem: FineTuneError | None = None


class FencedOutError(PeerError):
    """This incarnation must end, because another incarnation has replaced it."""


class CheckpointTree:
    """Reads and commits the checkpoints and the final model of one job below one storage root. Safe to use from several threads.

    `checkpoint_key` signs checkpoints or prepared rows, but not the final model. Without the key, nothing is signed.
    """

    def __init__(self, store: Store, checkpoint_key: str | None = None) -> None:
        self.store = store
        self._checkpoint_key = checkpoint_key

    def uri(self, key: str) -> str:
        """Return the full address of a key."""
        return f"{self.store.uri}/{key}"

    # ---- reading ----

    def list_committed(self) -> list[CommittedCheckpoint]:
        """Return every committed checkpoint, newest first."""
        return self.list_committed_and_damaged()[0]

    def list_committed_and_damaged(self) -> tuple[list[CommittedCheckpoint], list[int]]:
        """Return every committed checkpoint, and the steps whose marker cannot be read. Newest first."""
        is_healthy_by_step: dict[int, bool] = {}
        for stat in self.store.list(f"{Storage.CHECKPOINTS}/"):
            _, folder, *rest = stat.key.split("/")
            step = step_of(folder)
            if step is None or len(rest) != 1:
                continue
            if rest[0] == Storage.COMMITTED:
                is_healthy_by_step.setdefault(step, False)
            elif rest[0] == Storage.HEALTHY:
                is_healthy_by_step[step] = True
        committed, damaged_steps = [], []
        for step, healthy in sorted(is_healthy_by_step.items(), reverse=True):
            data = self.store.get(join(prefix_of(step), Storage.COMMITTED))
            marker = CommitMarker.parse(data) if data is not None else None
            if marker is not None:
                committed.append(CommittedCheckpoint(step, marker, healthy))
            elif data is not None:
                damaged_steps.append(step)
        return committed, damaged_steps

    @property
    def is_signing(self) -> bool:
        """Whether this tree can sign checkpoints and check their signatures."""
        return self._checkpoint_key is not None

    def is_signed(self, checkpoint: CommittedCheckpoint | CommittedFolder) -> bool:
        """Whether a pod with this tree's key has signed the manifest that the marker names. Write access to the store is not enough to sign."""
        if self._checkpoint_key is None:
            return False
        expected_signature = sign_checkpoint(self._checkpoint_key, checkpoint.folder, checkpoint.marker.manifest_sha256)
        return hmac.compare_digest(self.store.get(join(checkpoint.folder, Storage.SIGNATURE)) or b"", expected_signature.encode())

    def get_committed(self, step: int | None, healthy: bool = False) -> CommittedCheckpoint | None:
        """Return the committed checkpoint of a step, or the final model if `step` is None. Return None if nothing is committed there."""
        marker = self._read_marker(prefix_of(step))
        return CommittedCheckpoint(step, marker, healthy) if marker else None

    def get_merged(self) -> CommittedCheckpoint | None:
        """Return the committed merged model, or None if there is none."""
        marker = self._read_marker(Storage.MERGED)
        return CommittedCheckpoint(None, marker, is_merged=True) if marker else None

    def get_committed_folder(self, prefix: str) -> CommittedFolder | None:
        """Return the commit below a prefix, or None if nothing is committed there."""
        marker = self._read_marker(prefix)
        return CommittedFolder(prefix, marker) if marker else None

    def _read_marker(self, prefix: str) -> CommitMarker | None:
        data = self.store.get(join(prefix, Storage.COMMITTED))
        return CommitMarker.parse(data) if data is not None else None

    def read_manifest(self, checkpoint: CommittedCheckpoint | CommittedFolder) -> Manifest | None:
        """Return the manifest that the marker names, or None if it is missing or has another sha256."""
        data = self.store.get(join(checkpoint.folder, Storage.MANIFEST))
        if data is None or sha256_bytes(data) != checkpoint.marker.manifest_sha256:
            return None
        try:
            return Manifest.model_validate_json(data)
        except ValueError:
            return None

    def is_complete(self, checkpoint: CommittedCheckpoint) -> bool:
        """Whether the manifest is that of the marker, and every object that it lists exists with the right size. Nothing is downloaded."""
        manifest = self.read_manifest(checkpoint)
        return manifest is not None and not self._is_swept(checkpoint.folder, manifest)

    # ---- writing ----

    def upload(self, prefix: str, incarnation: str, folder: Path, *, byte_counter: ByteCounter | None = None) -> list[FileEntry]:
        """Upload the files of a local folder to the incarnation's folder; returns their entries."""
        entries = entries_of(folder)
        for entry in entries:
            self.store.put_file(folder / entry.path, join(prefix, incarnation, entry.path), byte_counter=byte_counter)
        return entries

    def report_part(self, prefix: str, incarnation: str, node: int, entries: list[FileEntry] | None) -> None:
        """Report to rank 0's pod which files this pod has uploaded. If `entries` is None, this pod skips the checkpoint."""
        part = UploadedPart(node=node, files=entries or [], dropped=entries is None)
        self.store.put(
            join(prefix, incarnation, PARTS_FOLDER, f"node-{node}.json"), part.model_dump_json(by_alias=True).encode()
        )

    def wait_parts(
        self, prefix: str, incarnation: str, nodes: int, timeout: float, give_up: Callable[[], bool]
    ) -> list[FileEntry]:
        """Wait until the other pods (1 .. nodes-1) have uploaded their files; returns the entries of these files.

        Errors: PeerError `PartMissing` if a pod skips the checkpoint, does not report within `timeout` seconds, or if
        `give_up` returns True.
        """
        deadline = time.monotonic() + timeout
        files: list[FileEntry] = []
        for node in range(1, nodes):
            key = join(prefix, incarnation, PARTS_FOLDER, f"node-{node}.json")
            while (data := self.store.get(key)) is None:
                if time.monotonic() > deadline or give_up():
                    raise PeerError(
                        "PartMissing", f"pod {node} did not write its part of {prefix} within {timeout:.0f} s"
                    )
                time.sleep(PART_POLL_SECONDS)
            part = UploadedPart.model_validate_json(data)
            if part.dropped:
                raise PeerError("PartMissing", f"pod {node} skipped {prefix}, or could not store its part")
            files += part.files
        return files

    @staticmethod
    def merge_parts(prefix: str, own_entries: list[FileEntry], other_entries: list[FileEntry]) -> list[FileEntry]:
        """Return the files of all pods. Errors: StorageError `PartsDiffer` if two pods wrote different contents of one file."""
        entries_by_path: dict[str, FileEntry] = {}
        for entry in (*own_entries, *other_entries):
            first_entry = entries_by_path.setdefault(entry.path, entry)
            if first_entry.sha256 != entry.sha256:
                raise StorageError("PartsDiffer", f"two pods wrote {entry.path} of {prefix}, with different contents")
        return list(entries_by_path.values())

    def commit(self, prefix: str, manifest: Manifest, *, replaceable_marker: CommitMarker | None = None) -> CommitMarker:
        """Write the manifest, check every object, create the marker.

        An existing marker is replaced if it equals `replaceable_marker` (a checkpoint that this attempt skipped at its start), if it is not
        valid, or if it belongs to an earlier attempt. (A node that the operator cannot reach may still run an earlier attempt.)
        Errors: StorageError `UploadIncomplete` if an object is missing or has another size; FencedOutError if a later attempt has
        begun, or if another incarnation of this attempt has committed the step.
        """
        folder = join(prefix, manifest.incarnation)
        data = manifest.to_bytes()
        marker = CommitMarker(attempt=manifest.attempt, path=manifest.incarnation, manifest_sha256=sha256_bytes(data))
        self.store.put(join(folder, Storage.MANIFEST), data)
        if self._checkpoint_key is not None and prefix not in (Storage.MODEL, Storage.MERGED):
            self.store.put(join(folder, Storage.SIGNATURE), sign_checkpoint(self._checkpoint_key, folder, marker.manifest_sha256).encode())
        self._check_objects(folder, manifest)
        self.require_newest_attempt(manifest.attempt)
        self._create_marker(prefix, marker, replaceable_marker)
        try:
            if self._is_swept(folder, manifest):
                self._remove_marker(prefix, marker)
                raise FencedOutError(
                    "FencedOut", f"another incarnation has removed {prefix}; this incarnation, {marker.path}, must end"
                )
            self.store.delete([stat.key for stat in self.store.list(join(folder, PARTS_FOLDER) + "/")])
        except FencedOutError:
            raise
        except FineTuneError as error:  # The checkpoint is committed now, even if a later request fails.
            log.warning("%s is committed, but could not be checked again: %s", prefix, error)
        return marker

    def begin_attempt(self, attempt: int, run: bytes) -> None:
        """Store the attempt's run configuration. Afterwards, earlier attempts can no longer commit."""
        self.store.put(join(Storage.RUN, attempt_folder(attempt), RUN_FILE_NAME), run)

    def require_newest_attempt(self, attempt: int) -> None:
        """Check that no later attempt has begun. Errors: FencedOutError."""
        if self.is_superseded(attempt):
            raise FencedOutError("FencedOut", f"a later attempt has begun; this attempt, {attempt}, must end")

    def is_superseded(self, attempt: int) -> bool:
        """Whether a later attempt has begun. An attempt begins when it stores its run configuration."""
        begun_attempts = (attempt_of_folder(stat.key.split("/")[1]) for stat in self.store.list(f"{Storage.RUN}/"))
        return any(number is not None and number > attempt for number in begun_attempts)

    def _remove_marker(self, prefix: str, marker: CommitMarker) -> None:
        """Remove a marker whose data was removed, unless another marker has replaced it."""
        if self._read_marker(prefix) == marker:
            self.store.delete([join(prefix, Storage.COMMITTED)])

    def _create_marker(self, prefix: str, marker: CommitMarker, replaceable_marker: CommitMarker | None) -> None:
        """Create the marker, or replace an existing marker (see `commit`). Errors: FencedOutError; StorageError `MarkerUnreadable`."""
        key = join(prefix, Storage.COMMITTED)
        for _ in range(MARKER_READS):
            if self.store.create(key, marker.to_bytes()) is CreateResult.NEW:
                return
            data = self.store.get(key)
            if data is None:
                time.sleep(PART_POLL_SECONDS)
                continue
            existing = CommitMarker.parse(data)
            if existing is not None and existing.manifest_sha256 == marker.manifest_sha256:
                return
            if existing is None or existing == replaceable_marker or existing.attempt < marker.attempt:
                self._replace_marker(prefix, marker)
                return
            raise FencedOutError("FencedOut", f"{prefix} was committed by {existing.path}; this incarnation, {marker.path}, must end")
        raise StorageError("MarkerUnreadable", f"{self.uri(key)} exists, but cannot be read")

    def _replace_marker(self, prefix: str, marker: CommitMarker) -> None:
        """Replace another marker. Remove the `_HEALTHY` object first, because it belongs to the replaced checkpoint."""
        try:
            self.store.delete([join(prefix, Storage.HEALTHY)])
        except FineTuneError as error:
            log.warning("%s keeps the %s object of the replaced checkpoint: %s", prefix, Storage.HEALTHY, error)
        self.store.put(join(prefix, Storage.COMMITTED), marker.to_bytes())

    def _check_objects(self, folder: str, manifest: Manifest) -> None:
        """Check that every object exists with the right size. Errors: StorageError `UploadIncomplete`."""
        stats_by_key: dict[str, ObjectStat] = {stat.key: stat for stat in self.store.list(folder + "/")}
        for entry in manifest.files:
            stat = stats_by_key.get(join(folder, entry.path))
            if stat is None or stat.size != entry.size:  # Some stores list new objects only after a delay.
                stat = self.store.stat(join(folder, entry.path))
            if stat is None or stat.size != entry.size:
                problem = "is missing" if stat is None else f"has {stat.size} bytes instead of {entry.size}"
                raise StorageError(UPLOAD_INCOMPLETE, f"{self.uri(join(folder, entry.path))} {problem} after its upload")

    def _is_swept(self, folder: str, manifest: Manifest) -> bool:
        """Whether another incarnation has removed an object of this checkpoint in its sweep."""
        if self.store.stat(join(folder, Storage.MANIFEST)) is None:
            return True
        try:
            self._check_objects(folder, manifest)
        except StorageError as error:
            if error.code == UPLOAD_INCOMPLETE:
                return True
            raise
        return False

    def mark_healthy(self, step: int) -> None:
        """Mark a checkpoint as healthy, because the losses after it were finite."""
        self.store.put(join(prefix_of(step), Storage.HEALTHY), b"{}")

    def remove(self, step: int) -> None:
        """Remove a checkpoint. The marker is removed first, so that no reader uses the incomplete folder as a checkpoint."""
        prefix = prefix_of(step)
        self.store.delete([join(prefix, Storage.COMMITTED)])
        self.store.delete([join(prefix, Storage.HEALTHY)])
        keys = [stat.key for stat in self.store.list(prefix + "/")]
        manifests = [key for key in keys if key.endswith("/" + Storage.MANIFEST)]
        self.store.delete(manifests)
        self.store.delete([key for key in keys if key not in manifests])

    def sweep(self) -> SweepResult:
        """Remove the leftovers of killed incarnations: data that no marker names, and unfinished uploads.

        Call this only while no other incarnation can commit. Errors are returned instead of raised, because leftovers only cost space.
        """
        count, problem = 0, None
        for sweep in (self._sweep_uploads, self._sweep_data):
            try:
                count += sweep()
            except FineTuneError as error:
                problem = problem or error
        return SweepResult(count, problem)

    def _sweep_uploads(self) -> int:
        return sum(self.store.sweep(f"{prefix}/") for prefix in (Storage.CHECKPOINTS, Storage.MODEL, Storage.MERGED))

    def _sweep_data(self) -> int:
        unreferenced = {
            prefix: keys
            for prefix, below in self._keys_by_prefix().items()
            if (keys := self._unreferenced_keys(prefix, below))
        }
        self.store.delete([key for keys in unreferenced.values() for key in keys])
        for prefix, keys in unreferenced.items():
            self._remove_marker_of_swept_data(prefix, keys)
        return sum(map(len, unreferenced.values()))

    def _remove_marker_of_swept_data(self, prefix: str, swept_keys: list[str]) -> None:
        """Remove a marker that a stale incarnation created while this sweep removed the data.

        The stale incarnation checks its data after creating the marker. This sweep checks the marker after deleting the data.
        At least one of the two therefore detects the conflict.
        """
        marker = self._read_marker(prefix)
        if marker is not None and any(key.startswith(join(prefix, marker.path) + "/") for key in swept_keys):
            self._remove_marker(prefix, marker)

    def _keys_by_prefix(self) -> dict[str, list[str]]:
        """Return all keys below the folders of checkpoints, of the final model and of the merged model, grouped by the folder's key."""
        keys: dict[str, list[str]] = {}
        for prefix in (Storage.CHECKPOINTS, Storage.MODEL, Storage.MERGED):
            for stat in self.store.list(f"{prefix}/"):
                parts = stat.key.split("/")
                if prefix is not Storage.CHECKPOINTS:
                    keys.setdefault(prefix, []).append(stat.key)
                elif (step := step_of(parts[1])) is not None and len(parts) > 2:
                    keys.setdefault(prefix_of(step), []).append(stat.key)
        return keys

    def _unreferenced_keys(self, prefix: str, keys: list[str]) -> list[str]:
        """Return the keys that do not belong to the committed checkpoint.

        The marker is read even if it is not listed, because some listings are out of date.
        """
        marker_key = join(prefix, Storage.COMMITTED)
        keys = [key for key in keys if key != join(prefix, Storage.PROMOTED)]
        data = self.store.get(marker_key)
        if data is None:
            return keys if marker_key not in keys else []  # A marker that is listed, but not readable yet, may be valid.
        marker = CommitMarker.parse(data)
        if marker is None or join(prefix, marker.path, Storage.MANIFEST) not in keys:
            return []  # If marker or manifest is damaged, the files of the checkpoint are unknown, so nothing is removed.
        own_keys = (marker_key, join(prefix, Storage.HEALTHY))
        return [key for key in keys if key not in own_keys and not key.startswith(join(prefix, marker.path) + "/")]
