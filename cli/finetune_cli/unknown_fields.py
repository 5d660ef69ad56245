"""Finds fields of a spec that the schema does not have. For each unknown field, suggests the most similar field of the schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finetune_api.aliases import find_field_for_alias

from finetune_cli.fields import fields_by_path, make_group_example
from finetune_cli.suggestions import suggest_field

POD_RESOURCES_HINT = "write the amounts in resources itself: `resources: {gpusPerNode: 1, cpu: 4, memory: 32Gi}`"
HINT_BY_FIELD_PATH = {
    "model.revision": "write the revision after the source: `source: org/name@main`",
    "dataset.revision": "write the revision after the source: `train: org/name@main`",
    "resources.limits": POD_RESOURCES_HINT,
    "resources.requests": POD_RESOURCES_HINT,
    "storage.credentialsSecretRef.key": "remove it: the Secret has the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}
"""Hints by the path of an unknown field. Other tools have these fields. Each hint says how a FineTuneJob expresses the same setting."""
MAX_LISTED_FIELDS = 12
"""A hint lists the fields of a group only if the group has at most this number of fields."""


@dataclass(frozen=True)
class UnknownField:
    """A field that the schema does not have. Paths are relative to spec. `suggested_path` is empty if no field is similar."""

    path: str
    message: str
    hint: str
    suggested_path: str = ""


def find_unknown_fields(raw_spec: dict[str, Any]) -> Iterator[UnknownField]:
    """Yield each field that the schema does not have, with the most similar field of the schema."""
    yield from _find_unknown_fields_below(raw_spec, "", "spec")


def _find_unknown_fields_below(group_value: dict[str, Any], path: str, pattern: str) -> Iterator[UnknownField]:
    """Yield the unknown fields of one group. `path` contains list indexes (`rewards[0]`); `pattern` begins with `spec` and has `[]` instead of indexes."""
    for key, field_value in group_value.items():
        field_path, field_pattern = f"{path}.{key}" if path else key, f"{pattern}.{key}"
        field = None if "." in key else fields_by_path().get(field_pattern)
        if field is None:
            yield _describe_unknown_field(key, field_value, field_path, pattern)
        elif field.type_text == "group" and isinstance(field_value, dict):
            yield from _find_unknown_fields_below(field_value, field_path, field_pattern)
        elif field.type_text == "list of group" and isinstance(field_value, list):
            for i, item in enumerate(field_value):
                if isinstance(item, dict):
                    yield from _find_unknown_fields_below(item, f"{field_path}[{i}]", f"{field_pattern}[]")


def _describe_unknown_field(key: str, value: Any, path: str, group_pattern: str) -> UnknownField:
    name, colon, rest = key.partition(":")
    if colon and value is None and f"{group_pattern}.{name}" in fields_by_path():
        return UnknownField(path, "unknown field", f"write a space after the colon: {name}: {rest}", f"{group_pattern}.{name}".removeprefix("spec."))
    if path in HINT_BY_FIELD_PATH:
        return UnknownField(path, "unknown field", HINT_BY_FIELD_PATH[path])
    if "." in key and not find_field_for_alias(key):
        suggested_path = suggest_field(f"{group_pattern}.{key}", _list_spec_paths())
        nested_path = suggested_path.removeprefix(f"{group_pattern}.") if suggested_path.startswith(f"{group_pattern}.") else key
        message = "a key with dots does not select a nested field"
        return UnknownField(path, message, f"write {_to_nested_yaml(nested_path, value)}", suggested_path.removeprefix("spec."))
    suggested_path = "spec." + alias if (alias := find_field_for_alias(key)) and "." in key else suggest_field(f"{group_pattern}.{key}", _list_spec_paths())
    if not suggested_path:
        return UnknownField(path, "unknown field", _list_fields(group_pattern))
    example = make_group_example(suggested_path.removeprefix("spec."))
    hint = f"did you mean {suggested_path}?" + (f" For example {example}" if example else "")
    return UnknownField(path, "unknown field", hint, suggested_path.removeprefix("spec."))


def _list_spec_paths() -> list[str]:
    return [path for path in fields_by_path() if path.startswith("spec.")]


def _list_fields(group_pattern: str) -> str:
    """Return a hint with the fields of a group, or with the command that lists them if the group is large."""
    prefix = f"{group_pattern}."
    field_names = [path.removeprefix(prefix) for path in fields_by_path() if path.startswith(prefix) and "." not in path.removeprefix(prefix)]
    group = group_pattern.removeprefix("spec.").replace("[]", "")
    if group_pattern == "spec" or len(field_names) > MAX_LISTED_FIELDS:
        return f"`finetune explain{'' if group_pattern == 'spec' else f' {group}'}` lists all fields"
    return f"the fields of {group} are {', '.join(field_names)}"


def _to_nested_yaml(dotted_key: str, value: Any) -> str:
    """Convert a dotted key and its value to nested YAML, such as `training: {learningRate: 0.5}`."""
    *groups, field_name = dotted_key.split(".")
    text = f"{field_name}: {json.dumps(value) if isinstance(value, str | int | float | bool | None) else '...'}"
    for group in reversed(groups):
        text = f"{group}: {{{text}}}"
    return text
