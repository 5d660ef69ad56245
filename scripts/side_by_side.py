"""Run slow steps side by side and show each one's time: what a person who waits wants to know.

Steps are functions that run commands; a step starts when the ones it needs are done. The first failure ends the others
and is the only thing that is reported. Everything started here ends with us: on Ctrl-C too.
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

TICK = 0.1
"""Seconds between two looks at the steps."""
GRACE = 10
"""Seconds that a command has to end by itself."""


class StepFailed(Exception):
    """A step could not be done; the message is one or a few lines for a person."""


@dataclass
class Step:
    """Something slow. `run` gets a Commands to start programs with; `after` names steps that must be done before."""

    name: str
    run: Callable[[Commands], None]
    after: tuple[str, ...] = ()
    started: float | None = None
    ended: float | None = None

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        if self.started is None:
            return 0.0
        return (self.ended or time.monotonic()) - self.started


@dataclass
class Commands:
    """Starts programs in process groups of their own, remembers them, and can end all of them."""

    log: Path
    running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    ending: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, argv: Sequence[str | Path], *, env: dict[str, str] | None = None) -> None:
        """Run a command to its end, output to the log. StepFailed with the last lines it wrote."""
        log = self.log / f"{Path(argv[0]).stem}-{threading.get_ident()}-{time.monotonic_ns()}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as out:
            with self._lock:
                if self.ending.is_set():
                    raise StepFailed("interrupted")
                process = subprocess.Popen(
                    [str(part) for part in argv], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                    env={**os.environ, **(env or {})}, start_new_session=True,
                )  # fmt: skip
                self.running.add(process)
            code = process.wait()
        with self._lock:
            self.running.discard(process)
        if code != 0:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise StepFailed("\n".join(lines[-5:]) or f"{argv[0]} ended with {code}")

    def end(self) -> None:
        """End every program that was started here, groups and all."""
        with self._lock:
            self.ending.set()
            processes = list(self.running)
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            deadline = time.monotonic() + GRACE
            for process in processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))


def run_all(steps: Sequence[Step], log: Path, console: Console, *, at_once: int = 4) -> None:
    """Do all steps, as many side by side as their order and `at_once` allow. StepFailed names the step that failed."""
    commands = Commands(log)
    pending, done = list(steps), set[str]()
    futures: dict[Future[None], Step] = {}
    pool = ThreadPoolExecutor(at_once)
    try:
        with _shown(steps, console) as refresh:
            while pending or futures:
                for step in [one for one in pending if done.issuperset(one.after)]:
                    pending.remove(step)
                    futures[pool.submit(_timed, step, commands)] = step
                finished, _ = wait(futures, timeout=TICK, return_when=FIRST_COMPLETED)
                for future in finished:
                    _collect(futures.pop(future), future, console)
                done.update(one.name for one in steps if one.ended)
                refresh()
    finally:
        commands.end()
        pool.shutdown(wait=True, cancel_futures=True)


def _timed(step: Step, commands: Commands) -> None:
    step.started = time.monotonic()
    step.run(commands)
    step.ended = time.monotonic()


def _collect(step: Step, future: Future[None], console: Console) -> None:
    error = future.exception()
    if isinstance(error, StepFailed):
        raise StepFailed(f"{step.name}: {error}") from None
    if error is not None:
        raise error
    console.print(f"  [green]✓[/] {step.name} [dim]{step.seconds:.1f} s[/]", highlight=False)


@contextlib.contextmanager
def _shown(steps: Sequence[Step], console: Console):  # type: ignore[no-untyped-def]  # yields a function
    """The steps under way, with their times, below what is printed; nothing where there is no terminal."""
    if not console.is_terminal:
        yield lambda: None
        return

    def table() -> Table:
        grid = Table.grid(padding=(0, 1))
        for step in steps:
            if step.started and not step.ended:
                grid.add_row("  [yellow]…[/]", step.name, f"[dim]{step.seconds:.0f} s[/]")
        return grid

    with Live(table(), console=console, refresh_per_second=4, transient=True) as live:
        yield lambda: live.update(table())
