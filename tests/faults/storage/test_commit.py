"""The commit protocol under faults: a committed checkpoint is complete and undamaged at all times."""

from __future__ import annotations

import asyncio
import random
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
from aiohttp import web
from finetune_api.errors import FineTuneError, StorageError
from finetune_trainer.checkpoint.manifest import checkpoint_folder_key
from finetune_trainer.checkpoint.tree import FencedOutError
from finetune_trainer.storage import s3
from finetune_trainer.storage.preflight import preflight
from proxied_tree import ProxiedTree

from tests.support.faultproxy import Call
from tests.support.s3proxy import LostResponse, Reset, S3Operation, S3Proxy, Status
from tests.support.store_features import UNFINISHED_UPLOADS, YES, read_result_of_chosen_store


def test_every_checkpoint_is_committed_despite_many_store_errors(storage: ProxiedTree, proxy: S3Proxy, checkpoint: Path, tmp_path: Path) -> None:
    """The store answers 30 % of the requests with SlowDown and 10 % with status 500, and resets 10 % of the connections."""
    rules = [
        proxy.fault(Status(503, "SlowDown"), probability=0.3),
        proxy.fault(Status(500, "InternalError"), probability=0.1),
        proxy.fault(Reset(), probability=0.1),
    ]
    for step in (5, 10):
        storage.commit(step, checkpoint)
    assert all(rule.hits > 0 for rule in rules)
    assert isinstance(storage.proxied_tree.store, s3.S3Store) and storage.proxied_tree.store.retries > 0
    assert storage.verify_all(tmp_path / "check") == [10, 5]


@pytest.mark.parametrize("key", ["optimizer.pt", "manifest.json", "_COMMITTED"])
def test_a_request_whose_response_is_lost_is_retried_without_harm(storage: ProxiedTree, proxy: S3Proxy, checkpoint: Path, tmp_path: Path, key: str) -> None:
    """The store executes a request, but the response is lost and the client retries. A retry that finds the client's own marker counts as success."""
    with proxy.fault(LostResponse(), operation="PutObject", key=key, max_hits=1) as lost_response:
        storage.commit(5, checkpoint)
    assert lost_response.hits == 1
    assert storage.verify_all(tmp_path / "check") == [5]


def test_a_multipart_upload_whose_last_response_is_lost_is_complete(
    storage: ProxiedTree, proxy: S3Proxy, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * s3.MIB)
    (checkpoint / "model.safetensors").write_bytes(random.Random(3).randbytes(11 * s3.MIB))
    with proxy.fault(LostResponse(), operation="CompleteMultipartUpload", max_hits=1) as lost_response:
        storage.commit(5, checkpoint)
    assert lost_response.hits == 1
    assert storage.verify_all(tmp_path / "check") == [5]


@pytest.mark.parametrize("second_attempt", [1, 2])
def test_only_one_of_two_incarnations_keeps_its_marker(storage: ProxiedTree, checkpoint: Path, tmp_path: Path, second_attempt: int) -> None:
    """Two incarnations commit the same step at the same time. In the same attempt, the slower incarnation is fenced. In different attempts, the marker
    of the later attempt remains.
    """
    results: dict[str, object] = {}
    barrier = threading.Barrier(2)

    def commit(incarnation: str, attempt: int) -> None:
        barrier.wait()
        try:
            storage.commit(5, checkpoint, incarnation, attempt)
            results[incarnation] = "committed"
        except FencedOutError as error:
            results[incarnation] = error

    incarnations = [("a1-00000001", 1), (f"a{second_attempt}-00000002", second_attempt)]
    threads = [threading.Thread(target=commit, args=incarnation) for incarnation in incarnations]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    committed_names = [name for name, result in results.items() if result == "committed"]
    if second_attempt == 1:
        assert sorted(type(result).__name__ for result in results.values()) == ["FencedOutError", "str"]
    committed_checkpoint = storage.direct_tree.get_committed(5)
    assert committed_checkpoint is not None and committed_checkpoint.marker.path == (committed_names[0] if second_attempt == 1 else incarnations[1][0])
    assert committed_checkpoint.marker.path in committed_names
    assert storage.verify_all(tmp_path / "check") == [5]


@dataclass(frozen=True)
class IgnoreConditions:
    """A fault that makes the store behave as if it ignored the condition `If-None-Match` of a write: a later write overwrites an earlier one."""

    storage: ProxiedTree

    async def handle(self, call: Call[S3Operation]) -> web.StreamResponse:
        operation = call.operation
        await asyncio.to_thread(self.storage.client.delete_object, Bucket=operation.bucket, Key=operation.key)
        return await call.forward()


