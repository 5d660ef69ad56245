"""Where an attempt starts, and which checkpoints are refused or not exact: over a folder, since no fault is in play."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from finetune_api.errors import ConfigError, CredentialsError, NoCheckpointError
from finetune_api.names import Storage
from finetune_api.pod import Resume, StoreTarget
from finetune_trainer.checkpoint.manifest import FileEntry, Manifest, RunFacts, base_of
from finetune_trainer.checkpoint.restore import Restored, restore
from finetune_trainer.checkpoint.tree import Fenced, Swept, Tree
from finetune_trainer.storage.base import Created, Stat
from finetune_trainer.storage.folder import FolderStore
from finetune_trainer.storage.roots import open_store
from web_server import Web

FACTS = RunFacts(
    model_revision="m", dataset_digest="d", method="lora", trainer="sft", effective_batch=4, versions={"torch": "2"},
    strategy="ddp", learning_rate=0.001, settings={"training": "one", "dataset": "two"},
    beside={"tokenizer": "a", "adapter": "a", "reference model": "a", "validation data": "a", "contents of ConfigMaps": "a"},
)  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Tree:
    return Tree(open_store(StoreTarget(uri=f"file://{tmp_path}/root/team/job/uid")))


@pytest.fixture
def two(place: Tree, tmp_path: Path) -> Tree:
    """Steps 5 and 10 are committed."""
    folder = tmp_path / "staged"
    folder.mkdir()
    (folder / "weights").write_text("w")
    for step in (5, 10):
        files = place.upload(base_of(step), "a1-00000000", folder)
        place.commit(base_of(step), Manifest(step=step, incarnation="a1-00000000", files=files, facts=FACTS))
    return place


@pytest.fixture
def other(tmp_path: Path) -> Tree:
    """Another job's, where nothing is."""
    return Tree(open_store(StoreTarget(uri=f"file://{tmp_path}/root/team/other/uid")))


def back(place: Tree, folder: Path, resume: Resume | None = None, facts: RunFacts = FACTS) -> Restored:
    return restore(place, resume or Resume(mode="auto", expect_step=10), facts, folder / "restored")


def test_progress_without_any_checkpoint_is_73(place: Tree, tmp_path: Path) -> None:
    with pytest.raises(NoCheckpointError):
        back(place, tmp_path, Resume(mode="auto", expect_step=7))
    assert back(place, tmp_path, Resume(mode="auto")).step == 0


def test_never_and_rollback(two: Tree, other: Tree, tmp_path: Path) -> None:
    assert back(other, tmp_path, Resume(mode="never", expect_step=0)).step == 0
    assert back(two, tmp_path, Resume(mode="auto", expect_step=10, max_step=9)).step == 5


@pytest.mark.parametrize("uri", ["{root}/checkpoints/step-00000005", "{root}/checkpoints/step-00000005/a1-00000000/"])
def test_a_checkpoint_by_its_uri(two: Tree, other: Tree, tmp_path: Path, uri: str) -> None:
    named = uri.format(root=two.store.uri)
    assert back(other, tmp_path, Resume(mode=named)).step == 5


def test_a_checkpoint_on_a_web_server(two: Tree, tmp_path: Path, server: Web) -> None:
    """Read with the certificates of the job's own storage; damage, absence and a job's whole tree are told without the query."""
    (tmp_path / "root/team").rename(server.folder / "team")
    store = FolderStore(tmp_path / "own", "file:///own")
    store.target = StoreTarget(uri="s3://bucket/root", ca_bundle=server.ca)  # type: ignore[attr-defined] # as S3Store has it
    own = Tree(store)
    job, secret = f"{server.url}/team/job/uid", "?signature=hidden/word"
    found = back(own, tmp_path, Resume(mode=f"{job}/checkpoints/step-00000005/a1-00000000{secret}"))
    assert (found.step, found.uri) == (5, f"{job}/checkpoints/step-00000005/a1-00000000")
    assert found.path is not None and (found.path / "weights").read_text() == "w"
    (server.folder / "team/job/uid/checkpoints/step-00000010/a1-00000000/weights").write_text("x")
    for place, code in (("10", "NoLoadableCheckpoint"), ("15", "CheckpointNotFound"), ("x", "ResumeInvalid")):
        with pytest.raises((NoCheckpointError, ConfigError)) as caught:
            back(own, tmp_path, Resume(mode=f"{job}/checkpoints/step-000000{place}{secret}"))
        assert caught.value.code == code and "hidden" not in str(caught.value)


