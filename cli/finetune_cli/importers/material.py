"""What importers are made of: entries read from files, the table of a tool, and the draft that becomes a FineTuneJob."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_cli.hiding import HIDDEN, hide
from finetune_cli.importers.convert import Convert, text

SECRET_WORD = re.compile(r"(token|secret|passw|api_?key|credential|_key$|-key$|_uri$)", re.IGNORECASE)


@dataclass(frozen=True)
class Origin:
    """Where a value came from: a place in words, and whether the user wrote it."""

    place: str
    given: bool = True


@dataclass(frozen=True)
class Entry:
    """One option as a reader found it: the key in the tool's own spelling, the value its grammar made, and the place."""

    key: str
    value: Any
    origin: Origin


@dataclass(frozen=True)
class Row:
    """One option of a tool: its key, where it goes, and how its value is read.

    With `manual` the tool's `combine` decides what becomes of it, and `path` only names the place in the reference. `inert`
    says why a known option has no effect here; it becomes a warning. A `secret` is never shown and goes into a Secret.
    """

    key: str
    path: str = ""
    convert: Convert = text
    aliases: tuple[str, ...] = ()
    required: bool = False
    manual: bool = False
    secret: bool = False
    inert: str = ""
    empty_is_absent: bool = True


@dataclass(frozen=True)
class Fill:
    """A value that the tool's runs have when the file is silent. `origin`: profile default, page example, fixed in its code."""

    path: str
    value: Any
    origin: str = "profile default"
    when: Callable[[Draft], bool] = lambda draft: True
    gpu: bool = False
    """Whether only a GPU can do it: a job that asks for none gets our own default instead."""


@dataclass(frozen=True)
class Given:
    """A converted value with the spelling and place it was written in."""

    row: Row
    key: str
    value: Any
    raw: Any
    origin: Origin


@dataclass(frozen=True)
class Assigned:
    """A value of the spec and where it came from; `key` is empty if no key of the tool stands behind it."""

    value: Any
    origin: Origin
    key: str = ""


@dataclass(frozen=True)
class Mistake:
    """One thing that is wrong in the user's files, in the words of those files."""

    place: str
    key: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        start = ": ".join(dict.fromkeys(part for part in (self.place, self.key) if part))
        return f"{start}: {self.message}" + (f"; {self.hint}" if self.hint else "")


class Refused(Exception):
    """The files cannot become a FineTuneJob; all mistakes at once."""

    def __init__(self, mistakes: list[Mistake]):
        super().__init__(f"{len(mistakes)} mistakes")
        self.mistakes = mistakes


@dataclass(frozen=True)
class Request:
    """What the user asked for on our own command line."""

    files: tuple[Path, ...]
    words: tuple[str, ...] = ()
    source: str | None = None
    name: str | None = None
    namespace: str | None = None
    own: Mapping[str, Assigned] = field(default_factory=dict)
    """Fields set by our own options, by spec path: they win over everything."""
    model_map: Mapping[str, str] = field(default_factory=dict)
    allow_env: frozenset[str] = frozenset()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Document:
    """One input file, or folder, as found on disk."""

    path: Path
    text: str
    folder: bool = False

    @property
    def name(self) -> str:
        """The file as messages name it."""
        return "standard input" if str(self.path) == "-" else self.path.name or str(self.path)


