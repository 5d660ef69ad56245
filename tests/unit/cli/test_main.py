"""The program `finetune`: usage, help, exit codes, completion, bug reports, colours, unusual locales, and outputs that cannot be written."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from finetune_cli import main, output

from tests.unit.cli.conftest import JOB, RunCommand, WriteFile

TOKEN = "hf_" + "a1B2c3D4e5F6g7H8"


@pytest.mark.parametrize(
    "words",
    [("logs", "bot", "--rank", "-1"), ("rerun", "bot", "--from-checkpoint", "x")],
)
def test_option_out_of_range_is_wrong_usage(run_command: RunCommand, words: tuple[str, ...]) -> None:
    code, _, stderr = run_command(*words)
    assert (code, "Error: Invalid value for" in stderr) == (1, True)


def test_bug_prints_no_traceback_unless_requested(run_command: RunCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_with_secret(*words: object, **options: object) -> None:
        raise KeyError(TOKEN)

    monkeypatch.setattr(main, "app", fail_with_secret)
    code, out, stderr = run_command("get")
    assert (code, out) == (output.ERROR, "")
    assert stderr.startswith("error: this is a bug in finetune: KeyError in test_main.py:")
    assert ("Traceback" in stderr, TOKEN in stderr) == (False, False)
    monkeypatch.setitem(os.environ, main.TRACE_VARIABLE, "1")
    assert "Traceback" in run_command("get")[2]


def test_version_is_printed(run_command: RunCommand) -> None:
    code, out, _ = run_command("--version")
    assert (code, out.split()[0]) == (0, "finetune")


def test_wrong_usage_exits_with_1(run_command: RunCommand) -> None:
    assert run_command("nonsense")[0] == 1
    assert run_command("validate")[0] == 1


@pytest.mark.parametrize("command", sorted(main.COMMANDS))
def test_every_command_has_an_example(run_command: RunCommand, command: str) -> None:
    code, out, _ = run_command(command, "--help")
    assert code == 0
    assert f"Example: finetune {command}" in out


def test_help_imports_nothing_heavy() -> None:
    slow_modules = ("pydantic", "kubernetes", "hydra", "omegaconf", "boto3", "ruamel.yaml", "finetune_api")
    code = f"import sys; sys.argv = ['finetune']; import finetune_cli.main; print([m for m in {slow_modules!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_run_requires_local(run_command: RunCommand, write_file: WriteFile) -> None:
    assert "needs --local" in run_command("run", write_file("job.yaml", JOB))[2]


@pytest.mark.parametrize(
    ("typed", "candidates"),
    [
        ("ev", {"events"}),
        ("explain training.learn", {"training.learningRate"}),
        ("import --from h", {"hydra"}),
        ("rerun x --set method.lora.ra", {"method.lora.rank=", "method.lora.rankStabilized="}),
        ("get -o ", {"yaml", "json", "wide", "cost", "name"}),
    ],
)
def test_shell_completion_lists_candidates(typed: str, candidates: set[str]) -> None:
    words = ["finetune", *typed.split(" ")]
    environment = {
        **os.environ,
        "_FINETUNE_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    code = "from finetune_cli.main import app; app(prog_name='finetune')"
    if not words[-1]:
        environment["COMP_WORDS"] += "''"
    completed_process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert set(completed_process.stdout.split()) == candidates


def test_kubectl_completion_lists_candidates(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_FINETUNE_COMPLETE", "COMP_WORDS", "COMP_CWORD"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(sys, "argv", ["kubectl_complete-finetune", "status", "bot", "--wa"])
    main.kubectl_complete()
    assert capsys.readouterr().out.split() == ["--watch", ":4"]


def test_help_shows_the_program_name_as_the_user_typed_it(
    run_command: RunCommand, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/kubectl-finetune"])
    assert run_command("--help")[1].startswith("Usage: kubectl finetune [OPTIONS]")
    # Unless this variable is set, Typer looks for a shell among the parent processes, and in CI there may be none.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/kubectl-finetune", "--show-completion", "bash"])
    assert "_FINETUNE_COMPLETE=complete_bash" in run_command("--show-completion", "bash")[1]


def test_unknown_output_format_is_refused(run_command: RunCommand) -> None:
    assert (
        run_command("get", "-o", "table")[2] == "error: -o table: unknown output format; write one of yaml, json, wide, cost, name\n"
    )
    assert run_command("status", "bot", "-o", "wide")[2] == "error: -o wide: unknown output format; write one of yaml, json\n"
    assert "choose one" in run_command("status", "bot", "-o", "json", "--watch")[2]
    assert (
        run_command("checkpoints", "bot", "--verify", "-o", "json")[2]
        == "error: --verify and -o exclude each other: choose one of them\n"
    )


def test_colours_follow_no_color(tmp_path: Path) -> None:
    def run_on_terminal(**variables: str) -> str:
        """Run a failing command with a pseudo-terminal as stderr, and return the output."""
        environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
        command = [sys.executable, "-m", "finetune_cli", "validate", str(tmp_path / "none")]
        terminal, program_side = pty.openpty()
        with os.fdopen(program_side, "wb") as stderr:
            subprocess.run(command, stderr=stderr, env={**environment, "TERM": "xterm", **variables}, check=False)
        with os.fdopen(terminal, "rb") as terminal_output:
            return terminal_output.read1(1 << 16).decode()

    assert "\x1b[1;31merror: " in run_on_terminal()
    assert "\x1b[1;31m" not in run_on_terminal(NO_COLOR="1")


def test_output_is_utf8_in_any_locale(write_file: WriteFile, tmp_path: Path) -> None:
    other_path = write_file("b.yaml", JOB.replace('t.jsonl"', 't.jsonl", systemPrompt: ü'))
    completed_process = subprocess.run(
        [sys.executable, "-m", "finetune_cli", "diff", str(write_file("a.yaml", JOB)), str(other_path)],
        env={"PATH": "/usr/bin:/bin", "PYTHONIOENCODING": "ascii", "HOME": str(tmp_path)}, capture_output=True, check=False,
    )  # fmt: skip
    assert (completed_process.returncode, '"ü"' in completed_process.stdout.decode()) == (0, True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux")
def test_full_disk_is_reported() -> None:
    with Path("/dev/full").open("w") as full_device:
        completed_process = subprocess.run(
            [sys.executable, "-m", "finetune_cli", "explain", "training"],
            stdout=full_device,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (completed_process.returncode, completed_process.stderr) == (1, "error: standard output cannot be written: No space left on device\n")


def test_interrupt_during_imports_prints_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")
    command = [sys.executable, "-m", "finetune_cli", "--help"]
    path = os.pathsep.join([str(tmp_path), *(folder for folder in sys.path if folder)])
    completed_process = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert (completed_process.returncode, completed_process.stdout, completed_process.stderr) == (130, "", "")
