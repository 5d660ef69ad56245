"""Prepared rows in storage: their commit, two preparations at the same time, signatures, and the removal of unused rows."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from finetune_api.errors import CredentialsError, StorageError
from finetune_api.pod import PreparedRows, RunConfig, StoreTarget
from finetune_api.prepared import UsedMarker, group_keys_for_removal, renew_marker
from finetune_api.spec.enums import DatasetFormat
from finetune_trainer.checkpoint.manifest import RunFacts
from finetune_trainer.checkpoint.tree import CheckpointTree
from finetune_trainer.data import DataSummary
from finetune_trainer.data.checks import CheckFindings
from finetune_trainer.data.prepared import TOKENS_FOLDER, open_prepared, prepared_folder, write_prepared
from finetune_trainer.data.shards import ColumnType, make_batch
from finetune_trainer.storage.folder import FolderStore
from finetune_trainer.supervisor.stored_rows import RowStore

from tests.support.learning import make_run

DIGEST = "d" * 64
SUMMARY = DataSummary(
    DatasetFormat.MESSAGES, [DatasetFormat.MESSAGES], {"train": 3}, 1, CheckFindings(duplicate_count=2), ["1 of 4 rows were left out"]
)
FACTS = RunFacts(dataset_digest="t", other_inputs={"validation data": "v", "test data": "e", "contents of ConfigMaps": "c"})


class NamespaceStorage:
    """The storage of a namespace, and the pods that use it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "store/team/_prepared"
        run, _ = make_run(folder, Path("/models/tiny"), {}, [])
        self.run: RunConfig = run.model_copy(update={"storage": StoreTarget(uri=f"file://{folder}/store/team/job/uid")})

    def open_row_store(self, key: str | None = "key", **prepared: Any) -> RowStore:
        run = self.run.model_copy(update={"prepared": PreparedRows(**prepared)})
        return RowStore(run, CheckpointTree(FolderStore(self.root, f"file://{self.root}"), key))

    def work_folder(self, name: str) -> Path:
        return self.folder / name

    def tokenise(self, pod: str, rows: list[list[int]], digest: str = DIGEST) -> Path:
        batch = make_batch({"input_ids": ColumnType.TOKENS}, {"input_ids": rows})
        folder = prepared_folder(self.work_folder(pod) / TOKENS_FOLDER, digest)
        write_prepared(folder, {"train": [batch]}, inputs_digest=digest, summary={})
        return folder

    def commit(self, pod: str, store: RowStore | None = None, rows: list[list[int]] | None = None, digest: str = DIGEST) -> str:
        """Tokenise and commit rows in one preparation pod. Returns the sha256 of the committed manifest."""
        folder = self.tokenise(pod, rows or [[1, 2], [3]], digest)
        return (store or self.open_row_store()).commit(digest, folder, incarnation=f"a1-{pod:0>8}", facts=FACTS, summary=SUMMARY)

    def list_object_names(self, digest: str = DIGEST) -> list[str]:
        return sorted(path.relative_to(self.root / digest).as_posix() for path in (self.root / digest).rglob("*") if path.is_file())

    def mark_used(self, until: str, digest: str = DIGEST) -> None:
        (self.root / digest / "_USED").write_text(json.dumps({"until": until}))


@pytest.fixture
def storage(tmp_path: Path) -> NamespaceStorage:
    return NamespaceStorage(tmp_path)


def test_a_training_pod_gets_the_rows_and_the_result_of_their_check(storage: NamespaceStorage) -> None:
    sha256 = storage.commit("1")
    files = ("manifest.hmac", "manifest.json", "prepared.json", "train/00000.arrow")
    assert storage.list_object_names() == ["_COMMITTED", "_USED", *(f"a1-00000001/{name}" for name in files)]
    reader = storage.open_row_store(key=None, digest=DIGEST, manifest_sha256=sha256)
    facts = FACTS.model_copy(update={"other_inputs": FACTS.other_inputs | {"contents of ConfigMaps": "x"}})
    stored_rows = reader.fetch_for_training(facts, storage.work_folder("t"), renews_marker=True)
    assert (stored_rows.summary, stored_rows.row_count, stored_rows.manifest_sha256) == (SUMMARY, 2, sha256)
    prepared_rows = open_prepared(prepared_folder(storage.work_folder("t") / TOKENS_FOLDER, DIGEST), DIGEST)
    prepared_rows.verify()
    assert sorted(path.name for path in (storage.work_folder("t") / TOKENS_FOLDER).iterdir()) == [DIGEST[:24]]


def overwrite_shard(storage: NamespaceStorage) -> None:
    (storage.root / DIGEST / "a1-00000001/train/00000.arrow").write_bytes(b"x")


def remove_files(storage: NamespaceStorage) -> None:
    (storage.root / DIGEST / "a1-00000001/train/00000.arrow").unlink()


def overwrite_manifest(storage: NamespaceStorage) -> None:
    (storage.root / DIGEST / "a1-00000001/manifest.json").write_text("{}")


