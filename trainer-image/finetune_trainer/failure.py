"""From whatever went wrong to one named failure: exceptions in ranks, exit codes of workers, several at once.

The rank that failed by itself is named, not the one that noticed: a rank that lost its peer says so (`origin` False), and
any rank with a reason of its own beats it. A code the user can act on beats one they cannot.
"""

from __future__ import annotations

import errno
import signal
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from finetune_api.errors import (
    ERROR_OF_CODE,
    FineTuneError,
    InternalError,
    MemoryExhaustedError,
    PeerError,
    StorageError,
)
from finetune_api.exits import EXIT_POLICIES
from finetune_api.names import ExitCode, FailureClass

PEER_TYPES = ("DistBackendError", "DistNetworkError", "DistStoreError", "DistError")
PEER_WORDS = (
    "connection closed by peer", "connection reset by peer", "connection refused", "broken pipe", "socket timeout", "gloo",
    "nccl", "connection was likely closed", "timed out waiting", "unable to connect to store", "application timeout",
)  # fmt: skip
MEMORY_WORDS = ("out of memory", "cuda error: out of memory", "defaultcpuallocator: can't allocate memory")


@dataclass(frozen=True)
class RankFailure:
    """A failure as one rank told it, or as its exit code shows it."""

    error: FineTuneError
    rank: int | None = None
    step: int | None = None
    origin: bool = True
    time_ns: int = 0
    told: bool = True
    """False: nobody said anything, only an exit code is known."""


DISK_FULL = ("No space left on device", "PytorchStreamWriter failed writing file")
"""What libraries that write weights say where no room is left: their exceptions carry no number."""
SHARED_MEMORY = ("</torch_", "/dev/shm")  # noqa: S108 -- names in messages
"""Files of shared memory, as torch and the system name them: where one finds no room, the disk has nothing to do with it."""


def local_disk_full() -> StorageError:
    """69: whoever writes to the pod's own disk finds no room."""
    return StorageError(
        "LocalDiskFull", "the pod's local disk is full", hint="raise resources.ephemeralStorage, or checkpoint less often"
    )  # fmt: skip


def classify(error: BaseException) -> tuple[FineTuneError, bool]:
    """The named failure for an exception in a rank, and whether it is this rank's own (False: a peer's)."""
    if isinstance(error, FineTuneError):
        return error, not isinstance(error, PeerError)
    name, text = type(error).__name__, str(error).lower()
    if name == "OutOfMemoryError" or isinstance(error, MemoryError) or any(word in text for word in MEMORY_WORDS):
        return _memory(error, name), True
    if name in PEER_TYPES or (isinstance(error, RuntimeError | ConnectionError) and any(w in text for w in PEER_WORDS)):
        return PeerError(
            "PeerLost", f"a collective failed: {_first_line(error)}", hint="see the other ranks' logs"
        ), False
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or any(word in str(error) for word in DISK_FULL):
        return _shared_memory_full() if any(file in str(error) for file in SHARED_MEMORY) else local_disk_full(), True
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else ""
    return InternalError(
        "TrainerCrashed", f"{name}: {_first_line(error)}{where}", hint="the traceback is in the pod's log"
    ), True


def _memory(error: BaseException, name: str) -> MemoryExhaustedError:
    if isinstance(error, MemoryError) or "cpuallocator" in str(error).lower():
        return MemoryExhaustedError(
            "HostMemory", f"the pod's memory is exhausted: {_first_line(error)}", hint="raise resources.memory"
        )
    return MemoryExhaustedError(
        "GpuMemory", f"GPU memory is exhausted: {_first_line(error)}",
        hint="lower training.batchSizePerDevice or dataset.maxSequenceLength, or use qlora",
    )  # fmt: skip


def _shared_memory_full() -> PeerError:
    """74, as where the system kills for the same: 71 would make batches smaller, and hint at the GPU."""
    return PeerError(
        "SharedMemoryFull", "the pod's shared memory, /dev/shm, is full", hint="raise resources.sharedMemory"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:1000]


def from_message(message: dict[str, Any]) -> RankFailure:
    """What a rank said on its channel."""
    code = int(message.get("exitCode", ExitCode.INTERNAL))
    kind = ERROR_OF_CODE.get(code, InternalError)
    given = message.get("failureClass")
    failure_class = FailureClass(given) if given in list(FailureClass) else EXIT_POLICIES[kind.exit_code].failure_class
    hint = message.get("hint")
    error = kind(
        str(message.get("code", "Unknown")),
        printable(str(message.get("message", ""))),
        hint=printable(hint) if hint else None,
        failure_class=failure_class,
    )
    return RankFailure(
        error,
        message.get("rank"),
        message.get("step"),
        bool(message.get("origin", True)),
        int(message.get("timeNs", 0)),
    )


def printable(text: str) -> str:
    """Text that can be written as UTF-8: half characters, as libraries' messages may hold, are replaced."""
    return text.encode(errors="replace").decode()


def from_exit_code(rank: int, code: int, *, host_memory: bool = False) -> RankFailure:
    """What an exit code alone says. `host_memory`: the kernel killed for memory in this pod."""
    if code < 0:
        name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
        return RankFailure(_killed(rank, -code, name, host_memory), rank, told=False, origin=-code != signal.SIGTERM)
    kind = ERROR_OF_CODE.get(code)
    if kind is not None and code != ExitCode.INTERNAL:
        return RankFailure(kind("RankFailed", f"rank {rank} ended with {code}"), rank, told=False)
    return RankFailure(
        InternalError("RankCrashed", f"rank {rank} ended with exit code {code} and gave no reason", hint="see the pod's log"),
        rank, told=False,
    )  # fmt: skip


def _killed(rank: int, number: int, name: str, host_memory: bool) -> FineTuneError:
    if number == signal.SIGKILL and host_memory:
        return MemoryExhaustedError(
            "HostMemory", f"rank {rank} was killed because the pod's memory is exhausted", hint="raise resources.memory"
        )
    if number == signal.SIGBUS:
        return PeerError(
            "RankKilled", f"rank {rank} was killed by SIGBUS", hint="raise resources.sharedMemory: /dev/shm may be full"
        )
    if number in (signal.SIGSEGV, signal.SIGILL, signal.SIGFPE):
        return InternalError("RankCrashed", f"rank {rank} crashed with {name}", hint="see the pod's log")
    return PeerError("RankKilled", f"rank {rank} was killed by {name}")


def root_cause(failures: Iterable[RankFailure]) -> RankFailure | None:
    """The one failure that is named, of several: an own reason before a noticed one, told before guessed, early before late."""
    ordered = sorted(
        failures,
        key=lambda one: (not one.origin, EXIT_POLICIES[one.error.exit_code].precedence, not one.told, one.time_ns),
    )
    return ordered[0] if ordered else None
