"""Merges a user's DeepSpeed or accelerate file from a ConfigMap with the fields of the spec.

If the user sets a value both in the file and in the spec, the two values must be equal; an error names all values that differ. If the
spec's value is a default, the file's value is used and must satisfy the same rules. The operator may have adapted the spec: a smaller
micro-batch after an out-of-memory error, or a lower learning rate after a rollback. The operator cannot adapt the file. So this module compares the
file's values with the spec's values from before the adaptation, and then adapts the file's values by the same factor.
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
from finetune_api.rules import new_problems, remove_defaults
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.common import ConfigMapKeyRef
from pydantic import ValidationError

AUTO_VALUE = "auto"
"""DeepSpeed's placeholder for a value that transformers or this module fills in."""


@dataclass(frozen=True)
class ValueType:
    """A set of values that a key of a file may have. `description` completes the sentence "the value is not ..."."""

    description: str
    accepts: Callable[[Any], bool]


def one_of(*values: Any) -> ValueType:
    """Return a type that accepts only these values. A value must also have the same type, so `true` is not accepted as 1."""
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
    file: str, section_path: str, section: Mapping[str, Any], types: Mapping[str, ValueType], *, allows_auto: bool = False
) -> None:
    """Refuse unknown keys and wrong values in a section of a file. null is always accepted.

    `file`: the name of the file in messages. `section_path`: the path of the section, or an empty text for the top level. `types`: the type
    of each known key. `allows_auto`: whether `auto` is accepted for every key whose value is not a mapping.
    Errors: ConfigError ConfigFileInvalid with every wrong key and value.
    """
    unknown_keys = [f"{_join_key_path(section_path, key)}{_suggest_key(key, types)}" for key in section if key not in types]
    wrong_values = [
        f"{_join_key_path(section_path, key)} is {_as_text(value)}, not {value_type.description}"
        for key, value_type, value in ((key, types[key], value) for key, value in section.items() if key in types)
        if value is not None and not (allows_auto and value == AUTO_VALUE and value_type is not MAPPING_TYPE) and not value_type.accepts(value)
    ]
    problems = ([f"{', '.join(unknown_keys)} would have no effect"] if unknown_keys else []) + wrong_values
    if problems:
        hint = " and ".join((["remove it"] if unknown_keys else []) + (["write a value that fits"] if wrong_values else []))
        raise ConfigError("ConfigFileInvalid", f"{file}: {'; '.join(problems)}", hint=hint)


def _join_key_path(section_path: str, key: str) -> str:
    return f"{section_path}.{key}" if section_path else key


def _suggest_key(key: str, known_keys: Iterable[str]) -> str:
    similar_keys = difflib.get_close_matches(key, list(known_keys), 1, cutoff=0.9)
    return f" (did you mean {similar_keys[0]}?)" if similar_keys else ""


def read_config_file(config_map_ref: ConfigMapKeyRef, config_maps: Path, field_path: str) -> dict[str, Any]:
    """Return the content of a YAML or JSON file as nested dictionaries. Errors: NotFoundError ConfigMapMissing; ConfigError ConfigFileInvalid."""
    location = f"{field_path}: ConfigMap {config_map_ref.name}, key {config_map_ref.key}"
    try:
        file_text = (config_maps / config_map_ref.name / config_map_ref.key).read_text(encoding="utf-8")
    except OSError:
        raise NotFoundError(
            "ConfigMapMissing", f"{location} does not exist", hint="create it", failure_class=FailureClass.USER
        ) from None
    try:
        content = json.loads(file_text)
    except ValueError:
        content = _parse_yaml(file_text, location)
    if not isinstance(content, dict):
        raise ConfigError(
            "ConfigFileInvalid", f"{location} holds {type(content).__name__}, not a mapping", hint="write keys and values"
        )
    non_text_keys = [_as_text(key) for key in _list_all_keys(content) if not isinstance(key, str)]
    if non_text_keys:
        raise ConfigError(
            "ConfigFileInvalid", f"{location} has keys that are not text: {', '.join(non_text_keys)}", hint="write them in quotes"
        )  # fmt: skip
    return content


