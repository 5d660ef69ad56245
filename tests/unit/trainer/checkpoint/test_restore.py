"""Which checkpoint a run resumes from, which resumes are refused or inexact, and what commits and sweeps change in storage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from finetune_api.errors import ConfigError, CredentialsError, NoCheckpointError
from finetune_api.names import Storage
from finetune_api.pod import ResumeConfig, StoreTarget
from finetune_trainer.checkpoint.manifest import FileEntry, Manifest, RunFacts, checkpoint_folder_key
from finetune_trainer.checkpoint.restore import RestoreResult, restore
from finetune_trainer.checkpoint.tree import CheckpointTree, FencedOutError, SweepResult
from finetune_trainer.storage.base import CreateResult, ObjectStat
from finetune_trainer.storage.folder import FolderStore
from finetune_trainer.storage.roots import open_store
from web_server import WebServer

FACTS = RunFacts(
    model_revision="m", dataset_digest="d", method="lora", trainer="sft", effective_batch=4, versions={"torch": "2"},
    strategy="ddp", learning_rate=0.001, settings={"training": "one", "dataset": "two"},
    other_inputs={
        "tokenizer": "a", "adapter": "a", "reference model": "a", "validation data": "a", "test data": "a", "contents of ConfigMaps": "a",
        "training image set": "a", "held-out image set": "a",
    },
)  # fmt: skip


@pytest.fixture
def job_tree(tmp_path: Path) -> CheckpointTree:
    return CheckpointTree(open_store(StoreTarget(uri=f"file://{tmp_path}/root/team/job/uid")))


@pytest.fixture
def filled_tree(job_tree: CheckpointTree, tmp_path: Path) -> CheckpointTree:
    """A job's folder in storage with committed checkpoints of steps 5 and 10."""
    folder = tmp_path / "staged"
    folder.mkdir()
    (folder / "weights").write_text("w")
    for step in (5, 10):
        files = job_tree.upload(checkpoint_folder_key(step), "a1-00000000", folder)
        job_tree.commit(checkpoint_folder_key(step), Manifest(step=step, incarnation="a1-00000000", files=files, facts=FACTS))
    return job_tree


@pytest.fixture
def other_job_tree(tmp_path: Path) -> CheckpointTree:
    """The empty folder of another job in storage."""
    return CheckpointTree(open_store(StoreTarget(uri=f"file://{tmp_path}/root/team/other/uid")))


def restore_checkpoint(tree: CheckpointTree, folder: Path, options: ResumeConfig | None = None, facts: RunFacts = FACTS) -> RestoreResult:
    return restore(tree, options or ResumeConfig(mode="auto", expect_step=10), facts, folder / "restored")


def test_a_job_with_progress_but_without_checkpoints_fails(job_tree: CheckpointTree, tmp_path: Path) -> None:
    with pytest.raises(NoCheckpointError):
        restore_checkpoint(job_tree, tmp_path, ResumeConfig(mode="auto", expect_step=7))
    assert restore_checkpoint(job_tree, tmp_path, ResumeConfig(mode="auto")).step == 0


def test_mode_never_starts_from_zero_and_a_rollback_from_an_earlier_step(
    filled_tree: CheckpointTree, other_job_tree: CheckpointTree, tmp_path: Path
) -> None:
    assert restore_checkpoint(other_job_tree, tmp_path, ResumeConfig(mode="never", expect_step=0)).step == 0
    assert restore_checkpoint(filled_tree, tmp_path, ResumeConfig(mode="auto", expect_step=10, max_step=9)).step == 5


@pytest.mark.parametrize("uri", ["{root}/checkpoints/step-00000005", "{root}/checkpoints/step-00000005/a1-00000000/"])
def test_a_checkpoint_is_restored_by_its_uri(filled_tree: CheckpointTree, other_job_tree: CheckpointTree, tmp_path: Path, uri: str) -> None:
    checkpoint_uri = uri.format(root=filled_tree.store.uri)
    assert restore_checkpoint(other_job_tree, tmp_path, ResumeConfig(mode=checkpoint_uri)).step == 5


