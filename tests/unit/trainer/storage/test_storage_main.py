"""`python -m finetune_trainer.storage`: list, verify, download."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from finetune_api.pod import StoreTarget
from finetune_trainer.checkpoint.address import Address, parse_address
from finetune_trainer.checkpoint.manifest import Manifest, prefix_of
from finetune_trainer.checkpoint.tree import Tree
from finetune_trainer.storage.__main__ import main
from finetune_trainer.storage.roots import open_store
from web_server import Web

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
        (
            "s3://bucket/root/team/model/0a1b2c3d-0000/model",
            Address("s3://bucket/root/team/model/0a1b2c3d-0000", model=True),
        ),
        ("s3://bucket/model/team/job/uid", Address("s3://bucket/model/team/job/uid")),
        ("https://host/uid/model/?sig=a/b", Address("https://host/uid?sig=a/b", model=True)),
        ("https://host/uid/checkpoints/step-00000100/a1-12345678?sig", Address("https://host/uid?sig", 100)),
        ("https://host/uid?sig", Address("https://host/uid?sig")),
    ],
)
def test_address(uri: str, found: Address) -> None:
    assert parse_address(uri) == found


@pytest.fixture
def root(tmp_path: Path) -> str:
    return filled(tmp_path, tmp_path / "root")


def filled(tmp_path: Path, place: Path) -> str:
    """A tree with two checkpoints and a model."""
    tree = Tree(open_store(StoreTarget(uri=f"file://{place}")))
    for step in (5, 10, None):
        folder = tmp_path / f"staged-{step}"
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "weights").write_text(f"weights of {step}")
        files = tree.upload(prefix_of(step), "a1-00000000", folder)
        tree.commit(prefix_of(step), Manifest(step=step or 10, incarnation="a1-00000000", files=files))
    tree.mark_healthy(5)
    return f"file://{place}"


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
    assert capsys.readouterr().out.count("complete and undamaged") == 3
    Path(root.removeprefix("file://"), "checkpoints/step-00000005/a1-00000000/sub/weights").write_text("weights of 6")
    assert main(["verify", root]) == 65
    assert "step-00000005/a1-00000000/sub/weights is damaged" in capsys.readouterr().err
    assert main(["verify", f"{root}/checkpoints/step-00000010"]) == 0


def test_download(root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", root, "--to", str(tmp_path / "a")]) == 0
    assert (tmp_path / "a/sub/weights").read_text() == "weights of None"
    assert main(["download", f"{root}/checkpoints/step-00000005/a1-00000000", "--to", str(tmp_path / "b")]) == 0
    assert (tmp_path / "b/sub/weights").read_text() == "weights of 5"


def test_a_damaged_download_is_not_left_on_disk(root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path(root.removeprefix("file://"), "model/a1-00000000/sub/weights").write_text("weights of Nome")
    assert main(["download", root, "--to", str(tmp_path / "a")]) == 65
    assert "sub/weights is damaged" in capsys.readouterr().err
    assert not (tmp_path / "a/sub/weights").exists()


def test_an_address_without_anything_committed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", f"file://{tmp_path}/nothing"]) == 66
    assert "NothingCommitted" in capsys.readouterr().err


SECRET = "?signature=hidden/word"


@pytest.fixture
def ask(server: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """The command about a place below a root that is served over https; returns exit code and all that was said."""
    filled(tmp_path, server.folder / "root")

    def run(command: str, place: str, *more: str) -> tuple[int, str]:
        code = main([command, f"{server.url}/root{place}{SECRET}", "--ca-bundle", server.ca, *more])
        said = "".join(capsys.readouterr())
        assert "hidden" not in said
        return code, said

    return run


@pytest.mark.parametrize(
    ("place", "weights"),
    [
        ("/checkpoints/step-00000005", "weights of 5"),
        ("/checkpoints/step-00000010/a1-00000000", "weights of 10"),
        ("/model", "weights of None"),
        ("/model/a1-00000000", "weights of None"),
    ],
)
def test_what_is_served_over_https_is_verified_and_downloaded(
    ask: Callable[..., tuple[int, str]],
    server: Web,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    weights: str,
) -> None:
    code, said = ask("verify", place)
    assert code == 0 and said.count("complete and undamaged") == 1
    monkeypatch.chdir(tmp_path)
    assert ask("download", place)[0] == 0
    assert (tmp_path / place.rpartition("/")[2] / "sub/weights").read_text() == weights
    folder = server.folder / "root" / place.lstrip("/")
    (next(folder.rglob("weights"))).write_text("weights of 6")
    code, said = ask("verify", place)
    assert code == 65 and "sub/weights is damaged" in said
    next(folder.rglob("weights")).unlink()
    assert "sub/weights is missing" in ask("download", place)[1]


def test_a_step_that_is_named_is_shown_and_a_job_is_not(ask: Callable[..., tuple[int, str]]) -> None:
    code, said = ask("list", "/checkpoints/step-00000005")
    assert code == 0 and said.splitlines()[1].split()[:5] == ["step", "5", "1", "12", "yes"]
    code, said = ask("verify", "/checkpoints/step-00000006")
    assert code == 66 and "nothing is committed at https://" in said and "step-00000006" in said
    for command in ("list", "verify", "download"):
        for place in ("", "/checkpoints"):
            code, said = ask(command, place)
            assert code == 67 and "StorageNotListable" in said and "/root/checkpoints/step-00000100" in said
            assert len(said.splitlines()) == 1


def test_options_of_another_store_are_refused(ask: Callable[..., tuple[int, str]]) -> None:
    with pytest.raises(SystemExit):
        ask("verify", "/model", "--endpoint", "https://s3.example.com")
