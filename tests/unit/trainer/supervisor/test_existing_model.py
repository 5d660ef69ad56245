"""The model that `phases.from` names: it is found, checked and downloaded, or refused with a hint that says what to write."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from finetune_api.errors import ConfigError, FineTuneError, NotFoundError
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import OutputKind
from finetune_trainer.checkpoint.manifest import Manifest, RunFacts
from finetune_trainer.checkpoint.tree import CheckpointTree
from finetune_trainer.inputs import Inputs
from finetune_trainer.storage.folder import FolderStore
from finetune_trainer.supervisor.existing_model import (
    download_existing_model,
    find_existing_model,
    record_existing_model,
    require_same_base,
)
from finetune_trainer.supervisor.file_digests import FileDigests
from finetune_trainer.supervisor.prepare import Preparation
from finetune_trainer.supervisor.run_state import RunState

BASE = "sha256:" + "a" * 64
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights", "optimizer.pt": b"state", "global_step1/shard.pt": b"state"}


def open_tree(folder: Path) -> CheckpointTree:
    return CheckpointTree(FolderStore(folder, f"file://{folder}"))


@pytest.fixture
def other_job(tmp_path: Path) -> Path:
    """The folder of another job with a checkpoint and a final model."""
    for name, content in FILES.items():
        (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / name).write_bytes(content)
    tree = open_tree(tmp_path / "other")
    for prefix, kind in (("checkpoints/step-00000002", None), ("model", OutputKind.ADAPTER)):
        entries = tree.upload(prefix, "a1-00000001", tmp_path / "files")
        tree.commit(prefix, Manifest(incarnation="a1-00000001", step=2, kind=kind, files=entries, facts=RunFacts(model_revision=BASE)))
    return tmp_path / "other"


def find_model(tmp_path: Path, key: str) -> Any:
    return find_existing_model(f"file://{tmp_path}/{key}", open_tree(tmp_path / "own"))


@pytest.mark.parametrize("key", ["other/model", "other/model/", "other/model/a1-00000001"])
def test_a_final_model_is_found_and_downloaded_whole(key: str, other_job: Path, tmp_path: Path) -> None:
    existing_model = find_model(tmp_path, key)
    assert existing_model.output.uri == f"file://{other_job}/model/a1-00000001" and existing_model.output.kind is OutputKind.ADAPTER
    download_existing_model(existing_model, tmp_path / "target")
    assert {path.relative_to(tmp_path / "target").as_posix() for path in (tmp_path / "target").rglob("*") if path.is_file()} == set(FILES)
    record_existing_model(existing_model, open_tree(tmp_path / "own"), attempt=3)
    record = json.loads((tmp_path / "own" / "run" / "given_model.json").read_text())
    assert (record["uri"], record["sha256"], record["kind"], record["attempt"]) == (existing_model.output.uri, existing_model.output.sha256, "adapter", 3)


def test_a_checkpoint_is_downloaded_without_its_training_state(other_job: Path, tmp_path: Path) -> None:
    existing_model, sizes = find_model(tmp_path, "other/checkpoints/step-00000002"), list[int]()
    assert existing_model.output_kind is OutputKind.ADAPTER and existing_model.output.uri == f"file://{other_job}/checkpoints/step-00000002/a1-00000001"
    download_existing_model(existing_model, tmp_path / "target", check_space=sizes.append)
    assert sorted(path.name for path in (tmp_path / "target").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert sizes == [len(b"{}") + len(b"weights")]


@pytest.mark.parametrize(
    ("key", "error", "code", "expected_text"),
    [
        ("other", ConfigError, "ExistingModelInvalid", "which is not the folder of a final model or checkpoint"),
        ("other/metrics", ConfigError, "ExistingModelInvalid", "which is not the folder of a final model or checkpoint"),
        ("other/checkpoints", ConfigError, "ExistingModelInvalid", "which is not the folder of a final model or checkpoint"),
        ("missing/model", NotFoundError, "ExistingModelNotCommitted", "no model is committed there: there is no _COMMITTED object"),
        ("other/checkpoints/step-00000004", NotFoundError, "ExistingModelNotCommitted", "there is no _COMMITTED object"),
        ("other/model/a2-00000002", NotFoundError, "ExistingModelNotCommitted", "the committed model is in another folder next to it"),
    ],
)
def test_a_wrong_address_is_refused(key: str, error: type[FineTuneError], code: str, expected_text: str, other_job: Path, tmp_path: Path) -> None:
    with pytest.raises(error) as caught:
        find_model(tmp_path, key)
    assert caught.value.code == code and expected_text in caught.value.message and caught.value.message.startswith("phases.from is file://")
    assert caught.value.hint


def test_a_damaged_manifest_and_a_damaged_file_are_refused(other_job: Path, tmp_path: Path) -> None:
    existing_model = find_model(tmp_path, "other/model")
    (other_job / "model" / "a1-00000001" / "adapter_model.safetensors").write_bytes(b"WEIGHTS")
    with pytest.raises(NotFoundError, match="damaged: .*adapter_model.safetensors is damaged: its sha256 differs") as caught:
        download_existing_model(existing_model, tmp_path / "target")
    assert caught.value.code == "ExistingModelDamaged" and caught.value.exit_code == 66 and not (tmp_path / "target").exists()
    (other_job / "model" / "a1-00000001" / "manifest.json").write_bytes(b"{}")
    with pytest.raises(NotFoundError, match="manifest.json is missing or is not the manifest that was committed"):
        find_model(tmp_path, "other/model")


def make_inputs(tmp_path: Path, revision: str) -> Inputs:
    return Inputs(model=tmp_path, model_revision=revision, dataset_digest="d", output_dir=tmp_path, config_maps=tmp_path)


def test_a_model_that_was_trained_from_another_base_model_is_refused(other_job: Path, tmp_path: Path) -> None:
    existing_model = find_model(tmp_path, "other/model")
    assert require_same_base(existing_model, make_inputs(tmp_path, BASE)) is None
    with pytest.raises(ConfigError, match="which was trained from the base model ") as caught:
        require_same_base(existing_model, make_inputs(tmp_path, "sha256:" + "b" * 64))
    assert caught.value.code == "ExistingModelOfOtherBase" and caught.value.hint == "write the base model of the other FineTuneJob in model.source"


def test_a_complete_model_cannot_be_merged(other_job: Path, tmp_path: Path) -> None:
    tree = open_tree(tmp_path / "other")
    entries = tree.upload("checkpoints/step-00000006", "a1-00000001", tmp_path / "files")
    tree.commit("checkpoints/step-00000006", Manifest(incarnation="a1-00000001", step=6, kind=OutputKind.MODEL, files=entries, facts=RunFacts()))
    address = f"file://{other_job}/checkpoints/step-00000006"
    run_config: Any = SimpleNamespace(spec=FineTuneJobSpec.model_validate({"phases": {"from": address}, "output": {"mergeAdapter": True}}))
    settings: Any = SimpleNamespace(work_folder=tmp_path / "work", node_rank=0, config_maps=tmp_path)
    with pytest.raises(ConfigError, match="a complete model, but output.mergeAdapter needs an adapter") as caught:
        Preparation(run_config, "0" * 64, settings, RunState(), FileDigests()).fetch_existing_model(open_tree(tmp_path / "own"), tmp_path / "target")
    assert caught.value.code == "ExistingModelNotAdapter" and caught.value.hint and not (tmp_path / "target").exists()


def test_a_base_model_from_another_type_of_source_adds_a_note(other_job: Path, tmp_path: Path) -> None:
    note = require_same_base(find_model(tmp_path, "other/model"), make_inputs(tmp_path, "0123abcd"))
    assert note is not None and note.endswith("the trainer could not compare it with model.source (0123abcd)")
