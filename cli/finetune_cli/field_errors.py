"""Converts validation errors of the API's pydantic models into errors about fields of a manifest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from finetune_cli.fields import example_of, group_example

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class FieldError:
    """An invalid field. `path` is relative to spec. `is_unknown`: the schema has no such field."""

    path: str
    message: str
    hint: str = ""
    is_unknown: bool = False


def is_within(path: str, group: str) -> bool:
    """Return whether `path` equals `group`, or is a field or list item inside the group."""
    return path == group or path.startswith((f"{group}.", f"{group}["))


def field_errors(error: ValidationError, known_errors: Iterable[FieldError] = ()) -> Iterator[FieldError]:
    """Yield every error of a model.

    The values of the `known` errors were removed. A field that is missing only because of such a removal is not reported.
    """
    earlier_errors = list(known_errors)
    for details in error.errors():
        path = path_of(details["loc"])
        if details["type"] == "missing" and any(
            is_within(other.path, path.rpartition(".")[0] or path) for other in earlier_errors
        ):
            continue
        yield FieldError(path, _message(details), _hint(details, path), details["type"] == "extra_forbidden")


def locations_to_remove(error: ValidationError) -> Iterator[tuple[Any, ...]]:
    """Yield the locations to remove so that the spec validates: invalid values, and groups without a required field."""
    for details in error.errors():
        location = details["loc"][:-1] if details["type"] == "missing" else details["loc"]
        if location:
            yield location


def path_of(location: tuple[Any, ...]) -> str:
    """Convert the location of a pydantic error to a dotted path."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


def _message(details: Any) -> str:
    if details["type"] == "missing":
        return "this required field is missing"
    value = details["input"]
    if details["type"] == "string_too_short":
        return "the value is empty"
    value_text = f"{value!r}: " if isinstance(value, str | int | float) and len(str(value)) <= 200 else ""
    if details["type"] == "string_pattern_mismatch":
        return f"{value_text}the value does not have the required form"
    return value_text + str(details["msg"]).removeprefix("Value error, ").removeprefix("Input ")


def _hint(details: Any, path: str) -> str:
    """Return an example of a valid value if the message alone does not say what to write."""
    if details["type"] in ("missing", "string_too_short", "string_pattern_mismatch", "list_type"):
        return field_example_hint(path)
    if details["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return group_example_hint(path)
    seconds = _seconds(details["input"]) if path.endswith("Seconds") else None
    return f"write {seconds}" if seconds is not None else ""


def field_example_hint(path: str) -> str:
    """Return a hint with an example of the field in YAML, or an empty string without an example."""
    example = example_of(path)
    return f"for example {path.rpartition('.')[2]}: {example}" if example else ""


def group_example_hint(path: str) -> str:
    """Return a hint with an example of the group in YAML, or an empty string without an example."""
    example = group_example(path)
    return f"write for example {example}" if example else ""


def _seconds(value: Any) -> int | None:
    """Convert a duration such as `1h`, `30m` or `1h30m` to seconds. Return None for any other value."""
    if not isinstance(value, str) or not re.fullmatch(r"(\d+[smhd])+", value):
        return None
    return sum(int(number) * SECONDS[unit] for number, unit in re.findall(r"(\d+)([smhd])", value))
