"""The lineage statement: its content, when it is written, and that a failure to write it does not end a run."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from finetune_api.errors import ConfigError, StorageError
from finetune_api.lineage import Statement, encode_signed_bytes, remove_secrets
from finetune_api.pod import ProgressReport, RunConfig, StoreTarget, TerminationMessage
from finetune_api.status import Progress, ResolvedConfig
from finetune_trainer.checkpoint.manifest import RunFacts
from finetune_trainer.checkpoint.tree import CheckpointTree
from finetune_trainer.file_entry import sha256_file
from finetune_trainer.settings import Settings
from finetune_trainer.storage.roots import open_store
from finetune_trainer.supervisor import file_digests
from finetune_trainer.supervisor import lineage as subject
from finetune_trainer.supervisor.attempt_recorder import AttemptRecorder
from finetune_trainer.supervisor.file_digests import FileDigests
from finetune_trainer.supervisor.lineage import Lineage, list_dependencies
from finetune_trainer.supervisor.prepare import require_expected_inputs
from finetune_trainer.supervisor.run_state import RunState
from finetune_trainer.supervisor.supervise import Supervisor

from tests.support.lineage import UID, make_inputs, write_finished_run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_finished_run(tmp_path / "run")


def load_stored_run(root: Path) -> tuple[RunConfig, CheckpointTree]:
    run = RunConfig.model_validate_json((root / "run/attempt-1/run.json").read_bytes())
    return run, CheckpointTree(open_store(StoreTarget(uri=f"file://{root}")))


def test_a_later_pod_keeps_the_statement_because_it_may_be_signed(root: Path) -> None:
    run, tree = load_stored_run(root)
    statement_before = (root / "lineage/statement.json").read_bytes()
    assert Lineage(run, tree, RunState(), FileDigests()).write_statement(None) == f"file://{root}/lineage/statement.json"
    assert (root / "lineage/statement.json").read_bytes() == statement_before


def test_a_later_pod_writes_the_missing_statement_but_no_digests_of_files(root: Path) -> None:
    run, tree = load_stored_run(root)
    (root / "lineage/statement.json").unlink()
    Lineage(run, tree, RunState(), FileDigests()).write_statement(None)
    statement = Statement.model_validate_json((root / "lineage/statement.json").read_bytes())
    assert [dependency.name for dependency in statement.predicate.build_definition.resolved_dependencies] == [
        "model.source", "dataset.train", "dataset.test", "training image set",
    ]  # fmt: skip
    assert [attempt.incarnation for attempt in statement.run.attempts] == ["a1-1f3c9a2b"]


def test_a_superseded_attempt_and_a_run_without_a_model_write_no_statement(root: Path) -> None:
    run, tree = load_stored_run(root)
    (root / "lineage/statement.json").unlink()
    tree.begin_attempt(2, b"{}")
    assert Lineage(run, tree, RunState(), FileDigests()).write_statement(None) is None
    (root / "model/_COMMITTED").unlink()
    assert Lineage(run, tree, RunState(), FileDigests()).write_statement(None) is None
    assert not (root / "lineage/statement.json").exists()


def test_files_that_have_changed_since_the_training_have_no_digest(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, tree = load_stored_run(root)
    manifest = tree.read_manifest(tree.get_committed(None))  # type: ignore[arg-type]
    assert manifest is not None
    inputs = make_inputs(tmp_path / "run")
    names = [dependency.name for dependency in list_dependencies(run, manifest.facts, inputs, FileDigests())]
    assert names == [
        "model.source", "model.source/config.json", "dataset.train", "dataset.train/train.jsonl", "dataset.test", "dataset.test/test.jsonl",
        "training image set",
    ]  # fmt: skip
    (tmp_path / "run/train.jsonl").write_text("changed")
    (tmp_path / "run/base/config.json").write_text("changed")
    names_after_change = [dependency.name for dependency in list_dependencies(run, manifest.facts, inputs, FileDigests())]
    assert names_after_change == ["model.source", "dataset.train", "dataset.test", "dataset.test/test.jsonl", "training image set"]
    monkeypatch.setattr(subject, "MAX_HASHED_MODEL_BYTES", 1)
    facts_with_commit = manifest.facts.model_copy(update={"model_revision": "c" * 40})
    (base_model, *_) = list_dependencies(run, facts_with_commit, inputs, FileDigests())
    assert base_model.digest == {"gitCommit": "c" * 40}


def test_downloaded_files_are_not_read_again(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, tree = load_stored_run(root)
    manifest, inputs, digests = tree.read_manifest(tree.get_committed(None)), make_inputs(tmp_path / "run"), FileDigests()  # type: ignore[arg-type]
    assert manifest is not None
    expected_dependencies = list_dependencies(run, manifest.facts, inputs, digests)
    downloads = [inputs.model / "config.json", *inputs.train, *inputs.test]
    for path in downloads:
        digests.add_download(path, sha256_file(path))
    read_paths: list[Path] = []
    monkeypatch.setattr(file_digests, "sha256_file", lambda path: read_paths.append(path) or "changed")
    monkeypatch.setattr(subject, "MAX_HASHED_MODEL_BYTES", 0)  # No byte of the model may be read.
    assert list_dependencies(run, manifest.facts, inputs, digests) == expected_dependencies and read_paths == []
    content, stat_before = inputs.train[0].read_bytes(), inputs.train[0].stat()
    inputs.train[0].write_bytes(content[::-1])
    os.utime(inputs.train[0], ns=(stat_before.st_atime_ns, stat_before.st_mtime_ns))  # Set back the modification time, as if the file had not changed.
    names = [dependency.name for dependency in list_dependencies(run, manifest.facts, inputs, digests)]
    assert read_paths == inputs.train and "dataset.train/train.jsonl" not in names and "dataset.test/test.jsonl" in names


class FailingLineage:
    def write_statement(self, inputs: Any) -> str:
        raise self.error

    def __init__(self, error: Exception) -> None:
        self.error = error


@pytest.mark.parametrize(("error", "code"), [(StorageError("StorageFull", "full"), "StorageFull"), (ValueError("bug"), "ValueError")])
def test_a_failure_to_write_the_statement_adds_a_note(error: Exception, code: str, tmp_path: Path) -> None:
    supervisor = Supervisor(Settings(tmp_path / "run.json", None, tmp_path, tmp_path / "log", 0, 0, "", UID))
    supervisor._lineage = FailingLineage(error)  # type: ignore[assignment]
    supervisor._write_lineage()
    assert supervisor._lineage_uri is None and supervisor._facts.supervisor_error is None
    assert supervisor._state.report().resolved.notes == [f"the lineage statement was not written: {code}"]


def test_the_statement_contains_the_attempts_without_messages_and_notes(root: Path) -> None:
    run, tree = load_stored_run(root)
    (root / "lineage/statement.json").unlink()
    recorder = AttemptRecorder(
        run.model_copy(update={"attempt": 2}), tree, incarnation="a2-00000002", config_sha256="c", started_at=datetime(2026, 3, 2, tzinfo=UTC)
    )
    recorder.record_start(10, ResolvedConfig(device="NVIDIA H100", strategy="ddp", notes=["a note"]))
    message = TerminationMessage(exit_code=71, code="GpuOutOfMemory", message="no memory", hint="lower it")
    resolved = ResolvedConfig(device="NVIDIA H100", notes=["a note"])
    recorder.record_end(message, ProgressReport(attempt=2, uid="u", progress=Progress(step=15), resolved=resolved))
    Lineage(run, tree, RunState(), FileDigests()).write_statement(None)
    statement_bytes = (root / "lineage/statement.json").read_bytes()
    first_attempt, second_attempt = Statement.model_validate_json(statement_bytes).run.attempts
    assert (first_attempt.attempt, first_attempt.start_step, first_attempt.ended_at) == (1, 0, None)
    assert (second_attempt.start_step, second_attempt.last_step, second_attempt.code) == (10, 15, "GpuOutOfMemory")
    assert second_attempt.resolved.device == "NVIDIA H100" and (second_attempt.message, second_attempt.hint, second_attempt.notes) == (None, None, [])
    assert b"no memory" not in statement_bytes and b"a note" not in statement_bytes and b"lower it" not in statement_bytes


def test_expected_inputs_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = RunFacts(model_revision="m", dataset_digest="d", other_inputs={"test data": "t"})
    require_expected_inputs(facts)
    expected_inputs = {"modelRevision": "m", "datasetDigest": "d", "beside": {"test data": "t"}}
    monkeypatch.setenv("FINETUNE_EXPECTED_INPUTS", json.dumps(expected_inputs))
    require_expected_inputs(facts)
    monkeypatch.setenv("FINETUNE_EXPECTED_INPUTS", json.dumps({**expected_inputs, "datasetDigest": "x", "beside": {"tokenizer": "k"}}))
    with pytest.raises(ConfigError) as caught:
        require_expected_inputs(facts)
    assert caught.value.message.endswith(": training data is d instead of x; tokenizer is absent instead of k")


def test_secrets_are_removed_at_every_depth() -> None:
    spec = {
        "dataset": {"mixture": [{"source": "https://u:p@h/f?sig=1"}, {"source": "s3://b/k"}]},
        "placement": {"env": [{"name": "A", "value": "v"}, {"name": "B", "secretKeyRef": {"name": "s", "key": "k"}}]},
    }  # fmt: skip
    spec_without_secrets, changed_paths = remove_secrets(spec)
    assert spec_without_secrets["dataset"]["mixture"] == [{"source": "https://h/f"}, {"source": "s3://b/k"}]
    assert spec_without_secrets["placement"]["env"] == [{"name": "A"}, {"name": "B", "secretKeyRef": {"name": "s", "key": "k"}}]
    assert changed_paths == ["dataset.mixture[0].source", "placement.env[0].value"]
    assert spec["placement"]["env"][0] == {"name": "A", "value": "v"}


def test_the_bytes_to_sign_are_those_of_the_specification() -> None:
    assert encode_signed_bytes("http://example.com/HelloWorld", b"hello world") == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
