"""A checkpoint that another program wrote into the job's own folder is refused before any of its files is opened.

The forged files are real: torch's distributed checkpoint and DeepSpeed's optimizer state, whose pickles create a file when they are loaded.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finetune_api.attempt_secret import derive_checkpoint_key
from finetune_api.errors import NoCheckpointError
from finetune_api.names import Storage
from finetune_api.pod import ResumeConfig, StoreTarget
from finetune_trainer.checkpoint.manifest import (
    CommitMarker,
    Manifest,
    RunFacts,
    checkpoint_folder_key,
    list_file_entries,
    sha256_bytes,
)
from finetune_trainer.checkpoint.restore import restore
from finetune_trainer.checkpoint.tree import CheckpointTree
from finetune_trainer.storage.roots import open_store

KEY, KEY_OF_ANOTHER_JOB = derive_checkpoint_key(b"operator", "uid"), derive_checkpoint_key(b"operator", "other")
INCARNATION, FORGED_INCARNATION = "a1-00000000", "a1-deadbeef"
STEP_5, STEP_10 = "step-00000005", "step-00000010"
ForgedFileWriter = Callable[[Path, Path], Path]


class CodeRunningObject:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, proof_file: Path) -> None:
        self.proof = proof_file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.proof,)


def write_dcp_files(folder: Path, proof_file: Path) -> Path:
    """Write a distributed checkpoint of torch with a forged `.metadata`. Returns the forged file."""
    (folder / "optimizer_0").mkdir(parents=True)
    file = folder / "optimizer_0/.metadata"
    file.write_bytes(pickle.dumps(CodeRunningObject(proof_file)))
    return file


def write_deepspeed_files(folder: Path, proof_file: Path) -> Path:
    """Write a checkpoint of DeepSpeed with forged optimizer states. Returns a forged file."""
    import torch

    file = folder / "global_step10/zero_pp_rank_0_mp_rank_00_optim_states.pt"
    file.parent.mkdir(parents=True)
    torch.save({"optimizer_state_dict": CodeRunningObject(proof_file)}, file)
    return file


def load_dcp(file: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    FileSystemReader(file.parent).read_metadata()


def load_deepspeed(file: Path) -> None:
    import torch

    torch.load(file, weights_only=False)  # as DeepSpeed does


class JobStorage:
    """A job's folder in storage with a genuine checkpoint of step 5. `forge` writes a forged checkpoint into this folder without the signing key."""

    def __init__(self, folder: Path, strategy: str, key: str | None) -> None:
        self.folder, self.facts = folder, RunFacts(strategy=strategy)
        self.store = open_store(StoreTarget(uri=f"file://{folder}/team/job/uid"))
        self.tree = CheckpointTree(self.store, key)
        staged_folder = folder / "staged"
        staged_folder.mkdir()
        (staged_folder / "weights").write_text("genuine")
        files = self.tree.upload(checkpoint_folder_key(5), INCARNATION, staged_folder)
        manifest = Manifest(step=5, incarnation=INCARNATION, files=files, facts=self.facts)
        self.genuine_sha256 = self.tree.commit(checkpoint_folder_key(5), manifest).manifest_sha256

    def forge(self, step: int, incarnation: str, write_files: ForgedFileWriter) -> tuple[Path, Path]:
        """Write a complete checkpoint with valid hashes, as the trainer does, but without the signing key.

        Returns the forged pickle, and the path of the file that the pickle creates when it is loaded.
        """
        proof_file, forged_folder = self.folder / "code-ran", self.folder / "forged"
        pickle_file = write_files(forged_folder, proof_file)
        manifest = Manifest(step=step, incarnation=incarnation, files=list_file_entries(forged_folder), facts=self.facts)
        checkpoint_folder = Path(self.tree.uri(f"{checkpoint_folder_key(step)}/{incarnation}").removeprefix("file://"))
        shutil.copytree(forged_folder, checkpoint_folder, dirs_exist_ok=True)
        (checkpoint_folder / Storage.MANIFEST).write_bytes(manifest.to_bytes())
        marker = CommitMarker(attempt=1, path=incarnation, manifest_sha256=sha256_bytes(manifest.to_bytes()))
        (checkpoint_folder.parent / Storage.COMMITTED).write_bytes(marker.to_bytes())
        return pickle_file, proof_file

    def restore(self, known_hashes: dict[str, str] | None = None) -> Any:
        config = ResumeConfig(mode="auto", expect_step=5, known_checkpoints=known_hashes or {})
        return restore(self.tree, config, self.facts, self.folder / "restored", attempt=2)


FORMATS = [
    pytest.param("fsdp", write_dcp_files, load_dcp, id="torch DCP"),
    pytest.param("deepspeed", write_deepspeed_files, load_deepspeed, id="DeepSpeed"),
]


