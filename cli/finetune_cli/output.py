"""Terminal output: results go to stdout; errors, warnings and notes go to stderr. Colours are used only on a terminal."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

OK, ERROR, JOB_FAILED = 0, 1, 2
"""Exit codes: success; the command failed; the job failed."""


class CommandExit(Exception):
    """The exception that ends the command with an exit code. All messages are printed before it is raised."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


class CommandError(Exception):
    """A failure of the command. Its text is printed without a traceback."""


@functools.cache
def stdout_console() -> Console:
    """Return the console for stdout. Rich honours NO_COLOR and detects whether stdout is a terminal."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


@functools.cache
def error_console() -> Console:
    """Return the console for stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def write(text: str) -> None:
    """Write a result to stdout without any change. Raises CommandError if stdout is closed or cannot be written."""
    if sys.stdout is None:
        raise CommandError("standard output is closed, so the result cannot be written")
    try:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CommandError(f"standard output cannot be written: {error.strerror}") from None


def _print_lines(prefix: str, lines: Iterable[Any], style: str) -> None:
    """Print lines to stderr, each with a prefix such as `error: `. Secrets are redacted."""
    from rich.text import Text

    from finetune_cli.redaction import redact_text

    for line in lines:
        error_console().print(Text.assemble((f"{prefix}: ", style), redact_text(str(line))))


def print_errors(lines: Iterable[Any]) -> None:
    """Print error messages: why the command fails."""
    _print_lines("error", lines, "bold red")


def print_warnings(lines: Iterable[Any]) -> None:
    """Print warnings: messages on which the user should act."""
    _print_lines("warning", lines, "yellow")


def print_notes(lines: Iterable[Any]) -> None:
    """Print notes: messages that require no action."""
    _print_lines("note", lines, "dim")


def fail(*lines: Any) -> CommandExit:
    """Print errors, and return an exception that ends the command with exit code 1. The caller raises it."""
    print_errors(lines)
    return CommandExit(ERROR)
