"""Stores prepared rows below `<storage.uri>/<namespace>/_prepared/<digest>/`, where all jobs of a namespace with the same data share them.

A preparation commits its rows like a checkpoint: files, manifest, and the marker `_COMMITTED` last. If two preparations store the same rows at
the same time, both use the first commit. With `isolation.secret`, a preparation uses stored rows only if a preparation of its namespace has signed
them, so that a program that can only write to the store cannot choose the rows of later jobs. The status of a job records the sha256 of the manifest
of its rows. Training pods accept only this manifest, and only files whose hashes the manifest contains. The marker `_USED` says until when the rows
are kept. If rows are removed while a pod reads them, the pod prepares the data itself.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api.errors import FineTuneError, StorageError
from finetune_api.names import USED_MARKER, make_prepared_rows_uri
from finetune_api.pod import PreparedRows, RunConfig
from finetune_api.prepared import UsedMarker, group_keys_for_removal, renew_marker
from pydantic import TypeAdapter, ValidationError

from finetune_trainer.checkpoint.manifest import CommitMarker, Manifest, RunFacts
from finetune_trainer.checkpoint.restore import fetch_verified
from finetune_trainer.checkpoint.tree import CheckpointTree, CommittedFolder, FencedOutError
from finetune_trainer.data.prepared import TOKENS_FOLDER, open_prepared, partial_folder, prepared_folder
from finetune_trainer.storage.base import ByteCounter, ObjectStat, join_key
from finetune_trainer.storage.roots import open_store

if TYPE_CHECKING:
    from finetune_trainer.data import DataSummary

log = logging.getLogger(__name__)
SUMMARY_KEY = "summary"
"""Key in the manifest's `extra` under which the result of the data check is stored."""
NO_ACTION = "no action is needed: the data are prepared again"
DATA_INPUTS = ("validation data", "test data")
"""The inputs in `RunFacts.other_inputs` from which rows are made."""

LEFTOVER_AGE = timedelta(days=1)
"""Uncommitted files of this age are removed. The preparation that wrote them has already ended, because a preparation takes at most six hours."""


@dataclass(frozen=True)
class StoredRows:
    """The committed rows of one digest."""

    digest: str
    manifest_sha256: str
    manifest: Manifest
    summary: DataSummary
    """The result of the check of the rows. Training pods need not repeat the check."""
    row_count: int = 0
    """Number of rows of all splits; 0 before the download. A packed sequence counts as one row."""


