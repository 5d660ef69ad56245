"""The types that all importers use: the options of a file, the option table of a tool, and the draft of the FineTuneJob."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_cli.importers.converters import Converter, to_text
from finetune_cli.mistakes import Mistake
from finetune_cli.provenance import AssignedValue, ValueOrigin
from finetune_cli.redaction import REDACTED_TEXT, redact_text


@dataclass(frozen=True)
class OptionEntry:
    """One option in a file or on a command line: the key as written, the parsed value, and the location."""

    key: str
    value: Any
    origin: ValueOrigin


@dataclass(frozen=True)
class OptionRow:
    """A row of a tool's option table: the `key` of an option, the `path` of its field in the spec, and the converter of its value.

    `aliases`: other spellings of the key. `is_required`: whether the import refuses a file that does not have the option. `is_set_by_combine`:
    whether the tool's function `combine_options` sets the field. `path` then only names the field in messages. `is_secret`: whether the value is a
    secret. The import stores a secret in a Kubernetes Secret, and never prints it. `no_effect_reason`: why the import ignores the option, which
    the user reads in a warning. It is empty if the import uses the option. `empty_is_absent`: whether an empty or null value counts as no value.
    `missing_feature`: the feature that the option requests and a FineTuneJob does not have. The option is refused unless its value turns the feature
    off: a value in `NEUTRAL_VALUES` or `neutral_values`. `hint` says what to write instead.
    """

    key: str
    path: str = ""
    convert: Converter = to_text
    aliases: tuple[str, ...] = ()
    is_required: bool = False
    is_set_by_combine: bool = False
    is_secret: bool = False
    no_effect_reason: str = ""
    empty_is_absent: bool = True
    missing_feature: str = ""
    hint: str = ""
    neutral_values: tuple[Any, ...] = ()


NEUTRAL_VALUES: tuple[Any, ...] = (None, False, 0, "", "false", "False", "none", "None", [], {})
"""Values that turn an option's feature off, whichever option has the value."""


@dataclass(frozen=True)
class ToolDefault:
    """A value that the tool uses for an option that no file sets. `origin` says where the tool defines the value."""

    path: str
    value: Any
    origin: str = "default of the tool"
    is_applicable: Callable[[JobDraft], bool] = lambda draft: True
    needs_gpu: bool = False
    """Whether the value needs a GPU. If it does, a job without GPUs gets the default of FineTuneJob instead of this value."""


