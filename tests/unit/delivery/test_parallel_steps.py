"""A step runs after the steps that it needs and in parallel with the others, and all processes are stopped when a step fails."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from parallel_steps import Commands, Step, StepFailed, run_all
from rich.console import Console


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO())


def test_step_starts_after_the_steps_that_it_depends_on(tmp_path: Path, console: Console) -> None:
    order: list[str] = []
    steps = [
        Step("last", lambda _: order.append("last"), required_steps=("first", "second")),
        Step("second", lambda _: order.append("second"), required_steps=("first",)),
        Step("first", lambda _: order.append("first")),
    ]
    run_all(steps, tmp_path, console)
    assert order == ["first", "second", "last"]
    assert all(step.ended_at is not None for step in steps)


def test_independent_steps_run_at_the_same_time(tmp_path: Path, console: Console) -> None:
    barrier = threading.Barrier(2, timeout=30)
    run_all([Step(name, lambda _: barrier.wait()) for name in ("a", "b")], tmp_path, console)
    assert not barrier.broken


def test_first_failure_stops_the_other_steps_and_is_the_only_message(tmp_path: Path, console: Console) -> None:
    pid_file = tmp_path / "pid"
    os.mkfifo(pid_file)
    pids: list[int] = []

    def fail(command: Commands) -> None:
        pids.append(int(pid_file.read_text()))
        command(["sh", "-c", "echo first; echo second; exit 3"])

    long_step = Step("long", lambda command: command(["sh", "-c", f"echo $$ > {pid_file}; exec sleep 1000"]))
    with pytest.raises(StepFailed, match="^broken: first\nsecond$"):
        run_all([long_step, Step("broken", fail)], tmp_path / "log", console)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_no_command_starts_after_stop_all_was_called(tmp_path: Path) -> None:
    commands = Commands(tmp_path)
    commands.stop_all()
    with pytest.raises(StepFailed, match="interrupted"):
        commands(["true"])


def test_interrupted_steps_leave_no_process(tmp_path: Path, root: Path) -> None:
    """After Ctrl-C, run_all stops the programs of the running steps, and only then returns."""
    fifo = tmp_path / "pid"
    os.mkfifo(fifo)
    script = (
        "import sys, signal; from pathlib import Path; from rich.console import Console\n"
        f"sys.path.insert(0, {str(root / 'scripts')!r})\n"
        "from parallel_steps import Step, run_all\n"
        f"slow = Step('slow', lambda command: command(['sh', '-c', 'echo $$ > {fifo}; exec sleep 1000']))\n"
        f"run_all([slow], Path({str(tmp_path / 'log')!r}), Console())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    pid = int(fifo.read_text())
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