class RowStore:
    """The prepared rows of one namespace in storage."""

    def __init__(self, run: RunConfig, tree: CheckpointTree) -> None:
        self._tree, self._run = tree, run
        self._options = run.prepared or PreparedRows()
        self._damaged_markers: dict[str, CommitMarker] = {}
        """Markers of commits that cannot be used, by digest. A new commit of the same digest replaces the marker."""

    @staticmethod
    @contextmanager
    def open(run: RunConfig, signing_key: str | None = None) -> Iterator[RowStore]:
        """Open the store of a run, and close it at the end.

        `signing_key`: the key with which the preparations of the namespace sign rows. None in training pods, and if `isolation.secret` is not set.
        """
        store = open_store(run.storage.model_copy(update={"uri": make_prepared_rows_uri(run.storage.uri)}))
        try:
            yield RowStore(run, CheckpointTree(store, signing_key))
        finally:
            store.close()

    def uri(self, digest: str) -> str:
        """Return the URI of the folder of the rows."""
        return self._tree.uri(digest)

    # ---- reading ----

    def fetch_for_training(self, facts: RunFacts, work_folder: Path, *, renews_marker: bool, byte_counter: ByteCounter | None = None) -> StoredRows:
        """Download and verify the rows that `run.json` names. `renews_marker`: whether to keep the rows for `prepare.ttlDays` from now on.

        Errors: StorageError PreparedDataMissing, PreparedDataDamaged, PreparedDataDiffers; errors of the store.
        """
        digest, expected_sha256 = self._options.digest or "", self._options.manifest_sha256
        if renews_marker:
            try:
                self._renew_used_marker(digest)
            except FineTuneError as error:  # Perhaps the credentials permit only reading.
                log.warning("the time until which the prepared rows are kept was not extended: %s", error)
        stored_rows, committed_folder = self._find_commit(digest, expected_sha256)
        if _list_data_digests(stored_rows.manifest.facts) != _list_data_digests(facts):
            raise _build_differing_error("the data have changed since the preparation")
        return self._download_rows(stored_rows, committed_folder, work_folder, byte_counter)

    def fetch_for_preparation(self, digest: str, work_folder: Path, *, byte_counter: ByteCounter | None = None) -> StoredRows | None:
        """Download and verify the rows that an earlier preparation has committed. Return None if no usable rows are committed."""
        try:
            self._renew_used_marker(digest)
            stored_rows, committed_folder = self._find_commit(digest, None)
            return self._download_rows(stored_rows, committed_folder, work_folder, byte_counter)
        except FineTuneError as error:
            log.info("no stored rows are used: %s", error.message)
            return None

    def _find_commit(self, digest: str, expected_sha256: str | None) -> tuple[StoredRows, CommittedFolder]:
        """Read the marker and the manifest of the committed rows.

        If `expected_sha256` is None and this store has a key, the rows must be signed. Errors: see `fetch_for_training`.
        """
        committed_folder = self._tree.get_committed_folder(digest)
        if committed_folder is None:
            raise _build_missing_error(f"nothing is committed at {self.uri(digest)}")
        sha256 = committed_folder.marker.manifest_sha256
        if expected_sha256 not in (None, sha256):
            raise _build_differing_error(f"{self.uri(digest)} was replaced after the preparation")
        manifest = self._tree.read_manifest(committed_folder)
        try:
            if expected_sha256 is None and self._tree.can_sign and not self._tree.is_signed(committed_folder):
                raise _build_differing_error(f"the rows at {self.uri(digest)} are not signed by a preparation of this namespace")
            if manifest is None:
                raise _build_damaged_error(f"the manifest at {self.uri(digest)} is missing or damaged")
            try:
                summary = _create_summary_type_adapter().validate_python(manifest.extra.get(SUMMARY_KEY))
            except ValidationError:
                raise _build_differing_error(f"the rows at {self.uri(digest)} were prepared by another version") from None
        except StorageError:
            self._damaged_markers[digest] = committed_folder.marker
            raise
        return StoredRows(digest, sha256, manifest, summary), committed_folder

    def _download_rows(self, stored_rows: StoredRows, committed_folder: CommittedFolder, work_folder: Path, byte_counter: ByteCounter | None) -> StoredRows:
        """Download the files to the folder where the ranks read rows, and compare them with the manifest. Errors: see `fetch_for_training`."""
        folder = prepared_folder(work_folder / TOKENS_FOLDER, stored_rows.digest)
        download_folder = partial_folder(folder)
        for leftover in (folder, download_folder):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            problem = fetch_verified(self._tree, committed_folder.folder, stored_rows.manifest, download_folder, lambda _: True, byte_counter)
            if problem is not None:
                raise _build_damaged_error(problem)
            prepared_rows = open_prepared(download_folder, stored_rows.digest)
            download_folder.rename(folder)
        except StorageError as error:
            if error.code.startswith("PreparedData"):
                self._damaged_markers[stored_rows.digest] = committed_folder.marker
            raise
        finally:
            shutil.rmtree(download_folder, ignore_errors=True)
        return replace(stored_rows, row_count=prepared_rows.rows)

    # ---- writing ----

    def commit(self, digest: str, folder: Path, *, incarnation: str, facts: RunFacts, summary: DataSummary) -> str:
        """Upload and commit the rows in `folder`, and return the sha256 of the committed manifest.

        If another preparation has already committed equal rows, that commit is used. Errors: StorageError PreparedDataDiffers if the rows of that
        commit are not equal; errors of the store.
        """
        self._renew_used_marker(digest)  # The marker is written before the upload, so that the files of a killed preparation are removed later.
        entries = self._tree.upload(digest, incarnation, folder)
        manifest = Manifest(
            job=f"{self._run.namespace}/{self._run.name}/{self._run.uid}", attempt=self._run.attempt, incarnation=incarnation, step=0,
            facts=facts, extra={SUMMARY_KEY: _create_summary_type_adapter().dump_python(summary, mode="json")}, files=entries,
        )  # fmt: skip
        try:
            return self._tree.commit(digest, manifest, replaceable_marker=self._damaged_markers.get(digest)).manifest_sha256
        except FencedOutError:
            store = self._tree.store
            store.delete([stat.key for stat in store.list(join_key(digest, incarnation) + "/")])
            other_rows, _ = self._find_commit(digest, None)
            if _map_path_to_sha256(other_rows.manifest) != _map_path_to_sha256(manifest):
                raise _build_differing_error(f"{self.uri(digest)} has other rows than this preparation has made") from None
            return other_rows.manifest_sha256

    def _renew_used_marker(self, digest: str) -> None:
        """Keep the rows for `prepare.ttlDays` from now on."""
        store, key = self._tree.store, join_key(digest, USED_MARKER)
        store.put(key, renew_marker(UsedMarker.parse(store.get(key)), datetime.now(UTC), self._options.ttl_days).to_bytes())

    def remove_expired(self, get_now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> list[str]:
        """Remove all rows of the namespace that no job has used for `prepare.ttlDays`. Returns the digests of the removed rows. Errors: those of
        listing the store.

        If the marker `_USED` of a folder is missing or cannot be read, a new marker is written, so that the folder is removed later. If a request to
        the store fails for some rows, these rows are kept.
        """
        store = self._tree.store
        stats_by_digest: dict[str, list[ObjectStat]] = {}
        for stat in store.list(""):
            digest, _, key_in_folder = stat.key.partition("/")
            if key_in_folder:
                stats_by_digest.setdefault(digest, []).append(stat)
        removed_digests = []
        for digest, stats in stats_by_digest.items():
            try:
                if self._remove_if_expired(digest, [stat.key for stat in stats], get_now()):
                    removed_digests.append(digest)
                else:
                    self._remove_leftovers(digest, stats, get_now())
            except FineTuneError as error:
                log.warning("it was not checked whether the prepared rows %s have expired: %s", digest, error)
        return removed_digests

    def _remove_if_expired(self, digest: str, keys: list[str], now: datetime) -> bool:
        """Remove the rows if no job has used them for `prepare.ttlDays`. Return whether they were removed. Errors: those of the store."""
        store = self._tree.store
        marker = UsedMarker.parse(store.get(join_key(digest, USED_MARKER)))
        if marker is None:
            self._renew_used_marker(digest)
        if marker is None or not marker.is_expired(now):
            return False
        for key_group in group_keys_for_removal(keys):
            store.delete(key_group)
        try:
            store.sweep(f"{digest}/")
        except FineTuneError as error:  # Perhaps the credentials do not permit listing unfinished uploads.
            log.warning("unfinished uploads of removed rows were kept: %s", error)
        return True

    def _remove_leftovers(self, digest: str, stats: list[ObjectStat], now: datetime) -> None:
        """Remove old folders of preparations, except the folder of the committed rows.

        If no rows are committed, remove no folder. Errors: those of the store.
        """
        committed_folder = self._tree.get_committed_folder(digest)
        if committed_folder is None:
            return
        stats_by_folder: dict[str, list[ObjectStat]] = {}
        for stat in stats:
            folder, separator, _ = stat.key.removeprefix(f"{digest}/").partition("/")
            if separator and folder != committed_folder.marker.path:
                stats_by_folder.setdefault(folder, []).append(stat)
        for folder_stats in stats_by_folder.values():
            if all(stat.modified_at is not None and now - stat.modified_at > LEFTOVER_AGE for stat in folder_stats):
                self._tree.store.delete([stat.key for stat in folder_stats])


def _create_summary_type_adapter() -> TypeAdapter[Any]:
    from finetune_trainer.data import DataSummary

    return TypeAdapter(DataSummary)


def _list_data_digests(facts: RunFacts) -> tuple[str, ...]:
    """Return the digests of the data from which rows are made."""
    return (facts.dataset_digest, *(facts.other_inputs.get(name, "") for name in DATA_INPUTS))


def _map_path_to_sha256(manifest: Manifest) -> dict[str, str]:
    return {entry.path: entry.sha256 for entry in manifest.files}


def _build_missing_error(message: str) -> StorageError:
    return StorageError("PreparedDataMissing", message, hint=NO_ACTION)


def _build_damaged_error(message: str) -> StorageError:
    return StorageError("PreparedDataDamaged", message, hint=NO_ACTION)


def _build_differing_error(message: str) -> StorageError:
    return StorageError("PreparedDataDiffers", message, hint=NO_ACTION)
