"""Maps exceptions and exit codes of ranks to named failures, and chooses the root cause among several failures.

A rank that failed only because another rank failed reports `origin` False. Failures with `origin` True take precedence. Failures that
the user can fix take precedence over failures that the user cannot fix.
"""

from __future__ import annotations

import errno
import logging
import math
import re
import signal
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from finetune_api.errors import (
    ERROR_OF_EXIT_CODE,
    FineTuneError,
    InstallationBrokenError,
    InternalError,
    MemoryExhaustedError,
    PeerError,
    StorageError,
)
from finetune_api.exits import EXIT_POLICIES
from finetune_api.names import ExitCode, FailureClass

log = logging.getLogger(__name__)
PEER_ERROR_TYPES = ("DistBackendError", "DistNetworkError", "DistStoreError", "DistError")
PEER_ERROR_MESSAGES = (
    "connection closed by peer", "connection reset by peer", "connection refused", "broken pipe", "socket timeout", "gloo",
    "nccl", "connection was likely closed", "timed out waiting", "unable to connect to store", "application timeout",
)  # fmt: skip
OUT_OF_MEMORY_MESSAGES = ("out of memory", "cuda error: out of memory", "defaultcpuallocator: can't allocate memory")


@dataclass(frozen=True)
class RankFailure:
    """The failure of one rank, from its own report or from its exit code."""

    error: FineTuneError
    rank: int | None = None
    step: int | None = None
    is_origin: bool = True
    time_ns: int = 0
    is_reported: bool = True
    """Whether the rank reported the failure. If not, only the exit code of the rank is known."""


DISK_FULL_MESSAGES = ("No space left on device", "PytorchStreamWriter failed writing file")
"""Texts in the exceptions of libraries that cannot write weights because the disk is full. These exceptions have no errno."""
SHARED_MEMORY_PATHS = ("</torch_", "/dev/shm")  # noqa: S108 -- names in messages
"""Paths in error messages about full shared memory. Error messages about a full disk do not contain these paths."""

BUILD_TOOLS = ("c++", "g++", "gcc", "cc", "clang", "clang++", "nvcc", "ninja")
TRAINER_IMAGE_PACKAGES = (
    "accelerate", "aiohttp", "bert_score", "bitsandbytes", "boto3", "botocore", "datasets", "deepspeed", "finetune_api", "finetune_trainer",
    "huggingface_hub", "jinja2", "jsonschema", "liger_kernel", "lm_eval", "mlflow", "numpy", "openai", "openpyxl", "peft", "prometheus_client",
    "pyarrow", "pydantic", "pymongo", "rouge_score", "sacrebleu", "safetensors", "scipy", "securesystemslib", "sentence_transformers",
    "sentencepiece", "tensorboard", "tiktoken", "tokenizers", "torch", "torchvision", "transformers", "triton", "trl", "wandb",
)  # fmt: skip
"""Packages that the trainer image installs. If one of them is missing, the image is broken. Any other missing module belongs to code of the user."""
HIDDEN_PACKAGE_MESSAGE = "None in sys.modules"
"""Text in the message of a failed import of a package that the image contains, but `imports.preload` has hidden."""
MISSING_PART_PATTERNS = (
    (re.compile(r"(?:^|[\s:/])(c\+\+|g\+\+|gcc|cc|clang|clang\+\+|nvcc|ninja): (?:command )?not found", re.MULTILINE), "the program {}"),
    (re.compile(r"Failed to find (C(?:\+\+)?) compiler"), "a {} compiler"),
    (re.compile(r"No working (C\+\+) compiler found"), "a {} compiler"),
    (re.compile(r"(?i:(ninja)) is required to load C\+\+ extensions|due to (ninja) not being installed"), "the program ninja"),
    (re.compile(r"CUDA_HOME (?:does not exist|environment variable is not set)"), "the CUDA compiler nvcc"),
    (re.compile(r"Torch not compiled with CUDA enabled"), "a build of torch for CUDA"),
    (re.compile(r"([^\s:'\"]+\.so[.\d]*): cannot open shared object file"), "the library {}"),
    (re.compile(r"version `([^']+)' not found \(required by"), "the library version {}"),
    (re.compile(r"packages that were not found in your environment: ([\w.,\- ]*[\w\-])"), "the Python package {}"),
    (re.compile(r"requires the (.+) library,? but it was not found in your environment"), "the Python package {}"),
)
"""Patterns of the messages with which libraries say that a part is missing in the image, each with a name for the missing part. The patterns fit the
versions in the lock file."""
INSTALL_ADVICE_PATTERN = re.compile(r"pip install (?:-U |--upgrade )?[\"']?([A-Za-z][\w.-]*)")
"""Matches the advice to install a missing package in a library's ImportError."""
GPU_DRIVER_MISSING_PATTERN = re.compile(r"(?i)found no NVIDIA driver|lib(?:cuda|nvidia-[\w-]+)\.so[.\d]*: cannot open shared object file")
"""Matches messages that mean that the pod has no GPU driver. The driver's libraries come from the node, not from the image."""
NODE_DRIVER_MESSAGES = (
    "cuda driver version is insufficient", "the nvidia driver on your system is too old", "cuda driver initialization failed",
    "unexpected error from cudagetdevicecount", "no cuda gpus are available", "no cuda-capable device is detected", "system not yet initialized",
    "cuda error: unknown error", "forward compatibility was attempted on non supported hw",
)  # fmt: skip
"""Messages (in lower case) that mean that the GPU driver does not work on this node. An attempt on another node may succeed."""