@dataclass(frozen=True)
class GivenOption:
    """An option of the user after conversion: `key` and `raw_value` as written, the converted `value`, and the location."""

    option_row: OptionRow
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
    """The name of the importer, from `--from`. If it is None, the importer that recognises the files is used."""
    name: str | None = None
    namespace: str | None = None
    overrides: Mapping[str, AssignedValue] = field(default_factory=dict)
    """Values of the fields that options of `finetune import` set, by spec path. They override the values in every file."""
    drop_unsupported: bool = False
    """Whether an option is left out with a warning, instead of refused, if a FineTuneJob does not have its feature."""
    benchmarks: str | None = None
    """URI of the folder with the data of the tool's benchmarks."""
    model_map: Mapping[str, str] = field(default_factory=dict)
    """For the name of each model of the OpenAI API: the name of the open model that replaces it."""
    base_learning_rate: float | None = None
    """For the importer `openai`: the learning rate that is multiplied by `learning_rate_multiplier`.

    None means the default learning rate of the objective.
    """
    has_command_line: bool = True
    """Whether hints may name options of `finetune import`. The clients of the OpenAI server have no command line."""
    allowed_variables: frozenset[str] = frozenset()
    """Names of the environment variables that a Hydra configuration may read."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """The environment variables of `finetune import`."""


@dataclass(frozen=True)
class InputDocument:
    """One input file with its text, or one input folder without text."""

    path: Path
    text: str
    is_folder: bool = False

    @property
    def name(self) -> str:
        """The name of the file or folder in messages."""
        return "standard input" if str(self.path) == "-" else self.path.name or str(self.path)


@dataclass
class JobDraft:
    """The FineTuneJob that an import builds: its values so far, and the mistakes, warnings and notes about them."""

    request: Request
    option_table: tuple[OptionRow, ...]
    name: str
    documents: tuple[InputDocument, ...] = ()
    given_options: dict[str, GivenOption] = field(default_factory=dict)
    """The options of the user, by the key in the tool's option table."""
    paths_of_invalid_keys: dict[str, str] = field(default_factory=dict)
    """For each key with an invalid value: the spec path of its field."""
    values: dict[str, AssignedValue] = field(default_factory=dict)
    """The values of the fields, by spec path."""
    paths_without_default: set[str] = field(default_factory=set)
    """Spec paths for which the tool's defaults are ignored."""
    mistakes: list[Mistake] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    secrets: dict[str, str] = field(default_factory=dict)
    """The content of the Secret that the import creates, by its keys."""
    secret_texts: set[str] = field(default_factory=set)
    """Texts that must never be printed."""
    config_maps: dict[str, dict[str, str]] = field(default_factory=dict)
    """The content of each ConfigMap that the import creates, by the name of the ConfigMap."""
    annotations: dict[str, str] = field(default_factory=dict)
    """The annotations of the FineTuneJob."""
    reasons: dict[str, str] = field(default_factory=dict)
    """For each key of the user that sets no field: the reason why it sets none."""

    @property
    def secret_name(self) -> str:
        return f"{self.name}-import"

    @property
    def location(self) -> str:
        """The location of a mistake without a line, such as a missing option: the names of the input files."""
        return ", ".join(document.name for document in self.documents) or "command line"

    def get(self, option_key: str, default: Any = None) -> Any:
        """Return the converted value of an option, or the default if the option is absent or invalid."""
        option = self.given_options.get(option_key)
        return default if option is None else option.value

    def has_key(self, option_key: str) -> bool:
        """Return whether the user wrote this option, with a valid or an invalid value."""
        return option_key in self.given_options or option_key in self.paths_of_invalid_keys

    def has_value(self, spec_path: str) -> bool:
        """Return whether the field at this path has a value. An override of the field takes precedence over its value in the draft."""
        override = self.request.overrides.get(spec_path)
        return spec_path in self.values if override is None else override.value is not None

    def value(self, spec_path: str, default: Any = None) -> Any:
        """Return the value of the field at this path, or the default. An override of the field takes precedence over its value in the draft."""
        assigned_value = self.request.overrides.get(spec_path) or self.values.get(spec_path)
        return default if assigned_value is None else assigned_value.value

    def assign(self, spec_path: str, value: Any, source: str | ValueOrigin) -> None:
        """Set a field. `source` is the key of the option that gives the value, or the origin of the value."""
        if isinstance(source, str):
            given_option = self.given_options[source]
            self.values[spec_path] = AssignedValue(value, given_option.origin, given_option.key)
        else:
            self.values[spec_path] = AssignedValue(value, source)

    def assign_default(self, spec_path: str, value: Any, reason: str = "default of the tool") -> None:
        """Set a field to a default if it has no value yet, unless the tool's defaults are ignored for this field.

        `reason` says where the default comes from.
        """
        if not self.has_value(spec_path) and spec_path not in self.paths_without_default:
            self.values[spec_path] = AssignedValue(value, ValueOrigin(reason, written_by_user=False))

    def remove(self, prefix: str, reason: str) -> None:
        """Remove a field or group that would have no effect, and ignore the tool's defaults for it.

        Warn about each option of the user that had set a removed value.
        """
        self.paths_without_default.add(prefix)
        for path in [path for path in self.values if path == prefix or path.startswith(prefix + ".")]:
            assigned_value = self.values.pop(path)
            self.paths_without_default.add(path)
            if assigned_value.key:
                self.reasons.setdefault(assigned_value.key, f"no effect: {reason}")
                self.add_warning(f"{assigned_value.origin.location}: {assigned_value.key} has no effect: {reason}")

    def add_mistake(self, keys: str | tuple[str, ...], message: str, hint: str = "", *, explained_path: str = "") -> None:
        """Record a mistake about one or several options, with their locations.

        `explained_path`: a spec path. Problems that the checks find at this path are not reported, because this mistake explains them.
        """
        if explained_path:
            self.paths_of_invalid_keys[explained_path] = explained_path
        keys = (keys,) if isinstance(keys, str) else keys
        options = [self.given_options[key] for key in keys if key in self.given_options]
        locations = ", ".join(dict.fromkeys(option.origin.location for option in options))
        written_keys = ", ".join(dict.fromkeys(option.key for option in options)) or ", ".join(keys)
        self.mistakes.append(Mistake(locations or self.location, written_keys, message, hint))

    def add_warning(self, message: str) -> None:
        """Record a message that asks the user to do or check something. The same message is recorded only once."""
        if message not in self.warnings:
            self.warnings.append(message)

    def add_reason(self, option_key: str, reason: str) -> None:
        """Record why an option of the user sets no field. `option_key`: the key in the tool's option table, or the key as the user wrote it."""
        given_option = self.given_options.get(option_key)
        self.reasons[given_option.key if given_option else option_key] = reason

    def refuse_feature(self, keys: str | tuple[str, ...], feature: str, hint: str = "", *, is_droppable: bool = True) -> None:
        """Record a mistake about options whose feature a FineTuneJob does not have.

        If the user gave `--drop-unsupported` and `is_droppable` is true, leave the options out, and record a warning instead of the mistake.
        """
        keys = (keys,) if isinstance(keys, str) else keys
        options = [self.given_options[key] for key in keys if key in self.given_options]
        locations = ", ".join(dict.fromkeys(option.origin.location for option in options)) or self.location
        written_keys = ", ".join(dict.fromkeys(option.key for option in options)) or ", ".join(keys)
        self.refuse_feature_at(locations, written_keys, feature, hint, is_droppable=is_droppable)

    def refuse_feature_at(self, location: str, option_key: str, feature: str, hint: str = "", *, is_droppable: bool = True) -> None:
        """Record a mistake about a key whose feature a FineTuneJob does not have. With `--drop-unsupported`, record a warning instead."""
        message = f"a FineTuneJob does not support {feature}"
        if is_droppable and self.request.drop_unsupported:
            for name in option_key.split(", "):
                self.add_reason(name, f"left out: {message}")
            self.add_warning(f"{location}: {option_key} is left out: {message}")
            return
        hints = [hint] if hint else []
        if is_droppable:
            hints.append(f"{'or ' if hint else ''}leave it out with --drop-unsupported")
        self.mistakes.append(Mistake(location, option_key, message, ", ".join(hints), feature))

    def warn_no_effect(self, option_key: str, reason: str) -> None:
        """Warn that an option of the user has no effect."""
        given_option = self.given_options[option_key]
        self.reasons[given_option.key] = f"no effect: {reason}"
        self.add_warning(f"{given_option.origin.location}: {given_option.key} has no effect: {reason}")

    def add_note(self, message: str) -> None:
        """Record a message that requires no action of the user. The same message is recorded only once."""
        if message not in self.notes:
            self.notes.append(message)

    def store_secret(self, secret_key: str, value: str) -> dict[str, str]:
        """Add a value to the Secret and return the spec's reference to this key of the Secret."""
        self.secrets[secret_key] = value
        self.redact_in_messages(value)
        return {"name": self.secret_name, "key": secret_key}

    def redact_in_messages(self, value: Any) -> None:
        """Redact a value in all messages, if it is a text that is not blank."""
        if isinstance(value, str) and value.strip():
            self.secret_texts.add(value)

    def redact_message(self, message: str) -> str:
        """Return a message in which the secrets are redacted."""
        for secret in sorted(self.secret_texts, key=len, reverse=True):
            word_edge = r"\b" if len(secret) < 6 else ""
            message = re.sub(word_edge + re.escape(secret) + word_edge, REDACTED_TEXT, message)
        return redact_text(message)


