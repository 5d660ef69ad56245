"""Exceptions and exit codes become failures with a code. If several ranks fail, the root cause is selected."""

from __future__ import annotations

import errno
import signal

import pytest
from finetune_api.errors import DataError, FineTuneError, InternalError, PeerError
from finetune_api.names import FailureClass
from finetune_trainer.failure import (
    RankFailure,
    classify_error,
    failure_from_exit_code,
    failure_from_message,
    root_cause,
)


class DistStoreError(RuntimeError):
    """A class with the same name as the exception of torch."""


class OutOfMemoryError(RuntimeError):
    """A class with the same name as the exception of torch."""


@pytest.mark.parametrize(
    ("error", "code", "exit_code", "origin"),
    [
        (DataError("DatasetEmpty", "x"), "DatasetEmpty", 65, True),
        (OutOfMemoryError("CUDA out of memory. Tried"), "GpuMemory", 71, True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "HostMemory", 71, True),
        (MemoryError(), "HostMemory", 71, True),
        (DistStoreError("wait timeout"), "PeerLost", 74, False),
        (RuntimeError("[gloo] Connection closed by peer"), "PeerLost", 74, False),
        (ConnectionResetError("Connection reset by peer"), "PeerLost", 74, False),
        (PeerError("StartsDiffer", "x"), "StartsDiffer", 74, False),
        (OSError(errno.ENOSPC, "No space left on device"), "LocalDiskFull", 69, True),
        (
            RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0: file write failed"),
            "LocalDiskFull",
            69,
            True,
        ),
        (
            Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
            "LocalDiskFull",
            69,
            True,
        ),
        (
            RuntimeError("unable to write to file </torch_71_2860184014_0>: No space left on device (28)"),
            "SharedMemoryFull",
            74,
            True,
        ),
        (
            RuntimeError(
                "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
                "RuntimeError: unable to write to file </torch_71_2860184014_0>: No space left on device (28)"
            ),
            "SharedMemoryFull",
            74,
            True,
        ),
        (OSError(errno.ENOSPC, "No space left on device", "/dev/shm/psm_1"), "SharedMemoryFull", 74, True),
        (
            OSError(errno.ENOSPC, "No space left on device", "/work/torch_1/model.safetensors"),
            "LocalDiskFull",
            69,
            True,
        ),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/usr/bin/c++"), "InstallationBroken", 78, True),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "ninja"), "InstallationBroken", 78, True),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/work/model.safetensors"), "TrainerCrashed", 70, True),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/cc"), "TrainerCrashed", 70, True),
        (ModuleNotFoundError("No module named 'bitsandbytes'", name="bitsandbytes"), "InstallationBroken", 78, True),
        (ModuleNotFoundError("No module named 'my_rewards'", name="my_rewards"), "TrainerCrashed", 70, True),
        (ImportError("libcudart.so.12: cannot open shared object file: No such file or directory"), "InstallationBroken", 78, True),
        (OSError("libnccl.so.2: cannot open shared object file: No such file or directory"), "InstallationBroken", 78, True),
        (RuntimeError("CUDA driver version is insufficient for CUDA runtime version"), "NodeDriverUnusable", 74, True),
        (
            DistStoreError("NCCL error: remote process exited. Last error: libnccl-net.so: cannot open shared object file"),
            "PeerLost",
            74,
            False,
        ),
        (RuntimeError("Failed to find C compiler. Please specify via CC environment variable"), "InstallationBroken", 78, True),
        (ValueError("what"), "TrainerCrashed", 70, True),
    ],
)
def test_an_exception_is_classified(error: Exception, code: str, exit_code: int, origin: bool) -> None:
    parsed, own = classify_error(error)
    assert (parsed.code, parsed.exit_code, own) == (code, exit_code, origin)


@pytest.mark.parametrize(
    ("code", "host_memory", "name", "exit_code", "origin"),
    [
        (-signal.SIGKILL, False, "RankKilled", 74, True),
        (-signal.SIGKILL, True, "HostMemory", 71, True),
        (-signal.SIGTERM, False, "RankKilled", 74, False),
        (-signal.SIGABRT, False, "RankKilled", 74, True),
        (-signal.SIGSEGV, False, "RankCrashed", 70, True),
        (-signal.SIGBUS, False, "RankKilled", 74, True),
        (72, False, "RankFailed", 72, True),
        (1, False, "RankCrashed", 70, True),
    ],
)
def test_an_exit_code_alone_is_classified(code: int, host_memory: bool, name: str, exit_code: int, origin: bool) -> None:
    parsed = failure_from_exit_code(3, code, is_host_out_of_memory=host_memory)
    assert (parsed.error.code, parsed.error.exit_code, parsed.is_origin, parsed.rank) == (name, exit_code, origin, 3)


def make_failure(code: int, *, origin: bool = True, time_ns: int = 0, is_reported: bool = True) -> RankFailure:
    parsed = failure_from_message(
        {"exitCode": code, "code": f"C{code}", "message": "m", "origin": origin, "timeNs": time_ns}
    )
    return RankFailure(parsed.error, 0, None, origin, time_ns, is_reported)


@pytest.mark.parametrize(
    ("failures", "expected_exit_code"),
    [
        ([make_failure(74, origin=False), make_failure(72)], 72),
        ([make_failure(70), make_failure(65)], 65),
        ([make_failure(74), make_failure(71)], 71),
        ([make_failure(74, origin=False, time_ns=1), make_failure(74, time_ns=2)], 74),
        ([make_failure(70, time_ns=2), make_failure(72, time_ns=3)], 72),
    ],
)
def test_the_root_cause_is_reported(failures: list[RankFailure], expected_exit_code: int) -> None:
    cause = root_cause(failures)
    assert cause is not None and cause.error.exit_code == expected_exit_code and cause.is_origin
    assert root_cause([]) is None


def test_the_earlier_of_equal_failures_is_reported() -> None:
    cause = root_cause([make_failure(70, time_ns=2), make_failure(70, time_ns=1)])
    assert cause is not None and cause.time_ns == 1


def test_a_message_keeps_its_class_and_loses_unpaired_surrogates() -> None:
    parsed = failure_from_message(
        {"exitCode": 77, "code": "X", "message": "a\udcffb", "failureClass": "Model", "rank": 2}
    )
    assert isinstance(parsed.error, FineTuneError) and parsed.error.failure_class is FailureClass.MODEL
    assert (parsed.error.message, parsed.rank) == ("a?b", 2)
    assert isinstance(failure_from_message({"exitCode": 200}).error, InternalError)
