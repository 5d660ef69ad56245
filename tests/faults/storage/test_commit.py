"""The commit protocol under faults: a committed checkpoint is whole and right at every instant, whatever the store does."""

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
from storage_place import Connection

from tests.support.faultproxy import Call
from tests.support.s3proxy import LostResponse, Reset, S3Operation, S3Proxy, Status


def test_a_bad_day(place: Connection, proxy: S3Proxy, checkpoint: Path, tmp_path: Path) -> None:
    """30 % SlowDown, 10 % 500, 10 % resets: everything is committed in the end, and right."""
    rules = [
        proxy.fault(Status(503, "SlowDown"), probability=0.3),
        proxy.fault(Status(500, "InternalError"), probability=0.1),
        proxy.fault(Reset(), probability=0.1),
    ]
    for step in (5, 10):
        place.commit(step, checkpoint)
    assert all(rule.hits > 0 for rule in rules)
    assert isinstance(place.through.store, s3.S3Store) and place.through.store.retries > 0
    assert place.whole(tmp_path / "check") == [10, 5]


@pytest.mark.parametrize("word", ["optimizer.pt", "manifest.json", "_COMMITTED"])
def test_a_lost_answer_is_recognised(place: Connection, proxy: S3Proxy, checkpoint: Path, tmp_path: Path, word: str) -> None:
    """The store did it, the answer was lost: once more is the same thing, and an existing marker is our own."""
    with proxy.fault(LostResponse(), operation="PutObject", key=word, times=1) as lost:
        place.commit(5, checkpoint)
    assert lost.hits == 1
    assert place.whole(tmp_path / "check") == [5]


def test_a_lost_answer_of_a_multipart_upload(
    place: Connection, proxy: S3Proxy, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * s3.MIB)
    (checkpoint / "model.safetensors").write_bytes(random.Random(3).randbytes(11 * s3.MIB))
    with proxy.fault(LostResponse(), operation="CompleteMultipartUpload", times=1) as lost:
        place.commit(5, checkpoint)
    assert lost.hits == 1
    assert place.whole(tmp_path / "check") == [5]


@pytest.mark.parametrize("second", [1, 2])
def test_two_incarnations_one_marker(place: Connection, checkpoint: Path, tmp_path: Path, second: int) -> None:
    """Two lives commit the same step at once. Of one attempt: one wins, the other is told and stops. Of two: the later one's stays."""
    ends: dict[str, object] = {}
    start = threading.Barrier(2)

    def live(incarnation: str, attempt: int) -> None:
        start.wait()
        try:
            place.commit(5, checkpoint, incarnation, attempt)
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
    found = place.truly.marker(5)
    assert found is not None and found.marker.path == (won[0] if second == 1 else lives[1][0]) and found.marker.path in won
    assert place.whole(tmp_path / "check") == [5]


@dataclass(frozen=True)
class Forget:
    """Whoever writes last wins, as if nobody had asked for a condition."""

    place: Connection

    async def handle(self, call: Call[S3Operation]) -> web.StreamResponse:
        there = call.operation
        await asyncio.to_thread(self.place.client.delete_object, Bucket=there.bucket, Key=there.key)
        return await call.forward()


def test_a_store_that_ignores_conditions(place: Connection, proxy: S3Proxy, checkpoint: Path, tmp_path: Path) -> None:
    """It is found out at start; two lives may both commit, and still neither spoils the other's bytes."""
    careless = proxy.fault(Forget(place), operation="PutObject")
    target = place.through.store.target  # type: ignore[attr-defined] # an S3Store
    assert preflight(target).conditional_writes is False
    place.commit(5, checkpoint, "a1-00000001", 1)
    place.commit(5, checkpoint, "a2-00000002", 2)
    found = place.truly.marker(5)
    assert found is not None and found.marker.path == "a2-00000002"
    assert place.whole(tmp_path / "check") == [5]
    careless.remove()
    assert preflight(target).conditional_writes is True


def test_an_upload_that_went_missing_is_never_committed(place: Connection, checkpoint: Path) -> None:
    entries = place.through.upload(prefix_of(5), "a1-00000000", checkpoint)
    from finetune_trainer.checkpoint.manifest import Manifest

    place.truly.store.delete(["checkpoints/step-00000005/a1-00000000/optimizer.pt"])
    with pytest.raises(StorageError) as caught:
        place.through.commit(prefix_of(5), Manifest(step=5, incarnation="a1-00000000", files=entries))
    assert caught.value.code == "UploadIncomplete" and "optimizer.pt" in caught.value.message
    assert place.truly.committed() == []


@pytest.mark.parametrize("word", ["trainer_state.json", "manifest.json", "_COMMITTED"])
def test_a_store_that_goes_away_leaves_nothing_visible(
    place: Connection, proxy: S3Proxy, checkpoint: Path, tmp_path: Path, word: str, s3_server: object
) -> None:
    """As after kill -9 between data and manifest, and between manifest and marker; the next start sweeps it away."""
    place.commit(5, checkpoint)
    impatient = s3.S3Store(place.through.store.target.model_copy(), attempts=1)  # type: ignore[attr-defined] # an S3Store
    place.through.store = impatient
    with proxy.fault(Reset(), operation="PutObject", key=word), pytest.raises(FineTuneError):
        place.commit(10, checkpoint)
    assert place.whole(tmp_path / "check") == [5]
    assert place.truly.sweep().count > 0
    assert [stat.key for stat in place.truly.store.list("checkpoints/step-00000010/")] == []
    assert place.whole(tmp_path / "check2") == [5]