@pytest.mark.parametrize(
    ("change", "expected_sha256", "facts", "code"),
    [
        (lambda s: (s.root / DIGEST / "_COMMITTED").unlink(), None, FACTS, "PreparedDataMissing"),
        (lambda s: None, "f" * 64, FACTS, "PreparedDataDiffers"),
        (lambda s: None, None, FACTS.model_copy(update={"dataset_digest": "other"}), "PreparedDataDiffers"),
        (lambda s: None, None, FACTS.model_copy(update={"other_inputs": {"validation data": "v"}}), "PreparedDataDiffers"),
        (overwrite_shard, None, FACTS, "PreparedDataDamaged"),
        (remove_files, None, FACTS, "PreparedDataDamaged"),
        (overwrite_manifest, None, FACTS, "PreparedDataDamaged"),
    ],
    ids=["no marker", "replaced", "other data", "no test data", "shard", "no shard", "manifest"],
)  # fmt: skip
def test_rows_that_are_not_verified_are_refused(
    storage: NamespaceStorage, change: Callable[[NamespaceStorage], Any], expected_sha256: str | None, facts: RunFacts, code: str
) -> None:
    sha256 = storage.commit("1")
    change(storage)
    with pytest.raises(StorageError) as caught:
        reader = storage.open_row_store(None, digest=DIGEST, manifest_sha256=expected_sha256 or sha256)
        reader.fetch_for_training(facts, storage.work_folder("t"), renews_marker=False)
    assert caught.value.code == code
    assert not list((storage.work_folder("t")).rglob("*.arrow")), "no unverified rows stay on the disk"


def test_two_preparations_at_the_same_time_both_use_the_first_commit(storage: NamespaceStorage) -> None:
    first_store, second_store = storage.open_row_store(), storage.open_row_store()
    assert first_store.fetch_for_preparation(DIGEST, storage.work_folder("1")) is None
    assert second_store.fetch_for_preparation(DIGEST, storage.work_folder("2")) is None
    sha256 = storage.commit("1", first_store)
    assert storage.commit("2", second_store) == sha256
    assert not [name for name in storage.list_object_names() if name.startswith("a1-00000002")]
    third_result = storage.open_row_store().fetch_for_preparation(DIGEST, storage.work_folder("3"))
    assert third_result is not None and third_result.manifest_sha256 == sha256


def test_different_rows_with_the_same_digest_are_not_used(storage: NamespaceStorage) -> None:
    storage.commit("1")
    with pytest.raises(StorageError) as caught:
        storage.commit("2", rows=[[1, 2], [4]])
    assert caught.value.code == "PreparedDataDiffers"


@pytest.mark.parametrize("damage", [overwrite_shard, overwrite_manifest])
def test_a_damaged_commit_is_replaced(storage: NamespaceStorage, damage: Callable[[NamespaceStorage], None]) -> None:
    sha256 = storage.commit("1")
    damage(storage)
    store = storage.open_row_store()
    assert store.fetch_for_preparation(DIGEST, storage.work_folder("2")) is None
    assert storage.commit("2", store) != sha256
    assert storage.open_row_store().fetch_for_preparation(DIGEST, storage.work_folder("3")) is not None


@pytest.mark.parametrize(
    ("writer_key", "reader_key", "is_used"), [("key", "key", True), (None, "key", False), ("other", "key", False), ("key", None, True), (None, None, True)]
)
def test_a_preparation_uses_only_rows_that_are_signed_with_the_key_of_its_namespace(
    storage: NamespaceStorage, writer_key: str | None, reader_key: str | None, is_used: bool
) -> None:
    storage.commit("1", storage.open_row_store(writer_key))
    store = storage.open_row_store(reader_key)
    assert (store.fetch_for_preparation(DIGEST, storage.work_folder("2")) is not None) is is_used
    if not is_used:
        storage.commit("2", store)
        assert storage.open_row_store(reader_key).fetch_for_preparation(DIGEST, storage.work_folder("3")) is not None


# ---- removal ----


def test_only_rows_that_are_unused_for_too_long_are_removed(storage: NamespaceStorage) -> None:
    for number, digest in enumerate(("a" * 64, "b" * 64, "c" * 64)):
        storage.commit(str(number), digest=digest)
    storage.mark_used("2026-01-01T00:00:00Z", "a" * 64)
    (storage.root / ("c" * 64) / "_USED").unlink()
    assert storage.open_row_store().remove_expired() == ["a" * 64]
    assert sorted(path.name for path in storage.root.iterdir()) == ["b" * 64, "c" * 64]
    assert UsedMarker.parse((storage.root / ("c" * 64) / "_USED").read_bytes()) is not None, "rows without a marker get one first"


