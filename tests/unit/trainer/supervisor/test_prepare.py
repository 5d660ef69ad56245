"""The preparation of a pod: it claims storage, fetches the inputs, and hashes them for a resumed run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from finetune_api.errors import StorageError
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.checkpoint.manifest import Manifest, RunFacts
from finetune_trainer.checkpoint.restore import RestoreResult
from finetune_trainer.checkpoint.tree import CheckpointTree, FencedOutError, SweepResult
from finetune_trainer.file_entry import sha256_file
from finetune_trainer.inputs import Inputs
from finetune_trainer.settings import Settings
from finetune_trainer.storage.folder import FolderStore
from finetune_trainer.storage.preflight import StoreAbilities
from finetune_trainer.supervisor import prepare as subject
from finetune_trainer.supervisor.file_digests import FileDigests
from finetune_trainer.supervisor.prepare import (
    Preparation,
    add_restored_checkpoint,
    collect_run_facts,
    hash_other_inputs,
    hash_settings,
    sweep_leftovers,
)
from finetune_trainer.supervisor.run_state import RunState


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    """Return inputs in which every field is set. The ConfigMap has the folders and links that a kubelet creates."""
    for name, text in (
        ("tokenizer/tokenizer.json", "{}"), ("reference/config.json", "{}"), ("valid.jsonl", "{}"), ("adapter/adapter_config.json", "{}"),
        ("test.jsonl", "{}"), ("maps/mine/..2026/ds.json", "{}"),
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "maps/mine/..data").symlink_to("..2026")
    (tmp_path / "maps/mine/ds.json").symlink_to("..data/ds.json")
    return Inputs(
        model=tmp_path, tokenizer=tmp_path / "tokenizer", reference=tmp_path / "reference", adapter=tmp_path / "adapter",
        validation=[tmp_path / "valid.jsonl"], test=[tmp_path / "test.jsonl"],
        model_revision="m", dataset_digest="d", output_dir=tmp_path, config_maps=tmp_path / "maps",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("file", "input_name"),
    [
        ("tokenizer/tokenizer.json", "tokenizer"), ("reference/config.json", "reference model"),
        ("adapter/adapter_config.json", "adapter"), ("valid.jsonl", "validation data"), ("test.jsonl", "test data"),
        ("maps/mine/..2026/ds.json", "contents of ConfigMaps"),
    ],
)  # fmt: skip
def test_the_hash_of_an_input_changes_with_its_contents(inputs: Inputs, tmp_path: Path, file: str, input_name: str) -> None:
    hashes_before = hash_other_inputs(inputs, sha256_file)
    (tmp_path / file).write_text('{"other": 1}')
    hashes_after = hash_other_inputs(inputs, sha256_file)
    assert {name for name in hashes_before if hashes_before[name] != hashes_after[name]} == {input_name}


def test_a_configmap_that_is_mounted_again_with_the_same_contents_has_the_same_hash(inputs: Inputs, tmp_path: Path) -> None:
    hashes_before = hash_other_inputs(inputs, sha256_file)
    (tmp_path / "maps/mine/..2026").rename(tmp_path / "maps/mine/..2027")
    (tmp_path / "maps/mine/..data").unlink()
    (tmp_path / "maps/mine/..data").symlink_to("..2027")
    assert hash_other_inputs(inputs, sha256_file) == hashes_before


def test_inputs_that_the_job_does_not_have_are_not_hashed(tmp_path: Path) -> None:
    inputs = Inputs(
        model=tmp_path, model_revision="m", dataset_digest="d", output_dir=tmp_path, config_maps=tmp_path / "none"
    )
    assert hash_other_inputs(inputs, sha256_file) == {}


class RecordingStore(FolderStore):
    """A folder store that records all writes and deletions."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, f"file://{root}")
        self.changes: list[str] = []

    def put(self, key: str, data: bytes) -> None:
        self.changes.append(f"put {key}")
        super().put(key, data)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.changes.append(f"delete {key}")
            super().delete([key])


@pytest.fixture
def store(tmp_path: Path) -> RecordingStore:
    """Return the store of a job with uncommitted files of a killed incarnation."""
    store = RecordingStore(tmp_path / "root")
    store.put("checkpoints/step-00000005/a1-00000000/weights", b"never committed")
    store.changes.clear()
    return store


def make_preparation(work: Path, attempt: int, node_rank: int = 0) -> Preparation:
    run: Any = SimpleNamespace(attempt=attempt, to_bytes=lambda: b"{}", storage=None, resume=None)
    settings = Settings.from_env(work_folder=str(work))
    return Preparation(run, "", replace(settings, node_rank=node_rank), RunState(), FileDigests())


def test_leftovers_are_removed_only_after_earlier_attempts_are_fenced_out(
    store: RecordingStore, tmp_path: Path
) -> None:
    """Before the sweep, an earlier attempt that still runs must be fenced out, because it could commit data that the sweep removes."""
    make_preparation(tmp_path, 2).claim_storage(CheckpointTree(store))
    assert store.changes == [
        "put run/attempt-2/run.json", "delete checkpoints/step-00000005/a1-00000000/weights"
    ]  # fmt: skip


