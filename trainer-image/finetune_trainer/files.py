"""Replaces local files so that other processes never read an unfinished file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file in the folder of `path`. If the block ends without an error, the temporary file becomes the file at `path`.

    Until then, readers see the old file at `path`, or no file. Only one process at a time may replace a file, because the name of the temporary file
    is the same in all processes. The folder is created if it does not exist. Errors: OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_name(f".{path.name}.part")
    yield partial_file
    partial_file.replace(path)
