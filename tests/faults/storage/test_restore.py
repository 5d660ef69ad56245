"""Restoring from damaged storage: the damage is detected before loading and is reported, and the previous checkpoint is restored."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from finetune_api.errors import FineTuneError, NoCheckpointError
from finetune_api.pod import ResumeConfig, StoreTarget
from finetune_trainer.checkpoint.manifest import RunFacts
from finetune_trainer.checkpoint.restore import RestoreResult, restore
from finetune_trainer.storage.preflight import preflight
from finetune_trainer.storage.s3 import S3Store
from finetune_trainer.supervisor.fetch import Fetcher
from proxied_tree import ProxiedTree

from tests.support.faultproxy import Call
from tests.support.s3proxy import FlipByte, S3Operation, S3Proxy, Status, Truncate
from tests.support.store_features import CLOCK, IGNORED, UNKNOWN_KEY, read_result_of_chosen_store

FOLDER = "checkpoints/step-00000010/a1-00000000"
FACTS = RunFacts(
    model_revision="m", dataset_digest="d", method="lora", trainer="sft", effective_batch=4, versions={"torch": "2"}
)


@pytest.fixture
def two_checkpoints(storage: ProxiedTree, checkpoint: Path) -> ProxiedTree:
    """Storage with two committed checkpoints, of the steps 5 and 10."""
    storage.commit(5, checkpoint, facts=FACTS)
    storage.commit(10, checkpoint, facts=FACTS)
    return storage


def restore_newest(storage: ProxiedTree, folder: Path, resume: ResumeConfig | None = None, facts: RunFacts = FACTS) -> RestoreResult:
    return restore(storage.proxied_tree, resume or ResumeConfig(mode="auto", expect_step=10), facts, folder / "restored")


def flip_bit(storage: ProxiedTree, key: str) -> None:
    data = storage.direct_tree.store.get(key)
    assert data is not None
    storage.direct_tree.store.put(key, data[:7] + bytes([data[7] ^ 1]) + data[8:])


def truncate_object(storage: ProxiedTree, key: str) -> None:
    data = storage.direct_tree.store.get(key)
    assert data is not None
    storage.direct_tree.store.put(key, data[: len(data) // 2])


def remove_object(storage: ProxiedTree, key: str) -> None:
    storage.direct_tree.store.delete([key])


def test_the_newest_checkpoint_is_restored(two_checkpoints: ProxiedTree, checkpoint: Path, tmp_path: Path) -> None:
    restore_result = restore_newest(two_checkpoints, tmp_path)
    assert (restore_result.step, restore_result.is_exact, restore_result.inexact_reason, restore_result.damage_messages) == (10, True, None, [])
    assert restore_result.local_folder is not None
    restored_files = {p.relative_to(restore_result.local_folder): p.read_bytes() for p in restore_result.local_folder.rglob("*") if p.is_file()}
    assert restored_files == {p.relative_to(checkpoint): p.read_bytes() for p in checkpoint.rglob("*") if p.is_file()}


@pytest.mark.parametrize("damage", [flip_bit, truncate_object, remove_object])
@pytest.mark.parametrize("name", ["optimizer.pt", "sub/rng_state.pth", "manifest.json"])
def test_damage_is_reported_and_the_previous_step_is_restored(
    two_checkpoints: ProxiedTree, tmp_path: Path, damage: Callable[[ProxiedTree, str], None], name: str
) -> None:
    damage(two_checkpoints, f"{FOLDER}/{name}")
    restore_result = restore_newest(two_checkpoints, tmp_path)
    assert restore_result.step == 5
    assert len(restore_result.damage_messages) == 1 and f"{FOLDER}/{name}" in restore_result.damage_messages[0]


def test_an_object_outside_the_manifest_is_not_downloaded(two_checkpoints: ProxiedTree, tmp_path: Path) -> None:
    two_checkpoints.direct_tree.store.put(f"{FOLDER}/model.safetensors", b"stray")
    restore_result = restore_newest(two_checkpoints, tmp_path)
    assert restore_result.step == 10 and restore_result.local_folder is not None
    assert not (restore_result.local_folder / "model.safetensors").exists()


def test_a_checkpoint_with_a_damaged_marker_is_not_restored(two_checkpoints: ProxiedTree, tmp_path: Path) -> None:
    two_checkpoints.direct_tree.store.put("checkpoints/step-00000010/_COMMITTED", b"{")
    assert restore_newest(two_checkpoints, tmp_path).step == 5


def test_a_restore_with_only_damaged_checkpoints_fails_with_73(two_checkpoints: ProxiedTree, tmp_path: Path) -> None:
    for step in (5, 10):
        flip_bit(two_checkpoints, f"checkpoints/step-{step:08d}/a1-00000000/optimizer.pt")
    with pytest.raises(NoCheckpointError) as caught:
        restore_newest(two_checkpoints, tmp_path)
    assert (caught.value.exit_code, caught.value.code) == (73, "NoLoadableCheckpoint")
    assert "step-00000010" in caught.value.message and "step-00000005" in caught.value.message


def test_an_interrupted_download_is_retried(two_checkpoints: ProxiedTree, proxy: S3Proxy, tmp_path: Path) -> None:
    with proxy.fault(Truncate(1000), operation="GetObject", key="optimizer.pt", max_hits=2) as cut_off_response:
        restore_result = restore_newest(two_checkpoints, tmp_path)
    assert (restore_result.step, restore_result.damage_messages, cut_off_response.hits) == (10, [], 2)


def test_a_byte_flipped_in_transit_is_detected(two_checkpoints: ProxiedTree, proxy: S3Proxy, tmp_path: Path) -> None:
    with proxy.fault(FlipByte(99_999), operation="GetObject", key="step-00000010/.*optimizer.pt", max_hits=1) as flipped_response:
        restore_result = restore_newest(two_checkpoints, tmp_path)
    assert (restore_result.step, flipped_response.hits) == (5, 1)
    assert "optimizer.pt" in restore_result.damage_messages[0]


@dataclass(frozen=True)
class RemoveStepBeforeRead:
    """A fault that removes all objects of a checkpoint just before one of them is read, as another process that deletes old checkpoints could do."""

    storage: ProxiedTree
    step: int

    async def handle(self, call: Call[S3Operation]) -> web.StreamResponse:
        await asyncio.to_thread(self.storage.direct_tree.remove, self.step)
        return await call.forward()


def test_a_checkpoint_that_is_removed_while_it_is_read_is_skipped(
    two_checkpoints: ProxiedTree, proxy: S3Proxy, tmp_path: Path
) -> None:
    proxy.fault(RemoveStepBeforeRead(two_checkpoints, 10), operation="GetObject", key="step-00000010/.*/optimizer.pt", max_hits=1)
    restore_result = restore_newest(two_checkpoints, tmp_path)
    assert (restore_result.step, len(restore_result.damage_messages)) == (5, 1)
    assert "optimizer.pt is missing" in restore_result.damage_messages[0]
    assert [committed.step for committed in two_checkpoints.direct_tree.list_committed()] == [5]


@pytest.mark.skipif(read_result_of_chosen_store(CLOCK) == IGNORED, reason="this store does not compare clocks")
def test_a_wrong_clock_is_reported_without_endless_retries(two_checkpoints: ProxiedTree, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's clock is twenty minutes fast, so its requests are signed with a wrong time."""
    from botocore import auth

    original_clock = auth.get_current_datetime
    monkeypatch.setattr(
        auth, "get_current_datetime", lambda *args, **options: original_clock(*args, **options) + timedelta(minutes=20)
    )
    target = two_checkpoints.proxied_tree.store.target  # type: ignore[attr-defined] # an S3Store
    with pytest.raises(FineTuneError) as caught:
        preflight(target)
    assert (caught.value.exit_code, caught.value.code) == (67, "ClockSkew")


