"""The types of an import: options read from files, the option table of a tool, and the draft of the FineTuneJob."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_cli.importers.converters import Converter, text
from finetune_cli.mistakes import Mistake
from finetune_cli.provenance import AssignedValue, ValueOrigin
from finetune_cli.redaction import REDACTED_TEXT, redact_text


@dataclass(frozen=True)
class OptionEntry:
    """One option in a file: the key as written, the parsed value, and the location."""

    key: str
    value: Any
    origin: ValueOrigin


@dataclass(frozen=True)
class Row:
    """One option of a tool: `key` in the file, `path` of the field in the spec, and `convert` for the value.

    `is_set_by_combine`: the tool's `combine_options` function sets the field; `path` is only documentation.
    `no_effect`: why the importer ignores the option. The warning about the option contains this reason.
    `is_secret`: the value is never printed and is stored in a Secret.
    `missing_feature`: the feature of the option, which a FineTuneJob does not have. The option is refused unless its value is one of
    `NEUTRAL_VALUES` or of `neutral_values`, which turn the feature off. `hint` says what to do instead.
    """

    key: str
    path: str = ""
    convert: Converter = text
    aliases: tuple[str, ...] = ()
    is_required: bool = False
    is_set_by_combine: bool = False
    is_secret: bool = False
    no_effect: str = ""
    empty_is_absent: bool = True
    missing_feature: str = ""
    hint: str = ""
    neutral_values: tuple[Any, ...] = ()


NEUTRAL_VALUES: tuple[Any, ...] = (None, False, 0, "", "false", "False", "none", "None", [], {})
"""Values that turn off the feature of every option."""


@dataclass(frozen=True)
class ToolDefault:
    """A value that the tool uses if the file does not set the option. `origin` says where the tool defines the value."""

    path: str
    value: Any
    origin: str = "default of the tool"
    is_applicable: Callable[[JobDraft], bool] = lambda draft: True
    needs_gpu: bool = False
    """The value works only on a GPU. A job without GPUs gets the default of FineTuneJob instead."""


@dataclass(frozen=True)
class GivenOption:
    """An option of the user after conversion: key and value as written (`key`, `raw_value`), converted value, and location."""

    row: Row
    key: str
    value: Any
    raw_value: Any
    origin: ValueOrigin


@dataclass(frozen=True)
class Request:
    """The arguments of `finetune import`."""

    files: tuple[Path, ...]
    tool_arguments: tuple[str, ...] = ()
    """The other tool's command line: the arguments after `--`."""
    source: str | None = None
    name: str | None = None
    namespace: str | None = None
    overrides: Mapping[str, AssignedValue] = field(default_factory=dict)
    """Fields set by options of `finetune import`, by spec path. They override every file."""
    drop_unsupported: bool = False
    """Leave out features that a FineTuneJob does not have, instead of refusing them."""
    benchmarks: str | None = None
    """Folder with the data of the tool's benchmarks."""
    model_map: Mapping[str, str] = field(default_factory=dict)
    base_learning_rate: float | None = None
    """For openai: the learning rate that `learning_rate_multiplier` multiplies. None: the default of the objective."""
    has_command_line: bool = True
    """Whether hints may name options of `finetune import`. The OpenAI server's clients have no command line."""
    allowed_variables: frozenset[str] = frozenset()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class InputDocument:
    """One input file or folder."""

    path: Path
    text: str
    is_folder: bool = False

    @property
    def name(self) -> str:
        """Return the file name for messages."""
        return "standard input" if str(self.path) == "-" else self.path.name or str(self.path)


