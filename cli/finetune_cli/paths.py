"""Paths of a FineTuneJob, from the schema the API server has: what may be set, explained and compared."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finetune_api.schema import crd


@dataclass(frozen=True)
class Field:
    """One field. `path` starts with `spec` or `status`; `[]` marks the items of a list."""

    path: str
    kind: str
    description: str
    group: bool


@functools.cache
def fields() -> tuple[Field, ...]:
    """Every field of spec and status, groups before what is in them."""
    root = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    return tuple(one for name in ("spec", "status") for one in _fields(name, root[name]))


def put(spec: dict[str, Any], path: str, value: Any) -> None:
    """Set a value at a dotted path of a nested spec; None removes what is there."""
    *groups, last = path.split(".")
    for one in groups:
        if value is None and one not in spec:
            return
        spec = spec.setdefault(one, {})
    if value is None:
        spec.pop(last, None)
    else:
        spec[last] = value


def _fields(path: str, schema: dict[str, Any]) -> Iterator[Field]:
    group = bool(schema.get("properties"))
    yield Field(path, kind(schema), str(schema.get("description", "")), group)
    inner, suffix = (schema["items"], "[]") if schema.get("type") == "array" else (schema, "")
    for name, value in (inner.get("properties") or {}).items():
        yield from _fields(f"{path}{suffix}.{name}", value)


def kind(schema: dict[str, Any]) -> str:
    """The type of a field in words: its bounds, or the words it may be."""
    if "x-kubernetes-int-or-string" in schema:
        return "quantity"
    if schema.get("type") == "array":
        return f"list of {kind(schema['items'])}"
    if "additionalProperties" in schema:
        return f"map of {kind(schema['additionalProperties'])}"
    if "enum" in schema:
        return " | ".join(str(one) for one in schema["enum"])
    if schema.get("properties"):
        return "group"
    low = f"{'>' if schema.get('exclusiveMinimum') else '>='} {schema['minimum']:g}" if "minimum" in schema else ""
    high = f"{'<' if schema.get('exclusiveMaximum') else '<='} {schema['maximum']:g}" if "maximum" in schema else ""
    bounds = ", ".join(part for part in (low, high) if part)
    return " ".join(part for part in (str(schema.get("type", "object")), bounds) if part)


def example_of(path: str) -> str:
    """The example that the reference gives for a path below spec; an empty text if there is none."""
    import re

    wanted = re.sub(r"\[\d+\]", "[]", f"spec.{path}")
    found = next((one.description for one in fields() if one.path == wanted), "")
    match = re.search(r"Example: `(.*)`", found)
    return match.group(1) if match else ""