def test_a_checkpoint_is_restored_from_a_web_server(filled_tree: CheckpointTree, tmp_path: Path, server: WebServer) -> None:
    """The request to the web server uses the CA bundle of the job's own storage. Error messages do not contain the query of the URL."""
    (tmp_path / "root/team").rename(server.folder / "team")
    store = FolderStore(tmp_path / "own", "file:///own")
    store.target = StoreTarget(uri="s3://bucket/root", ca_bundle=server.ca)  # type: ignore[attr-defined] # as S3Store has it
    own_tree = CheckpointTree(store)
    job_url, secret_query = f"{server.url}/team/job/uid", "?signature=hidden/word"
    result = restore_checkpoint(own_tree, tmp_path, ResumeConfig(mode=f"{job_url}/checkpoints/step-00000005/a1-00000000{secret_query}"))
    assert (result.step, result.uri) == (5, f"{job_url}/checkpoints/step-00000005/a1-00000000")
    assert result.local_folder is not None and (result.local_folder / "weights").read_text() == "w"
    (server.folder / "team/job/uid/checkpoints/step-00000010/a1-00000000/weights").write_text("x")
    for step_digits, code in (("10", "NoLoadableCheckpoint"), ("15", "CheckpointNotFound"), ("x", "ResumeInvalid")):
        with pytest.raises((NoCheckpointError, ConfigError)) as caught:
            restore_checkpoint(own_tree, tmp_path, ResumeConfig(mode=f"{job_url}/checkpoints/step-000000{step_digits}{secret_query}"))
        assert caught.value.code == code and "hidden" not in str(caught.value)


@pytest.mark.parametrize("mode", ["never", "{root}/checkpoints/step-00000005"])
def test_the_jobs_own_checkpoints_take_precedence_over_checkpoint_resume(
    filled_tree: CheckpointTree, other_job_tree: CheckpointTree, tmp_path: Path, mode: str
) -> None:
    """If a queue restarts the same attempt, or if the operator missed a commit, the job's storage contains newer checkpoints than `run.json` names."""
    folder = tmp_path / "staged"
    files = other_job_tree.upload(checkpoint_folder_key(150), "a1-00000000", folder)
    other_job_tree.commit(checkpoint_folder_key(150), Manifest(step=150, incarnation="a1-00000000", files=files, facts=FACTS))
    resume_config = ResumeConfig(mode=mode.format(root=filled_tree.store.uri))
    assert restore_checkpoint(other_job_tree, tmp_path, resume_config).step == 150
    result_after_rollback = restore_checkpoint(other_job_tree, tmp_path, resume_config.model_copy(update={"max_step": 0}))
    assert result_after_rollback.step == (0 if mode == "never" else 5)
    assert [checkpoint.step for checkpoint in result_after_rollback.skipped_checkpoints] == [150]