def test_rows_that_cannot_be_read_do_not_keep_others_from_being_removed(
    storage: NamespaceStorage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for number, digest in enumerate(("a" * 64, "b" * 64)):
        storage.commit(str(number), digest=digest)
        storage.mark_used("2026-01-01T00:00:00Z", digest)
    original_get = FolderStore.get

    def refuse_first(self: FolderStore, key: str) -> bytes | None:
        if key == "a" * 64 + "/_USED":
            raise CredentialsError("AccessDenied", "GetObject is not allowed")
        return original_get(self, key)

    monkeypatch.setattr(FolderStore, "get", refuse_first)
    assert storage.open_row_store().remove_expired() == ["b" * 64]
    assert len(storage.list_object_names("a" * 64)) == 6
    assert "the prepared rows " + "a" * 64 in caplog.text


def test_every_use_extends_the_time_of_the_rows_and_never_shortens_it(storage: NamespaceStorage) -> None:
    sha256 = storage.commit("1", storage.open_row_store(ttl_days=60))
    long_lived_marker = UsedMarker.parse((storage.root / DIGEST / "_USED").read_bytes())
    storage.open_row_store(None, digest=DIGEST, manifest_sha256=sha256, ttl_days=7).fetch_for_training(FACTS, storage.work_folder("t"), renews_marker=True)
    assert UsedMarker.parse((storage.root / DIGEST / "_USED").read_bytes()) == long_lived_marker
    storage.mark_used("2026-01-01T00:00:00Z")
    storage.open_row_store(None, digest=DIGEST, manifest_sha256=sha256, ttl_days=7).fetch_for_training(FACTS, storage.work_folder("t"), renews_marker=True)
    assert storage.open_row_store().remove_expired(lambda: datetime.now(UTC) + timedelta(days=6)) == []
    assert storage.open_row_store().remove_expired(lambda: datetime.now(UTC) + timedelta(days=8)) == [DIGEST]


def test_rows_that_are_removed_during_their_download_are_not_used(storage: NamespaceStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows are removed after the reader has read the manifest. The reader finds that files are missing, and uses none of the rows."""
    sha256 = storage.commit("1")
    reader = storage.open_row_store(None, digest=DIGEST, manifest_sha256=sha256)
    original_download, lock = FolderStore.download, threading.Lock()
    removed_digests: list[str] = []

    def remove_first(self: FolderStore, *arguments: Any, **options: Any) -> str | None:
        with lock:  # several threads download files at the same time
            if not removed_digests:
                storage.mark_used("2026-01-01T00:00:00Z")
                removed_digests.extend(storage.open_row_store().remove_expired())
        return original_download(self, *arguments, **options)

    monkeypatch.setattr(FolderStore, "download", remove_first)
    with pytest.raises(StorageError) as caught:
        reader.fetch_for_training(FACTS, storage.work_folder("t"), renews_marker=True)
    assert caught.value.code == "PreparedDataDamaged" and "is missing" in caught.value.message


def test_files_of_a_killed_preparation_are_removed_after_the_ttl(storage: NamespaceStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    def be_killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointTree, "commit", be_killed)
    with pytest.raises(KeyboardInterrupt):
        storage.commit("1")
    assert "_USED" in storage.list_object_names() and "_COMMITTED" not in storage.list_object_names()
    assert storage.open_row_store().remove_expired(lambda: datetime.now(UTC) + timedelta(days=31)) == [DIGEST]
    assert not storage.root.exists() or not list(storage.root.iterdir())


def test_files_of_a_killed_preparation_are_removed_next_to_rows_in_use(storage: NamespaceStorage) -> None:
    storage.commit("1")
    committed_names = storage.list_object_names()
    for name in ("a1-00000002/train/00000.arrow", "a1-00000003/train/00000.arrow", "a1-00000003/train/00001.arrow"):
        file = storage.root / DIGEST / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")
    now = datetime.now(UTC)
    old_timestamp = (now - timedelta(days=2)).timestamp()
    for file in (storage.root / DIGEST).rglob("*"):
        if file.name != "00001.arrow":
            os.utime(file, (old_timestamp, old_timestamp))
    assert storage.open_row_store().remove_expired(lambda: now) == []
    recent_names = ["a1-00000003/train/00000.arrow", "a1-00000003/train/00001.arrow"]
    assert storage.list_object_names() == sorted([*committed_names, *recent_names]), "one of two files of the third folder is not old"


def test_a_pod_that_may_only_read_the_rows_uses_them(storage: NamespaceStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    sha256 = storage.commit("1")

    def refuse(*_: Any) -> None:
        raise CredentialsError("AccessDenied", "PutObject is not allowed")

    monkeypatch.setattr(FolderStore, "put", refuse)
    reader = storage.open_row_store(None, digest=DIGEST, manifest_sha256=sha256)
    assert reader.fetch_for_training(FACTS, storage.work_folder("t"), renews_marker=True).row_count == 2


def test_removal_begins_with_the_marker_of_the_commit() -> None:
    keys = ["d/_COMMITTED", "d/_USED", "d/a1-1/manifest.json", "d/a1-1/train/00000.arrow", "d/a1-2/manifest.json"]
    assert group_keys_for_removal(keys) == [["d/_COMMITTED"], ["d/a1-1/manifest.json", "d/a1-2/manifest.json"], ["d/a1-1/train/00000.arrow"], ["d/_USED"]]
    assert UsedMarker.parse(b"{}") is None and UsedMarker.parse(b'{"until": "2026-01-01T00:00:00"}') is None
    now = datetime(2026, 5, 1, tzinfo=UTC)
    assert renew_marker(None, now, 30).to_bytes() == b'{"until":"2026-05-31T00:00:00Z"}'