@pytest.mark.parametrize(("strategy", "write_files", "load"), FORMATS)
def test_a_forged_newer_checkpoint_is_refused_by_name(tmp_path: Path, strategy: str, write_files: ForgedFileWriter, load: Callable[[Path], None]) -> None:
    job = JobStorage(tmp_path, strategy, KEY)
    pickle_file, proof_file = job.forge(10, FORGED_INCARNATION, write_files)
    result = job.restore({f"{STEP_5}/{INCARNATION}": job.genuine_sha256})
    assert result.step == 5
    forged_uri = job.tree.uri(f"{Storage.CHECKPOINTS}/{STEP_10}/{FORGED_INCARNATION}")
    assert result.damage_messages == [
        f"{forged_uri} is neither in the job's status nor signed by this job, and a forged checkpoint of {strategy} can run code"
    ]
    assert not [path for path in (tmp_path / "restored").rglob("*") if path.name == pickle_file.name]
    assert not proof_file.exists()
    with pytest.raises(Exception):  # noqa: B017, PT011 -- any error: the forged object is no state
        load(pickle_file)
        raise TypeError("loaded")
    assert proof_file.exists(), "the forged file is harmless, so the test shows nothing"


@pytest.mark.parametrize("has_key", [True, False])
@pytest.mark.parametrize(("strategy", "write_files", "load"), FORMATS)
def test_a_replaced_checkpoint_that_the_status_knows_is_refused(
    tmp_path: Path, strategy: str, write_files: ForgedFileWriter, load: Callable[[Path], None], has_key: bool
) -> None:
    """The replaced checkpoint is refused even if the operator gives attempts no Secret, and so no signing key."""
    job = JobStorage(tmp_path, strategy, KEY if has_key else None)
    _, proof_file = job.forge(5, INCARNATION, write_files)
    with pytest.raises(NoCheckpointError) as error:
        job.restore({f"{STEP_5}/{INCARNATION}": job.genuine_sha256})
    assert error.value.code == "NoLoadableCheckpoint"
    assert f"/{STEP_5}/{INCARNATION} is not the checkpoint that this job committed: its manifest has sha256" in error.value.message
    assert f"but the job's status has {job.genuine_sha256}" in error.value.message
    assert not proof_file.exists() and not (tmp_path / "restored").exists()


def test_a_replaced_checkpoint_without_code_is_refused_too(tmp_path: Path) -> None:
    job = JobStorage(tmp_path, "ddp", KEY)
    job.forge(5, INCARNATION, write_dcp_files)
    with pytest.raises(NoCheckpointError):
        job.restore({f"{STEP_5}/{INCARNATION}": job.genuine_sha256})


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed", "ddp"])
def test_a_signed_checkpoint_that_the_status_does_not_know_is_used(tmp_path: Path, strategy: str) -> None:
    """The status lacks the checkpoint because the pod was killed before the operator read it."""
    result = JobStorage(tmp_path, strategy, KEY).restore()
    assert (result.step, result.damage_messages) == (5, [])


def test_a_checkpoint_without_code_needs_no_signature(tmp_path: Path) -> None:
    """An older operator gives its attempts no key. After an upgrade, their checkpoints must be usable, so that no progress is lost."""
    job = JobStorage(tmp_path, "ddp", None)
    job.tree = CheckpointTree(job.store, KEY)
    assert job.restore().step == 5


def test_a_checkpoint_of_an_attempt_without_key_is_used_if_the_status_knows_it(tmp_path: Path) -> None:
    job = JobStorage(tmp_path, "fsdp", None)
    job.tree = CheckpointTree(job.store, KEY)
    with pytest.raises(NoCheckpointError, match="neither in the job's status nor signed by this job"):
        job.restore()
    assert job.restore({f"{STEP_5}/{INCARNATION}": job.genuine_sha256}).step == 5


def test_without_a_key_an_unknown_checkpoint_is_used(tmp_path: Path) -> None:
    """With `isolation.secret: false`, forged checkpoints are not detected; docs/guides/isolation.md says so."""
    assert JobStorage(tmp_path, "fsdp", None).restore().step == 5


@pytest.mark.parametrize("change", ["another job's key", "copied from step 5", "removed", "cut"])
def test_a_signature_fits_only_its_job_and_its_step(tmp_path: Path, change: str) -> None:
    job = JobStorage(tmp_path, "fsdp", KEY)
    checkpoints_folder = Path(job.tree.uri(Storage.CHECKPOINTS).removeprefix("file://"))
    signature_file = checkpoints_folder / STEP_5 / INCARNATION / Storage.SIGNATURE
    if change == "another job's key":
        job.tree = CheckpointTree(job.store, KEY_OF_ANOTHER_JOB)
    elif change == "copied from step 5":  # an old checkpoint under the name of a newer step
        (checkpoints_folder / STEP_5).rename(checkpoints_folder / STEP_10)
    elif change == "removed":
        signature_file.unlink()
    else:
        signature_file.write_bytes(signature_file.read_bytes()[:-1])
    with pytest.raises(NoCheckpointError, match="nor signed by this job"):
        job.restore()


def test_only_checkpoints_are_signed(tmp_path: Path) -> None:
    """The folder of the final model contains only the model and its manifest."""
    job = JobStorage(tmp_path, "fsdp", KEY)
    files = job.tree.upload(checkpoint_folder_key(None), INCARNATION, tmp_path / "staged")
    job.tree.commit(checkpoint_folder_key(None), Manifest(step=5, incarnation=INCARNATION, files=files))
    keys = sorted(stat.key for stat in job.store.list(""))
    assert [key for key in keys if key.endswith(Storage.SIGNATURE)] == [f"{Storage.CHECKPOINTS}/{STEP_5}/{INCARNATION}/{Storage.SIGNATURE}"]
    assert json.loads(job.store.get(f"model/{INCARNATION}/manifest.json") or b"{}")["step"] == 5