@dataclass(frozen=True)
class Importer:
    """The importer of one tool.

    It has the options and defaults of the tool, and the functions that recognise the tool's files, read them and combine their options.
    """

    name: str
    title: str
    option_table: tuple[OptionRow, ...]
    defaults: tuple[ToolDefault, ...]
    recognises_input: Callable[[tuple[InputDocument, ...], tuple[str, ...]], bool]
    """Returns whether the documents, or the words of the command line, belong to this tool."""
    read_options: Callable[[JobDraft], Iterator[OptionEntry]]
    """Yields the options of the user in order: a later entry overrides an earlier entry with the same key."""
    combine_options: Callable[[JobDraft], None]
    """Sets the fields whose value depends on several options."""
    normalise_key: Callable[[str], str] = lambda key: key
    """Returns a key in the spelling of the option table, so that the key's row can be found."""
    ignores_unknown_keys: bool = False
    """Whether the tool ignores unknown keys.

    If it does, the import refuses an unknown key that resembles a known key, and warns about every other unknown key.
    """
    choose_variant: Callable[[tuple[InputDocument, ...]], Importer] | None = None
    """A function that returns the importer with the option table for these documents. It is None if the tool has a single option table."""
    reports_every_key: bool = False
    """Whether the notes list all keys that set no field, including keys without a value. If false, the import prints a warning for each key without effect."""
