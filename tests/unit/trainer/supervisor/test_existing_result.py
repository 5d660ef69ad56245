"""The results of earlier jobs of the same name: which are found, adopted, refused or only named in a note."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finetune_api.defaults import resolve_defaults
from finetune_api.errors import ConfigError, CredentialsError, FineTuneError
from finetune_api.names import RESULT_KEY, Storage
from finetune_api.pod import ResumeConfig, RunConfig, StoreTarget, World
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import OutputKind
from finetune_api.status import EvaluationResult, Metrics, Output, Progress, ResolvedConfig
from finetune_trainer.checkpoint.manifest import Manifest, RunFacts, list_file_entries
from finetune_trainer.checkpoint.tree import CheckpointTree
from finetune_trainer.storage.folder import FolderStore
from finetune_trainer.supervisor import existing_result
from finetune_trainer.supervisor.existing_result import find_result_to_adopt, store_result
from finetune_trainer.supervisor.run_state import RunState

SPEC: dict[str, Any] = {"model": {"source": "org/tiny"}, "dataset": {"train": "s3://data/rows.jsonl"}, "training": {"maxSteps": 4}}
FACTS = RunFacts(dataset_digest="d1", other_inputs={"reference model": "with weights", "test data": "t1"}, source_versions={"model.source": "m1"})
FACTS_WITHOUT_WEIGHTS = FACTS.model_copy(update={"other_inputs": {"reference model": "without weights", "test data": "t1"}})


@pytest.fixture
def build_run(tmp_path: Path) -> Callable[..., RunConfig]:
    """Return a function that builds run configurations of jobs with the same name and different uids."""

    def build(uid: str, mode: str | None = None, attempt: int = 1, **changes: Any) -> RunConfig:
        spec_values = SPEC | changes | ({"policy": {"onExistingResult": mode}} if mode else {})
        resolved_spec = resolve_defaults(FineTuneJobSpec.model_validate(spec_values))
        run = RunConfig(
            name="job", namespace="team", uid=uid, attempt=attempt, spec=resolved_spec.spec, defaults=sorted(resolved_spec.defaults),
            world=World(nodes=1, processes_per_node=1, gpus_per_node=1, master_address="127.0.0.1", master_port=0, rendezvous_id="r"),
            storage=StoreTarget(uri=f"file://{tmp_path}/store/team/job/{uid}"), resume=ResumeConfig(mode="auto"), grace_seconds=30,
        )  # fmt: skip
        return RunConfig.model_validate_json(run.to_bytes())

    return build


def open_tree(run: RunConfig) -> CheckpointTree:
    return CheckpointTree(FolderStore(Path(run.storage.uri.removeprefix("file://")), run.storage.uri))


def commit_model(run: RunConfig, folder: Path, facts: RunFacts = FACTS) -> Output:
    """Commit a final model, as a run does before its last stages."""
    tree, incarnation = open_tree(run), "a1-12345678"
    (folder / run.uid).mkdir()
    (folder / run.uid / "adapter_model.safetensors").write_bytes(run.uid.encode())
    tree.upload(Storage.MODEL, incarnation, folder / run.uid)
    manifest = Manifest(attempt=1, incarnation=incarnation, step=4, kind=OutputKind.ADAPTER, facts=facts, files=list_file_entries(folder / run.uid))
    marker = tree.commit(Storage.MODEL, manifest)
    return Output(uri=tree.uri(f"{Storage.MODEL}/{incarnation}"), sha256=marker.manifest_sha256, kind=OutputKind.ADAPTER)


def commit_result(run: RunConfig, folder: Path, facts: RunFacts = FACTS) -> Output:
    """Commit a final model and store the result of the run."""
    output = commit_model(run, folder, facts)
    state = RunState()
    state.merge_resolved(ResolvedConfig(device="H100", notes=["a note"], config_sha256="c"))
    report = state.report().model_copy(update={
        "metrics": Metrics(train_loss=0.5), "progress": Progress(step=4), "evaluation": EvaluationResult(rows=3),
    })  # fmt: skip
    store_result(run, open_tree(run), output, report)
    return output


def read_notes(state: RunState) -> list[str]:
    return state.report().resolved.notes or []


def test_the_result_of_the_same_spec_and_inputs_is_adopted(build_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    output = commit_result(build_run("old"), tmp_path)
    state = RunState()
    result = find_result_to_adopt(build_run("new"), FACTS_WITHOUT_WEIGHTS, state)
    assert result is not None and read_notes(state) == []
    assert result.output == output.model_copy(update={"adopted_uid": "old"})
    assert (result.metrics, result.progress, result.evaluation) == (Metrics(train_loss=0.5), Progress(step=4), EvaluationResult(rows=3))
    assert result.resolved == ResolvedConfig(device="H100")


def test_the_newest_equal_result_of_another_job_is_adopted(build_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    for uid in ("z-first", "a-second"):
        commit_result(build_run(uid), tmp_path)
    commit_result(build_run("other", training={"maxSteps": 5}), tmp_path)
    first_result = find_result_to_adopt(build_run("new"), FACTS, RunState())
    assert first_result is not None and first_result.output.adopted_uid == "a-second"
    second_result = find_result_to_adopt(build_run("a-second"), FACTS, RunState())
    assert second_result is not None and second_result.output.adopted_uid == "z-first"


def test_a_first_job_trains_without_a_note(build_run: Callable[..., RunConfig]) -> None:
    state = RunState()
    for mode in (None, "adopt", "fail", "train"):
        assert find_result_to_adopt(build_run("new", mode), FACTS, state) is None
    assert read_notes(state) == []


@pytest.mark.parametrize(
    ("changes", "facts", "difference"),
    [
        ({"training": {"maxSteps": 5}}, FACTS, "training.maxSteps"),
        ({}, FACTS.model_copy(update={"dataset_digest": "d2"}), "contents of training data"),
        ({}, FACTS.model_copy(update={"source_versions": {"model.source": "m2"}}), "contents of model.source"),
        ({"method": {"type": "qlora"}}, FACTS.model_copy(update={"other_inputs": {}}), "method.type, contents of test data"),
    ],
)  # fmt: skip
def test_another_result_is_named_and_the_job_trains(
    build_run: Callable[..., RunConfig], tmp_path: Path, changes: dict[str, Any], facts: RunFacts, difference: str
) -> None:
    output, state = commit_result(build_run("old"), tmp_path), RunState()
    assert find_result_to_adopt(build_run("new", **changes), facts, state) is None
    assert read_notes(state) == [f"policy.onExistingResult: {output.uri} was not adopted, because it was made with other values: {difference}; the job trains"]


def test_a_model_of_a_run_that_did_not_succeed_is_not_adopted(build_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    output, state = commit_model(build_run("old"), tmp_path), RunState()
    assert find_result_to_adopt(build_run("new"), FACTS, state) is None
    assert read_notes(state) == [f"policy.onExistingResult: {output.uri} was not adopted, because it has no record of a successful run; the job trains"]


@pytest.mark.parametrize("name", ["manifest.json", "adapter_model.safetensors"])
def test_an_incomplete_model_is_ignored(build_run: Callable[..., RunConfig], tmp_path: Path, name: str) -> None:
    commit_result(build_run("old"), tmp_path)
    open_tree(build_run("old")).store.delete([f"{Storage.MODEL}/a1-12345678/{name}"])
    assert find_result_to_adopt(build_run("new"), FACTS, RunState()) is None
    assert find_result_to_adopt(build_run("new", "fail"), FACTS, RunState()) is None


def test_a_result_that_belongs_to_another_model_is_not_adopted(build_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    output, store, state = commit_result(build_run("old"), tmp_path), open_tree(build_run("old")).store, RunState()
    store.put(RESULT_KEY, (store.get(RESULT_KEY) or b"").replace(str(output.sha256).encode(), b"0" * 64))
    assert find_result_to_adopt(build_run("new"), FACTS, state) is None
    assert read_notes(state) == [f"policy.onExistingResult: {output.uri} was not adopted, because it has no record of a successful run; the job trains"]


def test_a_superseded_attempt_stores_no_result(build_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    old_run = build_run("old")
    open_tree(old_run).begin_attempt(2, b"{}")
    complete_output = commit_model_of_second_attempt(old_run, tmp_path)
    store_result(old_run, open_tree(old_run), complete_output, RunState().report())
    assert open_tree(old_run).store.get(RESULT_KEY) is None
    store_result(old_run.model_copy(update={"attempt": 2}), open_tree(old_run), complete_output, RunState().report())
    assert open_tree(old_run).store.get(RESULT_KEY) is not None


def commit_model_of_second_attempt(run: RunConfig, folder: Path) -> Output:
    tree, source = open_tree(run), folder / "model"
    source.mkdir()
    (source / "adapter_model.safetensors").write_bytes(b"1")
    tree.upload(Storage.MODEL, "a2-12345678", source)
    manifest = Manifest(attempt=2, incarnation="a2-12345678", step=4, kind=OutputKind.ADAPTER, facts=FACTS, files=list_file_entries(source))
    return Output(uri=tree.uri("model/a2-12345678"), sha256=tree.commit(Storage.MODEL, manifest).manifest_sha256)


@pytest.mark.parametrize(
    ("changes", "comparison"),
    [({}, "spec and inputs are the same"), ({"training": {"maxSteps": 5}}, "it was made with other values: training.maxSteps")],
)
def test_fail_refuses_every_earlier_result(build_run: Callable[..., RunConfig], tmp_path: Path, changes: dict[str, Any], comparison: str) -> None:
    output = commit_result(build_run("old"), tmp_path)
    with pytest.raises(ConfigError) as caught:
        find_result_to_adopt(build_run("new", "fail", **changes), FACTS, RunState())
    assert (caught.value.code, int(caught.value.exit_code)) == ("ExistingResultFound", 64)
    assert caught.value.message == (
        f"policy.onExistingResult is fail, and an earlier FineTuneJob team/job (uid old) has stored {output.uri}; {comparison}"
    )
    assert find_result_to_adopt(build_run("new", "train", **changes), FACTS, RunState()) is None


def test_a_store_that_cannot_be_listed_ends_only_a_job_that_sets_adopt_or_fail(build_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_store: FolderStore) -> tuple[str, ...]:
        raise CredentialsError("AccessDenied", "s3:ListBucket is not granted")

    monkeypatch.setattr(FolderStore, "list_folders", refuse)
    state = RunState()
    assert find_result_to_adopt(build_run("new"), FACTS, state) is None
    assert read_notes(state) == ["policy.onExistingResult: the results of earlier jobs could not be read, so the job trains: AccessDenied"]
    for mode in ("adopt", "fail"):
        with pytest.raises(FineTuneError, match="s3:ListBucket"):
            find_result_to_adopt(build_run("new", mode), FACTS, RunState())


def test_an_earlier_run_that_cannot_be_read_does_not_hide_the_other_runs(
    build_run: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = commit_result(build_run("old"), tmp_path)
    commit_result(build_run("encrypted"), tmp_path)
    read_run = existing_result._read_run

    def read_or_refuse(run: RunConfig, uri: str, uid: str) -> object:
        if uid == "encrypted":
            raise CredentialsError("EncryptionRefused", "the store refused the key")
        return read_run(run, uri, uid)

    monkeypatch.setattr(existing_result, "_read_run", read_or_refuse)
    state = RunState()
    result = find_result_to_adopt(build_run("new", "adopt"), FACTS_WITHOUT_WEIGHTS, state)
    assert result is not None and result.output.uri == output.uri
    assert read_notes(state) == [
        "policy.onExistingResult: the result of the job with uid encrypted could not be read, so it is not compared: EncryptionRefused"
    ]
