"""Exceptions and exit codes become failures with a code. If several ranks fail, the root cause is reported."""

from __future__ import annotations

import errno
import signal

import pytest
from finetune_api.errors import DataError, FineTuneError, InternalError, PeerError
from finetune_api.names import FailureClass
from finetune_trainer.failure import (
    RankFailure,
    choose_root_cause,
    classify_error,
    failure_from_exit_code,
    failure_from_message,
)


class DistStoreError(RuntimeError):
    """A class with the same name as an exception of torch."""


class OutOfMemoryError(RuntimeError):
    """A class with the same name as an exception of torch."""


@pytest.mark.parametrize(
    ("error", "code", "exit_code", "is_origin"),
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
        (ModuleNotFoundError("import of wandb halted; None in sys.modules", name="wandb"), "TrainerCrashed", 70, True),
        (ImportError("libcudart.so.12: cannot open shared object file: No such file or directory"), "InstallationBroken", 78, True),
        (OSError("libnccl.so.2: cannot open shared object file: No such file or directory"), "InstallationBroken", 78, True),
        (RuntimeError("CUDA driver version is insufficient for CUDA runtime version"), "NodeDriverUnusable", 74, True),
        (
            DistStoreError("NCCL error: remote process exited. Last error: libnccl-net.so: cannot open shared object file"),
            "PeerLost",
            74,
            False,
        ),
        (ValueError("what"), "TrainerCrashed", 70, True),
    ],
)
def test_an_exception_gets_its_code_and_its_origin(error: Exception, code: str, exit_code: int, is_origin: bool) -> None:
    failure, found_is_origin = classify_error(error)
    assert (failure.code, failure.exit_code, found_is_origin) == (code, exit_code, is_origin)


