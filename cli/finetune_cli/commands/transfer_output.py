"""Prints the progress and the results of uploads and downloads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_cli import output

if TYPE_CHECKING:
    from finetune_cli.transfers import Progress, TransferredFile

STATE_TEXTS = {"transferred": "", "resumed": "continued", "unchanged": "unchanged"}


@contextlib.contextmanager
def show_progress(verb: str, *, is_quiet: bool) -> Iterator[Progress]:
    """Yield a `Progress` that shows a bar for each file on a terminal, and otherwise prints a note for each file. `verb`: `upload` or `download`.

    After Ctrl-C or a lost connection, print how to continue.
    """
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    from finetune_cli.job_storage import ConnectionLost
    from finetune_cli.transfers import SilentProgress

    try:
        if is_quiet:
            yield SilentProgress()
        elif output.error_console().is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
            with Bars(*columns, console=output.error_console()) as bars:
                yield _ProgressBars(bars)
        else:
            yield _ProgressNotes(verb)
    except (KeyboardInterrupt, ConnectionLost):
        output.print_notes([f"the {verb} is incomplete; run the same command again to continue it"])
        raise


class _ProgressBars:
    """Shows a progress bar for each file."""

    def __init__(self, bars: Any):
        self._bars = bars

    def begin_file(self, name: str, size: int) -> Callable[[int], None]:
        task_id = self._bars.add_task(name, total=size)
        return lambda byte_count: self._bars.advance(task_id, byte_count)


class _ProgressNotes:
    """Prints a note at the beginning of each file."""

    def __init__(self, verb: str):
        self._verb = verb

    def begin_file(self, name: str, size: int) -> Callable[[int], None]:
        from finetune_cli.status_text import format_bytes

        output.print_notes([f"{self._verb} of {name}, {format_bytes(size)}"])
        return lambda byte_count: None


def summarise_files(files: list[TransferredFile]) -> str:
    """Return a summary of the transferred files, for example `3 files, 12.0 MiB (1 continued, 2 unchanged)`."""
    from finetune_cli.status_text import format_bytes

    count_by_text = {text: sum(1 for file in files if file.state == state) for state, text in STATE_TEXTS.items() if text}
    details = ", ".join(f"{count} {text}" for text, count in count_by_text.items() if count)
    file_count_text = f"{len(files)} file{'s' if len(files) != 1 else ''}"
    return f"{file_count_text}, {format_bytes(sum(file.size for file in files))}" + (f" ({details})" if details else "")


def describe_checks(files: list[TransferredFile]) -> str:
    """Return how the files were checked, as a text that lists each kind of check once."""
    text_by_check = {"sha256": "sha256 of the manifest", "etag": "MD5 of the store", "size": "size only, because the store gives no digest"}
    return ", ".join(text for check, text in text_by_check.items() if any(file.check == check for file in files))


def to_dict(uri: str, local_path: Path, files: list[TransferredFile]) -> dict[str, Any]:
    """Return the result as a dict, for `-o json` and `-o yaml`. `uri`: the location in storage. `local_path`: the local file or folder."""
    entries = [
        {
            "path": str(file.path), "uri": file.uri, "bytes": file.size, "sha256": file.sha256, "state": file.state.value, "check": file.check.value,
        }
        for file in files
    ]  # fmt: skip
    return {"uri": uri, "path": str(local_path), "bytes": sum(file.size for file in files), "files": entries}
