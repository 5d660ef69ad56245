"""Restoring from damaged storage: found out before anything is loaded, named, and passed over step by step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fault_proxy import Do, FaultProxy, Rule
from finetune_api.errors import NoCheckpointError
from finetune_api.pod import Resume
from finetune_trainer.checkpoint.manifest import RunFacts
from finetune_trainer.checkpoint.restore import Restored, restore
from storage_place import Place

FOLDER = "checkpoints/step-00000010/a1-00000000"
FACTS = RunFacts(
    model_revision="m", dataset_digest="d", method="lora", trainer="sft", effective_batch=4, versions={"torch": "2"}
)


@pytest.fixture
def two(place: Place, checkpoint: Path) -> Place:
    """Steps 5 and 10 are committed."""
    place.commit(5, checkpoint, facts=FACTS)
    place.commit(10, checkpoint, facts=FACTS)
    return place


def back(place: Place, folder: Path, resume: Resume | None = None, facts: RunFacts = FACTS) -> Restored:
    return restore(place.through, resume or Resume(mode="auto", expect_step=10), facts, folder / "restored")


def flip(place: Place, key: str) -> None:
    data = place.truly.store.get(key)
    assert data is not None
    place.truly.store.put(key, data[:7] + bytes([data[7] ^ 1]) + data[8:])


def cut(place: Place, key: str) -> None:
    data = place.truly.store.get(key)
    assert data is not None
    place.truly.store.put(key, data[: len(data) // 2])


def remove(place: Place, key: str) -> None:
    place.truly.store.delete([key])


def test_the_newest_is_taken(two: Place, checkpoint: Path, tmp_path: Path) -> None:
    found = back(two, tmp_path)
    assert (found.step, found.exact, found.note, found.damaged) == (10, True, None, [])
    assert found.path is not None
    same = {p.relative_to(found.path): p.read_bytes() for p in found.path.rglob("*") if p.is_file()}
    assert same == {p.relative_to(checkpoint): p.read_bytes() for p in checkpoint.rglob("*") if p.is_file()}


@pytest.mark.parametrize("hurt", [flip, cut, remove])
@pytest.mark.parametrize("name", ["optimizer.pt", "sub/rng_state.pth", "manifest.json"])
def test_damage_is_named_and_the_one_before_is_taken(
    two: Place, tmp_path: Path, hurt: Callable[[Place, str], None], name: str
) -> None:
    hurt(two, f"{FOLDER}/{name}")
    found = back(two, tmp_path)
    assert found.step == 5
    assert len(found.damaged) == 1 and f"{FOLDER}/{name}" in found.damaged[0]


def test_an_object_that_no_manifest_names_is_not_brought(two: Place, tmp_path: Path) -> None:
    two.truly.store.put(f"{FOLDER}/model.safetensors", b"stray")
    found = back(two, tmp_path)
    assert found.step == 10 and found.path is not None
    assert not (found.path / "model.safetensors").exists()


def test_a_damaged_marker_does_not_exist(two: Place, tmp_path: Path) -> None:
    two.truly.store.put("checkpoints/step-00000010/_COMMITTED", b"{")
    assert back(two, tmp_path).step == 5


def test_all_damaged_is_73_and_never_a_silent_start(two: Place, tmp_path: Path) -> None:
    for step in (5, 10):
        flip(two, f"checkpoints/step-{step:08d}/a1-00000000/optimizer.pt")
    with pytest.raises(NoCheckpointError) as caught:
        back(two, tmp_path)
    assert (caught.value.exit_code, caught.value.code) == (73, "NoLoadableCheckpoint")
    assert "step-00000010" in caught.value.message and "step-00000005" in caught.value.message


def test_a_download_that_breaks_is_asked_for_again(two: Place, proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.rules = [Rule(Do.TRUNCATE, lambda m, p: m == "GET" and "optimizer.pt" in p, times=2)]
    found = back(two, tmp_path)
    assert (found.step, found.damaged) == (10, [])


def test_a_byte_flipped_on_the_way_is_found(two: Place, proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.rules = [Rule(Do.FLIP, lambda m, p: m == "GET" and "step-00000010" in p and "optimizer.pt" in p, times=1)]
    found = back(two, tmp_path)
    assert found.step == 5 and "optimizer.pt" in found.damaged[0]
