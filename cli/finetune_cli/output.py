"""How results and complaints reach the terminal: results on stdout, everything else on stderr, colours only where wanted."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

OK, ERROR, JOB_FAILED = 0, 1, 2
"""Exit codes: done; the command could not do it; the job failed."""


class Ended(Exception):
    """A command ends here, with an exit code; everything was said."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


class Told(Exception):
    """A failure that is told in one sentence, without a trace."""


@functools.cache
def console() -> Console:
    """stdout. Rich honours NO_COLOR and knows a terminal from a pipe."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


@functools.cache
def messages() -> Console:
    """stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def write(text: str) -> None:
    """A result, as it is. Raises Told if there is nowhere to write it to."""
    if sys.stdout is None:
        raise Told("standard output is closed, so the result cannot be written")
    try:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Told(f"standard output cannot be written: {error.strerror}") from None


def say(kind: str, lines: Iterable[Any], style: str = "") -> None:
    """Lines on stderr, each behind its kind: `error: ...`."""
    from rich.text import Text

    from finetune_cli.hiding import hide

    for line in lines:
        messages().print(Text.assemble((f"{kind}: ", style), hide(str(line))))


def errors(lines: Iterable[Any]) -> None:
    """What is wrong."""
    say("error", lines, "bold red")


def warnings(lines: Iterable[Any]) -> None:
    """What the user should act on."""
    say("warning", lines, "yellow")


def notes(lines: Iterable[Any]) -> None:
    """What the user may want to know."""
    say("note", lines, "dim")