def local_disk_full_error() -> StorageError:
    """Return the failure for a full disk of the pod (exit code 69)."""
    return StorageError(
        "LocalDiskFull", "the pod's local disk is full", hint="raise resources.ephemeralStorage, or checkpoint less often"
    )  # fmt: skip


def as_failure(error: Exception, code: str) -> FineTuneError:
    """Return the failure for an exception. An unexpected exception becomes an InternalError with `code`, unless the image is broken."""
    if isinstance(error, FineTuneError):
        return error
    log.error("%s", code, exc_info=error)
    return installation_error(error) or InternalError(code, f"{type(error).__name__}: {error}")


def classify_wrapped_error(error: BaseException) -> tuple[FineTuneError, bool]:
    """Return the result of `classify_error`. If an InternalError only wraps a library's exception, classify the library's exception instead."""
    is_wrapper = isinstance(error, InternalError) and isinstance(error.__cause__, Exception)
    return classify_error(error.__cause__ if is_wrapper and error.__cause__ is not None else error)


def classify_error(error: BaseException) -> tuple[FineTuneError, bool]:
    """Return the failure for a rank's exception, and whether the failure began on this rank (False: another rank caused it)."""
    if isinstance(error, FineTuneError):
        return error, not error.follows_other_rank
    type_name, lower_message = type(error).__name__, str(error).lower()
    # Errors of collectives are excluded, because their messages may name optional NCCL libraries that are not installed.
    if type_name not in PEER_ERROR_TYPES and (installation_failure := installation_error(error)) is not None:
        return installation_failure, True
    if any(message in lower_message for message in NODE_DRIVER_MESSAGES):
        return node_driver_error(_first_line(error)), True
    if type_name == "OutOfMemoryError" or isinstance(error, MemoryError) or any(message in lower_message for message in OUT_OF_MEMORY_MESSAGES):
        return _memory_exhausted_error(error), True
    if type_name in PEER_ERROR_TYPES or (
        isinstance(error, RuntimeError | ConnectionError) and any(message in lower_message for message in PEER_ERROR_MESSAGES)
    ):
        return PeerError(
            "PeerLost", f"a collective failed: {_first_line(error)}", hint="see the other ranks' logs"
        ), False
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or any(
        message in str(error) for message in DISK_FULL_MESSAGES
    ):
        return _shared_memory_full_error() if any(
            path in str(error) for path in SHARED_MEMORY_PATHS
        ) else local_disk_full_error(), True
    frames = traceback.extract_tb(error.__traceback__)
    location = f" at {frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else ""
    return InternalError(
        "TrainerCrashed", f"{type_name}: {_first_line(error)}{location}", hint="the traceback is in the pod's log"
    ), True


