"""The commit protocol under faults: a committed checkpoint is complete and undamaged at every instant."""

from __future__ import annotations

import asyncio
import random
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
from aiohttp import web
from finetune_api.errors import FineTuneError, StorageError
from finetune_trainer.checkpoint.manifest import prefix_of
from finetune_trainer.checkpoint.tree import Fenced
from finetune_trainer.storage import s3
from finetune_trainer.storage.preflight import preflight
from proxied_tree import ProxiedTree

from tests.support.faultproxy import Call
from tests.support.s3proxy import LostResponse, Reset, S3Operation, S3Proxy, Status


def test_many_store_errors(storage: ProxiedTree, proxy: S3Proxy, checkpoint: Path, tmp_path: Path) -> None:
    """30 % SlowDown, 10 % 500, 10 % resets: every checkpoint is committed and undamaged in the end."""
    rules = [
        proxy.fault(Status(503, "SlowDown"), probability=0.3),
        proxy.fault(Status(500, "InternalError"), probability=0.1),
        proxy.fault(Reset(), probability=0.1),
    ]
    for step in (5, 10):
        storage.commit(step, checkpoint)
    assert all(rule.hits > 0 for rule in rules)
    assert isinstance(storage.proxied.store, s3.S3Store) and storage.proxied.store.retries > 0
    assert storage.verify_all(tmp_path / "check") == [10, 5]


@pytest.mark.parametrize("word", ["optimizer.pt", "manifest.json", "_COMMITTED"])
def test_a_lost_response_is_recognised(storage: ProxiedTree, proxy: S3Proxy, checkpoint: Path, tmp_path: Path, word: str) -> None:
    """The store executed the request and the response was lost: the retry has the same result, and the marker is recognised."""
    with proxy.fault(LostResponse(), operation="PutObject", key=word, times=1) as lost:
        storage.commit(5, checkpoint)
    assert lost.hits == 1
    assert storage.verify_all(tmp_path / "check") == [5]


def test_a_lost_response_of_a_multipart_upload(
    storage: ProxiedTree, proxy: S3Proxy, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * s3.MIB)
    (checkpoint / "model.safetensors").write_bytes(random.Random(3).randbytes(11 * s3.MIB))
    with proxy.fault(LostResponse(), operation="CompleteMultipartUpload", times=1) as lost:
        storage.commit(5, checkpoint)
    assert lost.hits == 1
    assert storage.verify_all(tmp_path / "check") == [5]


@pytest.mark.parametrize("second", [1, 2])
def test_two_incarnations_one_marker(storage: ProxiedTree, checkpoint: Path, tmp_path: Path, second: int) -> None:
    """Two incarnations commit a step at once. Of one attempt: one commits, the other is fenced. Of two: the later one's marker stays."""
    ends: dict[str, object] = {}
    start = threading.Barrier(2)

    def live(incarnation: str, attempt: int) -> None:
        start.wait()
        try:
            storage.commit(5, checkpoint, incarnation, attempt)
            ends[incarnation] = "committed"
        except Fenced as error:
            ends[incarnation] = error

    lives = [("a1-00000001", 1), (f"a{second}-00000002", second)]
    threads = [threading.Thread(target=live, args=one) for one in lives]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    won = [name for name, end in ends.items() if end == "committed"]
    if second == 1:
        assert sorted(type(end).__name__ for end in ends.values()) == ["Fenced", "str"]
    found = storage.direct.marker(5)
    assert found is not None and found.marker.path == (won[0] if second == 1 else lives[1][0]) and found.marker.path in won
    assert storage.verify_all(tmp_path / "check") == [5]


@dataclass(frozen=True)
class IgnoreConditions:
    """The last writer wins, as if the request had no condition."""

    storage: ProxiedTree

    async def handle(self, call: Call[S3Operation]) -> web.StreamResponse:
        there = call.operation
        await asyncio.to_thread(self.storage.client.delete_object, Bucket=there.bucket, Key=there.key)
        return await call.forward()


def test_a_store_that_ignores_conditions(storage: ProxiedTree, proxy: S3Proxy, checkpoint: Path, tmp_path: Path) -> None:
    """The preflight detects it; two incarnations may both commit, but never overwrite each other's data."""
    careless = proxy.fault(IgnoreConditions(storage), operation="PutObject")
    target = storage.proxied.store.target  # type: ignore[attr-defined] # an S3Store
    assert preflight(target).conditional_writes is False
    storage.commit(5, checkpoint, "a1-00000001", 1)
    storage.commit(5, checkpoint, "a2-00000002", 2)
    found = storage.direct.marker(5)
    assert found is not None and found.marker.path == "a2-00000002"
    assert storage.verify_all(tmp_path / "check") == [5]
    careless.remove()
    assert preflight(target).conditional_writes is True


def test_a_checkpoint_with_a_missing_object_is_not_committed(storage: ProxiedTree, checkpoint: Path) -> None:
    entries = storage.proxied.upload(prefix_of(5), "a1-00000000", checkpoint)
    from finetune_trainer.checkpoint.manifest import Manifest

    storage.direct.store.delete(["checkpoints/step-00000005/a1-00000000/optimizer.pt"])
    with pytest.raises(StorageError) as caught:
        storage.proxied.commit(prefix_of(5), Manifest(step=5, incarnation="a1-00000000", files=entries))
    assert caught.value.code == "UploadIncomplete" and "optimizer.pt" in caught.value.message
    assert storage.direct.committed() == []


