"""The other tools' own command lines, pasted behind `--`: the launcher's words in front are skipped, flags become entries."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from finetune_cli.files import Unreadable, read_text
from finetune_cli.importers.material import Document, Draft, Entry, Mistake, Origin

LAUNCHERS = ("python", "python3", "accelerate", "torchrun", "deepspeed", "uv", "poetry", "launch", "run")
NEGATIVE = re.compile(r"^-(\d|\.\d)")


def after_launcher(words: tuple[str, ...]) -> list[str]:
    """The words behind `python train.py`, `accelerate launch x.py` and the like; line continuations are taken out."""
    rest = [word for word in words if word.strip() not in ("\\", "")]
    while rest and (rest[0] in LAUNCHERS or rest[0].endswith(".py")):
        launcher = rest.pop(0)
        if launcher in LAUNCHERS and rest[:1] == ["-m"]:
            del rest[:2]
    return rest


@dataclass
class Flags:
    """What a command line said: (name with its dashes, value or None) in order, and words that belong to no flag."""

    pairs: list[tuple[str, str | None]] = field(default_factory=list)
    stray: list[str] = field(default_factory=list)


def parse_flags(words: list[str], takes_value: Callable[[str], bool]) -> Flags:
    """Split into flags and values: `--a v` and `--a=v`. A flag for which `takes_value` is false stands alone."""
    flags = Flags()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or NEGATIVE.match(word):
            flags.stray.append(word)
            continue
        name, equals, value = word.partition("=")
        if equals:
            flags.pairs.append((name, value))
        elif takes_value(name) and rest and (not rest[0].startswith("-") or NEGATIVE.match(rest[0])):
            flags.pairs.append((name, rest.pop(0)))
        else:
            flags.pairs.append((name, None))
    return flags


def flag_entry(name: str, value: object) -> Entry:
    """An entry from a flag; its spelling is its place too."""
    return Entry(name, value, Origin("command line"))


def stray_mistakes(draft: Draft, flags: Flags) -> None:
    """Words that belong to no flag are mistakes."""
    for word in flags.stray:
        draft.mistakes.append(Mistake("command line", word, "it belongs to no option", "write --option value"))


def config_document(draft: Draft, path: str) -> Document | None:
    """The file that the tool's own `--config` names; a mistake if it cannot be read."""
    try:
        document = Document(Path(path), read_text(Path(path)))
    except Unreadable as unreadable:
        if draft.documents:
            if not any(one.path.name == Path(path).name for one in draft.documents):
                draft.note(f"--config {path} is not here; the files given are taken instead")
            return None
        draft.mistakes.append(
            Mistake(
                "command line", "--config", f"{path}: {unreadable.mistake.message}", "name the file before `--` too"
            )
        )
        return None
    if any(one.path.resolve() == document.path.resolve() for one in draft.documents):
        return None
    draft.documents = (*draft.documents, document)
    return document
