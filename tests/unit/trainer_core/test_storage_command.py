"""`python -m finetune_trainer.storage`: list, verify, download."""

from __future__ import annotations

from pathlib import Path

import pytest
from finetune_api.pod import StoreTarget
from finetune_trainer.checkpoint.manifest import Manifest, base_of
from finetune_trainer.checkpoint.tree import Tree
from finetune_trainer.storage.__main__ import Address, address, main
from finetune_trainer.storage.roots import open_store

ROOT = "s3://bucket/root/team/job/uid"


@pytest.mark.parametrize(
    ("uri", "found"),
    [
        (ROOT, Address(ROOT)),
        (f"{ROOT}/", Address(ROOT)),
        (f"{ROOT}/checkpoints", Address(ROOT)),
        (f"{ROOT}/checkpoints/step-00000100", Address(ROOT, 100)),
        (f"{ROOT}/checkpoints/step-00000100/a1-12345678/", Address(ROOT, 100)),
        (f"{ROOT}/model", Address(ROOT, model=True)),
        (f"{ROOT}/model/a2-12345678", Address(ROOT, model=True)),
        ("s3://bucket/root/team/model/0a1b2c3d-0000", Address("s3://bucket/root/team/model/0a1b2c3d-0000")),
        ("s3://bucket/root/team/model/0a1b2c3d-0000/model", Address("s3://bucket/root/team/model/0a1b2c3d-0000", model=True)),
        ("s3://bucket/model/team/job/uid", Address("s3://bucket/model/team/job/uid")),
    ],
)
def test_address(uri: str, found: Address) -> None:
    assert address(uri) == found


@pytest.fixture
def root(tmp_path: Path) -> str:
    tree = Tree(open_store(StoreTarget(uri=f"file://{tmp_path}/root")))
    for step in (5, 10, None):
        folder = tmp_path / f"staged-{step}"
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "weights").write_text(f"weights of {step}")
        files = tree.upload(base_of(step), "a1-00000000", folder)
        tree.commit(base_of(step), Manifest(step=step or 10, incarnation="a1-00000000", files=files))
    tree.mark_healthy(5)
    return f"file://{tmp_path}/root"


def test_list(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", root]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[:5] for line in lines[:2]] == [
        ["step", "10", "1", "13", "unknown"],
        ["step", "5", "1", "12", "yes"],
    ]
    assert lines[2].split()[0] == "model" and lines[2].endswith(f"{root}/model/a1-00000000")


def test_verify_names_what_is_damaged(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", root]) == 0
    assert capsys.readouterr().out.count("whole and right") == 3
    Path(root.removeprefix("file://"), "checkpoints/step-00000005/a1-00000000/sub/weights").write_text("weights of 6")
    assert main(["verify", root]) == 65
    assert "step-00000005/a1-00000000/sub/weights is damaged" in capsys.readouterr().err
    assert main(["verify", f"{root}/checkpoints/step-00000010"]) == 0


def test_download(root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", root, "--to", str(tmp_path / "a")]) == 0
    assert (tmp_path / "a/sub/weights").read_text() == "weights of None"
    assert main(["download", f"{root}/checkpoints/step-00000005/a1-00000000", "--to", str(tmp_path / "b")]) == 0
    assert (tmp_path / "b/sub/weights").read_text() == "weights of 5"


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", f"file://{tmp_path}/nothing"]) == 66
    assert "NothingCommitted" in capsys.readouterr().err
