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


class Scene:
    """The storage of a namespace, and the pods that use it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "store/team/_prepared"
        run, _ = make_run(folder, Path("/models/tiny"), {}, [])
        self.run: RunConfig = run.model_copy(update={"storage": StoreTarget(uri=f"file://{folder}/store/team/job/uid")})

    def row_store(self, key: str | None = "key", **prepared: Any) -> RowStore:
        run = self.run.model_copy(update={"prepared": PreparedRows(**prepared)})
        return RowStore(run, CheckpointTree(FolderStore(self.root, f"file://{self.root}"), key))

    def work(self, name: str) -> Path:
        return self.folder / name

    def tokenise(self, pod: str, rows: list[list[int]], digest: str = DIGEST) -> Path:
        batch = make_batch({"input_ids": ColumnType.TOKENS}, {"input_ids": rows})
        folder = prepared_folder(self.work(pod) / TOKENS_FOLDER, digest)
        write_prepared(folder, {"train": [batch]}, inputs_digest=digest, summary={})
        return folder

    def commit(self, pod: str, store: RowStore | None = None, rows: list[list[int]] | None = None, digest: str = DIGEST) -> str:
        """Tokenise and commit rows in one preparation pod. Returns the sha256 of the committed manifest."""
        folder = self.tokenise(pod, rows or [[1, 2], [3]], digest)
        return (store or self.row_store()).commit(digest, folder, incarnation=f"a1-{pod:0>8}", facts=FACTS, summary=SUMMARY)

    def object_names(self, digest: str = DIGEST) -> list[str]:
        return sorted(path.relative_to(self.root / digest).as_posix() for path in (self.root / digest).rglob("*") if path.is_file())

    def mark_used(self, until: str, digest: str = DIGEST) -> None:
        (self.root / digest / "_USED").write_text(json.dumps({"until": until}))


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_a_training_pod_gets_the_rows_and_the_result_of_their_check(scene: Scene) -> None:
    sha256 = scene.commit("1")
    files = ("manifest.hmac", "manifest.json", "prepared.json", "train/00000.arrow")
    assert scene.object_names() == ["_COMMITTED", "_USED", *(f"a1-00000001/{name}" for name in files)]
    training = scene.row_store(key=None, digest=DIGEST, manifest_sha256=sha256)
    facts = FACTS.model_copy(update={"other_inputs": FACTS.other_inputs | {"contents of ConfigMaps": "x"}})
    stored = training.fetch_for_training(facts, scene.work("t"), renews_marker=True)
    assert (stored.summary, stored.row_count, stored.manifest_sha256) == (SUMMARY, 2, sha256)
    prepared = open_prepared(prepared_folder(scene.work("t") / TOKENS_FOLDER, DIGEST), DIGEST)
    prepared.verify()
    assert sorted(path.name for path in (scene.work("t") / TOKENS_FOLDER).iterdir()) == [DIGEST[:24]]


def overwrite_shard(scene: Scene) -> None:
    (scene.root / DIGEST / "a1-00000001/train/00000.arrow").write_bytes(b"x")


def remove_files(scene: Scene) -> None:
    (scene.root / DIGEST / "a1-00000001/train/00000.arrow").unlink()


def overwrite_manifest(scene: Scene) -> None:
    (scene.root / DIGEST / "a1-00000001/manifest.json").write_text("{}")


@pytest.mark.parametrize(
    ("change", "expected", "facts", "code"),
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
    scene: Scene, change: Callable[[Scene], Any], expected: str | None, facts: RunFacts, code: str
) -> None:
    sha256 = scene.commit("1")
    change(scene)
    with pytest.raises(StorageError) as caught:
        scene.row_store(None, digest=DIGEST, manifest_sha256=expected or sha256).fetch_for_training(facts, scene.work("t"), renews_marker=False)
    assert caught.value.code == code
    assert not list((scene.work("t")).rglob("*.arrow")), "no unverified rows stay on the disk"


def test_two_preparations_at_the_same_time_both_use_the_first_commit(scene: Scene) -> None:
    first, second = scene.row_store(), scene.row_store()
    assert first.fetch_for_preparation(DIGEST, scene.work("1")) is None and second.fetch_for_preparation(DIGEST, scene.work("2")) is None
    sha256 = scene.commit("1", first)
    assert scene.commit("2", second) == sha256
    assert not [name for name in scene.object_names() if name.startswith("a1-00000002")]
    third = scene.row_store().fetch_for_preparation(DIGEST, scene.work("3"))
    assert third is not None and third.manifest_sha256 == sha256


def test_different_rows_with_the_same_digest_are_not_used(scene: Scene) -> None:
    scene.commit("1")
    with pytest.raises(StorageError) as caught:
        scene.commit("2", rows=[[1, 2], [4]])
    assert caught.value.code == "PreparedDataDiffers"


@pytest.mark.parametrize("damage", [overwrite_shard, overwrite_manifest])
def test_a_damaged_commit_is_replaced(scene: Scene, damage: Callable[[Scene], None]) -> None:
    sha256 = scene.commit("1")
    damage(scene)
    store = scene.row_store()
    assert store.fetch_for_preparation(DIGEST, scene.work("2")) is None
    assert scene.commit("2", store) != sha256
    assert scene.row_store().fetch_for_preparation(DIGEST, scene.work("3")) is not None


@pytest.mark.parametrize(
    ("writer", "reader", "is_used"), [("key", "key", True), (None, "key", False), ("other", "key", False), ("key", None, True), (None, None, True)]
)
def test_a_preparation_uses_only_rows_that_are_signed_with_the_key_of_its_namespace(
    scene: Scene, writer: str | None, reader: str | None, is_used: bool
) -> None:
    scene.commit("1", scene.row_store(writer))
    store = scene.row_store(reader)
    assert (store.fetch_for_preparation(DIGEST, scene.work("2")) is not None) is is_used
    if not is_used:
        scene.commit("2", store)
        assert scene.row_store(reader).fetch_for_preparation(DIGEST, scene.work("3")) is not None


# ---- removal ----


def test_only_rows_that_are_unused_for_too_long_are_removed(scene: Scene) -> None:
    for number, digest in enumerate(("a" * 64, "b" * 64, "c" * 64)):
        scene.commit(str(number), digest=digest)
    scene.mark_used("2026-01-01T00:00:00Z", "a" * 64)
    (scene.root / ("c" * 64) / "_USED").unlink()
    assert scene.row_store().remove_expired() == ["a" * 64]
    assert sorted(path.name for path in scene.root.iterdir()) == ["b" * 64, "c" * 64]
    assert UsedMarker.parse((scene.root / ("c" * 64) / "_USED").read_bytes()) is not None, "rows without a marker get one first"


def test_rows_that_cannot_be_read_do_not_keep_others_from_being_removed(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for number, digest in enumerate(("a" * 64, "b" * 64)):
        scene.commit(str(number), digest=digest)
        scene.mark_used("2026-01-01T00:00:00Z", digest)
    get = FolderStore.get

    def refuse_first(self: FolderStore, key: str) -> bytes | None:
        if key == "a" * 64 + "/_USED":
            raise CredentialsError("AccessDenied", "GetObject is not allowed")
        return get(self, key)

    monkeypatch.setattr(FolderStore, "get", refuse_first)
    assert scene.row_store().remove_expired() == ["b" * 64]
    assert len(scene.object_names("a" * 64)) == 6
    assert "the prepared rows " + "a" * 64 in caplog.text


def test_every_use_extends_the_time_of_the_rows_and_never_shortens_it(scene: Scene) -> None:
    sha256 = scene.commit("1", scene.row_store(ttl_days=60))
    long = UsedMarker.parse((scene.root / DIGEST / "_USED").read_bytes())
    scene.row_store(None, digest=DIGEST, manifest_sha256=sha256, ttl_days=7).fetch_for_training(FACTS, scene.work("t"), renews_marker=True)
    assert UsedMarker.parse((scene.root / DIGEST / "_USED").read_bytes()) == long
    scene.mark_used("2026-01-01T00:00:00Z")
    scene.row_store(None, digest=DIGEST, manifest_sha256=sha256, ttl_days=7).fetch_for_training(FACTS, scene.work("t"), renews_marker=True)
    assert scene.row_store().remove_expired(lambda: datetime.now(UTC) + timedelta(days=6)) == []
    assert scene.row_store().remove_expired(lambda: datetime.now(UTC) + timedelta(days=8)) == [DIGEST]


def test_rows_that_are_removed_during_their_download_are_not_used(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows are removed after the reader has read the manifest. The reader finds that files are missing, and uses none of the rows."""
    sha256 = scene.commit("1")
    reader = scene.row_store(None, digest=DIGEST, manifest_sha256=sha256)
    download, lock = FolderStore.download, threading.Lock()
    removed: list[str] = []

    def remove_first(self: FolderStore, *arguments: Any, **options: Any) -> str | None:
        with lock:  # several threads download files at the same time
            if not removed:
                scene.mark_used("2026-01-01T00:00:00Z")
                removed.extend(scene.row_store().remove_expired())
        return download(self, *arguments, **options)

    monkeypatch.setattr(FolderStore, "download", remove_first)
    with pytest.raises(StorageError) as caught:
        reader.fetch_for_training(FACTS, scene.work("t"), renews_marker=True)
    assert caught.value.code == "PreparedDataDamaged" and "is missing" in caught.value.message