def _list_all_keys(value: Any) -> list[Any]:
    """Return the keys at every level of nested dictionaries and lists."""
    if isinstance(value, list):
        return [key for item in value for key in _list_all_keys(item)]
    return [*value, *(key for item in value.values() for key in _list_all_keys(item))] if isinstance(value, dict) else []


def _parse_yaml(text: str, location: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        first_line = str(error).splitlines()[0]
        raise ConfigError(
            "ConfigFileInvalid", f"{location} is neither JSON nor YAML: {first_line}", hint="correct the file"
        ) from None


@dataclass
class FileMerge:
    """Merges the values of one file with the spec. All conflicts are collected, so that one error can report them together."""

    run: RunConfig
    conflicts: list[str] = field(default_factory=list)
    """One sentence for each value that differs between the file and the spec."""
    notes: list[str] = field(default_factory=list)
    """Sentences for the status."""
    file_values: dict[str, Any] = field(default_factory=dict)
    """The values of the file that replace values of the spec, by spec path."""

    def merge(self, key: str, file_value: Any, path: str, spec_value: Any, file_text: str | None = None) -> Any:
        """Return the value to use: `file_value` (the file's value of `key`), or `spec_value` (the spec's value at `path`) if the file has none.

        If the user set both and the values differ, record a conflict. If the operator adapted the spec's value, adapt the file's value too.
        `file_text`: `file_value` as the file spells it.
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
        """Whether the file's value replaces `spec_value`. If it does, record a note. If the user set both values and they differ, record a conflict."""
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
        """Return the spec's value at `path` from before the operator adapted it, or `spec_value` if it was not adapted."""
        return (self.run.before_adaptation or {}).get(path, spec_value)

    def undo_adaptation(self, path: str, spec_value: Any, value: Any) -> Any:
        """Return `value` divided by the factor by which the operator adapted the spec's value at `path`."""
        value_before_adaptation = self.before_adaptation(path, spec_value)
        return value if _values_equal(value_before_adaptation, spec_value) else value * value_before_adaptation / spec_value

    def _adapt_file_value(self, key: str, file_value: Any, path: str, value_before_adaptation: Any, spec_value: Any) -> Any:
        """Return the file's value multiplied by the factor by which the operator adapted the spec's value. Record a note."""
        if not all(_is_number(value) and value for value in (file_value, value_before_adaptation, spec_value)):
            return spec_value
        adapted_value = file_value * spec_value / value_before_adaptation
        self.notes.append(
            f"the operator changed {path} from {_as_text(value_before_adaptation)} to {_as_text(spec_value)}; {key} in the file therefore changes from "
            f"{_as_text(file_value)} to {adapted_value:.10g}"
        )
        return adapted_value

    def require_equal(self, key: str, file_value: Any, actual_name: str, actual_value: Any) -> None:
        """Record a conflict if the file's value differs from a value that the file cannot change, such as the number of ranks."""
        if file_value is not None and file_value != AUTO_VALUE and not _values_equal(file_value, actual_value):
            self.conflicts.append(f"{key} is {_as_text(file_value)}, {actual_name} is {_as_text(actual_value)}")

    def check_merged_values(self, file: str) -> None:
        """Check that there are no conflicts, and that the merged spec satisfies the rules of the API. `file`: the name of the file in messages.

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
        """Whether the merged spec with `values` (by spec path) satisfies each API rule that it satisfies without them. Errors: pydantic's ValidationError."""
        spec = self.merged_spec()
        return not new_problems(spec, spec.with_values(values))

    def _spec_as_written(self) -> FineTuneJobSpec:
        """Return the spec without its defaults, except defaults that the operator has adapted."""
        settings_before_adaptation = self.run.before_adaptation or {}
        return remove_defaults(self.run.spec, [path for path in self.run.defaults if path not in settings_before_adaptation])


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
    """Return a value as it would be written in the file. Text that could be read as a number or a boolean is quoted."""
    if isinstance(value, str):
        return value if value[:1].isalpha() and value not in ("true", "false", "null") else json.dumps(value)
    return "not given" if value is None else json.dumps(value, default=str)
