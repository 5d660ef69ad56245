"""Prepared rows in storage, below `<storage.uri>/<namespace>/_prepared/<digest>/`: shared by all jobs of a namespace that use the same data.

A preparation commits its rows like a checkpoint: files, manifest, and the marker `_COMMITTED` last. If two preparations
store the same rows at the same time, both use the first commit. With `isolation.secret`, a preparation uses stored rows only if a preparation of its
namespace has signed them: write access to the store is then not enough
to choose the rows of later jobs. The status of a job records the sha256 of the manifest. Training pods
accept only this manifest, and only files with its hashes. The marker `_USED` says until when the rows are kept. Rows can be removed while a
pod reads them; the pod then prepares the data itself.
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
from finetune_api.names import USED_MARKER, prepared_root
from finetune_api.pod import PreparedRows, RunConfig
from finetune_api.prepared import UsedMarker, removal_order, renewed_marker
from pydantic import TypeAdapter, ValidationError

from finetune_trainer.checkpoint.manifest import CommitMarker, Manifest, RunFacts
from finetune_trainer.checkpoint.restore import fetch_verified
from finetune_trainer.checkpoint.tree import CheckpointTree, CommittedFolder, FencedOutError
from finetune_trainer.data.prepared import TOKENS_FOLDER, open_prepared, partial_folder, prepared_folder
from finetune_trainer.storage.base import ByteCounter, ObjectStat, join
from finetune_trainer.storage.roots import open_store

if TYPE_CHECKING:
    from finetune_trainer.data import DataSummary

log = logging.getLogger(__name__)
SUMMARY = "summary"
"""Key in the `extra` of the manifest: result of the check of the rows."""
NO_ACTION = "no action is needed: the data are prepared again"
DATA_INPUTS = ("validation data", "test data")
"""Inputs in `RunFacts.other_inputs` from which rows are made."""

LEFTOVER_AGE = timedelta(days=1)
"""Age after which files without a commit are no longer needed. A preparation ends after six hours at the latest."""


@dataclass(frozen=True)
class StoredRows:
    """Committed rows. `summary`: the result of the check of the rows, which training pods need not repeat."""

    digest: str
    manifest_sha256: str
    manifest: Manifest
    summary: DataSummary
    row_count: int = 0
    """Stored rows of all splits, after the download. A packed sequence counts as one row."""


class RowStore:
    """The prepared rows of one namespace in storage."""

    def __init__(self, run: RunConfig, tree: CheckpointTree) -> None:
        self._tree, self._run = tree, run
        self._options = run.prepared or PreparedRows()
        self._damaged: dict[str, CommitMarker] = {}
        """Markers of commits that cannot be used. A new commit replaces them."""

    @staticmethod
    @contextmanager
    def open(run: RunConfig, signing_key: str | None = None) -> Iterator[RowStore]:
        """Open the store of a run, and close it at the end.

        `signing_key`: the key with which the preparations of the namespace sign rows. Only preparations have this key. None without `isolation.secret`.
        """
        store = open_store(run.storage.model_copy(update={"uri": prepared_root(run.storage.uri)}))
        try:
            yield RowStore(run, CheckpointTree(store, signing_key))
        finally:
            store.close()

    def uri(self, digest: str) -> str:
        """Address of the folder of the rows."""
        return self._tree.uri(digest)

    # ---- reading ----

    def fetch_for_training(self, facts: RunFacts, work: Path, *, renews_marker: bool, byte_counter: ByteCounter | None = None) -> StoredRows:
        """Download the rows that `run.json` names. `renews_marker`: move the time of `_USED` forward.

        Errors: StorageError PreparedDataMissing, PreparedDataDamaged, PreparedDataDiffers; errors of the store.
        """
        digest, expected = self._options.digest or "", self._options.manifest_sha256
        if renews_marker:
            try:
                self._renew(digest)
            except FineTuneError as error:  # the credentials may permit only reading
                log.warning("the time of the prepared rows could not be moved forward: %s", error)
        stored, committed = self._find(digest, expected)
        if _data_of(stored.manifest.facts) != _data_of(facts):
            raise _differs("the data have changed since the preparation")
        return self._download(stored, committed, work, byte_counter)

    def fetch_for_preparation(self, digest: str, work: Path, *, byte_counter: ByteCounter | None = None) -> StoredRows | None:
        """Download and verify the rows if an earlier preparation has committed them. None: no usable rows are stored."""
        try:
            self._renew(digest)
            stored, committed = self._find(digest, None)
            return self._download(stored, committed, work, byte_counter)
        except FineTuneError as error:
            log.info("no stored rows are used: %s", error.message)
            return None

    def _find(self, digest: str, expected_sha256: str | None) -> tuple[StoredRows, CommittedFolder]:
        """Read marker and manifest. `expected_sha256`: None to accept a manifest that a preparation has signed. Errors: see `fetch_for_training`."""
        committed = self._tree.get_committed_folder(digest)
        if committed is None:
            raise _missing(f"nothing is committed at {self.uri(digest)}")
        sha256 = committed.marker.manifest_sha256
        if expected_sha256 not in (None, sha256):
            raise _differs(f"{self.uri(digest)} was replaced after the preparation")
        manifest = self._tree.read_manifest(committed)
        try:
            if expected_sha256 is None and self._tree.is_signing and not self._tree.is_signed(committed):
                raise _differs(f"the rows at {self.uri(digest)} are not signed by a preparation of this namespace")
            if manifest is None:
                raise _damaged(f"the manifest at {self.uri(digest)} is missing or damaged")
            try:
                summary = _summary_adapter().validate_python(manifest.extra.get(SUMMARY))
            except ValidationError:
                raise _differs(f"the rows at {self.uri(digest)} were prepared by another version") from None
        except StorageError:
            self._damaged[digest] = committed.marker
            raise
        return StoredRows(digest, sha256, manifest, summary), committed

    def _download(self, stored: StoredRows, committed: CommittedFolder, work: Path, byte_counter: ByteCounter | None) -> StoredRows:
        """Download the files to the cache of the ranks, and compare them with the manifest. Errors: see `fetch_for_training`."""
        folder = prepared_folder(work / TOKENS_FOLDER, stored.digest)
        partial = partial_folder(folder)
        for leftover in (folder, partial):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            problem = fetch_verified(self._tree, committed.folder, stored.manifest, partial, lambda _: True, byte_counter)
            if problem is not None:
                raise _damaged(problem)
            prepared = open_prepared(partial, stored.digest)
            partial.rename(folder)
        except StorageError as error:
            if error.code.startswith("PreparedData"):
                self._damaged[stored.digest] = committed.marker
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return replace(stored, row_count=prepared.rows)

    # ---- writing ----

    def commit(self, digest: str, folder: Path, *, incarnation: str, facts: RunFacts, summary: DataSummary) -> str:
        """Upload and commit the rows in `folder`, and return the sha256 of the committed manifest.

        If another preparation has committed equal rows in the meantime, its commit is used. Errors: StorageError PreparedDataDiffers if these
        rows are not equal; errors of the store.
        """
        self._renew(digest)  # before the first file, so that the files of a killed preparation are removed after `prepare.ttlDays`
        entries = self._tree.upload(digest, incarnation, folder)
        manifest = Manifest(
            job=f"{self._run.namespace}/{self._run.name}/{self._run.uid}", attempt=self._run.attempt, incarnation=incarnation, step=0,
            facts=facts, extra={SUMMARY: _summary_adapter().dump_python(summary, mode="json")}, files=entries,
        )  # fmt: skip
        try:
            return self._tree.commit(digest, manifest, replaceable_marker=self._damaged.get(digest)).manifest_sha256
        except FencedOutError:
            store = self._tree.store
            store.delete([stat.key for stat in store.list(join(digest, incarnation) + "/")])
            other, _ = self._find(digest, None)
            if _hashes(other.manifest) != _hashes(manifest):
                raise _differs(f"{self.uri(digest)} has other rows than this preparation has made") from None
            return other.manifest_sha256

    def _renew(self, digest: str) -> None:
        """Keep the rows for `prepare.ttlDays` from now on."""
        store, key = self._tree.store, join(digest, USED_MARKER)
        store.put(key, renewed_marker(UsedMarker.parse(store.get(key)), datetime.now(UTC), self._options.ttl_days).to_bytes())

    def remove_expired(self, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> list[str]:
        """Remove all rows of the namespace that no job has used for `prepare.ttlDays`. Returns their digests. Errors: those of the store for the list.

        A folder without a readable marker `_USED` gets one, and is removed later. Rows for which a request fails are kept.
        """
        store = self._tree.store
        stats_by_digest: dict[str, list[ObjectStat]] = {}
        for stat in store.list(""):
            digest, _, rest = stat.key.partition("/")
            if rest:
                stats_by_digest.setdefault(digest, []).append(stat)
        removed = []
        for digest, stats in stats_by_digest.items():
            try:
                if self._remove_if_expired(digest, [stat.key for stat in stats], now()):
                    removed.append(digest)
                else:
                    self._remove_leftovers(digest, stats, now())
            except FineTuneError as error:
                log.warning("the time of the prepared rows %s was not checked: %s", digest, error)
        return removed

    def _remove_if_expired(self, digest: str, keys: list[str], now: datetime) -> bool:
        """Remove the rows if no job has used them for too long; return whether they were removed. Errors: those of the store."""
        store = self._tree.store
        marker = UsedMarker.parse(store.get(join(digest, USED_MARKER)))
        if marker is None:
            self._renew(digest)
        if marker is None or not marker.is_expired(now):
            return False
        for group in removal_order(keys):
            store.delete(group)
        try:
            store.sweep(f"{digest}/")
        except FineTuneError as error:  # not every role may list unfinished uploads
            log.warning("unfinished uploads of removed rows were kept: %s", error)
        return True


    def _remove_leftovers(self, digest: str, stats: list[ObjectStat], now: datetime) -> None:
        """Remove the folders of preparations that ended long ago without a commit. Rows without a commit are kept. Errors: those of the store."""
        committed = self._tree.get_committed_folder(digest)
        if committed is None:
            return
        stats_by_folder: dict[str, list[ObjectStat]] = {}
        for stat in stats:
            folder, separator, _ = stat.key.removeprefix(f"{digest}/").partition("/")
            if separator and folder != committed.marker.path:
                stats_by_folder.setdefault(folder, []).append(stat)
        for folder_stats in stats_by_folder.values():
            if all(stat.modified is not None and now - stat.modified > LEFTOVER_AGE for stat in folder_stats):
                self._tree.store.delete([stat.key for stat in folder_stats])


def _summary_adapter() -> TypeAdapter[Any]:
    from finetune_trainer.data import DataSummary

    return TypeAdapter(DataSummary)


def _data_of(facts: RunFacts) -> tuple[str, ...]:
    """The hashes of the data from which rows are made."""
    return (facts.dataset_digest, *(facts.other_inputs.get(name, "") for name in DATA_INPUTS))


def _hashes(manifest: Manifest) -> dict[str, str]:
    return {entry.path: entry.sha256 for entry in manifest.files}


def _missing(message: str) -> StorageError:
    return StorageError("PreparedDataMissing", message, hint=NO_ACTION)


def _damaged(message: str) -> StorageError:
    return StorageError("PreparedDataDamaged", message, hint=NO_ACTION)


def _differs(message: str) -> StorageError:
    return StorageError("PreparedDataDiffers", message, hint=NO_ACTION)
