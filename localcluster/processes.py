"""Start processes, find them again, and end them with all their children.

There are no pid files, because they are wrong after a reboot and may be missing after a `kill -9`. Instead, an environment variable of each
process names its owner (a state folder). Child processes inherit the variable, and `list_owned_pids` searches `/proc` for it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from localcluster.errors import StartFailed

OWNER_VARIABLE = "FINETUNE_LOCALCLUSTER"
_PR_SET_PDEATHSIG = 1
_KERNEL_THREAD_FLAG = 0x00200000
STACK_START_FIELD = 25
"""Index of the start address of the stack in the result of `_read_stat`. The address is 0 inside `execve`."""
MAX_ENVIRONMENT_READS = 5
"""Number of times that an empty environment of a process is read, because the process can begin an `execve` between two reads."""
EXEC_WAIT_SECONDS = 1.0
"""How long `end_owned_processes` waits for processes inside `execve`, most of which belong to other programs."""
_libc = ctypes.CDLL(None, use_errno=True)
Condition = Callable[[], bool]


class Lifetime(Enum):
    """How long a server runs if it is not stopped."""

    UNTIL_PARENT_ENDS = "parent"
    """The kernel kills the server when the thread that started it ends, even if `kill -9` ends this thread. Tests and programs use this lifetime."""
    UNTIL_STOPPED = "detached"
    """The server keeps running after the thread that started it has ended. `localcluster up` uses this lifetime."""


@dataclass(frozen=True)
class Server:
    """A started process and its log file."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def check_running(self) -> None:
        """Raise StartFailed with the end of the log if the process has ended."""
        exit_code = self.process.poll()
        if exit_code is not None:
            raise StartFailed(f"{self.name} exited with {exit_code} while starting: {join_last_lines(self.log)}")


def spawn(
    name: str, argv: Sequence[str | Path], *, owner: Path, log: Path, lifetime: Lifetime,
    env: Mapping[str, str] | None = None, working_folder: Path | None = None, pass_fds: Sequence[int] = (),
) -> Server:
    """Start `argv` in a new session. Append the output of the process to `log`. The environment is `env` (default: the environment of this process) plus
    a variable that names `owner`.
    """
    parent_pid = os.getpid()

    def bind_to_parent() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:
            os._exit(0)

    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as log_stream:
        process = subprocess.Popen(
            [str(a) for a in argv], stdin=subprocess.DEVNULL, stdout=log_stream, stderr=subprocess.STDOUT,
            start_new_session=True, cwd=working_folder, pass_fds=pass_fds,
            env={**(os.environ if env is None else env), OWNER_VARIABLE: str(owner)},
            preexec_fn=bind_to_parent if lifetime is Lifetime.UNTIL_PARENT_ENDS else None,
        )
    return Server(name, process, log)


def join_last_lines(log_file: Path, line_count: int = 3) -> str:
    """Return the last lines of a log, joined into one line."""
    try:
        log_lines = log_file.read_text(errors="replace").splitlines()
    except OSError:
        return f"no log at {log_file}"
    return " | ".join(log_lines[-line_count:]) + f" (log: {log_file})"


@dataclass(frozen=True)
class FoundProcesses:
    """The pids of an owner's processes, and of processes inside `execve`, whose owner cannot be read yet.

    Inside `execve`, a process has neither an environment nor arguments for a moment, even if `subprocess.Popen` has already returned.
    """

    owned_pids: list[int]
    pids_in_exec: list[int]


def list_owned_pids(owner: Path) -> list[int]:
    """List the pids of all running processes of `owner`, including their children, except this process."""
    return find_processes(owner).owned_pids


def find_processes(owner: Path) -> FoundProcesses:
    """Search all processes except this one, as far as this user may read them."""
    owner_variable, found_processes = f"{OWNER_VARIABLE}={owner}".encode(), FoundProcesses([], [])
    for pid in {int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()} - {os.getpid()}:
        try:
            environment = read_environment(pid) if is_running_program(pid) else []
        except OSError:
            continue  # the process has ended or belongs to another user
        if environment is None:
            found_processes.pids_in_exec.append(pid)
        elif owner_variable in environment:
            found_processes.owned_pids.append(pid)
    return found_processes


def read_environment(pid: int) -> list[bytes] | None:
    """Return the environment of a process, or None if the process is inside `execve`. Errors: OSError if the process has ended or belongs to another user.

    Inside `execve`, the kernel first sets up the arguments, then the environment, and then the start of the stack (`create_elf_tables` and
    `load_elf_binary` in the kernel's sources). Until the end, the process can be interrupted for any time.
    """
    for _ in range(MAX_ENVIRONMENT_READS):
        stack_start = _read_stat(pid)[STACK_START_FIELD]
        if environment := Path(f"/proc/{pid}/environ").read_bytes():
            return environment.split(b"\0")
        if stack_start == "0":
            return None
    return []


def is_running_program(pid: int) -> bool:
    """Whether a process is running and is not a thread of the kernel. Errors: OSError if the process has ended."""
    state, *other_fields = _read_stat(pid)
    return state not in "ZX" and not int(other_fields[5]) & _KERNEL_THREAD_FLAG


def read_start_time(pid: int) -> str | None:
    """Return the start time of a process in clock ticks; None if it has ended. The start time distinguishes two processes for which the kernel
    has used the same pid.
    """
    try:
        stat_fields = _read_stat(pid)
    except OSError:
        return None
    return None if stat_fields[0] in "ZX" else stat_fields[19]


def _read_stat(pid: int) -> list[str]:
    """Return the fields of `/proc/PID/stat`, beginning with the third field (the state). Errors: OSError if the process has ended."""
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode().split()


def end_owned_processes(owner: Path, timeout_seconds: float = 20.0) -> int:
    """Kill all processes of `owner` and wait until they have ended. Returns the number of killed processes.

    If a killed process is the first process of a PID namespace, all other processes in this namespace have ended before it. The search is repeated,
    because a process may have started another process before it was killed. For at most `EXEC_WAIT_SECONDS`, this function also waits for processes inside
    `execve`.
    """
    start_time_by_pid: dict[int, str] = {}
    deadline, exec_deadline = time.monotonic() + timeout_seconds, time.monotonic() + EXEC_WAIT_SECONDS
    while True:
        found_processes = find_processes(owner)
        for pid in found_processes.owned_pids:
            if start_time := read_start_time(pid):
                start_time_by_pid[pid] = start_time
            kill(pid)
        now = time.monotonic()
        remaining_pids = [pid for pid, start_time in start_time_by_pid.items() if read_start_time(pid) == start_time]
        if remaining_pids or found_processes.owned_pids:
            exec_deadline = now + EXEC_WAIT_SECONDS
            if now > deadline:
                raise StartFailed(f"processes {remaining_pids or found_processes.owned_pids} of {owner} do not end after SIGKILL")
        elif not found_processes.pids_in_exec or now > exec_deadline:
            return len(start_time_by_pid)
        time.sleep(0.01)


def kill(pid: int) -> None:
    """Send SIGKILL to a process, and reap it if it is a child of this process. A process that has ended is not an error."""
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        return


def wait_until(description: str, condition: Callable[[], bool], *, servers: Sequence[Server], timeout: float) -> None:
    """Wait until `condition` returns true. Errors: StartFailed if one of `servers` ends, or after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        for server in servers:
            server.check_running()
        if time.monotonic() > deadline:
            log_summary = "; ".join(f"{s.name}: {join_last_lines(s.log, 1)}" for s in servers)
            raise StartFailed(f"still waiting for {description} after {timeout:.0f} s: {log_summary}")
        time.sleep(0.05)
