"""Calls a user's reward function in a process of its own, with a time limit. A function that hangs or ends its process fails with the
number of the completion that causes it.

The process runs the user's file once, when the function is called first, and answers one call after another. This module does not import torch.
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
"""Arguments that are functions. The process records their calls, and they are repeated here."""
START_SECONDS = 120.0
"""Time in which Python starts and the user's file imports its packages. The first call also gets it, because its arguments may import packages."""
READY = b"ready"
"""The first message of the process. Before it, the process does not read, so a large call would fill the pipe and block the rank."""


class _NoAnswerError(Exception):
    """The process hangs or has ended. The message says which."""


class RewardProcess:
    """A function of a user's file that is called in another process."""

    def __init__(self, name: str, file: Path, function: str, timeout_seconds: float) -> None:
        """`name`: name of the reward in messages."""
        self._name, self._file, self._function, self._timeout = name, file, function, timeout_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def __call__(self, **arguments: Any) -> Any:
        """Return what the function returns. Errors: ConfigError RewardFailed, RewardWithoutAnswer."""
        try:
            return self._ask(arguments)
        except _NoAnswerError as error:
            raise self._error(str(error), arguments) from None

    def _ask(self, arguments: Mapping[str, Any]) -> Any:
        """Call the function once. Errors: _NoAnswerError; ConfigError RewardFailed."""
        connection, limit = self._connection, self._timeout
        data = {name: value for name, value in arguments.items() if name not in LOGGING_ARGUMENTS}
        try:
            if connection is None:
                connection, limit = self._start(), self._timeout + START_SECONDS
                self._require_answer(connection, START_SECONDS, "has not imported its file")
                connection.recv_bytes()
            connection.send_bytes(pickle.dumps(data))
            self._require_answer(connection, limit, "has not answered")
            kind, value, calls = pickle.loads(connection.recv_bytes())  # noqa: S301 -- the rank itself has run the same file
        except (EOFError, ConnectionError):
            code = self.close()
            ending = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            raise _NoAnswerError(f"ended its process {ending}") from None
        if kind == "error":
            raise ConfigError(
                "RewardFailed", f"reward {self._name} raised {value}",
                hint="fix the function: it must return a list with one number, or None, for every completion",
            )  # fmt: skip
        for name, positional, named in calls:
            if callable(arguments.get(name)):
                arguments[name](*positional, **named)
        return value

    def _require_answer(self, connection: Connection, seconds: float, problem: str) -> None:
        """Wait for a message of the process. Errors: _NoAnswerError; the process is then ended."""
        if not connection.poll(seconds):
            self.close()
            raise _NoAnswerError(f"{problem} for {seconds:g} s")

    def _error(self, problem: str, arguments: Mapping[str, Any]) -> ConfigError:
        """Return the error of a call without an answer. The completions are tried one by one, to name the first that causes it."""
        number = self._first_bad_completion(arguments)
        cause = "no single completion causes it" if number is None else f"completion {number + 1} of {len(arguments['completions'])} alone causes it"
        if number is not None and "prompts" in arguments:
            cause += f" (prompt: {str(arguments['prompts'][number])[:120]!r})"
        return ConfigError(
            "RewardWithoutAnswer", f"reward {self._name} {problem}; {cause}",
            hint="call the function with this completion on your machine and fix it, or raise timeoutSeconds of the reward",
        )  # fmt: skip

    def _first_bad_completion(self, arguments: Mapping[str, Any]) -> int | None:
        count = len(arguments["completions"])
        for number in range(count if count > 1 else 0):
            alone = {name: [value[number]] if isinstance(value, list) and len(value) == count else value for name, value in arguments.items()}
            try:
                self._ask({name: value for name, value in alone.items() if name not in LOGGING_ARGUMENTS})
            except _NoAnswerError:
                return number
            except ConfigError:
                continue
        return 0 if count == 1 else None

    def _start(self) -> Connection:
        """Start the process. Its output goes to the log of the rank."""
        self._connection, other_end = multiprocessing.Pipe()
        path = os.pathsep.join(filter(None, sys.path))
        command = [sys.executable, "-m", __name__, str(other_end.fileno()), str(self._file), self._function]
        self._process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, pass_fds=[other_end.fileno()], stdin=subprocess.DEVNULL)
        other_end.close()
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


def _serve(connection: Connection, function: Callable[..., Any]) -> None:
    """Answer calls until the other end is closed."""
    connection.send_bytes(READY)
    while True:
        try:
            arguments = pickle.loads(connection.recv_bytes())  # noqa: S301 -- written by the rank
        except EOFError:
            return
        connection.send_bytes(_to_bytes(_answer(function, arguments)))


def _to_bytes(answer: tuple[str, Any, list[tuple[str, Any, Any]]]) -> bytes:
    """Return the pickled answer. `Connection.send` cannot be used: it would pass tensors in shared memory, which the rank cannot open."""
    try:
        return pickle.dumps(answer)
    except Exception as error:  # the classes of the user's values may raise anything
        return pickle.dumps(("error", f"{type(error).__name__} when its result was sent: {str(error)[:300]}", []))


def _plain(value: Any) -> Any:
    """Return a reward as a value that the rank can read: the user's classes exist only in this process."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    try:
        return float(value)
    except (TypeError, ValueError):
        return repr(value)


def _answer(function: Callable[..., Any], arguments: dict[str, Any]) -> tuple[str, Any, list[tuple[str, Any, Any]]]:
    """Call the function. Returns `value` with its result or `error` with a description, and its calls of the logging functions."""
    from finetune_trainer.objective.rewards import describe_error

    calls: list[tuple[str, Any, Any]] = []

    def recorder(name: str) -> Callable[..., None]:
        return lambda *positional, **named: calls.append((name, positional, named))

    try:
        value = function(**arguments, **{name: recorder(name) for name in LOGGING_ARGUMENTS})
        is_iterable = hasattr(value, "__iter__") and not isinstance(value, str | bytes)
        return "value", [_plain(one) for one in value] if is_iterable else value, calls
    except Exception as error:  # the user's code may raise anything
        return "error", describe_error(error), calls


def main(arguments: Sequence[str]) -> None:
    """Run the user's file, and answer calls. Arguments: file descriptor of the connection, file, name of the function."""
    from finetune_trainer.objective.rewards import run_file

    processes.die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    descriptor, file, name = arguments
    _serve(Connection(int(descriptor)), run_file(Path(file), file)[name])


if __name__ == "__main__":
    main(sys.argv[1:])
