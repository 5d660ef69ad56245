"""Reading what the user names, and writing where the user says; every way in which that can fail is told in one sentence.

`-` is standard input, as for kubectl.
"""

from __future__ import annotations

import sys
from pathlib import Path

from finetune_cli.importers.material import Mistake
from finetune_cli.output import Told

STDIN = "-"
MAX_BYTES = 4 << 20
"""Longer than any manifest that an API server takes, and than any configuration; rows of data may be longer."""
DATA = ".jsonl"


class Unreadable(Told):
    """A file that cannot be read, or is not what it must be."""

    def __init__(self, mistake: Mistake):
        super().__init__(str(mistake))
        self.mistake = mistake


class Unwritable(Told):
    """A place that cannot be written to."""


def shown(path: Path) -> str:
    """A path as messages name it."""
    return "standard input" if str(path) == STDIN else str(path)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, without a byte order mark. Raises Unreadable."""
    try:
        data = _bytes(path)
        if len(data) > MAX_BYTES and path.suffix != DATA:
            raise Unreadable(
                Mistake(shown(path), "", f"it is longer than {MAX_BYTES >> 20} MiB, which no configuration is")
            )
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError:
        why = "there is no such file"
    except IsADirectoryError:
        why = "it is a folder, and a file is needed"
    except UnicodeDecodeError:
        why = "it is not a text in UTF-8"
    except (OSError, ValueError) as error:
        why = f"it cannot be read: {getattr(error, 'strerror', None) or error}"
    raise Unreadable(Mistake(shown(path), "", why))


def _bytes(path: Path) -> bytes:
    """What a file holds; of one that may not be so long, no more than is needed to see that."""
    if str(path) == STDIN:
        return sys.stdin.buffer.read(MAX_BYTES + 1)
    with path.open("rb") as file:
        return file.read() if path.suffix == DATA else file.read(MAX_BYTES + 1)


def write_text(path: Path, text: str) -> None:
    """Write a file. Raises Unwritable."""
    try:
        path.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        raise unwritable(path, error) from None


def unwritable(path: Path, error: Exception) -> Unwritable:
    """The failure to write somewhere, in one sentence."""
    return Unwritable(
        f"{path} cannot be written: {getattr(error, 'strerror', None) or error}; name another place with -o"
    )
