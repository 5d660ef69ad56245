"""Measures with `/proc` whether the processes of the ranks compute or read. A rank that hangs in a system call or in a library cannot report this itself.

A rank sends no heartbeats while it loads a model, and the duration of loading is unknown. But a process that loads a model either computes, reads
files, or waits for pages of mapped files. A process that waits for a dead file server does none of these three things.
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
"""A rank counts as working if it uses more than this share of a CPU core. The polling threads of a rank that only waits use about 0.01 of a core."""
MIN_BYTES_PER_SECOND = 16_384
MIN_FAULTS_PER_SECOND = 1.0
MAX_WINDOW_SECONDS = 30.0
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Work:
    """The CPU time used, bytes transferred and pages read by one or more processes since their start."""

    cpu_seconds: float = 0.0
    bytes_moved: int = 0
    """Bytes read from and written to disks, network file systems and caches."""
    page_fault_count: int = 0
    """Pages of mapped files that were read."""
    is_blocked: bool = False
    """Whether a thread waits in the kernel for a device or a network file system, and cannot be interrupted."""

    def __add__(self, other: Work) -> Work:
        return Work(
            self.cpu_seconds + other.cpu_seconds, self.bytes_moved + other.bytes_moved, self.page_fault_count + other.page_fault_count,
            self.is_blocked or other.is_blocked,
        )  # fmt: skip

    def shows_work_since(self, earlier_work: Work, seconds: float) -> bool:
        """Whether the processes worked in the `seconds` since `earlier_work` was measured."""
        return (
            self.cpu_seconds - earlier_work.cpu_seconds > MIN_CPU_SHARE * seconds
            or self.bytes_moved - earlier_work.bytes_moved > MIN_BYTES_PER_SECOND * seconds
            or self.page_fault_count - earlier_work.page_fault_count > MIN_FAULTS_PER_SECOND * seconds
        )  # fmt: skip


def measure_work(pid: int) -> Work:
    """Return the work of a process, including its threads and its ended children. If the process has ended, return an object without any work."""
    folder, moved_bytes, is_blocked = Path(f"/proc/{pid}"), 0, False
    with contextlib.suppress(OSError, ValueError, IndexError):
        stat_fields = (folder / "stat").read_text().rpartition(")")[2].split()
        with contextlib.suppress(OSError, ValueError):
            io_counters = dict(line.split(": ") for line in (folder / "io").read_text().splitlines())
            moved_bytes = sum(int(io_counters[name]) for name in ("rchar", "wchar", "read_bytes"))
        for thread in (folder / "task").iterdir():
            with contextlib.suppress(OSError, IndexError):  # The thread has ended.
                is_blocked = is_blocked or (thread / "stat").read_text().rpartition(")")[2].split()[0] == "D"
        # The kernel includes the bytes of ended children, so the CPU time and page faults of ended children are included too. Otherwise the end of a
        # child would look like negative work, and the work of short-lived children would not count.
        ticks, faults = sum(map(int, stat_fields[11:15])), int(stat_fields[9]) + int(stat_fields[10])
        return Work(ticks / TICKS_PER_SECOND, moved_bytes, faults, is_blocked)
    return Work()


def measure_work_of_descendants() -> Work:
    """Return the work of all running descendants of this process."""
    return sum((measure_work(pid) for pid in processes.descendants()), Work())


class WorkWatch:
    """Measures for how long the ranks have not worked."""

    def __init__(self, measure: Callable[[], Work] = measure_work_of_descendants) -> None:
        self._measure_work = measure
        self._last_measurement: tuple[float, Work] | None = None
        self._worked_at = 0.0
        self._was_always_blocked = False

    def restart(self) -> None:
        """Discard the earlier measurements, and begin to measure again at the next call of `measure_idle_seconds`."""
        self._last_measurement = None

    def measure_idle_seconds(self, window_seconds: float) -> float:
        """Return the seconds since the ranks last worked. The work is measured once in each window of `window_seconds` or 30 s, whichever is shorter."""
        now = time.monotonic()
        if self._last_measurement is None:
            self._last_measurement, self._worked_at, self._was_always_blocked = (now, self._measure_work()), now, True
            return 0.0
        measured_at, earlier_work = self._last_measurement
        window_duration_seconds = now - measured_at
        if window_duration_seconds >= min(window_seconds, MAX_WINDOW_SECONDS):
            work = self._measure_work()
            if work.shows_work_since(earlier_work, window_duration_seconds):
                self._worked_at, self._was_always_blocked = now, True
            self._was_always_blocked = self._was_always_blocked and work.is_blocked
            self._last_measurement = (now, work)
        return now - self._worked_at

    @property
    def was_blocked(self) -> bool:
        """Whether a thread was blocked at every measurement since the ranks last worked."""
        return self._was_always_blocked
