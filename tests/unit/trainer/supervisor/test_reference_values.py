"""The reference values of a model are copied from the folder of the job that trained it.

If this job has stored no reference values, the reason is returned.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from finetune_api.spec.enums import OutputKind
from finetune_trainer.checkpoint.manifest import Manifest
from finetune_trainer.checkpoint.tree import CheckpointTree
from finetune_trainer.storage.folder import FolderStore
from finetune_trainer.supervisor.reference_values import copy_reference_values
from finetune_trainer.verification.reference import FILE_NAME, MANIFEST_KEY, reference_values_key

VALUES = b'{"version": 1}'
DIGEST = hashlib.sha256(VALUES).hexdigest()


def commit_model(folder: Path, *, digest: object = DIGEST, prefix: str = "model") -> CheckpointTree:
    tree = CheckpointTree(FolderStore(folder / "store", f"file://{folder}/store"))
    (folder / "files").mkdir()
    (folder / "files" / "adapter_config.json").write_text("{}")
    entries = tree.upload(prefix, "a1-00000001", folder / "files")
    tree.commit(prefix, Manifest(incarnation="a1-00000001", step=2, kind=OutputKind.ADAPTER, files=entries, extra={MANIFEST_KEY: digest}))
    return tree


def test_values_of_the_committed_model_are_copied(tmp_path: Path) -> None:
    tree = commit_model(tmp_path)
    tree.store.put(reference_values_key(DIGEST), VALUES)
    assert copy_reference_values(tree, tree.get_committed(None), tmp_path) is None
    assert (tmp_path / FILE_NAME).read_bytes() == VALUES


@pytest.mark.parametrize(
    ("digest", "content", "expected_text"),
    [
        (None, VALUES, "recorded no reference values: its output.verify was false, or its trainer is older than 0.2.0"),
        (7, VALUES, "recorded no reference values"),
        (DIGEST, None, f"{reference_values_key(DIGEST)} are missing"),
        (DIGEST, VALUES + b" ", f"{reference_values_key(DIGEST)} are damaged"),
        (DIGEST, b"", f"{reference_values_key(DIGEST)} are damaged"),
    ],
)
def test_missing_and_changed_values_have_a_reason(digest: object, content: bytes | None, expected_text: str, tmp_path: Path) -> None:
    tree = commit_model(tmp_path, digest=digest)
    if content is not None:
        tree.store.put(reference_values_key(DIGEST), content)
    problem = copy_reference_values(tree, tree.get_committed(None), tmp_path)
    assert problem is not None and expected_text in problem and not (tmp_path / FILE_NAME).exists()


@pytest.mark.parametrize("content", [b'{"version": 1, "rows": 7}', b"[]", b"\xff"])
def test_values_that_this_trainer_cannot_read_have_a_reason(content: bytes, tmp_path: Path) -> None:
    digest = hashlib.sha256(content).hexdigest()
    tree = commit_model(tmp_path, digest=digest)
    tree.store.put(reference_values_key(digest), content)
    problem = copy_reference_values(tree, tree.get_committed(None), tmp_path)
    assert problem is not None and "cannot be read by this trainer" in problem and not (tmp_path / FILE_NAME).exists()


def test_a_checkpoint_and_a_model_without_manifest_have_a_reason(tmp_path: Path) -> None:
    tree = commit_model(tmp_path, prefix="checkpoints/step-00000002")
    tree.store.put(reference_values_key(DIGEST), VALUES)
    assert "the model is a checkpoint" in (copy_reference_values(tree, tree.get_committed(2), tmp_path) or "")
    assert copy_reference_values(tree, tree.get_committed(None), tmp_path) == "the manifest of the model cannot be read"