@dataclass
class Draft:
    """A FineTuneJob in the making."""

    request: Request
    rows: tuple[Row, ...]
    name: str
    documents: tuple[Document, ...] = ()
    given: dict[str, Given] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    """Keys whose value could not be read, and the spec path they would have gone to."""
    values: dict[str, Assigned] = field(default_factory=dict)
    fixed: set[str] = field(default_factory=set)
    """Paths that the profile must not fill in."""
    mistakes: list[Mistake] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    secrets: dict[str, str] = field(default_factory=dict)
    """Key in the Secret and its value."""
    hidden: set[str] = field(default_factory=set)
    """Texts that must never be shown."""
    config_maps: dict[str, dict[str, str]] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)

    @property
    def secret_name(self) -> str:
        return f"{self.name}-import"

    def get(self, key: str, default: Any = None) -> Any:
        """Converted value of a key of the tool, or the default if it is absent or could not be read."""
        found = self.given.get(key)
        return default if found is None else found.value

    def wrote(self, key: str) -> bool:
        """Whether the user wrote this key, readable or not."""
        return key in self.given or key in self.broken

    def has(self, path: str) -> bool:
        """Whether the spec has a value at this path, or will have one from our own options."""
        own = self.request.own.get(path)
        return path in self.values if own is None else own.value is not None

    def value(self, path: str, default: Any = None) -> Any:
        """Value at a path of the spec."""
        found = self.request.own.get(path) or self.values.get(path)
        return default if found is None else found.value

    def put(self, path: str, value: Any, source: str | Origin) -> None:
        """Set a value; `source` is a key the user wrote, or an origin."""
        if isinstance(source, str):
            given = self.given[source]
            self.values[path] = Assigned(value, given.origin, given.key)
        else:
            self.values[path] = Assigned(value, source)

    def fill(self, path: str, value: Any, place: str = "profile default") -> None:
        """Set a value that the user did not write, unless one is there."""
        if not self.has(path) and path not in self.fixed:
            self.values[path] = Assigned(value, Origin(place, given=False))

    def drop(self, prefix: str, why: str) -> None:
        """Take away a value, or a whole group, that would have no effect; say so if the user wrote it. The profile leaves it alone."""
        self.fixed.add(prefix)
        for path in [one for one in self.values if one == prefix or one.startswith(prefix + ".")]:
            assigned = self.values.pop(path)
            self.fixed.add(path)
            if assigned.key:
                self.warn(f"{assigned.origin.place}: {assigned.key} has no effect: {why}")

    def refuse(self, keys: str | tuple[str, ...], message: str, hint: str = "", *, settles: str = "") -> None:
        """Record a mistake about one or several keys; each is named with its place.

        `settles` is a spec path about which nothing further is to be said: this mistake explains it.
        """
        if settles:
            self.broken[settles] = settles
        keys = (keys,) if isinstance(keys, str) else keys
        found = [self.given[key] for key in keys if key in self.given]
        places = ", ".join(dict.fromkeys(one.origin.place for one in found))
        spelled = ", ".join(dict.fromkeys(one.key for one in found)) or ", ".join(keys)
        self.mistakes.append(Mistake(places or self.where, spelled, message, hint))

    @property
    def where(self) -> str:
        """The files, for mistakes about something that is absent."""
        return ", ".join(document.name for document in self.documents) or "command line"

    def warn(self, message: str) -> None:
        """Say something the user should act on."""
        if message not in self.warnings:
            self.warnings.append(message)

    def note(self, message: str) -> None:
        """Say something the user may want to know."""
        if message not in self.notes:
            self.notes.append(message)

    def secret(self, key: str, value: str) -> dict[str, str]:
        """Move a secret into the Secret document; returns the reference for the spec."""
        self.secrets[key] = value
        self.hide(value)
        return {"name": self.secret_name, "key": key}

    def hide(self, value: Any) -> None:
        """Never show this text, wherever it stands."""
        if isinstance(value, str) and value.strip():
            self.hidden.add(value)

    def safe(self, message: str) -> str:
        """A message without any secret."""
        for secret in sorted(self.hidden, key=len, reverse=True):
            edge = r"\b" if len(secret) < 6 else ""
            message = re.sub(edge + re.escape(secret) + edge, HIDDEN, message)
        return hide(message)


@dataclass(frozen=True)
class Importer:
    """A tool: how its files are recognised and read, its table, its profile, and how options that belong together combine."""

    name: str
    title: str
    rows: tuple[Row, ...]
    profile: tuple[Fill, ...]
    recognise: Callable[[tuple[Document, ...], tuple[str, ...]], bool]
    read: Callable[[Draft], Iterator[Entry]]
    combine: Callable[[Draft], None]
    key_of: Callable[[str], str] = lambda key: key
    """Normalises a spelling before it is looked up in the table."""