@pytest.mark.parametrize("mode", ["never", "{root}/checkpoints/step-00000005"])
def test_own_progress_comes_before_what_the_job_was_to_begin_with(two: Tree, other: Tree, tmp_path: Path, mode: str) -> None:
    """The same attempt again, after a queue took its quota back; or a commit that the operator never heard of."""
    folder = tmp_path / "staged"
    files = other.upload(base_of(150), "a1-00000000", folder)
    other.commit(base_of(150), Manifest(step=150, incarnation="a1-00000000", files=files, facts=FACTS))
    wanted = Resume(mode=mode.format(root=two.store.uri))
    assert back(other, tmp_path, wanted).step == 150
    rolled_back = back(other, tmp_path, wanted.model_copy(update={"max_step": 0}))
    assert rolled_back.step == (0 if mode == "never" else 5)
    assert [one.step for one in rolled_back.passed] == [150]


@pytest.mark.parametrize(
    ("uri", "code"),
    [("{root}/checkpoints/step-00000006", "CheckpointNotFound"), ("{root}/model", "ResumeInvalid")],
)
def test_a_uri_that_is_none(two: Tree, other: Tree, tmp_path: Path, uri: str, code: str) -> None:
    with pytest.raises((NoCheckpointError, ConfigError)) as caught:
        back(other, tmp_path, Resume(mode=uri.format(root=two.store.uri)))
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_revision": "other"}, "base model"),
        ({"dataset_digest": "other"}, "training data"),
        ({"method": "full"}, "method"),
        ({"effective_batch": 8}, "effective batch"),
        ({"strategy": "deepspeed", "world_size": 2}, "DeepSpeed"),
        ({"strategy": "fsdp"}, "fsdp keeps"),
        ({"beside": {"tokenizer": "b"}}, "another tokenizer"),
        ({"beside": {"adapter": "b"}}, "another adapter"),
        ({"beside": {"reference model": "b"}}, "another reference model"),
    ],
)
def test_another_run_is_refused_with_the_difference(
    two: Tree, tmp_path: Path, change: dict[str, object], word: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        back(two, tmp_path, facts=FACTS.model_copy(update=change))
    assert caught.value.code == "CheckpointIncompatible" and word in caught.value.message


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"world_size": 2}, "ranks"),
        ({"micro_batch": 2}, "split"),
        ({"versions": {"torch": "3"}}, "torch 2 -> 3"),
        ({"learning_rate": 0.0005}, "learningRate 0.001 until there, 0.0005"),
        ({"settings": {"training": "other", "dataset": "two"}}, "other settings in training"),
        ({"beside": {"validation data": "b"}}, "made with other validation data"),
        ({"beside": {"contents of ConfigMaps": "b"}}, "made with other contents of ConfigMaps"),
    ],
)
def test_what_is_allowed_and_not_exact_says_why(
    two: Tree, tmp_path: Path, change: dict[str, object], word: str
) -> None:
    found = back(two, tmp_path, facts=FACTS.model_copy(update=change))
    assert found.step == 10 and found.exact is False and word in (found.note or "")


def test_what_is_passed_over_is_told_apart_from_what_is_gone_on_from(two: Tree, tmp_path: Path) -> None:
    """Behind a rollback, or damaged: neither is this attempt's past."""
    rolled = back(two, tmp_path, Resume(mode="auto", expect_step=10, max_step=9))
    assert ([one.step for one in rolled.before], [one.step for one in rolled.passed]) == ([5], [10])
    two.store.put("checkpoints/step-00000010/a1-00000000/weights", b"x")
    damaged = back(two, tmp_path)
    assert ([one.step for one in damaged.before], [one.step for one in damaged.passed]) == ([5], [10])
    whole = back(two, tmp_path, Resume(mode="auto", expect_step=5, max_step=5))
    assert [one.step for one in whole.before] == [5]