def test_an_attempt_that_starts_after_a_later_one_changes_nothing_in_storage(store: RecordingStore, tmp_path: Path) -> None:
    CheckpointTree(store).begin_attempt(3, b"{}")
    store.changes.clear()
    with pytest.raises(FencedOutError):
        make_preparation(tmp_path, 2).claim_storage(CheckpointTree(store))
    assert store.changes == []


def test_only_rank_0s_pod_claims_storage(store: RecordingStore, tmp_path: Path) -> None:
    make_preparation(tmp_path, 2, node_rank=1).claim_storage(CheckpointTree(store))
    assert store.changes == []


@pytest.mark.parametrize(("busy_responses", "expected_pauses"), [(0, []), (1, [1.0]), (4, [1.0, 2.0, 4.0, 8.0])])
def test_a_request_to_a_busy_store_is_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, busy_responses: int, expected_pauses: list[float]
) -> None:
    pauses: list[float] = []
    responses = [StorageError("StorageFailed", "busy")] * busy_responses
    monkeypatch.setattr(subject.time, "sleep", pauses.append)
    preparation = make_preparation(tmp_path, 1)

    def send_request() -> str:
        if responses:
            raise responses.pop()
        return "ready"

    assert (preparation._retry_while_busy(send_request), pauses) == ("ready", expected_pauses)


@pytest.mark.parametrize(("code", "pause_count"), [("StorageFailed", 4), ("EndpointUnreachable", 0)])
def test_a_store_that_stays_busy_or_cannot_be_reached_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, pause_count: int
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(subject.time, "sleep", pauses.append)

    def refuse() -> None:
        raise StorageError(code, "no")

    with pytest.raises(StorageError, match=code):
        make_preparation(tmp_path, 1)._retry_while_busy(refuse)
    assert len(pauses) == pause_count


@pytest.mark.parametrize(
    ("node_rank", "can_delete", "notes"),
    [(0, True, None), (1, False, None), (0, False, ["storage: s3:DeleteObject is not granted; old checkpoints are not removed"])],
)
def test_only_rank_0s_pod_reports_the_abilities_of_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node_rank: int, can_delete: bool, notes: list[str] | None
) -> None:
    needs_write_flags: list[bool] = []

    def try_store(target: object, *, needs_write: bool) -> StoreAbilities:
        needs_write_flags.append(needs_write)
        return StoreAbilities("s3", True, can_delete)

    monkeypatch.setattr(subject, "preflight", try_store)
    preparation = make_preparation(tmp_path, 1, node_rank)
    preparation.preflight()
    resolved = preparation._state.report().resolved
    assert (needs_write_flags, resolved.notes, resolved.storage is not None) == ([node_rank == 0], notes, node_rank == 0)


def test_a_resumed_run_reports_its_step_and_why_it_is_not_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = [
        RestoreResult(manifest=Manifest(step=7, incarnation="a1-0", files=[]), local_folder=tmp_path, uri="u", is_exact=False, inexact_reason="other seed",
                      changed_inputs=["tokenizer", "adapter"], damage_messages=["step 9 is damaged"]),
        RestoreResult(),
    ]  # fmt: skip
    monkeypatch.setattr(subject, "restore", lambda *_, **__: results.pop(0))
    preparation = make_preparation(tmp_path, 1)
    tree: Any = None
    inputs = Inputs(model=tmp_path, model_revision="m", dataset_digest="d", output_dir=tmp_path, config_maps=tmp_path)
    restored_checkpoint = add_restored_checkpoint(inputs, preparation.restore(tree, RunFacts())).restore
    report = preparation._state.report()
    assert restored_checkpoint is not None and (restored_checkpoint.step, restored_checkpoint.uri, restored_checkpoint.path) == (7, "u", tmp_path)
    assert (report.resumed_from_step, report.resolved.resume_exact, report.resolved.resume_note) == (7, False, "other seed")
    assert report.resolved.notes == ["skipped: step 9 is damaged", "resumed from step 7 with changed tokenizer, adapter"]
    assert report.health.checkpoint_problem == "CheckpointDamaged: step 9 is damaged"
    assert add_restored_checkpoint(inputs, preparation.restore(tree, RunFacts())).restore is None


@pytest.mark.parametrize(
    ("training", "expected"), [({}, (1, 1, 0, 6)), ({"batchSizePerDevice": 2, "gradientAccumulationSteps": 4, "seed": 3}, (2, 4, 3, 48))]
)
def test_the_effective_batch_counts_all_ranks(tmp_path: Path, training: dict[str, int], expected: tuple[int, ...]) -> None:
    inputs = Inputs(model=tmp_path, model_revision="m", dataset_digest="d", output_dir=tmp_path, config_maps=tmp_path)
    run: Any = SimpleNamespace(spec=FineTuneJobSpec.model_validate({"training": training}), world=SimpleNamespace(size=6))
    facts = collect_run_facts(run, "c", inputs)
    assert (facts.micro_batch, facts.accumulation, facts.seed, facts.effective_batch) == expected
    assert "torch" in facts.versions


