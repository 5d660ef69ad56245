"""`python -m finetune_trainer.storage`: list, verify, download."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from finetune_api.pod import StoreTarget
from finetune_trainer.checkpoint.address import JobAddress, parse_address
from finetune_trainer.checkpoint.manifest import Manifest, checkpoint_folder_key
from finetune_trainer.checkpoint.tree import CheckpointTree
from finetune_trainer.storage.__main__ import main
from finetune_trainer.storage.roots import open_store
from web_server import WebServer

JOB_URI = "s3://bucket/prefix/team/job/uid"


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        (JOB_URI, JobAddress(JOB_URI)),
        (f"{JOB_URI}/", JobAddress(JOB_URI)),
        (f"{JOB_URI}/checkpoints", JobAddress(JOB_URI)),
        (f"{JOB_URI}/checkpoints/step-00000100", JobAddress(JOB_URI, 100)),
        (f"{JOB_URI}/checkpoints/step-00000100/a1-12345678/", JobAddress(JOB_URI, 100)),
        (f"{JOB_URI}/model", JobAddress(JOB_URI, is_model=True)),
        (f"{JOB_URI}/model/a2-12345678", JobAddress(JOB_URI, is_model=True)),
        ("s3://bucket/prefix/team/model/0a1b2c3d-0000", JobAddress("s3://bucket/prefix/team/model/0a1b2c3d-0000")),
        (
            "s3://bucket/prefix/team/model/0a1b2c3d-0000/model",
            JobAddress("s3://bucket/prefix/team/model/0a1b2c3d-0000", is_model=True),
        ),
        ("s3://bucket/model/team/job/uid", JobAddress("s3://bucket/model/team/job/uid")),
        ("https://host/uid/model/?sig=a/b", JobAddress("https://host/uid?sig=a/b", is_model=True)),
        ("https://host/uid/checkpoints/step-00000100/a1-12345678?sig", JobAddress("https://host/uid?sig", 100)),
        ("https://host/uid?sig", JobAddress("https://host/uid?sig")),
    ],
)
def test_an_address_is_parsed(uri: str, address: JobAddress) -> None:
    assert parse_address(uri) == address


@pytest.fixture
def root(tmp_path: Path) -> str:
    return commit_checkpoints_and_model(tmp_path, tmp_path / "root")


def commit_checkpoints_and_model(tmp_path: Path, folder: Path) -> str:
    """Commit two checkpoints and a model below `folder`, and return the URI."""
    tree = CheckpointTree(open_store(StoreTarget(uri=f"file://{folder}")))
    for step in (5, 10, None):
        staged_folder = tmp_path / f"staged-{step}"
        (staged_folder / "sub").mkdir(parents=True)
        (staged_folder / "sub" / "weights").write_text(f"weights of {step}")
        files = tree.upload(checkpoint_folder_key(step), "a1-00000000", staged_folder)
        tree.commit(checkpoint_folder_key(step), Manifest(step=step or 10, incarnation="a1-00000000", files=files))
    tree.mark_healthy(5)
    return f"file://{folder}"


def test_list_prints_steps_and_model(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", root]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[:5] for line in lines[:2]] == [
        ["step", "10", "1", "13", "unknown"],
        ["step", "5", "1", "12", "yes"],
    ]
    assert lines[2].split()[0] == "model" and lines[2].endswith(f"{root}/model/a1-00000000")


def test_verify_names_the_damaged_file(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", root]) == 0
    assert capsys.readouterr().out.count("complete and undamaged") == 3
    Path(root.removeprefix("file://"), "checkpoints/step-00000005/a1-00000000/sub/weights").write_text("weights of 6")
    assert main(["verify", root]) == 65
    assert "step-00000005/a1-00000000/sub/weights is damaged" in capsys.readouterr().err
    assert main(["verify", f"{root}/checkpoints/step-00000010"]) == 0


def test_download_writes_the_model_or_the_named_step(root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", root, "--to", str(tmp_path / "a")]) == 0
    assert (tmp_path / "a/sub/weights").read_text() == "weights of None"
    assert main(["download", f"{root}/checkpoints/step-00000005/a1-00000000", "--to", str(tmp_path / "b")]) == 0
    assert (tmp_path / "b/sub/weights").read_text() == "weights of 5"


def test_a_damaged_download_is_not_left_on_disk(root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path(root.removeprefix("file://"), "model/a1-00000000/sub/weights").write_text("weights of Nome")
    assert main(["download", root, "--to", str(tmp_path / "a")]) == 65
    assert "sub/weights is damaged" in capsys.readouterr().err
    assert not (tmp_path / "a/sub/weights").exists()


def test_an_address_without_a_commit_ends_with_66(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", f"file://{tmp_path}/nothing"]) == 66
    assert "NothingCommitted" in capsys.readouterr().err


SECRET_QUERY = "?signature=hidden/word"


@pytest.fixture
def run_on_web_server(server: WebServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Return a function that runs a command with an https URL of the storage. The function returns the command's exit code and output."""
    commit_checkpoints_and_model(tmp_path, server.folder / "root")

    def run_command(command: str, path: str, *further_arguments: str) -> tuple[int, str]:
        exit_code = main([command, f"{server.url}/root{path}{SECRET_QUERY}", "--ca-bundle", server.ca, *further_arguments])
        output = "".join(capsys.readouterr())
        assert "hidden" not in output
        return exit_code, output

    return run_command


@pytest.mark.parametrize(
    ("path", "expected_weights"),
    [
        ("/checkpoints/step-00000005", "weights of 5"),
        ("/checkpoints/step-00000010/a1-00000000", "weights of 10"),
        ("/model", "weights of None"),
        ("/model/a1-00000000", "weights of None"),
    ],
)
def test_a_checkpoint_or_model_on_a_web_server_is_verified_and_downloaded(
    run_on_web_server: Callable[..., tuple[int, str]],
    server: WebServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    expected_weights: str,
) -> None:
    exit_code, output = run_on_web_server("verify", path)
    assert exit_code == 0 and output.count("complete and undamaged") == 1
    monkeypatch.chdir(tmp_path)
    assert run_on_web_server("download", path)[0] == 0
    assert (tmp_path / path.rpartition("/")[2] / "sub/weights").read_text() == expected_weights
    folder = server.folder / "root" / path.lstrip("/")
    (next(folder.rglob("weights"))).write_text("weights of 6")
    exit_code, output = run_on_web_server("verify", path)
    assert exit_code == 65 and "sub/weights is damaged" in output
    next(folder.rglob("weights")).unlink()
    assert "sub/weights is missing" in run_on_web_server("download", path)[1]


def test_on_a_web_server_one_step_can_be_listed_but_not_a_whole_job(run_on_web_server: Callable[..., tuple[int, str]]) -> None:
    exit_code, output = run_on_web_server("list", "/checkpoints/step-00000005")
    assert exit_code == 0 and output.splitlines()[1].split()[:5] == ["step", "5", "1", "12", "yes"]
    exit_code, output = run_on_web_server("verify", "/checkpoints/step-00000006")
    assert exit_code == 66 and "nothing is committed at https://" in output and "step-00000006" in output
    for command in ("list", "verify", "download"):
        for path in ("", "/checkpoints"):
            exit_code, output = run_on_web_server(command, path)
            assert exit_code == 67 and "StorageNotListable" in output and "/root/checkpoints/step-00000100" in output
            assert len(output.splitlines()) == 1


def test_options_of_another_store_are_refused(run_on_web_server: Callable[..., tuple[int, str]]) -> None:
    with pytest.raises(SystemExit):
        run_on_web_server("verify", "/model", "--endpoint", "https://s3.example.com")
