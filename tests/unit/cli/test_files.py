"""Reading and writing files named by the user."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from finetune_cli.files import MAX_BYTES

from tests.unit.cli.conftest import JOB, RunCommand, WriteFile


def list_error_lines(stderr: str, folder: Path) -> list[str]:
    """Return the error lines of a command, without the path of the test's folder."""
    return [
        line.removeprefix("error: ").replace(f"{folder}/", "")
        for line in stderr.splitlines()
        if line.startswith("error: ")
    ]


ENV_CONFIG = "MODEL_NAME=gpt2\nTRAIN_DATA_PATH=s3://data/t.jsonl\nDATASET_TYPE=mcq_jsonl\n"


FLAT_CONFIG = "model: org/m\nlora_r: 8\n"


def test_unreadable_paths_are_refused(run_command: RunCommand, tmp_path: Path) -> None:
    (tmp_path / "a.env").write_bytes(bytes(range(256)))
    for command in ("import", "validate"):
        code, _, stderr = run_command(command, tmp_path / "a.env")
        assert (code, list_error_lines(stderr, tmp_path)) == (1, ["a.env: the file is not UTF-8 text"])
    assert run_command("validate", tmp_path)[2] == f"error: {tmp_path}: this is a folder, not a file\n"
    assert run_command("import", tmp_path / "b.env")[2] == f"error: {tmp_path}/b.env: there is no such file\n"
    assert "no importer recognises this configuration" in run_command("import", tmp_path)[2]


@pytest.mark.parametrize(
    ("name", "text"), [("a.env", ENV_CONFIG), ("a.yaml", FLAT_CONFIG), ("job.yaml", JOB)], ids=["env", "guide", "job"]
)
def test_byte_order_mark_and_carriage_returns_are_ignored(
    run_command: RunCommand, write_file: WriteFile, tmp_path: Path, name: str, text: str
) -> None:
    command = "validate" if text is JOB else "import"
    plain_outcome = run_command(command, write_file(name, text))
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert plain_outcome[0] == 0
    assert run_command(command, tmp_path / name) == plain_outcome


def test_dash_reads_standard_input(run_command: RunCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    def set_stdin(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    set_stdin(ENV_CONFIG)
    code, out, _ = run_command("import", "-")
    assert (code, "name: imported" in out) == (0, True)
    set_stdin(ENV_CONFIG + "EPOCHS=0\n")
    assert run_command("import", "-")[2].startswith("error: standard input:4: EPOCHS: ")
    set_stdin(JOB)
    assert run_command("validate", "-")[:2] == (0, "standard input: bot: ok\n")
    set_stdin("")
    assert run_command("validate", "-")[2] == "error: standard input: there is no FineTuneJob in the input\n"


def test_unwritable_path_is_reported(run_command: RunCommand, write_file: WriteFile, tmp_path: Path) -> None:
    words = ("init", "bot", "--model", "org/m", "--data", "s3://data/t.jsonl", "-o")
    assert run_command(*words, "/proc/nobody/x")[2].startswith("error: /proc/nobody/x cannot be written: ")
    assert run_command(*words, tmp_path)[2] == f"error: {tmp_path} already exists; choose another file\n"
    job = write_file("job.yaml", JOB.replace("s3://data/t.jsonl", "org/d"))
    assert run_command("run", job, "--local", "-o", "/proc/nobody")[2].startswith("error: /proc/nobody cannot be written: ")
    assert run_command("import", write_file("a.env", ENV_CONFIG), "-o", tmp_path)[2].endswith(
        f"error: {tmp_path} cannot be written: Is a directory; choose another path with -o\n"
    )


def test_too_large_file_is_refused(write_file: WriteFile, run_command: RunCommand) -> None:
    code, _, err = run_command("validate", write_file("big.yaml", "a: b\n" * (MAX_BYTES // 5 + 1)))
    assert (code, "larger than 4 MiB" in err) == (1, True)