@pytest.mark.parametrize(
    ("change", "groups"),
    [
        ({"training": {"epochs": 3}}, {"training"}), ({"training": {"learningRate": 0.5}}, set()), ({"dataset": {"train": "a/b"}}, {"dataset"}),
        ({"dataset": {"storage": {"region": "x"}}}, set()), ({"checkpoint": {"steps": 4}}, set()), ({"evaluation": {"steps": 4}}, {"evaluation"}),
        ({"distributed": {"contextParallelSize": 2}}, {"distributed"}), ({"distributed": {"deepspeed": {"zeroStage": 3}}}, {"distributed"}),
        ({"distributed": {"contextParallelSize": 1, "fsdp": {"stateDict": "full"}, "deepspeed": {}}}, set()),
    ],
)  # fmt: skip
def test_settings_that_change_the_computed_numbers_are_hashed(change: dict[str, Any], groups: set[str]) -> None:
    def compute_hashes(spec: dict[str, Any]) -> dict[str, str]:
        run: Any = SimpleNamespace(spec=FineTuneJobSpec.model_validate(spec))
        return hash_settings(run)

    hashes_before, hashes_after = compute_hashes({}), compute_hashes(change)
    assert {group for group in hashes_before if hashes_before[group] != hashes_after[group]} == groups
    assert {len(text) for text in hashes_before.values()} == {12}


def test_a_sweep_that_fails_adds_a_note() -> None:
    state = RunState()
    for result in (SweepResult(2), SweepResult(0, StorageError("x", "no access"))):
        tree: Any = SimpleNamespace(sweep=lambda result=result: result)
        sweep_leftovers(tree, state)
    assert state.report().resolved.notes == ["storage: unfinished uploads could not be removed: no access"]


def test_the_detail_of_the_stage_shows_the_downloaded_bytes(tmp_path: Path) -> None:
    preparation = make_preparation(tmp_path, 1)
    for size in (1_400_000, 600_000):
        preparation._count_downloaded_bytes(size)
    assert preparation._state.report().detail == "2 MB"


def test_every_source_of_the_spec_is_fetched(tmp_path: Path) -> None:
    sources = tmp_path / "sources"
    for name in ("model/config.json", "tokenizer/tokenizer.json", "adapter/adapter_config.json", "reference/config.json",
                 "a.jsonl", "b.jsonl", "train.jsonl", "valid.jsonl", "test.jsonl"):  # fmt: skip
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        (sources / name).write_text(name)

    def fetch(**groups: Any) -> Inputs:
        spec = {"model": {"source": f"file://{sources}/model"}, "dataset": {"train": f"file://{sources}/train.jsonl"}} | groups
        preparation = make_preparation(tmp_path / "work", 1)
        preparation._run.spec = FineTuneJobSpec.model_validate(spec)  # type: ignore[misc] # this fake run is not frozen
        return preparation._fetch()

    def list_names(inputs: Inputs, *fields: str) -> list[Any]:
        field_values = [getattr(inputs, field) for field in fields]
        return [[file.name for file in value] if isinstance(value, list) else value and value.name for value in field_values]

    model_spec = {"source": f"file://{sources}/model", "tokenizer": f"file://{sources}/tokenizer"}
    all_inputs = fetch(
        model=model_spec, method={"adapter": {"source": f"file://{sources}/adapter"}}, trainer={"dpo": {"referenceModel": f"file://{sources}/reference"}},
        dataset={"mixture": [{"source": f"file://{sources}/{name}.jsonl"} for name in "ab"]}
        | {name: f"file://{sources}/{file}.jsonl" for name, file in (("validation", "valid"), ("test", "test"))},
    )  # fmt: skip
    assert list_names(all_inputs, "model", "tokenizer", "adapter", "reference") == ["model", "tokenizer", "adapter", "reference"]
    assert list_names(all_inputs, "train", "validation", "test") == [[], ["valid.jsonl"], ["test.jsonl"]]
    assert [[file.name for file in part] for part in all_inputs.mixture] == [["a.jsonl"], ["b.jsonl"]]
    few_inputs = fetch(model=model_spec | {"tokenizer": model_spec["source"]})
    assert list_names(few_inputs, "tokenizer", "adapter", "reference", "train", "mixture", "test") == [None, None, None, ["train.jsonl"], [], []]
    assert few_inputs.output_dir == tmp_path / "work/output" and few_inputs.model_revision.startswith("sha256:")
    assert few_inputs.dataset_digest == hashlib.sha256(hashlib.sha256(b"train.jsonl").hexdigest().encode()).hexdigest()
