"""Merges a user's DeepSpeed or accelerate file from a ConfigMap with the fields of the spec.

If the user set a value in file and spec, the two must be equal; every difference is reported with both values. If the spec's value
is a default, the file's value is used and must satisfy the same rules. The operator may have adapted the spec (a smaller micro-batch
after an out-of-memory error, a lower learning rate after a rollback), but not the file. The file's values are therefore compared
with the spec's values before the adaptation, and then adapted by the same factor.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.errors import ConfigError, NotFoundError
from finetune_api.names import FailureClass
from finetune_api.pod import RunConfig
from finetune_api.rules import new_problems, without_defaults
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.common import ConfigMapKeyRef
from pydantic import ValidationError

AUTO_VALUE = "auto"
"""DeepSpeed's placeholder for a value that transformers or this module fills in."""


@dataclass(frozen=True)
class ValueType:
    """The values that a key of a file may have."""

    description: str
    accepts: Callable[[Any], bool]


def one_of(*values: Any) -> ValueType:
    """Return a type that accepts only these words and numbers. It does not accept `true` as 1."""
    return ValueType(
        f"one of {', '.join(_as_text(allowed) for allowed in values)}",
        lambda value: any(value == allowed and type(value) is type(allowed) for allowed in values),
    )


COUNT_TYPE = ValueType("a whole number of at least 1", lambda value: _is_whole(value) and value >= 1)
STEP_COUNT_TYPE = ValueType("a whole number of at least 0", lambda value: _is_whole(value) and value >= 0)
POSITIVE_TYPE = ValueType("a number above 0", lambda value: _is_number(value) and value > 0)
NOT_NEGATIVE_TYPE = ValueType("a number of at least 0", lambda value: _is_number(value) and 0 <= value < math.inf)
BOOLEAN_TYPE = ValueType("true or false", lambda value: isinstance(value, bool))
TEXT_TYPE = ValueType("text", lambda value: isinstance(value, str))
MAPPING_TYPE = ValueType("a mapping of keys and values", lambda value: isinstance(value, dict))


def check_keys(
    file: str, group: str, keys: Mapping[str, Any], types: Mapping[str, ValueType], *, allows_auto: bool = False
) -> None:
    """Refuse unknown keys and wrong values in a group of a file (empty group: the top level). null is always accepted.

    With `allows_auto`, `auto` is accepted as the value of every key that is not a mapping.
    Errors: ConfigError ConfigFileInvalid with every wrong key and value.
    """
    unknown = [f"{_key_path(group, key)}{_suggest_key(key, types)}" for key in keys if key not in types]
    wrong = [
        f"{_key_path(group, key)} is {_as_text(value)}, not {kind.description}"
        for key, kind, value in ((key, types[key], value) for key, value in keys.items() if key in types)
        if value is not None and not (allows_auto and value == AUTO_VALUE and kind is not MAPPING_TYPE) and not kind.accepts(value)
    ]
    problems = ([f"{', '.join(unknown)} would have no effect"] if unknown else []) + wrong
    if problems:
        hint = " and ".join((["remove it"] if unknown else []) + (["write a value that fits"] if wrong else []))
        raise ConfigError("ConfigFileInvalid", f"{file}: {'; '.join(problems)}", hint=hint)


def _key_path(group: str, key: str) -> str:
    return f"{group}.{key}" if group else key


def _suggest_key(key: str, known_keys: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known_keys), 1, cutoff=0.9)
    return f" (did you mean {near[0]}?)" if near else ""


def read_config_file(ref: ConfigMapKeyRef, config_maps: Path, field_path: str) -> dict[str, Any]:
    """Read the YAML or JSON file as nested dictionaries. Errors: NotFoundError ConfigMapMissing; ConfigError ConfigFileInvalid."""
    location = f"{field_path}: ConfigMap {ref.name}, key {ref.key}"
    try:
        text = (config_maps / ref.name / ref.key).read_text(encoding="utf-8")
    except OSError:
        raise NotFoundError(
            "ConfigMapMissing", f"{location} does not exist", hint="create it", failure_class=FailureClass.USER
        ) from None
    try:
        value = json.loads(text)
    except ValueError:
        value = _parse_yaml(text, location)
    if not isinstance(value, dict):
        raise ConfigError(
            "ConfigFileInvalid", f"{location} holds {type(value).__name__}, not a mapping", hint="write keys and values"
        )
    not_text = [_as_text(key) for key in _all_keys(value) if not isinstance(key, str)]
    if not_text:
        raise ConfigError(
            "ConfigFileInvalid", f"{location} has keys that are not text: {', '.join(not_text)}", hint="write them in quotes"
        )  # fmt: skip
    return value


def _all_keys(value: Any) -> list[Any]:
    """Yield the keys at every level of nested dictionaries and lists."""
    if isinstance(value, list):
        return [key for item in value for key in _all_keys(item)]
    return [*value, *(key for item in value.values() for key in _all_keys(item))] if isinstance(value, dict) else []