def installation_error(error: BaseException) -> InstallationBrokenError | None:
    """Return the failure if the image lacks a compiler, a package or a library, or if the pod has no GPU driver; None for other errors.

    Another attempt would fail in the same way. The chain of causes is examined too, because transformers wraps the reason of a failed import.
    """
    return _find_installation_error(error) or (installation_error(error.__cause__) if error.__cause__ is not None else None)


def _find_installation_error(error: BaseException) -> InstallationBrokenError | None:
    text = str(error)
    if GPU_DRIVER_MISSING_PATTERN.search(text):
        return InstallationBrokenError(
            "GpuDriverMissing", f"the pod has no GPU driver: {_first_line(error)}",
            hint="let the container runtime of the GPU nodes add the NVIDIA driver to pods (NVIDIA Container Toolkit); for a run on CPUs, write "
            "resources.gpusPerNode: 0",
        )  # fmt: skip
    missing_part, line = _find_missing_part(error)
    if missing_part is None:
        return None
    return InstallationBrokenError(
        "InstallationBroken", f"the trainer image lacks {missing_part}: {type(error).__name__}: {line}",
        hint=f"use a trainer image that contains {missing_part}; status.resolved.image is the image of this job",
    )  # fmt: skip


def _find_missing_part(error: BaseException) -> tuple[str | None, str]:
    """Return the name of the part that the image lacks (None if it lacks none), and the line of the message that says so."""
    if HIDDEN_PACKAGE_MESSAGE in str(error):
        return None, ""
    if isinstance(error, FileNotFoundError) and _is_build_tool(str(error.filename)):
        return f"the program {str(error.filename).rpartition('/')[2]}", _first_line(error)
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in TRAINER_IMAGE_PACKAGES:
        return f"the Python package {error.name}", _first_line(error)
    text = str(error)
    for pattern, part_name in MISSING_PART_PATTERNS:
        if match := pattern.search(text):
            line_start = text.rfind("\n", 0, match.end()) + 1
            return part_name.format(match.group(1) if match.groups() else ""), text[line_start:].splitlines()[0].strip()[:1000]
    if isinstance(error, ImportError) and (match := INSTALL_ADVICE_PATTERN.search(text)):
        return f"the Python package {match.group(1)}", _first_line(error)
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] in TRAINER_IMAGE_PACKAGES:
        return f"a usable Python package {str(error.name).partition('.')[0]}", _first_line(error)
    return None, ""


def node_driver_error(reason: str) -> PeerError:
    """Return the failure for a GPU driver that does not work on this node (exit code 74): an attempt on another node may succeed."""
    return PeerError(
        "NodeDriverUnusable", f"the GPUs of the node cannot be used: {reason}",
        hint="check the GPUs and the driver of the node, or choose another node pool",
    )  # fmt: skip


def _is_build_tool(path: str) -> bool:
    """Whether `path` names a build tool. A path with a folder must be in a folder `bin`, because a data set may also be named `cc`."""
    folder, _, name = path.rpartition("/")
    return name in BUILD_TOOLS and folder.rpartition("/")[2] in ("", "bin")


def _memory_exhausted_error(error: BaseException) -> MemoryExhaustedError:
    if isinstance(error, MemoryError) or "cpuallocator" in str(error).lower():
        return MemoryExhaustedError(
            "HostMemory", f"the pod's memory is exhausted: {_first_line(error)}", hint="raise resources.memory"
        )
    return MemoryExhaustedError(
        "GpuMemory", f"GPU memory is exhausted: {_first_line(error)}",
        hint="lower training.batchSizePerDevice or dataset.maxSequenceLength, or use qlora",
    )  # fmt: skip


def _shared_memory_full_error() -> PeerError:
    """Return the failure for full shared memory, with exit code 74, as for SIGBUS.

    After exit code 71 (out of memory), the operator would lower the batch size, which does not free shared memory.
    """
    return PeerError(
        "SharedMemoryFull", "the pod's shared memory, /dev/shm, is full", hint="raise resources.sharedMemory"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:1000]


