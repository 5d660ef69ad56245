"""Reads and writes files named by the user. Every error message is one sentence. As in kubectl, `-` is standard input."""

from __future__ import annotations

import sys
from pathlib import Path

from finetune_cli.mistakes import Mistake
from finetune_cli.output import CommandError

STDIN_PATH = "-"
MAX_BYTES = 4 << 20
"""Maximum size in bytes of a file, except for a JSONL data file. An API server refuses a larger manifest."""
DATA_SUFFIX = ".jsonl"


class UnreadableFile(CommandError):
    """A file that cannot be read, or whose content is invalid."""

    def __init__(self, mistake: Mistake):
        super().__init__(str(mistake))
        self.mistake = mistake


class UnwritableFile(CommandError):
    """A file that cannot be written."""


def display_name(path: Path) -> str:
    """Return the name of a path for messages."""
    return "standard input" if str(path) == STDIN_PATH else str(path)


def read_text(path: Path) -> str:
    """Read a UTF-8 text file without its byte order mark. Raises UnreadableFile."""
    try:
        content = _read_bytes(path)
        if len(content) > MAX_BYTES and path.suffix != DATA_SUFFIX:
            message = f"the file is larger than {MAX_BYTES >> 20} MiB, which is too large for a configuration"
            raise UnreadableFile(Mistake(display_name(path), "", message))
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError:
        message = "there is no such file"
    except IsADirectoryError:
        message = "this is a folder, not a file"
    except UnicodeDecodeError:
        message = "the file is not UTF-8 text"
    except (OSError, ValueError) as error:
        message = f"the file cannot be read: {getattr(error, 'strerror', None) or error}"
    raise UnreadableFile(Mistake(display_name(path), "", message))


def _read_bytes(path: Path) -> bytes:
    """Read a data file completely, or at most MAX_BYTES + 1 bytes of any other file.

    If MAX_BYTES + 1 bytes were read, the caller knows that the file is too large.
    """
    if str(path) == STDIN_PATH:
        return sys.stdin.buffer.read(MAX_BYTES + 1)
    with path.open("rb") as file:
        return file.read() if path.suffix == DATA_SUFFIX else file.read(MAX_BYTES + 1)


def write_text(path: Path, text: str) -> None:
    """Write a text file. Raises UnwritableFile."""
    try:
        path.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        raise make_unwritable_file_error(path, error) from None


def make_unwritable_file_error(path: Path, error: Exception) -> UnwritableFile:
    """Return the error for a path that cannot be written."""
    return UnwritableFile(
        f"{path} cannot be written: {getattr(error, 'strerror', None) or error}; choose another path with -o"
    )