@pytest.mark.skipif(read_result_of_chosen_store(UNKNOWN_KEY) == IGNORED, reason="this store accepts every key")
def test_an_unknown_access_key_is_not_reported_as_a_missing_object(storage: ProxiedTree, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Versity gateway answers a request with an unknown access key with status 404, as if the object did not exist."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKUNKNOWN")
    target: StoreTarget = storage.direct_tree.store.target  # type: ignore[attr-defined] # an S3Store
    for request in (lambda: preflight(target), lambda: S3Store(target).get("checkpoints/x")):
        with pytest.raises(FineTuneError) as caught:
            request()
        assert (caught.value.exit_code, caught.value.code) == (77, "CredentialsRejected")


def test_a_busy_store_is_retried_for_models_and_data(storage: ProxiedTree, proxy: S3Proxy, tmp_path: Path) -> None:
    """The store answers two download requests with SlowDown, and the client retries until the download succeeds."""
    storage.direct_tree.store.put("rows.jsonl", b"{}")
    store = storage.proxied_tree.store
    assert isinstance(store, S3Store)
    run: Any = SimpleNamespace(model_store=None, dataset_store=store.target, storage=store.target)
    with proxy.fault(Status(503, "SlowDown"), operation="GetObject", key="rows.jsonl", max_hits=2) as busy_rule:
        (data_file,) = Fetcher(run, tmp_path).fetch_data_files(
            f"s3://{store.bucket}/{store.full_key('rows.jsonl')}", "dataset.train", "train"
        )
    assert (data_file.read_bytes(), busy_rule.hits) == (b"{}", 2)
