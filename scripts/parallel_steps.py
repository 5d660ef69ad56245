"""Run slow steps in parallel, and show how long each step takes.

A step is a function that runs commands. A step starts when the steps that it requires have ended. The first failure stops all other steps, and
only this failure is reported. `run_all` stops all started programs before it returns, even after Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

POLL_SECONDS = 0.1
TERMINATION_GRACE_SECONDS = 10
"""Seconds between SIGTERM and SIGKILL."""


class StepFailed(Exception):
    """A step failed. The message contains the last lines of the step's output."""


@dataclass
class Step:
    """A slow step.

    The function `run` gets a Commands object, which it calls to run programs. The step starts when the steps in `required_steps` have ended.
    """

    name: str
    run: Callable[[Commands], None]
    required_steps: tuple[str, ...] = ()
    started_at: float | None = None
    ended_at: float | None = None

    @property
    def seconds(self) -> float:
        """Duration of the step; while the step is running, the time since its start."""
        if self.started_at is None:
            return 0.0
        return (self.ended_at or time.monotonic()) - self.started_at


@dataclass
class Commands:
    """Runs programs in separate process groups, and can stop all of them."""

    log_folder: Path
    running_processes: set[subprocess.Popen[bytes]] = field(default_factory=set)
    stop_requested: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, argv: Sequence[str | Path], *, env: dict[str, str] | None = None) -> None:
        """Run a command and write its output to a log file. Errors: StepFailed with the last lines of the output."""
        log_file = self.log_folder / f"{Path(argv[0]).stem}-{threading.get_ident()}-{time.monotonic_ns()}.log"
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with log_file.open("wb") as out:
            with self._lock:
                if self.stop_requested.is_set():
                    raise StepFailed("interrupted")
                process = subprocess.Popen(
                    [str(word) for word in argv], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                    env={**os.environ, **(env or {})}, start_new_session=True,
                )  # fmt: skip
                self.running_processes.add(process)
            exit_code = process.wait()
        with self._lock:
            self.running_processes.discard(process)
        if exit_code != 0:
            log_lines = [line for line in log_file.read_text(errors="replace").splitlines() if line.strip()]
            raise StepFailed("\n".join(log_lines[-5:]) or f"{argv[0]} ended with {exit_code}")

    def stop_all(self) -> None:
        """Stop all running programs and their process groups: send SIGTERM, wait, then send SIGKILL."""
        with self._lock:
            self.stop_requested.set()
            processes = list(self.running_processes)
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal_number)
            deadline = time.monotonic() + TERMINATION_GRACE_SECONDS
            for process in processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))


def run_all(steps: Sequence[Step], log_folder: Path, console: Console, *, max_parallel: int = 4) -> None:
    """Run all steps, at most `max_parallel` at the same time. Errors: StepFailed with the name of the step."""
    commands = Commands(log_folder)
    pending_steps, ended_step_names = list(steps), set[str]()
    step_by_future: dict[Future[None], Step] = {}
    pool = ThreadPoolExecutor(max_parallel)
    try:
        with _show_progress(steps, console) as refresh:
            while pending_steps or step_by_future:
                for step in [step for step in pending_steps if ended_step_names.issuperset(step.required_steps)]:
                    pending_steps.remove(step)
                    step_by_future[pool.submit(_run_timed, step, commands)] = step
                finished_futures, _ = wait(step_by_future, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                for future in finished_futures:
                    _report_end(step_by_future.pop(future), future, console)
                ended_step_names.update(step.name for step in steps if step.ended_at)
                refresh()
    finally:
        commands.stop_all()
        pool.shutdown(wait=True, cancel_futures=True)


def _run_timed(step: Step, commands: Commands) -> None:
    step.started_at = time.monotonic()
    step.run(commands)
    step.ended_at = time.monotonic()


def _report_end(step: Step, future: Future[None], console: Console) -> None:
    error = future.exception()
    if isinstance(error, StepFailed):
        raise StepFailed(f"{step.name}: {error}") from None
    if error is not None:
        raise error
    console.print(f"  [green]✓[/] {step.name} [dim]{step.seconds:.1f} s[/]", highlight=False)


@contextlib.contextmanager
def _show_progress(steps: Sequence[Step], console: Console):  # type: ignore[no-untyped-def]  # yields a function
    """On a terminal, show the running steps and their durations below the printed lines. Yields a function that updates this display."""
    if not console.is_terminal:
        yield lambda: None
        return

    def render_table() -> Table:
        grid = Table.grid(padding=(0, 1))
        for step in steps:
            if step.started_at and not step.ended_at:
                grid.add_row("  [yellow]…[/]", step.name, f"[dim]{step.seconds:.0f} s[/]")
        return grid

    with Live(render_table(), console=console, refresh_per_second=4, transient=True) as live:
        yield lambda: live.update(render_table())
