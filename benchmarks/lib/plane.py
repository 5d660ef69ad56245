"""Run a control plane with raised client limits; measure the CPU time and memory of its processes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from localcluster import ControlPlane, build, components
from localcluster.processes import Server

CLIENT_LIMIT_FLAGS = ("--kube-api-qps=2000", "--kube-api-burst=4000")
"""Raised request limits. With the defaults (20 and 30 requests per second), the benchmark would only measure the limits."""
EXTRA_FLAGS_BY_PROGRAM = {
    "kube-controller-manager": [*CLIENT_LIMIT_FLAGS, "--concurrent-job-syncs=20"],
    "kube-scheduler": list(CLIENT_LIMIT_FLAGS),
    # No audit log: it records only writes to FineTuneJobs, so only the variant that creates FineTuneJobs would become slower.
    "kube-apiserver": ["--max-requests-inflight=2000", "--max-mutating-requests-inflight=1000", "--audit-log-path=", "--audit-policy-file="],
}
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class FastControlPlane(ControlPlane):
    """The local cluster's control plane with raised client limits, and a scheduler that can be started and stopped."""

    def __init__(self, state_dir: Path) -> None:
        super().__init__(state_dir)
        self.pids: dict[str, int] = {}

    def _spawn(self, name: str, argv: list[str]) -> Server:
        server = super()._spawn(name, [*argv, *EXTRA_FLAGS_BY_PROGRAM.get(name, [])])
        self.pids[name] = server.process.pid
        return server

    @contextlib.contextmanager
    def run_scheduler(self) -> Iterator[None]:
        """Run the scheduler while the `with` block runs. At other times, new pods are not bound to nodes."""
        server = self._spawn("kube-scheduler", components.make_scheduler_command(build.ensure_built(build.KUBE_PROGRAM), self.state_dir))
        try:
            yield
        finally:
            server.process.kill()
            server.process.wait()


@dataclass(frozen=True)
class CpuUsage:
    """The CPU seconds that each program has used at one moment."""

    seconds_by_program: dict[str, float]

    @classmethod
    def measure(cls, pids: dict[str, int]) -> CpuUsage:
        return cls({name: read_cpu_seconds(pid) for name, pid in pids.items()})

    def compute_seconds_since(self, earlier_usage: CpuUsage) -> dict[str, float]:
        """Return the CPU seconds that each program has used since `earlier_usage`."""
        return {name: round(used_seconds - earlier_usage.seconds_by_program.get(name, 0.0), 2) for name, used_seconds in self.seconds_by_program.items()}


def read_cpu_seconds(pid: int) -> float:
    """Return the CPU seconds (user and system) of a process and its reaped children; 0 if the process has ended."""
    try:
        stat_fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return sum(int(value) for value in stat_fields[11:15]) / TICKS_PER_SECOND


def read_memory_bytes(pid: int, field_name: str = "VmRSS") -> int:
    """Return the resident memory of a process in bytes. With the field `VmHWM`, return its maximum since the start of the process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field_name}:"):
            return int(line.split()[1]) * 1024
    return 0
