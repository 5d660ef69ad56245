"""Measures whether the processes of the ranks work, from outside. A rank that hangs in a system call or in a library cannot report it.

Loading a model sends no heartbeats, and its duration is unknown. But a process that loads computes, reads files, or waits for pages of
mapped files. A process that waits for a dead file server does none of these.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune_trainer import processes

MIN_CPU_SHARE = 0.05
"""Minimum share of a core. The polling threads of a rank that waits use about 0.01."""
MIN_BYTES_PER_SECOND = 16_384
MIN_FAULTS_PER_SECOND = 1.0
LONGEST_WINDOW_SECONDS = 30.0
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Work:
    """Work of processes since their start."""

    cpu_seconds: float = 0.0
    bytes_moved: int = 0
    """Bytes that were read and written, from disks, network file systems and caches."""
    faults: int = 0
    """Pages of mapped files that were read."""
    is_blocked: bool = False
    """Whether a thread waits in the kernel for a device or a network file system, and cannot be interrupted."""

    def __add__(self, other: Work) -> Work:
        return Work(
            self.cpu_seconds + other.cpu_seconds, self.bytes_moved + other.bytes_moved, self.faults + other.faults, self.is_blocked or other.is_blocked,
        )  # fmt: skip

    def is_much_more_than(self, before: Work, seconds: float) -> bool:
        """Whether the processes worked in the `seconds` since `before`."""
        return (
            self.cpu_seconds - before.cpu_seconds > MIN_CPU_SHARE * seconds
            or self.bytes_moved - before.bytes_moved > MIN_BYTES_PER_SECOND * seconds
            or self.faults - before.faults > MIN_FAULTS_PER_SECOND * seconds
        )  # fmt: skip


def work_of_process(pid: int) -> Work:
    """Return the work of a process with its threads and its ended children; no work if the process has ended."""
    folder, moved, is_blocked = Path(f"/proc/{pid}"), 0, False
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        with contextlib.suppress(OSError, ValueError):
            numbers = dict(line.split(": ") for line in (folder / "io").read_text().splitlines())
            moved = sum(int(numbers[name]) for name in ("rchar", "wchar", "read_bytes"))
        for thread in (folder / "task").iterdir():
            with contextlib.suppress(OSError, IndexError):  # the thread has ended
                is_blocked = is_blocked or (thread / "stat").read_text().rpartition(")")[2].split()[0] == "D"
        # With the children that have ended. The kernel adds their bytes to those of the parent, too. Without them, the end of a child would
        # look like negative work, and short children would not count at all.
        ticks, faults = sum(map(int, fields[11:15])), int(fields[9]) + int(fields[10])
        return Work(ticks / TICKS_PER_SECOND, moved, faults, is_blocked)
    return Work()


def work_of_descendants() -> Work:
    """Return the work of all running descendants of this process."""
    return sum((work_of_process(pid) for pid in processes.descendants()), Work())


class WorkWatch:
    """Finds how long the ranks have not worked."""

    def __init__(self, measure: Callable[[], Work] = work_of_descendants) -> None:
        self._measure = measure
        self._before: tuple[float, Work] | None = None
        self._worked_at = 0.0
        self._is_blocked = False

    def restart(self) -> None:
        """Discard earlier measurements."""
        self._before = None

    def idle_seconds(self, window_seconds: float) -> float:
        """Return the seconds since the ranks last worked. Measures once in each window, which is at most 30 s long."""
        now = time.monotonic()
        if self._before is None:
            self._before, self._worked_at, self._is_blocked = (now, self._measure()), now, True
            return 0.0
        measured_at, before = self._before
        seconds = now - measured_at
        if seconds >= min(window_seconds, LONGEST_WINDOW_SECONDS):
            work = self._measure()
            if work.is_much_more_than(before, seconds):
                self._worked_at, self._is_blocked = now, True
            self._is_blocked = self._is_blocked and work.is_blocked
            self._before = (now, work)
        return now - self._worked_at

    @property
    def was_blocked(self) -> bool:
        """Whether a thread was blocked at every measurement since the ranks last worked."""
        return self._is_blocked