def test_an_orphaned_multipart_upload_is_swept(place: Connection) -> None:
    key = place.truly.store.key("checkpoints/step-00000005/a1-00000000/model.safetensors")  # type: ignore[attr-defined] # an S3Store
    place.client.create_multipart_upload(Bucket=place.bucket, Key=key)
    assert place.truly.sweep().count == 1
    assert not place.client.list_multipart_uploads(Bucket=place.bucket).get("Uploads")


def test_a_committed_step_is_whole_at_every_instant(
    place: Connection, proxy: S3Proxy, checkpoint: Path, tmp_path: Path
) -> None:
    """A watcher looks at the bucket all the time while checkpoints come and go under faults."""
    proxy.fault(Status(503, "SlowDown"), probability=0.2)
    proxy.fault(LostResponse(), operation="PutObject", probability=0.2)
    done, looks, wrong = threading.Event(), [0], []

    def watch() -> None:
        while not done.is_set():
            for committed in place.truly.committed():
                manifest = place.truly.manifest(committed)
                gone = place.truly.marker(committed.step or 0) is None  # retention was faster than this look
                if manifest is None and not gone:
                    wrong.append(committed)
                looks[0] += 1

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        for step in range(1, 6):
            place.commit(step, checkpoint)
            if step > 3:
                place.through.remove(step - 3)
    finally:
        done.set()
        thread.join()
    assert not wrong and looks[0] > 0
    assert place.whole(tmp_path / "check") == [5, 4, 3]


ODD = ["with space", "ümlaut-雪", "100%25 +plus", "a#b?c&d", ".hidden", "sub folder/x", "empty"]


def test_odd_names_and_an_empty_file(place: Connection, tmp_path: Path) -> None:
    """Names as they are in the folder, in the manifest, in the store and in the folder that comes back."""
    folder = tmp_path / "odd"
    for name in ODD:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("" if name == "empty" else name)
    manifest = place.commit(5, folder)
    assert sorted(entry.path for entry in manifest.files) == sorted(ODD)
    assert place.whole(tmp_path / "check") == [5]
    back = tmp_path / "check" / "checkpoints/step-00000005/a1-00000000"
    assert {name: (back / name).read_text() for name in ODD} == {name: "" if name == "empty" else name for name in ODD}
    place.through.remove(5)
    assert list(place.truly.store.list("")) == []


@pytest.mark.parametrize(
    ("status", "code"), [(501, "NotImplemented"), (405, "MethodNotAllowed"), (400, "MissingContentMD5")]
)
def test_a_store_that_cannot_delete_several_at_once(
    place: Connection, proxy: S3Proxy, checkpoint: Path, status: int, code: str
) -> None:
    refused = proxy.fault(Status(status, code), operation="DeleteObjects")
    target = place.through.store.target  # type: ignore[attr-defined] # an S3Store
    assert preflight(target).can_delete
    place.commit(5, checkpoint)
    before = refused.hits
    place.through.remove(5)
    assert list(place.truly.store.list("")) == []
    assert refused.hits == before + 1, "it is asked once"


@dataclass(frozen=True)
class NoConditions:
    """A store that refuses a header it does not know."""

    status: int
    code: str

    async def handle(self, call: Call[S3Operation]) -> web.StreamResponse:
        if "If-None-Match" in call.request.headers:
            return await Status(self.status, self.code).handle(call)
        return await call.forward()


@pytest.mark.parametrize(("status", "code"), [(501, "NotImplemented"), (400, "InvalidArgument")])
def test_a_store_that_refuses_conditions(
    place: Connection, proxy: S3Proxy, checkpoint: Path, tmp_path: Path, status: int, code: str
) -> None:
    """On a store without conditional writes a marker that exists stays; the operator prevents two writers at the same instant."""
    proxy.fault(NoConditions(status, code), operation="PutObject")
    target = place.through.store.target  # type: ignore[attr-defined] # an S3Store
    assert preflight(target).conditional_writes is False
    place.commit(5, checkpoint)
    with pytest.raises(Fenced):
        place.commit(5, checkpoint, "a1-22222222")
    assert place.whole(tmp_path / "check") == [5]


def test_the_first_question_survives_a_lost_answer(place: Connection, proxy: S3Proxy) -> None:
    target = place.through.store.target  # type: ignore[attr-defined] # an S3Store
    with proxy.fault(LostResponse(), operation="PutObject", key=r"\.probe/", times=1) as lost:
        assert preflight(target).conditional_writes
    assert lost.hits == 1


def test_a_full_disk_of_the_pod_is_not_an_unreachable_store(place: Connection, tmp_path: Path) -> None:
    place.truly.store.put("weights", b"x" * 100_000)
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(StorageError) as caught:
        place.truly.store.download("weights", tmp_path / "full")
    assert caught.value.code == "LocalDiskFull"