def failure_from_message(message: dict[str, Any]) -> RankFailure:
    """Return the failure in a rank's report. An unreadable field gets a default value, so that the other fields can still be used."""
    exit_code = _to_int_or(message.get("exitCode"), ExitCode.INTERNAL_ERROR)
    error_class = ERROR_OF_EXIT_CODE.get(exit_code, InternalError)
    reported_class = message.get("failureClass")
    failure_class = FailureClass(reported_class) if reported_class in list(FailureClass) else EXIT_POLICIES[error_class.exit_code].failure_class
    hint = message.get("hint")
    error = error_class(
        str(message.get("code", "Unknown")),
        replace_unpaired_surrogates(str(message.get("message", ""))),
        hint=replace_unpaired_surrogates(hint) if hint else None,
        failure_class=failure_class,
    )
    return RankFailure(
        error,
        _to_int_or(message.get("rank"), None),
        _to_int_or(message.get("step"), None),
        bool(message.get("origin", True)),
        _to_int_or(message.get("timeNs"), 0),
    )


Default = TypeVar("Default")


def _to_int_or(value: Any, default: Default) -> int | Default:
    return int(value) if isinstance(value, int | float) and math.isfinite(value) else default


def replace_unpaired_surrogates(text: str) -> str:
    """Replace unpaired surrogates, which UTF-8 cannot encode. Messages of libraries may contain unpaired surrogates."""
    return text.encode(errors="replace").decode()


def failure_from_exit_code(rank: int, exit_code: int, *, is_host_out_of_memory: bool = False) -> RankFailure:
    """Return the failure of a rank that reported nothing, from its exit code.

    `is_host_out_of_memory`: the kernel's OOM killer ended a process of this pod.
    """
    if exit_code < 0:
        signal_name = signal.Signals(-exit_code).name if -exit_code in list(signal.Signals) else f"signal {-exit_code}"
        return RankFailure(
            _build_error_of_signal(rank, -exit_code, signal_name, is_host_out_of_memory), rank, is_reported=False, is_origin=-exit_code != signal.SIGTERM
        )
    error_class = ERROR_OF_EXIT_CODE.get(exit_code)
    if error_class is not None and exit_code != ExitCode.INTERNAL_ERROR:
        return RankFailure(error_class("RankFailed", f"rank {rank} ended with {exit_code}"), rank, is_reported=False)
    return RankFailure(
        InternalError("RankCrashed", f"rank {rank} ended with exit code {exit_code} and gave no reason", hint="see the pod's log"),
        rank, is_reported=False,
    )  # fmt: skip


def _build_error_of_signal(rank: int, signal_number: int, signal_name: str, is_host_out_of_memory: bool) -> FineTuneError:
    if signal_number == signal.SIGKILL and is_host_out_of_memory:
        return MemoryExhaustedError(
            "HostMemory", f"rank {rank} was killed because the pod's memory is exhausted", hint="raise resources.memory"
        )
    if signal_number == signal.SIGBUS:
        return PeerError(
            "RankKilled", f"rank {rank} was killed by SIGBUS", hint="raise resources.sharedMemory: /dev/shm may be full"
        )
    if signal_number in (signal.SIGSEGV, signal.SIGILL, signal.SIGFPE):
        return InternalError("RankCrashed", f"rank {rank} crashed with {signal_name}", hint="see the pod's log")
    return PeerError("RankKilled", f"rank {rank} was killed by {signal_name}")


def choose_root_cause(failures: Iterable[RankFailure]) -> RankFailure | None:
    """Choose the failure that the pod reports; None if there is no failure. Failures with `is_origin` take precedence. Between failures with the same
    `is_origin`, these criteria decide in turn: the precedence of the exit code, whether the rank reported the failure, and which failure was earlier.
    """
    ordered_failures = sorted(
        failures,
        key=lambda failure: (not failure.is_origin, EXIT_POLICIES[failure.error.exit_code].precedence, not failure.is_reported, failure.time_ns),
    )
    return ordered_failures[0] if ordered_failures else None