def _parse_yaml(text: str, location: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        first = str(error).splitlines()[0]
        raise ConfigError(
            "ConfigFileInvalid", f"{location} is neither JSON nor YAML: {first}", hint="correct the file"
        ) from None


@dataclass
class FileMerge:
    """Merges the values of one file with the spec. All conflicts are collected and reported together."""

    run: RunConfig
    conflicts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Sentences for the status."""
    file_values: dict[str, Any] = field(default_factory=dict)
    """Values that the file sets instead of the spec, by spec path."""

    def merge(self, key: str, file_value: Any, path: str, spec_value: Any, file_text: str | None = None) -> Any:
        """Return `file_value` (the file's value of `key`). If the file has no value, return `spec_value` (the spec's value at `path`).

        Record a conflict if the user set both and the values differ. `file_text`: `file_value` as the file spells it.
        """
        value_before_adaptation = self.before_adaptation(path, spec_value)
        if not self._file_takes_precedence(key, file_value, path, value_before_adaptation, file_text):
            return spec_value
        self.file_values[path] = (
            file_value
            if _values_equal(value_before_adaptation, spec_value)
            else self._adapt_file_value(key, file_value, path, value_before_adaptation, spec_value)
        )
        return self.file_values[path]

    def _file_takes_precedence(self, key: str, file_value: Any, path: str, spec_value: Any, file_text: str | None = None) -> bool:
        """Whether the file's value replaces the spec's value `spec_value`. Record a note if it does, or a conflict if the user set both."""
        if file_value is None or file_value == AUTO_VALUE or _values_equal(file_value, spec_value):
            return False
        text = _as_text(file_value) if file_text is None else file_text
        if spec_value is not None and path not in self.run.defaults:
            self.conflicts.append(f"{key} is {text}, {path} is {_as_text(spec_value)}")
            return False
        if spec_value is not None:
            self.notes.append(f"{key} {text} of the file replaces the default {path} {_as_text(spec_value)}")
        return True

    def before_adaptation(self, path: str, spec_value: Any) -> Any:
        """Return the spec's value at `path` before the operator adapted it, or `spec_value` if it was not adapted."""
        return (self.run.before_adaptation or {}).get(path, spec_value)

    def undo_adaptation(self, path: str, spec_value: Any, value: Any) -> Any:
        """Divide `value` by the factor by which the operator adapted the spec's value at `path`."""
        value_before_adaptation = self.before_adaptation(path, spec_value)
        return value if _values_equal(value_before_adaptation, spec_value) else value * value_before_adaptation / spec_value

    def _adapt_file_value(self, key: str, file_value: Any, path: str, value_before_adaptation: Any, spec_value: Any) -> Any:
        """Multiply the file's value by the factor by which the operator adapted the spec's value."""
        if not all(_is_number(value) and value for value in (file_value, value_before_adaptation, spec_value)):
            return spec_value
        value = file_value * spec_value / value_before_adaptation
        self.notes.append(
            f"the operator changed {path} from {_as_text(value_before_adaptation)} to {_as_text(spec_value)}; {key} in the file therefore changes from "
            f"{_as_text(file_value)} to {value:.10g}"
        )
        return value

    def require_equal(self, key: str, file_value: Any, actual_name: str, actual_value: Any) -> None:
        """Record a conflict if the file's value differs from a value that the file cannot set, such as the number of ranks."""
        if file_value is not None and file_value != AUTO_VALUE and not _values_equal(file_value, actual_value):
            self.conflicts.append(f"{key} is {_as_text(file_value)}, {actual_name} is {_as_text(actual_value)}")

    def check_merged_values(self, file: str) -> None:
        """Check the merged values.

        Errors: ConfigError ConfigsDisagree with every conflict; ConfigFileInvalid; or the code of a rule that the file's values break.
        """
        if self.conflicts:
            raise ConfigError(
                "ConfigsDisagree", f"{file} and the spec disagree: {'; '.join(self.conflicts)}",
                hint="write the same value in both, remove one of the two, or (DeepSpeed) write auto in the file",
            )  # fmt: skip
        if not self.file_values:
            return
        try:
            spec = self.merged_spec()
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, item['loc']))} {item['input']}: {item['msg']}" for item in error.errors()
            )
            raise ConfigError(
                "ConfigFileInvalid", f"{file} holds values that the API does not allow: {problems}", hint="write a value that fits"
            ) from None  # fmt: skip
        for problem in new_problems(self._spec_as_written(), spec):
            raise ConfigError(
                problem.code, f"{problem.path}, with the values of {file}: {problem.message}", hint=problem.hint
            )

    def merged_spec(self) -> FineTuneJobSpec:
        """Return the spec with the file's values, as if the user had written them in the spec. Errors: pydantic's ValidationError."""
        return self._spec_as_written().with_values(self.file_values)

    def allows(self, values: Mapping[str, Any]) -> bool:
        """Whether these values (by spec path) break no further rule in the merged spec. Errors: pydantic's ValidationError."""
        spec = self.merged_spec()
        return not new_problems(spec, spec.with_values(values))

    def _spec_as_written(self) -> FineTuneJobSpec:
        """Return the spec without its defaults, except defaults that the operator has adapted."""
        adapted = self.run.before_adaptation or {}
        return without_defaults(self.run.spec, [path for path in self.run.defaults if path not in adapted])


def _values_equal(left: Any, right: Any) -> bool:
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, int | float) and isinstance(right, int | float):
        return math.isclose(left, right, rel_tol=1e-9)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(_values_equal(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_text(value: Any) -> str:
    """Format a value as in the file. Text that could be parsed as a number or a boolean is quoted."""
    if isinstance(value, str):
        return value if value[:1].isalpha() and value not in ("true", "false", "null") else json.dumps(value)
    return "not given" if value is None else json.dumps(value, default=str)
