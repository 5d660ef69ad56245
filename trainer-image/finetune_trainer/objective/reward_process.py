"""Calls a user's reward function in a process of its own, with a time limit.

If the function hangs or ends its process, the job fails with an error that names the completion that causes the failure. The process runs the user's
file once, at the first call, and then answers one call after another. This module does not import torch.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from finetune_api.errors import ConfigError

from finetune_trainer import processes

LOGGING_ARGUMENTS = ("log_extra", "log_metric")
"""Arguments that are functions. The reward process records the calls of these functions, and the rank then repeats the calls."""
START_SECONDS = 120.0
"""Time limit for starting Python and running the user's file, which imports packages. The time limit of the first call is longer by this time,
because Python may have to import packages to unpickle the arguments of this call."""
READY_MESSAGE = b"ready"
"""The first message of the process. The rank waits for this message before it sends a call. Before this message, the process does not read, so a
large call would fill the pipe and block the rank."""


class _NoAnswerError(Exception):
    """The reward process hangs or has ended. The error's message says whether the process hangs or has ended."""


class RewardProcess:
    """A callable that calls a function of a user's file in another process."""

    def __init__(self, name: str, file: Path, function_name: str, timeout_seconds: float) -> None:
        """`name`: the name of the reward in error messages. `timeout_seconds`: the time limit of each call."""
        self._name, self._file, self._function_name, self._timeout_seconds = name, file, function_name, timeout_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def __call__(self, **arguments: Any) -> Any:
        """Return what the function returns. Errors: ConfigError RewardFailed, RewardWithoutAnswer."""
        try:
            return self._call_in_process(arguments)
        except _NoAnswerError as error:
            raise self._no_answer_error(str(error), arguments) from None

    def _call_in_process(self, arguments: Mapping[str, Any]) -> Any:
        """Call the function once. Errors: _NoAnswerError; ConfigError RewardFailed."""
        connection, limit_seconds = self._connection, self._timeout_seconds
        sent_arguments = {name: value for name, value in arguments.items() if name not in LOGGING_ARGUMENTS}
        try:
            if connection is None:
                connection, limit_seconds = self._start(), self._timeout_seconds + START_SECONDS
                self._require_answer(connection, START_SECONDS, "has not imported its file")
                connection.recv_bytes()
            connection.send_bytes(pickle.dumps(sent_arguments))
            self._require_answer(connection, limit_seconds, "has not answered")
            answer_type, result_or_error, logging_calls = pickle.loads(connection.recv_bytes())  # noqa: S301 -- the rank itself has run the same file
        except (EOFError, ConnectionError):
            exit_code = self.close()
            exit_description = f"by signal {signal.Signals(-exit_code).name}" if exit_code < 0 else f"with exit code {exit_code}"
            raise _NoAnswerError(f"ended its process {exit_description}") from None
        if answer_type == "error":
            raise ConfigError(
                "RewardFailed", f"reward {self._name} raised {result_or_error}",
                hint="fix the function: it must return a list with one number, or None, for every completion",
            )  # fmt: skip
        for name, positional, named in logging_calls:
            if callable(arguments.get(name)):
                arguments[name](*positional, **named)
        return result_or_error

    def _require_answer(self, connection: Connection, seconds: float, problem: str) -> None:
        """Wait until the process sends a message. If the process sends no message in time, end the process. Errors: _NoAnswerError."""
        if not connection.poll(seconds):
            self.close()
            raise _NoAnswerError(f"{problem} for {seconds:g} s")

    def _no_answer_error(self, problem: str, arguments: Mapping[str, Any]) -> ConfigError:
        """Return the error for a call without an answer. The error names the first completion that also fails as the only completion of a call."""
        index = self._find_first_bad_completion(arguments)
        cause = "no single completion causes it" if index is None else f"completion {index + 1} of {len(arguments['completions'])} alone causes it"
        if index is not None and "prompts" in arguments:
            cause += f" (prompt: {str(arguments['prompts'][index])[:120]!r})"
        return ConfigError(
            "RewardWithoutAnswer", f"reward {self._name} {problem}; {cause}",
            hint="call the function with this completion on your machine and fix it, or raise timeoutSeconds of the reward",
        )  # fmt: skip

    def _find_first_bad_completion(self, arguments: Mapping[str, Any]) -> int | None:
        """Call the function with one completion at a time. Return the index of the first call without an answer; None if all are answered.

        If the failed call had only one completion, return 0 without another call.
        """
        completion_count = len(arguments["completions"])
        for index in range(completion_count if completion_count > 1 else 0):
            single_arguments = {
                name: [value[index]] if isinstance(value, list) and len(value) == completion_count else value
                for name, value in arguments.items()
            }
            try:
                self._call_in_process({name: value for name, value in single_arguments.items() if name not in LOGGING_ARGUMENTS})
            except _NoAnswerError:
                return index
            except ConfigError:
                continue
        return 0 if completion_count == 1 else None

    def _start(self) -> Connection:
        """Start the reward process. The output of this process goes to the log of the rank."""
        self._connection, end_of_process = multiprocessing.Pipe()
        python_path = os.pathsep.join(filter(None, sys.path))
        command = [sys.executable, "-m", __name__, str(end_of_process.fileno()), str(self._file), self._function_name]
        self._process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": python_path}, pass_fds=[end_of_process.fileno()], stdin=subprocess.DEVNULL)
        end_of_process.close()
        return self._connection

    def close(self) -> int:
        """End the process. Returns its exit code."""
        assert self._process is not None and self._connection is not None, "the process was started"
        self._connection.close()
        process, self._process, self._connection = self._process, None, None
        try:
            return process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def _answer_calls(connection: Connection, function: Callable[..., Any]) -> None:
    """Answer calls until the rank closes its end of the connection."""
    connection.send_bytes(READY_MESSAGE)
    while True:
        try:
            arguments = pickle.loads(connection.recv_bytes())  # noqa: S301 -- written by the rank
        except EOFError:
            return
        connection.send_bytes(_to_bytes(_call(function, arguments)))