def set_cause(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


FAILED_EXTENSION_BUILD = """Error building extension 'deepspeed_shm_comm': [1/3] c++ -MMD -MF shm.o.d -c /opt/venv/comm/shm.cpp -o shm.o
FAILED: [code=127] shm.o
c++ -MMD -MF shm.o.d -c /opt/venv/comm/shm.cpp -o shm.o
/bin/sh: 1: c++: not found
ninja: build stopped: subcommand failed.
"""
BITSANDBYTES_MESSAGE = """
🚨 CUDA SETUP ERROR: Missing dependency: libnvJitLink.so.13 🚨

CUDA 13.x runtime libraries were not found in the LD_LIBRARY_PATH.

Original error: libnvJitLink.so.13: cannot open shared object file: No such file or directory

Native code method attempted to call: lib.cquantize_blockwise_fp16_nf4()"""


@pytest.mark.parametrize(
    ("error", "expected_text"),
    [
        (RuntimeError(FAILED_EXTENSION_BUILD), "the trainer image lacks the program c++: RuntimeError: /bin/sh: 1: c++: not found"),
        (RuntimeError("bash: line 1: nvcc: command not found"), "lacks the program nvcc"),
        (
            RuntimeError("Failed to find C compiler. Please specify via CC environment variable or set triton.knobs.build.impl."),
            "lacks a C compiler: RuntimeError: Failed to find C compiler",
        ),
        (
            RuntimeError("InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')\n\nSet TORCHDYNAMO_VERBOSE"),
            "lacks a C++ compiler",
        ),
        (RuntimeError("Ninja is required to load C++ extensions (pip install ninja to get it)"), "lacks the program ninja"),
        (RuntimeError("Unable to JIT load the cpu_adam op due to ninja not being installed."), "lacks the program ninja"),
        (OSError("CUDA_HOME environment variable is not set. Please set it to your CUDA install root."), "lacks the CUDA compiler nvcc"),
        (Exception("CUDA_HOME does not exist, unable to compile CUDA op(s)"), "lacks the CUDA compiler nvcc"),
        (RuntimeError(BITSANDBYTES_MESSAGE), "lacks the library libnvJitLink.so.13: RuntimeError: Original error: libnvJitLink.so.13: cannot open"),
        (
            ImportError("/lib/x86_64-linux-gnu/libm.so.6: version `GLIBC_2.38' not found (required by /opt/venv/lib/x.so)"),
            "lacks the library version GLIBC_2.38",
        ),
        (
            ImportError(
                "This modeling file requires the following packages that were not found in your environment: einops, flash_attn. "
                "Run `pip install einops flash_attn`"
            ),
            "lacks the Python package einops, flash_attn",
        ),
        (
            ImportError("\nLlamaConverter requires the protobuf library but it was not found in your environment. Check out the instructions on the"),
            "lacks the Python package protobuf",
        ),
        (
            ImportError("Using `bitsandbytes` 4-bit quantization requires bitsandbytes: `pip install -U bitsandbytes>=0.46.1`"),
            "lacks the Python package bitsandbytes: ImportError: Using",
        ),
        (ImportError("cannot import name 'x' from 'peft.utils' (/opt/peft/utils.py)", name="peft.utils"), "lacks a usable Python package peft"),
        (
            set_cause(
                ModuleNotFoundError("Could not import module 'LlamaForCausalLM'. Are this object's requirements defined correctly?"),
                OSError("libcudnn.so.9: cannot open shared object file: No such file or directory"),
            ),
            "lacks the library libcudnn.so.9",
        ),
    ],
    ids=[
        "c++", "nvcc", "Triton without C compiler", "torch.compile without C++ compiler", "ninja", "DeepSpeed without ninja", "nvcc of torch",
        "nvcc of DeepSpeed", "library of bitsandbytes", "C library", "packages of model code", "package of transformers", "package of a quantiser",
        "version of a package", "reason hidden by transformers",
    ],
)  # fmt: skip
def test_a_missing_part_of_the_image_is_a_final_failure_that_names_the_part(error: Exception, expected_text: str) -> None:
    failure, is_origin = classify_error(error)
    assert (failure.code, failure.exit_code, is_origin) == ("InstallationBroken", 78, True)
    assert expected_text in failure.message
    assert "status.resolved.image" in str(failure.hint)


@pytest.mark.parametrize(
    "message",
    [
        "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver from http://www.nvidia.com/",
        "libcuda.so.1: cannot open shared object file: No such file or directory",
        "libnvidia-ml.so.1: cannot open shared object file: No such file or directory",
    ],
)
def test_a_missing_gpu_driver_is_a_final_failure(message: str) -> None:
    failure, _ = classify_error(RuntimeError(message))
    assert (failure.code, failure.exit_code) == ("GpuDriverMissing", 78)
    assert "NVIDIA Container Toolkit" in str(failure.hint)


@pytest.mark.parametrize(
    ("message", "code", "exit_code"),
    [
        ("The NVIDIA driver on your system is too old (found version 11040).", "NodeDriverUnusable", 74),
        ("CUDA driver initialization failed, you might not have a CUDA gpu.", "NodeDriverUnusable", 74),
        ("Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized", "NodeDriverUnusable", 74),
        ("CUDA error: no CUDA-capable device is detected", "NodeDriverUnusable", 74),
        ("CUDA error: unspecified launch failure", "TrainerCrashed", 70),
        ("CUDA error: uncorrectable ECC error encountered", "TrainerCrashed", 70),
        ("Error building extension 'x': [1/2] c++ -c main.cpp\nmain.cpp:1:10: fatal error: Python.h: No such file or directory", "TrainerCrashed", 70),
        ("Command '['/usr/bin/gcc', '/tmp/tmpx/main.c']' returned non-zero exit status 1.", "TrainerCrashed", 70),
    ],
)
def test_failures_that_may_belong_to_one_node_are_retried(message: str, code: str, exit_code: int) -> None:
    failure, _ = classify_error(RuntimeError(message))
    assert (failure.code, failure.exit_code) == (code, exit_code)


@pytest.mark.parametrize(
    ("rank_exit_code", "is_host_out_of_memory", "code", "exit_code", "is_origin"),
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
def test_the_failure_of_a_silent_rank_follows_from_its_exit_code(
    rank_exit_code: int, is_host_out_of_memory: bool, code: str, exit_code: int, is_origin: bool
) -> None:
    failure = failure_from_exit_code(3, rank_exit_code, is_host_out_of_memory=is_host_out_of_memory)
    assert (failure.error.code, failure.error.exit_code, failure.is_origin, failure.rank) == (code, exit_code, is_origin, 3)


def make_failure(code: int, *, is_origin: bool = True, time_ns: int = 0, is_reported: bool = True) -> RankFailure:
    parsed_failure = failure_from_message(
        {"exitCode": code, "code": f"C{code}", "message": "m", "origin": is_origin, "timeNs": time_ns}
    )
    return RankFailure(parsed_failure.error, 0, None, is_origin, time_ns, is_reported)


@pytest.mark.parametrize(
    ("failures", "expected_exit_code"),
    [
        ([make_failure(74, is_origin=False), make_failure(72)], 72),
        ([make_failure(70), make_failure(65)], 65),
        ([make_failure(74), make_failure(71)], 71),
        ([make_failure(74, is_origin=False, time_ns=1), make_failure(74, time_ns=2)], 74),
        ([make_failure(70, time_ns=2), make_failure(72, time_ns=3)], 72),
    ],
)
def test_the_root_cause_is_reported(failures: list[RankFailure], expected_exit_code: int) -> None:
    cause = choose_root_cause(failures)
    assert cause is not None and cause.error.exit_code == expected_exit_code and cause.is_origin
    assert choose_root_cause([]) is None


def test_the_earlier_of_equal_failures_is_reported() -> None:
    cause = choose_root_cause([make_failure(70, time_ns=2), make_failure(70, time_ns=1)])
    assert cause is not None and cause.time_ns == 1


def test_a_reported_failure_keeps_its_class_and_loses_unpaired_surrogates() -> None:
    parsed_failure = failure_from_message(
        {"exitCode": 77, "code": "X", "message": "a\udcffb", "failureClass": "Model", "rank": 2}
    )
    assert isinstance(parsed_failure.error, FineTuneError) and parsed_failure.error.failure_class is FailureClass.MODEL
    assert (parsed_failure.error.message, parsed_failure.rank) == ("a?b", 2)
    assert isinstance(failure_from_message({"exitCode": 200}).error, InternalError)