def test_incarnations_do_not_mix_data_in_a_store_that_ignores_conditions(storage: ProxiedTree, proxy: S3Proxy, checkpoint: Path, tmp_path: Path) -> None:
    """Two incarnations may both commit, but do not overwrite each other's data. The preflight detects a store that ignores conditions."""
    fault = proxy.fault(IgnoreConditions(storage), operation="PutObject")
    target = storage.proxied_tree.store.target  # type: ignore[attr-defined] # an S3Store
    assert preflight(target).has_conditional_writes is False
    storage.commit(5, checkpoint, "a1-00000001", 1)
    storage.commit(5, checkpoint, "a2-00000002", 2)
    committed_checkpoint = storage.direct_tree.get_committed(5)
    assert committed_checkpoint is not None and committed_checkpoint.marker.path == "a2-00000002"
    assert storage.verify_all(tmp_path / "check") == [5]
    fault.remove()
    assert preflight(target).has_conditional_writes is True


def test_a_checkpoint_with_a_missing_object_is_not_committed(storage: ProxiedTree, checkpoint: Path) -> None:
    entries = storage.proxied_tree.upload(checkpoint_folder_key(5), "a1-00000000", checkpoint)
    from finetune_trainer.checkpoint.manifest import Manifest

    storage.direct_tree.store.delete(["checkpoints/step-00000005/a1-00000000/optimizer.pt"])
    with pytest.raises(StorageError) as caught:
        storage.proxied_tree.commit(checkpoint_folder_key(5), Manifest(step=5, incarnation="a1-00000000", files=entries))
    assert caught.value.code == "UploadIncomplete" and "optimizer.pt" in caught.value.message
    assert storage.direct_tree.list_committed() == []


@pytest.mark.parametrize("key", ["trainer_state.json", "manifest.json", "_COMMITTED"])
def test_a_store_that_fails_during_a_commit_leaves_nothing_visible(
    storage: ProxiedTree, proxy: S3Proxy, checkpoint: Path, tmp_path: Path, key: str, s3_server: object
) -> None:
    """The objects of a failed commit remain in the store, as after a SIGKILL during a commit. The next sweep removes these objects."""
    storage.commit(5, checkpoint)
    store_without_retries = s3.S3Store(storage.proxied_tree.store.target.model_copy(), max_tries=1)  # type: ignore[attr-defined] # an S3Store
    storage.proxied_tree.store = store_without_retries
    with proxy.fault(Reset(), operation="PutObject", key=key), pytest.raises(FineTuneError):
        storage.commit(10, checkpoint)
    assert storage.verify_all(tmp_path / "check") == [5]
    assert storage.direct_tree.sweep().removed_count > 0
    assert [stat.key for stat in storage.direct_tree.store.list("checkpoints/step-00000010/")] == []
    assert storage.verify_all(tmp_path / "check2") == [5]


@pytest.mark.skipif(read_result_of_chosen_store(UNFINISHED_UPLOADS) != YES, reason="this store lists an unfinished upload only for its whole key")
def test_an_orphaned_multipart_upload_is_swept(storage: ProxiedTree) -> None:
    key = storage.direct_tree.store.full_key("checkpoints/step-00000005/a1-00000000/model.safetensors")  # type: ignore[attr-defined] # an S3Store
    storage.client.create_multipart_upload(Bucket=storage.bucket, Key=key)
    assert storage.direct_tree.sweep().removed_count == 1
    assert not storage.client.list_multipart_uploads(Bucket=storage.bucket).get("Uploads")


def test_a_committed_step_is_complete_at_every_instant(
    storage: ProxiedTree, proxy: S3Proxy, checkpoint: Path, tmp_path: Path
) -> None:
    """A thread checks continuously that every committed checkpoint has a manifest, while checkpoints are committed and removed under faults."""
    proxy.fault(Status(503, "SlowDown"), probability=0.2)
    proxy.fault(LostResponse(), operation="PutObject", probability=0.2)
    is_done, read_count, incomplete_checkpoints = threading.Event(), [0], []

    def read_continuously() -> None:
        while not is_done.is_set():
            for committed in storage.direct_tree.list_committed():
                manifest = storage.direct_tree.read_manifest(committed)
                is_removed = storage.direct_tree.get_committed(committed.step or 0) is None  # the checkpoint was removed after it had been listed
                if manifest is None and not is_removed:
                    incomplete_checkpoints.append(committed)
                read_count[0] += 1

    thread = threading.Thread(target=read_continuously)
    thread.start()
    try:
        for step in range(1, 6):
            storage.commit(step, checkpoint)
            if step > 3:
                storage.proxied_tree.remove(step - 3)
    finally:
        is_done.set()
        thread.join()
    assert not incomplete_checkpoints and read_count[0] > 0
    assert storage.verify_all(tmp_path / "check") == [5, 4, 3]


