"""Values of a spec from the command line: `--set PATH=VALUE`, and options such as `--model` that set one field."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from finetune_cli.field_errors import is_within
from finetune_cli.fields import Field, fields, find_example, make_group_example
from finetune_cli.mistakes import InvalidInput, Mistake
from finetune_cli.provenance import AssignedValue, ValueOrigin
from finetune_cli.suggestions import suggest_field
from finetune_cli.value_hints import make_field_example_hint, make_group_example_hint
from finetune_cli.yaml_reader import parse_value

FIELD_OF_OPTION = {
    "model": "model.source", "data": "dataset.train", "validation": "dataset.validation", "test": "dataset.test",
    "adapter": "method.adapter.source", "storage": "storage.uri", "gpus": "resources.gpusPerNode", "nodes": "resources.nodes",
}  # fmt: skip
CONFIG_MAP_OPTIONS = {"prompts": "evaluation.comparison.promptsRef", "deepspeed": "distributed.deepspeed.configRef"}
SOURCE_OPTIONS = ("model", "data", "validation", "test", "adapter")
CONFIG_MAP_NAME_PATTERN = re.compile(r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
CONFIG_MAP_KEY_PATTERN = re.compile(r"^[-._a-zA-Z0-9]+$")


def parse_overrides(set_texts: Iterable[str], options: Mapping[str, Any] | None = None) -> dict[str, AssignedValue]:
    """Return the values that `--set` and options such as `--model` set, by spec path. Raises InvalidInput.

    `options` maps the name of each option to its value, or to None if the user does not give the option.
    """
    mistakes: list[Mistake] = []
    overrides: dict[str, AssignedValue] = {}
    for option, value in (options or {}).items():
        if value is not None:
            overrides |= _parse_option(option, value, mistakes)
    fields_by_path = {field.path.removeprefix("spec."): field for field in fields() if field.path.startswith("spec.")}
    for text in set_texts:
        overrides |= _parse_set_text(text, fields_by_path, mistakes)
    if mistakes:
        raise InvalidInput(mistakes)
    return overrides


def attribute_to_option(mistake: Mistake, overrides: Mapping[str, AssignedValue]) -> Mistake:
    """If an option of the command line has set the field of the mistake, return a mistake whose location is this option.

    Otherwise return the mistake unchanged.
    """
    path = mistake.key.removeprefix("spec.")
    assigned_value = next((value for overridden_path, value in overrides.items() if is_within(path, overridden_path)), None)
    if assigned_value is None:
        return mistake
    option = assigned_value.origin.location
    key = path if option == "--set" else option
    return Mistake(option, key, mistake.message, make_hint_for_option(mistake.hint, option, path))


def make_hint_for_option(hint: str, option: str, path: str) -> str:
    """Return the hint for the value of an option. A YAML example becomes an example of the option.

    An option can only set a whole list, so the example for a list item becomes a list.
    """
    if not hint or hint not in (make_field_example_hint(path), make_group_example_hint(path)):
        return hint
    if path.endswith("]"):
        path, example = path.partition("[")[0], f"[{make_group_example(path)}]"
    elif "[" in path:
        return hint
    else:
        example = find_example(path)
    argument = f"{path}={example}" if option == "--set" else example
    return f"for example {option} {shlex.quote(argument)}"


def _parse_option(option: str, value: Any, mistakes: list[Mistake]) -> dict[str, AssignedValue]:
    origin, written_option = ValueOrigin(f"--{option}"), f"--{option}"
    if option in FIELD_OF_OPTION:
        is_path = option in SOURCE_OPTIONS and str(value).startswith((".", "/", "~"))
        return {FIELD_OF_OPTION[option]: AssignedValue(f"file://{value}" if is_path else value, origin, written_option)}
    name, _, key = str(value).removeprefix("configmap://").partition("/")
    if not CONFIG_MAP_NAME_PATTERN.match(name) or not CONFIG_MAP_KEY_PATTERN.match(key):
        mistakes.append(Mistake(written_option, str(value), "this is not the name and key of a ConfigMap", "write NAME/KEY"))
        return {}
    path = CONFIG_MAP_OPTIONS[option]
    return {f"{path}.name": AssignedValue(name, origin, written_option), f"{path}.key": AssignedValue(key, origin, written_option)}


def _parse_set_text(text: str, fields_by_path: dict[str, Field], mistakes: list[Mistake]) -> dict[str, AssignedValue]:
    written_path, equals_sign, value = text.partition("=")
    path = written_path.removeprefix("spec.")
    field = fields_by_path.get(path)
    if field is None:
        mistakes.append(Mistake("--set", written_path, "unknown field", _make_hint_for_unknown(path, fields_by_path)))
    elif not equals_sign or value == "":
        mistakes.append(
            Mistake(
                "--set", path, "the value is missing", f"write --set {path}=VALUE, or {path}=null to remove the field"
            )
        )
    elif value == "null":
        return {path: AssignedValue(None, ValueOrigin("--set"), path)}
    elif field.is_group:
        nested_path = next((field_path for field_path in fields_by_path if field_path.startswith(f"{path}.")), path)
        hint = f"set its fields, for example --set {nested_path}=VALUE, or remove the group with --set {path}=null"
        mistakes.append(Mistake("--set", path, "this is a group of fields and takes no value", hint))
    else:
        return {path: AssignedValue(_convert_text(field.type_text, value), ValueOrigin("--set"), path)}
    return {}


def _make_hint_for_unknown(path: str, fields_by_path: dict[str, Field]) -> str:
    """Return a hint what to write instead of an unknown path. An option cannot set a part of a list or map, but only the whole list or map."""
    ancestor_path = path
    while ancestor_path and ancestor_path not in fields_by_path:
        ancestor_path = ancestor_path[: ancestor_path.rfind("[")] if ancestor_path.endswith("]") else ancestor_path.rpartition(".")[0]
    type_text = fields_by_path[ancestor_path].type_text if ancestor_path else ""
    if type_text.startswith("list of"):
        return f"set the whole list: --set '{ancestor_path}=[...]'"
    if type_text.startswith("map of"):
        return f"set the whole map: --set '{ancestor_path}={{NAME: VALUE}}'"
    closest_path = suggest_field(path, [field_path for field_path in fields_by_path if "[]" not in field_path])
    return f"did you mean {closest_path}?" if closest_path else "`finetune explain` lists all fields"


def _convert_text(type_text: str, text: str) -> Any:
    """Convert the text of an option to the type of its field. For a string or an enum, `no` and `010` stay text."""
    if type_text.startswith("string") or (" | " in type_text and not type_text.startswith("list")):
        return text
    value = parse_value(text)
    if type_text == "map of string" and isinstance(value, dict):
        return {key: item if isinstance(item, str | dict | list) else _to_string(item) for key, item in value.items()}
    if type_text.startswith("list of") and isinstance(value, str) and not text.startswith("["):
        return [part.strip() for part in value.split(",")]
    return value


def _to_string(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