@pytest.mark.parametrize("word", ["trainer_state.json", "manifest.json", "_COMMITTED"])
def test_a_store_that_fails_during_a_commit_leaves_nothing_visible(
    storage: ProxiedTree, proxy: S3Proxy, checkpoint: Path, tmp_path: Path, word: str, s3_server: object
) -> None:
    """As after kill -9 between data and manifest, or between manifest and marker; the next start sweeps it."""
    storage.commit(5, checkpoint)
    impatient = s3.S3Store(storage.proxied.store.target.model_copy(), attempts=1)  # type: ignore[attr-defined] # an S3Store
    storage.proxied.store = impatient
    with proxy.fault(Reset(), operation="PutObject", key=word), pytest.raises(FineTuneError):
        storage.commit(10, checkpoint)
    assert storage.verify_all(tmp_path / "check") == [5]
    assert storage.direct.sweep().count > 0
    assert [stat.key for stat in storage.direct.store.list("checkpoints/step-00000010/")] == []
    assert storage.verify_all(tmp_path / "check2") == [5]


def test_an_orphaned_multipart_upload_is_swept(storage: ProxiedTree) -> None:
    key = storage.direct.store.key("checkpoints/step-00000005/a1-00000000/model.safetensors")  # type: ignore[attr-defined] # an S3Store
    storage.client.create_multipart_upload(Bucket=storage.bucket, Key=key)
    assert storage.direct.sweep().count == 1
    assert not storage.client.list_multipart_uploads(Bucket=storage.bucket).get("Uploads")


def test_a_committed_step_is_complete_at_every_instant(
    storage: ProxiedTree, proxy: S3Proxy, checkpoint: Path, tmp_path: Path
) -> None:
    """A thread verifies the bucket continuously while checkpoints are committed and removed under faults."""
    proxy.fault(Status(503, "SlowDown"), probability=0.2)
    proxy.fault(LostResponse(), operation="PutObject", probability=0.2)
    done, looks, wrong = threading.Event(), [0], []

    def watch() -> None:
        while not done.is_set():
            for committed in storage.direct.committed():
                manifest = storage.direct.manifest(committed)
                gone = storage.direct.marker(committed.step or 0) is None  # retention was faster than this look
                if manifest is None and not gone:
                    wrong.append(committed)
                looks[0] += 1

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        for step in range(1, 6):
            storage.commit(step, checkpoint)
            if step > 3:
                storage.proxied.remove(step - 3)
    finally:
        done.set()
        thread.join()
    assert not wrong and looks[0] > 0
    assert storage.verify_all(tmp_path / "check") == [5, 4, 3]


ODD = ["with space", "ümlaut-雪", "100%25 +plus", "a#b?c&d", ".hidden", "sub folder/x", "empty"]


def test_unusual_names_and_an_empty_file(storage: ProxiedTree, tmp_path: Path) -> None:
    """Names are the same in the folder, the manifest, the store and the restored folder."""
    folder = tmp_path / "odd"
    for name in ODD:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("" if name == "empty" else name)
    manifest = storage.commit(5, folder)
    assert sorted(entry.path for entry in manifest.files) == sorted(ODD)
    assert storage.verify_all(tmp_path / "check") == [5]
    back = tmp_path / "check" / "checkpoints/step-00000005/a1-00000000"
    assert {name: (back / name).read_text() for name in ODD} == {name: "" if name == "empty" else name for name in ODD}
    storage.proxied.remove(5)
    assert list(storage.direct.store.list("")) == []


@pytest.mark.parametrize(
    ("status", "code"), [(501, "NotImplemented"), (405, "MethodNotAllowed"), (400, "MissingContentMD5")]
)
def test_a_store_that_cannot_delete_several_at_once(
    storage: ProxiedTree, proxy: S3Proxy, checkpoint: Path, status: int, code: str
) -> None:
    refused = proxy.fault(Status(status, code), operation="DeleteObjects")
    target = storage.proxied.store.target  # type: ignore[attr-defined] # an S3Store
    assert preflight(target).can_delete
    storage.commit(5, checkpoint)
    before = refused.hits
    storage.proxied.remove(5)
    assert list(storage.direct.store.list("")) == []
    assert refused.hits == before + 1, "it is asked once"


@dataclass(frozen=True)
class RefuseConditions:
    """A store that refuses the header of a conditional request."""

    status: int
    code: str

    async def handle(self, call: Call[S3Operation]) -> web.StreamResponse:
        if "If-None-Match" in call.request.headers:
            return await Status(self.status, self.code).handle(call)
        return await call.forward()


@pytest.mark.parametrize(("status", "code"), [(501, "NotImplemented"), (400, "InvalidArgument")])
def test_a_store_that_refuses_conditions(
    storage: ProxiedTree, proxy: S3Proxy, checkpoint: Path, tmp_path: Path, status: int, code: str
) -> None:
    """On a store without conditional writes a marker that exists stays; the operator prevents two writers at the same instant."""
    proxy.fault(RefuseConditions(status, code), operation="PutObject")
    target = storage.proxied.store.target  # type: ignore[attr-defined] # an S3Store
    assert preflight(target).conditional_writes is False
    storage.commit(5, checkpoint)
    with pytest.raises(Fenced):
        storage.commit(5, checkpoint, "a1-22222222")
    assert storage.verify_all(tmp_path / "check") == [5]


def test_the_preflight_survives_a_lost_response(storage: ProxiedTree, proxy: S3Proxy) -> None:
    target = storage.proxied.store.target  # type: ignore[attr-defined] # an S3Store
    with proxy.fault(LostResponse(), operation="PutObject", key=r"\.probe/", times=1) as lost:
        assert preflight(target).conditional_writes
    assert lost.hits == 1


def test_a_full_disk_of_the_pod_is_not_an_unreachable_store(storage: ProxiedTree, tmp_path: Path) -> None:
    storage.direct.store.put("weights", b"x" * 100_000)
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(StorageError) as caught:
        storage.direct.store.download("weights", tmp_path / "full")
    assert caught.value.code == "LocalDiskFull"