def _to_bytes(answer: tuple[str, Any, list[tuple[str, Any, Any]]]) -> bytes:
    """Return the pickled answer. The answer is not sent with `Connection.send`, which would pass tensors in shared memory that the rank cannot open."""
    try:
        return pickle.dumps(answer)
    except Exception as error:  # the user's classes may raise any exception when they are pickled
        return pickle.dumps(("error", f"{type(error).__name__} when its result was sent: {str(error)[:300]}", []))


def _to_plain_value(value: Any) -> Any:
    """Convert a reward to a number or text, because the rank cannot read the user's classes, which exist only in this process."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    try:
        return float(value)
    except (TypeError, ValueError):
        return repr(value)


def _call(function: Callable[..., Any], arguments: dict[str, Any]) -> tuple[str, Any, list[tuple[str, Any, Any]]]:
    """Call the function, and return the answer to the rank.

    The answer has three items: `value` or `error`; the function's result or a description of the error; and the function's calls of the logging functions.
    """
    from finetune_trainer.objective.rewards import describe_error

    logging_calls: list[tuple[str, Any, Any]] = []

    def make_recorder(name: str) -> Callable[..., None]:
        return lambda *positional, **named: logging_calls.append((name, positional, named))

    try:
        function_result = function(**arguments, **{name: make_recorder(name) for name in LOGGING_ARGUMENTS})
        is_iterable = hasattr(function_result, "__iter__") and not isinstance(function_result, str | bytes)
        return "value", [_to_plain_value(reward) for reward in function_result] if is_iterable else function_result, logging_calls
    except Exception as error:  # the user's code may raise anything
        return "error", describe_error(error), logging_calls


def main(arguments: Sequence[str]) -> None:
    """Run the user's file, and answer calls. `arguments`: file descriptor of the connection, path of the file, name of the function."""
    from finetune_trainer.objective.rewards import run_user_file

    processes.die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    descriptor, file, function_name = arguments
    _answer_calls(Connection(int(descriptor)), run_user_file(Path(file), file)[function_name])


if __name__ == "__main__":
    main(sys.argv[1:])
