"""The fields of a FineTuneJob with their types, read from the CRD's schema, and functions that get and set values in a spec."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finetune_api.schema import build_crd


@dataclass(frozen=True)
class Field:
    """A field of a FineTuneJob. `path` starts with `spec` or `status`, and has `[]` after the name of a list."""

    path: str
    type_text: str
    description: str
    is_group: bool
    enum_values: tuple[str, ...] = ()
    """Allowed values of an enum."""


@functools.cache
def fields() -> tuple[Field, ...]:
    """Return every field of spec and status. A group comes before the fields inside it."""
    root = build_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    return tuple(field for name in ("spec", "status") for field in iterate_fields_below(name, root[name]))


@functools.cache
def fields_by_path() -> dict[str, Field]:
    """Return every field by path. Paths start with `spec` or `status`."""
    return {field.path: field for field in fields()}


def iterate_fields_below(path: str, schema: dict[str, Any]) -> Iterator[Field]:
    """Yield the field that an OpenAPI schema describes, and all fields inside it."""
    is_group = bool(schema.get("properties"))
    enum_values = tuple(str(value) for value in schema.get("enum") or schema.get("items", {}).get("enum") or ())
    yield Field(path, describe_type(schema), str(schema.get("description", "")), is_group, enum_values)
    group_schema, suffix = (schema["items"], "[]") if schema.get("type") == "array" else (schema, "")
    for name, field_schema in (group_schema.get("properties") or {}).items():
        yield from iterate_fields_below(f"{path}{suffix}.{name}", field_schema)


def describe_type(schema: dict[str, Any]) -> str:
    """Describe the type of a field with its bounds, or list the values of an enum."""
    if "x-kubernetes-int-or-string" in schema:
        return "quantity"
    if schema.get("type") == "array":
        return f"list of {describe_type(schema['items'])}"
    if "additionalProperties" in schema:
        return f"map of {describe_type(schema['additionalProperties'])}"
    if "enum" in schema:
        return " | ".join(str(value) for value in schema["enum"])
    if schema.get("properties"):
        return "group"
    low_bound_text = f"{'>' if schema.get('exclusiveMinimum') else '>='} {schema['minimum']:g}" if "minimum" in schema else ""
    high_bound_text = f"{'<' if schema.get('exclusiveMaximum') else '<='} {schema['maximum']:g}" if "maximum" in schema else ""
    bounds = ", ".join(part for part in (low_bound_text, high_bound_text) if part)
    return " ".join(part for part in (str(schema.get("type", "object")), bounds) if part)


def remove_indexes(path: str) -> str:
    """Return a path without list indexes: `tolerations[].key` for `tolerations[2].key`."""
    return re.sub(r"\[\d+\]", "[]", path)


def find_field(path: str) -> Field | None:
    """Return the field at a path below spec, or None if there is no such field. The path may contain list indexes."""
    return fields_by_path().get(f"spec.{remove_indexes(path)}")


def find_example(path: str) -> str:
    """Return the example in the description of a field below spec, or an empty string if the description has no example."""
    field = find_field(path)
    match = re.search(r"Example: `(.*?)`\.?(?: Values:|$)", field.description) if field else None
    return match.group(1) if match else ""


def make_group_example(path: str) -> str:
    """Return an example of a group below spec with some of its fields, such as `training: {epochs: 3}`.

    Returns an empty string if the path is neither a group nor a list item, or if no field inside it has an example.
    """
    pattern = f"spec.{remove_indexes(path)}"
    field = fields_by_path().get(pattern.removesuffix("[]"))
    if field is None or not (field.is_group or pattern.endswith("[]")):
        return ""
    prefix = f"{pattern}."
    inner_paths = [inner_field.path.removeprefix(prefix) for inner_field in fields() if inner_field.path.startswith(prefix)]
    examples = [(name, find_example(f"{path}.{name}")) for name in inner_paths if "." not in name]
    pairs = [f"{name}: {example}" for name, example in examples if example]
    # The example shows all fields of a reference, the first two of a list item (the schema lists required fields first), and one of any other group.
    shown_pairs = pairs if path.endswith("Ref") else pairs[: 2 if pattern.endswith("[]") else 1]
    name = "" if pattern.endswith("[]") else f"{path.rpartition('.')[2]}: "
    return f"{name}{{{', '.join(shown_pairs)}}}" if shown_pairs else ""


# --- values at dotted paths -----------------------------------------------------------------------------------------


def get_value(spec: dict[str, Any], path: str) -> Any:
    """Return the value at a dotted path of a nested spec, or None if the path does not exist."""
    value: Any = spec
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def set_value(spec: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a dotted path of a nested spec. The value None removes the field."""
    *groups, last_name = path.split(".")
    for name in groups:
        if value is None and name not in spec:
            return
        spec = spec.setdefault(name, {})
    if value is None:
        spec.pop(last_name, None)
    else:
        spec[last_name] = value


def with_values(spec: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a spec with values set by dotted path. The value None removes a field."""
    changed_spec = copy.deepcopy(spec)
    for path, value in values.items():
        set_value(changed_spec, path, value)
    return changed_spec


def flatten(spec: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return a dict from the dotted path of every value in a nested spec to the value as JSON. Empty groups are left out."""
    json_by_path: dict[str, str] = {}
    for key, inner in spec.items():
        path = f"{prefix}{key}"
        if isinstance(inner, dict) and inner:
            json_by_path |= flatten(inner, f"{path}.")
        elif inner != {}:
            json_by_path[path] = json.dumps(inner, ensure_ascii=False)
    return json_by_path