@pytest.mark.parametrize(
    ("uri", "code"),
    [("{root}/checkpoints/step-00000006", "CheckpointNotFound"), ("{root}/model", "ResumeInvalid")],
)
def test_a_uri_without_a_checkpoint_is_refused(filled_tree: CheckpointTree, other_job_tree: CheckpointTree, tmp_path: Path, uri: str, code: str) -> None:
    with pytest.raises((NoCheckpointError, ConfigError)) as caught:
        restore_checkpoint(other_job_tree, tmp_path, ResumeConfig(mode=uri.format(root=filled_tree.store.uri)))
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("change", "message_part"),
    [
        ({"model_revision": "other"}, "base model"),
        ({"dataset_digest": "other"}, "training data"),
        ({"method": "full"}, "method"),
        ({"effective_batch": 8}, "effective batch"),
        ({"strategy": "deepspeed", "world_size": 2}, "DeepSpeed"),
        ({"strategy": "fsdp"}, "fsdp stores"),
        ({"other_inputs": {"tokenizer": "b"}}, "another tokenizer"),
        ({"other_inputs": {"adapter": "b"}}, "another adapter"),
        ({"other_inputs": {"reference model": "b"}}, "another reference model"),
        ({"other_inputs": {"training image set": "b"}}, "another training image set"),
    ],
)
def test_a_checkpoint_of_a_different_run_is_refused(
    filled_tree: CheckpointTree, tmp_path: Path, change: dict[str, object], message_part: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        restore_checkpoint(filled_tree, tmp_path, facts=FACTS.model_copy(update=change))
    assert caught.value.code == "CheckpointIncompatible" and message_part in caught.value.message


@pytest.mark.parametrize(
    ("change", "reason_part"),
    [
        ({"world_size": 2}, "ranks"),
        ({"micro_batch": 2}, "split"),
        ({"versions": {"torch": "3"}}, "torch 2 -> 3"),
        ({"learning_rate": 0.0005}, "learningRate was 0.001 until the checkpoint and is 0.0005"),
        ({"settings": {"training": "other", "dataset": "two"}}, "other settings in training"),
        ({"other_inputs": {"validation data": "b"}}, "made with other validation data"),
        ({"other_inputs": {"validation data": "a", "test data": "b"}}, "made with other test data"),
        ({"other_inputs": {"contents of ConfigMaps": "b"}}, "made with other contents of ConfigMaps"),
        ({"other_inputs": {"held-out image set": "b"}}, "made with other held-out image set"),
    ],
)
def test_an_inexact_resume_reports_the_reason(filled_tree: CheckpointTree, tmp_path: Path, change: dict[str, object], reason_part: str) -> None:
    result = restore_checkpoint(filled_tree, tmp_path, facts=FACTS.model_copy(update=change))
    assert result.step == 10 and result.is_exact is False and reason_part in (result.inexact_reason or "")


def list_ancestor_and_skipped_steps(result: RestoreResult) -> tuple[list[int | None], list[int | None]]:
    return [checkpoint.step for checkpoint in result.ancestor_checkpoints], [checkpoint.step for checkpoint in result.skipped_checkpoints]


def test_skipped_checkpoints_are_not_ancestors(filled_tree: CheckpointTree, tmp_path: Path) -> None:
    """Damaged checkpoints are skipped, and so are checkpoints after the step to which a rollback has returned."""
    result_after_rollback = restore_checkpoint(filled_tree, tmp_path, ResumeConfig(mode="auto", expect_step=10, max_step=9))
    assert list_ancestor_and_skipped_steps(result_after_rollback) == ([5], [10])
    filled_tree.store.put("checkpoints/step-00000010/a1-00000000/weights", b"x")
    result_after_damage = restore_checkpoint(filled_tree, tmp_path)
    assert not (tmp_path / "restored/checkpoint-10").exists(), "the Trainer would take this folder for a checkpoint"
    assert list_ancestor_and_skipped_steps(result_after_damage) == ([5], [10])
    result_of_step_5 = restore_checkpoint(filled_tree, tmp_path, ResumeConfig(mode="auto", expect_step=5, max_step=5))
    assert [checkpoint.step for checkpoint in result_of_step_5.ancestor_checkpoints] == [5]


@pytest.mark.parametrize("path", ["../escaped", "/tmp/escaped", "sub/../../escaped", "sub//x", "."])
def test_a_manifest_with_paths_outside_the_checkpoint_is_damaged(filled_tree: CheckpointTree, tmp_path: Path, path: str) -> None:
    files = [FileEntry(path=path, size=1, sha256="0" * 64)]
    filled_tree.store.put("checkpoints/step-00000015/a1-00000000/x", b"x")
    manifest = Manifest(step=15, incarnation="a1-00000000", files=files, facts=FACTS)
    filled_tree._check_objects = lambda folder, manifest: None  # type: ignore[method-assign] # only an attacker writes such a manifest
    filled_tree.commit(checkpoint_folder_key(15), manifest)
    result = restore_checkpoint(filled_tree, tmp_path)
    assert result.step == 10 and "not a path inside" in result.damage_messages[0]


class DelayedStore(FolderStore):
    """A store that shows new objects late: listings omit keys that end with `unlisted_suffixes`, and reads do not find keys that end with `unread_suffixes`."""

    unlisted_suffixes: tuple[str, ...] = ()
    unread_suffixes: tuple[str, ...] = ()
    refuse_deletes = False

    def list(self, prefix: str) -> Iterator[ObjectStat]:
        return (stat for stat in super().list(prefix) if not stat.key.endswith(self.unlisted_suffixes or ("\0",)))

    def get(self, key: str) -> bytes | None:
        return None if key.endswith(self.unread_suffixes or ("\0",)) else super().get(key)

    def delete(self, keys: Iterable[str]) -> None:
        if self.refuse_deletes:
            raise CredentialsError("PermissionDenied", "s3:DeleteObject")
        super().delete(keys)


@pytest.fixture
def delayed_store(filled_tree: CheckpointTree) -> DelayedStore:
    assert isinstance(filled_tree.store, FolderStore)
    store = DelayedStore(filled_tree.store.root, filled_tree.store.uri)
    filled_tree.store = store
    return store


@pytest.mark.parametrize(("unlisted_suffixes", "unread_suffixes"), [((Storage.COMMITTED,), ()), ((), (Storage.COMMITTED,))])
def test_a_sweep_keeps_a_committed_checkpoint_that_the_store_does_not_show_yet(
    filled_tree: CheckpointTree, delayed_store: DelayedStore, tmp_path: Path, unlisted_suffixes: tuple[str, ...], unread_suffixes: tuple[str, ...]
) -> None:
    delayed_store.unlisted_suffixes, delayed_store.unread_suffixes = unlisted_suffixes, unread_suffixes
    assert filled_tree.sweep().removed_count == 0
    delayed_store.unlisted_suffixes = delayed_store.unread_suffixes = ()
    assert restore_checkpoint(filled_tree, tmp_path).step == 10


def test_a_sweep_without_permission_to_delete_returns_the_error(filled_tree: CheckpointTree, delayed_store: DelayedStore) -> None:
    filled_tree.store.put("checkpoints/step-00000015/a1-00000000/weights", b"never committed")
    delayed_store.refuse_deletes = True
    sweep_result = filled_tree.sweep()
    assert sweep_result.removed_count == 0 and sweep_result.first_error is not None and sweep_result.first_error.code == "PermissionDenied"


def test_a_sweep_removes_an_incomplete_final_model_and_keeps_a_committed_one(filled_tree: CheckpointTree, tmp_path: Path) -> None:
    filled_tree.store.put("model/a1-00000000/model.safetensors", b"half of it")
    assert filled_tree.sweep().removed_count == 1
    assert list(filled_tree.store.list("model/")) == []
    files = filled_tree.upload("model", "a2-00000000", tmp_path / "staged")
    filled_tree.commit("model", Manifest(step=10, incarnation="a2-00000000", files=files, facts=FACTS))
    filled_tree.store.put("model/a1-00000000/model.safetensors", b"half of it")
    assert filled_tree.sweep().removed_count == 1
    assert {stat.key.split("/")[1] for stat in filled_tree.store.list("model/")} == {"_COMMITTED", "a2-00000000"}


def test_only_the_marker_of_a_skipped_checkpoint_is_replaced(filled_tree: CheckpointTree, tmp_path: Path) -> None:
    """When the run repeats the step of a skipped checkpoint, the new checkpoint replaces it. The new checkpoint is not healthy yet."""
    filled_tree.mark_healthy(10)
    (skipped_checkpoint,) = restore_checkpoint(filled_tree, tmp_path, ResumeConfig(mode="auto", max_step=9)).skipped_checkpoints
    files = filled_tree.upload(checkpoint_folder_key(10), "a1-22222222", tmp_path / "staged")
    new_manifest = Manifest(step=10, attempt=1, incarnation="a1-22222222", files=files, facts=FACTS)
    with pytest.raises(FencedOutError):
        filled_tree.commit(checkpoint_folder_key(10), new_manifest)
    filled_tree.commit(checkpoint_folder_key(10), new_manifest, replaceable_marker=skipped_checkpoint.marker)
    committed_checkpoint = filled_tree.get_committed(10)
    assert committed_checkpoint is not None and committed_checkpoint.marker.path == "a1-22222222"
    assert [checkpoint.is_healthy for checkpoint in filled_tree.list_committed()] == [False, False]
    with pytest.raises(FencedOutError):
        filled_tree.commit(
            checkpoint_folder_key(10), new_manifest.model_copy(update={"incarnation": "a1-33333333", "files": []}), replaceable_marker=skipped_checkpoint.marker
        )


def commit_checkpoint(tree: CheckpointTree, folder: Path, step: int, attempt: int = 1) -> Manifest:
    """Upload and commit a checkpoint of this step and attempt."""
    incarnation = f"a{attempt}-00000000"
    files = tree.upload(checkpoint_folder_key(step), incarnation, folder / "staged")
    manifest = Manifest(step=step, attempt=attempt, incarnation=incarnation, files=files, facts=FACTS)
    tree.commit(checkpoint_folder_key(step), manifest)
    return manifest


def begin_attempt(tree: CheckpointTree, attempt: int) -> None:
    tree.begin_attempt(attempt, b"{}")
    assert tree.store.get(f"run/attempt-{attempt}/run.json") == b"{}"


def test_an_earlier_attempt_commits_nothing_after_the_next_has_begun(filled_tree: CheckpointTree, tmp_path: Path) -> None:
    """The later attempt replaces the checkpoint that an earlier attempt committed at the same step."""
    commit_checkpoint(filled_tree, tmp_path, 20)
    begin_attempt(filled_tree, 2)
    with pytest.raises(FencedOutError, match="a later attempt has begun"):
        commit_checkpoint(filled_tree, tmp_path, 30)
    commit_checkpoint(filled_tree, tmp_path, 20, attempt=2)
    committed_checkpoint = filled_tree.get_committed(20)
    assert committed_checkpoint is not None and committed_checkpoint.marker.attempt == 2
    with pytest.raises(FencedOutError):
        commit_checkpoint(filled_tree, tmp_path, 20)
    assert [checkpoint.step for checkpoint in filled_tree.list_committed()] == [20, 10, 5]


def test_a_checkpoint_that_is_swept_during_its_commit_is_not_committed(
    filled_tree: CheckpointTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next attempt begins and sweeps between the last check of the commit and the creation of the marker."""
    original_create = filled_tree.store.create

    def create_after_sweep(key: str, data: bytes) -> CreateResult:
        begin_attempt(filled_tree, 2)
        assert filled_tree.sweep().removed_count == 2
        return original_create(key, data)

    monkeypatch.setattr(filled_tree.store, "create", create_after_sweep)
    with pytest.raises(FencedOutError, match="has removed"):
        commit_checkpoint(filled_tree, tmp_path, 20)
    assert [checkpoint.step for checkpoint in filled_tree.list_committed()] == [10, 5]


def test_attempts_are_compared_as_numbers_and_not_as_text(filled_tree: CheckpointTree) -> None:
    begin_attempt(filled_tree, 9)
    begin_attempt(filled_tree, 10)
    assert [attempt for attempt in (1, 9, 10, 11) if filled_tree.is_superseded(attempt)] == [1, 9]


@pytest.mark.parametrize(
    "marker_data", [b"{", b'{"attempt": 1, "path": "a1-00000001", "manifestSha256": "%s"}' % (b"0" * 64)]
)
def test_a_sweep_keeps_data_next_to_a_damaged_marker(filled_tree: CheckpointTree, tmp_path: Path, marker_data: bytes) -> None:
    filled_tree.store.put("checkpoints/step-00000010/_COMMITTED", marker_data)
    filled_tree.sweep()
    assert filled_tree.store.get("checkpoints/step-00000010/a1-00000000/weights") is not None
    result = restore_checkpoint(filled_tree, tmp_path)
    assert result.step == 5 and "step-00000010" in result.damage_messages[0]
    commit_checkpoint(filled_tree, tmp_path, 10, attempt=2)
    assert [checkpoint.step for checkpoint in filled_tree.list_committed()] == [10, 5]


def test_a_job_whose_markers_are_all_damaged_does_not_start_from_zero(job_tree: CheckpointTree, tmp_path: Path) -> None:
    job_tree.store.put("checkpoints/step-00000007/_COMMITTED", b"{")
    with pytest.raises(NoCheckpointError, match="had reached step 7") as caught:
        restore_checkpoint(job_tree, tmp_path, ResumeConfig(mode="auto"))
    assert "_COMMITTED is damaged" in caught.value.message


def test_a_marker_that_becomes_readable_later_is_recognised(filled_tree: CheckpointTree, delayed_store: DelayedStore, tmp_path: Path) -> None:
    """The response to the request that creates the marker is lost, and the marker can be read only after a delay."""
    read_keys: list[str] = []
    original_create, original_get = delayed_store.create, delayed_store.get

    def create_with_lost_response(key: str, data: bytes) -> CreateResult:
        return original_create(key, data) and CreateResult.EXISTS

    def get_with_delay(key: str) -> bytes | None:
        read_keys.append(key)
        return original_get(key) if len(read_keys) > 2 else None

    delayed_store.create, delayed_store.get = create_with_lost_response, get_with_delay  # type: ignore[method-assign] # the fault to test
    files = filled_tree.upload(checkpoint_folder_key(15), "a1-00000000", tmp_path / "staged")
    filled_tree.commit(checkpoint_folder_key(15), Manifest(step=15, incarnation="a1-00000000", files=files))
    assert len(read_keys) == 3 and [checkpoint.step for checkpoint in filled_tree.list_committed()] == [15, 10, 5]


def test_a_sweep_removes_only_data_without_a_marker(filled_tree: CheckpointTree, tmp_path: Path) -> None:
    keys_before = {stat.key for stat in filled_tree.store.list("checkpoints/")}
    filled_tree.store.put("checkpoints/step-00000010/a9-deadbeef/weights", b"of a stale incarnation")
    filled_tree.store.put("checkpoints/step-00000015/a1-00000000/weights", b"never committed")
    filled_tree.store.put("checkpoints/step-00000015/_HEALTHY", b"{}")
    assert filled_tree.sweep() == SweepResult(3)
    assert {stat.key for stat in filled_tree.store.list("checkpoints/")} == keys_before
    assert restore_checkpoint(filled_tree, tmp_path).step == 10