UNUSUAL_NAMES = ["with space", "ümlaut-雪", "100%25 +plus", "a#b?c&d", ".hidden", "sub folder/x", "empty"]


def test_unusual_file_names_and_empty_files_are_restored(storage: ProxiedTree, tmp_path: Path) -> None:
    """The folder, the manifest, the store and the restored folder have the same file names."""
    folder = tmp_path / "odd"
    for name in UNUSUAL_NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("" if name == "empty" else name)
    manifest = storage.commit(5, folder)
    assert sorted(entry.path for entry in manifest.files) == sorted(UNUSUAL_NAMES)
    assert storage.verify_all(tmp_path / "check") == [5]
    restored_folder = tmp_path / "check" / "checkpoints/step-00000005/a1-00000000"
    assert {name: (restored_folder / name).read_text() for name in UNUSUAL_NAMES} == {name: "" if name == "empty" else name for name in UNUSUAL_NAMES}
    storage.proxied_tree.remove(5)
    assert list(storage.direct_tree.store.list("")) == []


@pytest.mark.parametrize(
    ("status", "code"), [(501, "NotImplemented"), (405, "MethodNotAllowed"), (400, "MissingContentMD5")]
)
def test_a_store_without_batch_deletes_gets_single_deletes(
    storage: ProxiedTree, proxy: S3Proxy, checkpoint: Path, status: int, code: str
) -> None:
    refusal_rule = proxy.fault(Status(status, code), operation="DeleteObjects")
    target = storage.proxied_tree.store.target  # type: ignore[attr-defined] # an S3Store
    assert preflight(target).can_delete
    storage.commit(5, checkpoint)
    hits_before = refusal_rule.hits
    storage.proxied_tree.remove(5)
    assert list(storage.direct_tree.store.list("")) == []
    assert refusal_rule.hits == hits_before + 1, "after one refused batch delete, the client must delete objects one by one"


@dataclass(frozen=True)
class RefuseConditions:
    """A fault that simulates a store that refuses every request with the header If-None-Match."""

    status: int
    code: str

    async def handle(self, call: Call[S3Operation]) -> web.StreamResponse:
        if "If-None-Match" in call.request.headers:
            return await Status(self.status, self.code).handle(call)
        return await call.forward()


@pytest.mark.parametrize(("status", "code"), [(501, "NotImplemented"), (400, "InvalidArgument")])
def test_an_existing_marker_stays_in_a_store_that_refuses_conditions(
    storage: ProxiedTree, proxy: S3Proxy, checkpoint: Path, tmp_path: Path, status: int, code: str
) -> None:
    """The trainer checks whether a marker exists before it writes one.

    A store without conditional writes needs no other protection, because the operator prevents simultaneous writers.
    """
    proxy.fault(RefuseConditions(status, code), operation="PutObject")
    target = storage.proxied_tree.store.target  # type: ignore[attr-defined] # an S3Store
    assert preflight(target).has_conditional_writes is False
    storage.commit(5, checkpoint)
    with pytest.raises(FencedOutError):
        storage.commit(5, checkpoint, "a1-22222222")
    assert storage.verify_all(tmp_path / "check") == [5]


def test_the_preflight_succeeds_although_a_response_is_lost(storage: ProxiedTree, proxy: S3Proxy) -> None:
    target = storage.proxied_tree.store.target  # type: ignore[attr-defined] # an S3Store
    with proxy.fault(LostResponse(), operation="PutObject", key=r"\.probe/", max_hits=1) as lost_response:
        assert preflight(target).has_conditional_writes
    assert lost_response.hits == 1


def test_a_full_disk_of_the_pod_is_not_reported_as_an_unreachable_store(storage: ProxiedTree, tmp_path: Path) -> None:
    storage.direct_tree.store.put("weights", b"x" * 100_000)
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(StorageError) as caught:
        storage.direct_tree.store.download("weights", tmp_path / "full")
    assert caught.value.code == "LocalDiskFull"