@pytest.mark.parametrize("path", ["../escaped", "/tmp/escaped", "sub/../../escaped", "sub//x", "."])
def test_a_manifest_that_names_files_elsewhere_is_not_followed(two: Tree, tmp_path: Path, path: str) -> None:
    files = [FileEntry(path=path, size=1, sha256="0" * 64)]
    two.store.put("checkpoints/step-00000015/a1-00000000/x", b"x")
    manifest = Manifest(step=15, incarnation="a1-00000000", files=files, facts=FACTS)
    two._look = lambda folder, manifest: None  # type: ignore[method-assign] # nobody honest would have written this
    two.commit(base_of(15), manifest)
    found = back(two, tmp_path)
    assert found.step == 10 and "no path inside" in found.damaged[0]


class Forgetful(FolderStore):
    """A store whose listings, or answers, are a moment behind."""

    unlisted: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    refuse_deletes = False

    def list(self, prefix: str) -> Iterator[Stat]:
        return (stat for stat in super().list(prefix) if not stat.key.endswith(self.unlisted or ("\0",)))

    def get(self, key: str) -> bytes | None:
        return None if key.endswith(self.unread or ("\0",)) else super().get(key)

    def delete(self, keys: Iterable[str]) -> None:
        if self.refuse_deletes:
            raise CredentialsError("PermissionDenied", "s3:DeleteObject")
        super().delete(keys)


@pytest.fixture
def forgetful(two: Tree) -> Forgetful:
    assert isinstance(two.store, FolderStore)
    made = Forgetful(two.store.root, two.store.uri)
    two.store = made
    return made


@pytest.mark.parametrize(("unlisted", "unread"), [((Storage.COMMITTED,), ()), ((), (Storage.COMMITTED,))])
def test_a_sweep_takes_no_committed_checkpoint_that_the_store_does_not_show_yet(
    two: Tree, forgetful: Forgetful, tmp_path: Path, unlisted: tuple[str, ...], unread: tuple[str, ...]
) -> None:
    forgetful.unlisted, forgetful.unread = unlisted, unread
    assert two.sweep().count == 0
    forgetful.unlisted = forgetful.unread = ()
    assert back(two, tmp_path).step == 10


def test_a_sweep_without_the_right_to_delete_says_so_and_is_no_failure(two: Tree, forgetful: Forgetful) -> None:
    two.store.put("checkpoints/step-00000015/a1-00000000/weights", b"never committed")
    forgetful.refuse_deletes = True
    swept = two.sweep()
    assert swept.count == 0 and swept.problem is not None and swept.problem.code == "PermissionDenied"


def test_half_a_final_model_is_swept_and_a_whole_one_is_not(two: Tree, tmp_path: Path) -> None:
    two.store.put("model/a1-00000000/model.safetensors", b"half of it")
    assert two.sweep().count == 1
    assert list(two.store.list("model/")) == []
    files = two.upload("model", "a2-00000000", tmp_path / "staged")
    two.commit("model", Manifest(step=10, incarnation="a2-00000000", files=files, facts=FACTS))
    two.store.put("model/a1-00000000/model.safetensors", b"half of it")
    assert two.sweep().count == 1
    assert {stat.key.split("/")[1] for stat in two.store.list("model/")} == {"_COMMITTED", "a2-00000000"}


def test_a_marker_that_was_passed_over_gives_way_and_any_other_does_not(two: Tree, tmp_path: Path) -> None:
    """The step is done again: the new checkpoint takes the old one's place, and not its health."""
    two.mark_healthy(10)
    (old,) = back(two, tmp_path, Resume(mode="auto", max_step=9)).passed
    files = two.upload(base_of(10), "a1-22222222", tmp_path / "staged")
    ours = Manifest(step=10, attempt=1, incarnation="a1-22222222", files=files, facts=FACTS)
    with pytest.raises(Fenced):
        two.commit(base_of(10), ours)
    two.commit(base_of(10), ours, instead_of=old.marker)
    found = two.marker(10)
    assert found is not None and (found.marker.path, [one.healthy for one in two.committed()]) == (
        "a1-22222222",
        [False, False],
    )
    with pytest.raises(Fenced):
        two.commit(
            base_of(10), ours.model_copy(update={"incarnation": "a1-33333333", "files": []}), instead_of=old.marker
        )


def commit(tree: Tree, folder: Path, step: int, attempt: int = 1) -> Manifest:
    """A checkpoint of an attempt, which says which it is."""
    incarnation = f"a{attempt}-00000000"
    files = tree.upload(base_of(step), incarnation, folder / "staged")
    manifest = Manifest(step=step, attempt=attempt, incarnation=incarnation, files=files, facts=FACTS)
    tree.commit(base_of(step), manifest)
    return manifest


