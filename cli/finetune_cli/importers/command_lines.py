"""Parses the command line of the other tool, which the user gives after `--`: skips the launcher, and separates each flag from its value."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from finetune_cli.files import UnreadableFile, read_text
from finetune_cli.importers.draft import InputDocument, JobDraft, OptionEntry
from finetune_cli.mistakes import Mistake
from finetune_cli.provenance import ValueOrigin

LAUNCHERS = ("python", "python3", "accelerate", "torchrun", "deepspeed", "uv", "poetry", "launch", "run")
NEGATIVE_NUMBER_PATTERN = re.compile(r"^-(\d|\.\d)")


def strip_launcher(command_words: tuple[str, ...]) -> list[str]:
    """Return the words of a command line without line continuations, and without a launcher such as `python train.py` or `accelerate launch x.py`."""
    remaining_words = [word for word in command_words if word.strip() not in ("\\", "")]
    while remaining_words and (remaining_words[0] in LAUNCHERS or remaining_words[0].endswith(".py")):
        launcher = remaining_words.pop(0)
        if launcher in LAUNCHERS and remaining_words[:1] == ["-m"]:
            del remaining_words[:2]
    return remaining_words


@dataclass
class ParsedFlags:
    """A parsed command line.

    `name_value_pairs`: the name of each flag with its dashes, and the value of the flag or None, in the order of the command line. `stray_words`: the
    words that belong to no flag.
    """

    name_value_pairs: list[tuple[str, str | None]] = field(default_factory=list)
    stray_words: list[str] = field(default_factory=list)


def parse_flags(command_words: list[str], takes_value: Callable[[str], bool]) -> ParsedFlags:
    """Split a command line into flags and values: `--a v` or `--a=v`. `takes_value` returns whether the flag with this name can have a value."""
    flags = ParsedFlags()
    remaining_words = list(command_words)
    while remaining_words:
        word = remaining_words.pop(0)
        if not word.startswith("-") or NEGATIVE_NUMBER_PATTERN.match(word):
            flags.stray_words.append(word)
            continue
        name, equals, value = word.partition("=")
        if equals:
            flags.name_value_pairs.append((name, value))
        elif takes_value(name) and remaining_words and (not remaining_words[0].startswith("-") or NEGATIVE_NUMBER_PATTERN.match(remaining_words[0])):
            flags.name_value_pairs.append((name, remaining_words.pop(0)))
        else:
            flags.name_value_pairs.append((name, None))
    return flags


def build_flag_entry(name: str, value: object) -> OptionEntry:
    """Return the option entry of a flag. The location of the entry is the command line."""
    return OptionEntry(name, value, ValueOrigin("command line"))


def add_stray_mistakes(draft: JobDraft, flags: ParsedFlags) -> None:
    """Record a mistake for each word that belongs to no flag."""
    for word in flags.stray_words:
        draft.mistakes.append(Mistake("command line", word, "this word belongs to no option", "write --option value"))


def add_config_file(draft: JobDraft, path: str) -> InputDocument | None:
    """Add the file of the tool's `--config` flag to the documents and return it.

    Return None if the file is already one of the documents, or cannot be read.
    """
    try:
        document = InputDocument(Path(path), read_text(Path(path)))
    except UnreadableFile as error:
        if draft.documents:
            if not any(given_document.path.name == Path(path).name for given_document in draft.documents):
                draft.add_note(f"--config {path}: this file cannot be read here, so the given files are used instead")
            return None
        draft.mistakes.append(
            Mistake("command line", "--config", f"{path}: {error.mistake.message}", "give the file before `--` too")
        )
        return None
    if any(given_document.path.resolve() == document.path.resolve() for given_document in draft.documents):
        return None
    draft.documents = (*draft.documents, document)
    return document