@dataclass
class JobDraft:
    """The values of a FineTuneJob during the import, with mistakes, warnings and notes."""

    request: Request
    rows: tuple[Row, ...]
    name: str
    documents: tuple[InputDocument, ...] = ()
    given_options: dict[str, GivenOption] = field(default_factory=dict)
    """Options of the user, by the key in the tool's table."""
    paths_of_invalid_keys: dict[str, str] = field(default_factory=dict)
    """The spec path of every key that has an invalid value."""
    values: dict[str, AssignedValue] = field(default_factory=dict)
    paths_without_default: set[str] = field(default_factory=set)
    """Spec paths that the tool's defaults must not set."""
    mistakes: list[Mistake] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    secrets: dict[str, str] = field(default_factory=dict)
    """Content of the Secret, by key."""
    secret_texts: set[str] = field(default_factory=set)
    """Texts that must never be printed."""
    config_maps: dict[str, dict[str, str]] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    """For every key of the user that sets no field: the reason."""

    @property
    def secret_name(self) -> str:
        return f"{self.name}-import"

    @property
    def location(self) -> str:
        """Return the names of the input files, as the location of a missing option."""
        return ", ".join(document.name for document in self.documents) or "command line"

    def get(self, key: str, default: Any = None) -> Any:
        """Return the converted value of an option, or the default if the option is absent or unreadable."""
        option = self.given_options.get(key)
        return default if option is None else option.value

    def has_key(self, key: str) -> bool:
        """Return whether the user wrote this option, with a valid or an invalid value."""
        return key in self.given_options or key in self.paths_of_invalid_keys

    def has_value(self, path: str) -> bool:
        """Return whether the field at this path has a value. An override has precedence."""
        override = self.request.overrides.get(path)
        return path in self.values if override is None else override.value is not None

    def value(self, path: str, default: Any = None) -> Any:
        """Return the value of the field at this path. An override has precedence."""
        assigned = self.request.overrides.get(path) or self.values.get(path)
        return default if assigned is None else assigned.value

    def assign(self, path: str, value: Any, source: str | ValueOrigin) -> None:
        """Set a field. `source` is the key of the option that gives the value, or an origin."""
        if isinstance(source, str):
            given_option = self.given_options[source]
            self.values[path] = AssignedValue(value, given_option.origin, given_option.key)
        else:
            self.values[path] = AssignedValue(value, source)

    def assign_default(self, path: str, value: Any, reason: str = "default of the tool") -> None:
        """Set a field if it has no value yet."""
        if not self.has_value(path) and path not in self.paths_without_default:
            self.values[path] = AssignedValue(value, ValueOrigin(reason, written_by_user=False))

    def remove(self, prefix: str, reason: str) -> None:
        """Remove a field or group that would have no effect, and ignore the tool's defaults for it. Warns if the user set the field."""
        self.paths_without_default.add(prefix)
        for path in [path for path in self.values if path == prefix or path.startswith(prefix + ".")]:
            assigned = self.values.pop(path)
            self.paths_without_default.add(path)
            if assigned.key:
                self.reasons.setdefault(assigned.key, f"no effect: {reason}")
                self.add_warning(f"{assigned.origin.location}: {assigned.key} has no effect: {reason}")

    def add_mistake(self, keys: str | tuple[str, ...], message: str, hint: str = "", *, explained_path: str = "") -> None:
        """Record a mistake about one or several options, with their locations.

        `explained_path` is a spec path: later problems at this path are not reported, because this mistake causes them.
        """
        if explained_path:
            self.paths_of_invalid_keys[explained_path] = explained_path
        keys = (keys,) if isinstance(keys, str) else keys
        options = [self.given_options[key] for key in keys if key in self.given_options]
        locations = ", ".join(dict.fromkeys(option.origin.location for option in options))
        spellings = ", ".join(dict.fromkeys(option.key for option in options)) or ", ".join(keys)
        self.mistakes.append(Mistake(locations or self.location, spellings, message, hint))

    def add_warning(self, message: str) -> None:
        """Record a message that requires an action of the user."""
        if message not in self.warnings:
            self.warnings.append(message)

    def add_reason(self, key: str, reason: str) -> None:
        """Record why an option of the user sets no field. `key` is the key in the tool's table, or as the user wrote it."""
        given_option = self.given_options.get(key)
        self.reasons[given_option.key if given_option else key] = reason

    def refuse_feature(self, keys: str | tuple[str, ...], feature: str, hint: str = "", *, is_droppable: bool = True) -> None:
        """Record that options request a feature that a FineTuneJob does not have.

        With `--drop-unsupported`, the options are left out with a warning.
        """
        keys = (keys,) if isinstance(keys, str) else keys
        options = [self.given_options[key] for key in keys if key in self.given_options]
        locations = ", ".join(dict.fromkeys(option.origin.location for option in options)) or self.location
        spellings = ", ".join(dict.fromkeys(option.key for option in options)) or ", ".join(keys)
        self.refuse_feature_at(locations, spellings, feature, hint, is_droppable=is_droppable)

    def refuse_feature_at(self, location: str, key: str, feature: str, hint: str = "", *, is_droppable: bool = True) -> None:
        """Record that the key at a location requests a feature that a FineTuneJob does not have."""
        message = f"{feature} is not possible in a FineTuneJob"
        if is_droppable and self.request.drop_unsupported:
            for name in key.split(", "):
                self.add_reason(name, f"left out: {message}")
            self.add_warning(f"{location}: {key} is left out: {message}")
            return
        hints = [hint] if hint else []
        if is_droppable:
            hints.append(f"{'or ' if hint else ''}leave it out with --drop-unsupported")
        self.mistakes.append(Mistake(location, key, message, ", ".join(hints), feature))

    def warn_no_effect(self, key: str, reason: str) -> None:
        """Warn that an option of the user has no effect."""
        given_option = self.given_options[key]
        self.reasons[given_option.key] = f"no effect: {reason}"
        self.add_warning(f"{given_option.origin.location}: {given_option.key} has no effect: {reason}")

    def add_note(self, message: str) -> None:
        """Record a message that requires no action."""
        if message not in self.notes:
            self.notes.append(message)

    def store_secret(self, key: str, value: str) -> dict[str, str]:
        """Add a value to the Secret and return the spec's reference to this key of the Secret."""
        self.secrets[key] = value
        self.redact_in_messages(value)
        return {"name": self.secret_name, "key": key}

    def redact_in_messages(self, value: Any) -> None:
        """Redact this text in every message."""
        if isinstance(value, str) and value.strip():
            self.secret_texts.add(value)

    def redact_message(self, message: str) -> str:
        """Return a message without secrets."""
        for secret in sorted(self.secret_texts, key=len, reverse=True):
            edge = r"\b" if len(secret) < 6 else ""
            message = re.sub(edge + re.escape(secret) + edge, REDACTED_TEXT, message)
        return redact_text(message)


@dataclass(frozen=True)
class Importer:
    """A tool: its options and defaults, and functions that recognise its files, read them and combine the options."""

    name: str
    title: str
    rows: tuple[Row, ...]
    defaults: tuple[ToolDefault, ...]
    recognises_input: Callable[[tuple[InputDocument, ...], tuple[str, ...]], bool]
    """Returns whether the documents or the command line belong to this tool."""
    read_options: Callable[[JobDraft], Iterator[OptionEntry]]
    combine_options: Callable[[JobDraft], None]
    """Sets the fields whose value depends on several options."""
    normalise_key: Callable[[str], str] = lambda key: key
    """Normalises the spelling of a key for the lookup in the table."""
    ignores_unknown_keys: bool = False
    """Whether the tool ignores keys that it does not know. The import then warns about such a key, unless it resembles a known key."""
    choose_variant: Callable[[tuple[InputDocument, ...]], Importer] | None = None
    """Returns the importer for these documents, if the tool has several option tables."""
    reports_every_key: bool = False
    """Whether one note lists the keys without effect, instead of one warning for each of them. Keys without a value are listed, too."""