def begin(tree: Tree, attempt: int) -> None:
    tree.begin(attempt, b"{}")
    assert tree.store.get(f"run/attempt-{attempt}/run.json") == b"{}"


def test_an_attempt_that_lives_on_out_of_reach_gives_way_to_the_next(two: Tree, tmp_path: Path) -> None:
    """It may be ahead; from the moment the next one has begun it commits nothing, and what it brought before does not stand in the way."""
    commit(two, tmp_path, 20)
    begin(two, 2)
    with pytest.raises(Fenced, match="a later attempt has begun"):
        commit(two, tmp_path, 30)
    commit(two, tmp_path, 20, attempt=2)
    found = two.marker(20)
    assert found is not None and found.marker.attempt == 2
    with pytest.raises(Fenced):
        commit(two, tmp_path, 20)
    assert [one.step for one in two.committed()] == [20, 10, 5]


def test_what_was_swept_under_a_commit_is_not_committed(two: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its last look and its marker the next attempt begins and sweeps."""
    create = two.store.create

    def late(key: str, data: bytes) -> Created:
        begin(two, 2)
        assert two.sweep().count == 2
        return create(key, data)

    monkeypatch.setattr(two.store, "create", late)
    with pytest.raises(Fenced, match="was swept"):
        commit(two, tmp_path, 20)
    assert [one.step for one in two.committed()] == [10, 5]


def test_a_later_attempt_is_told_from_an_earlier_one_by_its_number(two: Tree) -> None:
    begin(two, 9)
    begin(two, 10)
    assert [attempt for attempt in (1, 9, 10, 11) if two.superseded(attempt)] == [1, 9]


@pytest.mark.parametrize("damage", [b"{", b'{"attempt": 1, "path": "a1-00000001", "manifestSha256": "%s"}' % (b"0" * 64)])
def test_a_sweep_spares_what_a_damaged_marker_may_have_meant(two: Tree, tmp_path: Path, damage: bytes) -> None:
    two.store.put("checkpoints/step-00000010/_COMMITTED", damage)
    two.sweep()
    assert two.store.get("checkpoints/step-00000010/a1-00000000/weights") is not None
    found = back(two, tmp_path)
    assert found.step == 5 and "step-00000010" in found.damaged[0]
    commit(two, tmp_path, 10, attempt=2)
    assert [one.step for one in two.committed()] == [10, 5]


def test_nothing_but_damaged_markers_is_no_start_from_zero(place: Tree, tmp_path: Path) -> None:
    place.store.put("checkpoints/step-00000007/_COMMITTED", b"{")
    with pytest.raises(NoCheckpointError, match="had come to step 7") as caught:
        back(place, tmp_path, Resume(mode="auto"))
    assert "_COMMITTED is damaged" in caught.value.message


def test_a_marker_that_shows_a_moment_later_is_still_ours(two: Tree, forgetful: Forgetful, tmp_path: Path) -> None:
    """The answer to its creation is lost, and it cannot be read at once: that is no other incarnation's."""
    looks: list[str] = []
    create, get = forgetful.create, forgetful.get

    def lost(key: str, data: bytes) -> Created:
        return create(key, data) and Created.EXISTS

    def late(key: str) -> bytes | None:
        looks.append(key)
        return get(key) if len(looks) > 2 else None

    forgetful.create, forgetful.get = lost, late  # type: ignore[method-assign] # that is what the fault is
    files = two.upload(base_of(15), "a1-00000000", tmp_path / "staged")
    two.commit(base_of(15), Manifest(step=15, incarnation="a1-00000000", files=files))
    assert len(looks) == 3 and [one.step for one in two.committed()] == [15, 10, 5]


def test_sweeping_takes_what_no_marker_names_and_nothing_else(two: Tree, tmp_path: Path) -> None:
    before = {stat.key for stat in two.store.list("checkpoints/")}
    two.store.put("checkpoints/step-00000010/a9-deadbeef/weights", b"a zombie's")
    two.store.put("checkpoints/step-00000015/a1-00000000/weights", b"never committed")
    two.store.put("checkpoints/step-00000015/_HEALTHY", b"{}")
    assert two.sweep() == Swept(3)
    assert {stat.key for stat in two.store.list("checkpoints/")} == before
    assert back(two, tmp_path).step == 10