def test_files_of_a_killed_preparation_are_removed_after_the_ttl(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointTree, "commit", killed)
    with pytest.raises(KeyboardInterrupt):
        scene.commit("1")
    assert "_USED" in scene.object_names() and "_COMMITTED" not in scene.object_names()
    assert scene.row_store().remove_expired(lambda: datetime.now(UTC) + timedelta(days=31)) == [DIGEST]
    assert not scene.root.exists() or not list(scene.root.iterdir())


def test_files_of_a_killed_preparation_are_removed_next_to_rows_in_use(scene: Scene) -> None:
    scene.commit("1")
    committed = scene.object_names()
    for name in ("a1-00000002/train/00000.arrow", "a1-00000003/train/00000.arrow", "a1-00000003/train/00001.arrow"):
        file = scene.root / DIGEST / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")
    now = datetime.now(UTC)
    old = (now - timedelta(days=2)).timestamp()
    for file in (scene.root / DIGEST).rglob("*"):
        if file.name != "00001.arrow":
            os.utime(file, (old, old))
    assert scene.row_store().remove_expired(lambda: now) == []
    recent = ["a1-00000003/train/00000.arrow", "a1-00000003/train/00001.arrow"]
    assert scene.object_names() == sorted([*committed, *recent]), "one of two files of the third folder is not old"


def test_a_pod_that_may_only_read_the_rows_uses_them(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    sha256 = scene.commit("1")

    def refuse(*_: Any) -> None:
        raise CredentialsError("AccessDenied", "PutObject is not allowed")

    monkeypatch.setattr(FolderStore, "put", refuse)
    reader = scene.row_store(None, digest=DIGEST, manifest_sha256=sha256)
    assert reader.fetch_for_training(FACTS, scene.work("t"), renews_marker=True).row_count == 2


def test_removal_begins_with_the_marker_of_the_commit() -> None:
    keys = ["d/_COMMITTED", "d/_USED", "d/a1-1/manifest.json", "d/a1-1/train/00000.arrow", "d/a1-2/manifest.json"]
    assert group_keys_for_removal(keys) == [["d/_COMMITTED"], ["d/a1-1/manifest.json", "d/a1-2/manifest.json"], ["d/a1-1/train/00000.arrow"], ["d/_USED"]]
    assert UsedMarker.parse(b"{}") is None and UsedMarker.parse(b'{"until": "2026-01-01T00:00:00"}') is None
    now = datetime(2026, 5, 1, tzinfo=UTC)
    assert renew_marker(None, now, 30).to_bytes() == b'{"until":"2026-05-31T00:00:00Z"}'
