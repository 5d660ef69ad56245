"""Converts validation errors of the API's pydantic models into errors about fields of a manifest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from finetune_api.patterns import MISMATCH_TEXTS
from pydantic import ValidationError

from finetune_cli.value_hints import make_hint_for_value, to_yaml_text


@dataclass(frozen=True)
class FieldError:
    """An invalid field. `path` is relative to spec. `is_unknown`: the schema has no such field."""

    path: str
    message: str
    hint: str = ""
    is_unknown: bool = False


def is_within(path: str, group_path: str) -> bool:
    """Return whether `path` equals `group_path`, or names a field or list item inside this group."""
    return path == group_path or path.startswith((f"{group_path}.", f"{group_path}["))


def iterate_field_errors(error: ValidationError, known_errors: Iterable[FieldError] = ()) -> Iterator[FieldError]:
    """Yield every error that pydantic found.

    `known_errors`: the errors of values that the caller has already removed from the spec. A field that is missing because of this removal is not reported.
    """
    earlier_errors = list(known_errors)
    for details in error.errors():
        path = to_dotted_path(details["loc"])
        if details["type"] == "missing" and any(
            is_within(earlier_error.path, path.rpartition(".")[0] or path) for earlier_error in earlier_errors
        ):
            continue
        hint = make_hint_for_value(details["type"], details["input"], path, details.get("ctx", {}))
        yield FieldError(path, _make_message(details), hint, details["type"] == "extra_forbidden")


def find_locations_to_remove(error: ValidationError) -> Iterator[tuple[Any, ...]]:
    """Yield the locations to remove so that the spec validates: invalid values, and groups in which a required field is missing."""
    for details in error.errors():
        location = details["loc"][:-1] if details["type"] == "missing" else details["loc"]
        if location:
            yield location


def to_dotted_path(location: tuple[Any, ...]) -> str:
    """Convert the location of a pydantic error to a dotted path."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


def _make_message(details: Any) -> str:
    if details["type"] == "missing":
        return "this required field is missing"
    value = details["input"]
    if details["type"] == "string_too_short":
        return "the value is empty"
    value_text = to_yaml_text(value) if isinstance(value, str | int | float) and len(str(value)) <= 200 else ""
    if details["type"] == "string_pattern_mismatch":
        return f"{value_text or 'the value'} {MISMATCH_TEXTS.get(details['ctx']['pattern'], 'does not have the required form')}"
    message = str(details["msg"]).removeprefix("Value error, ").removeprefix("Input ").replace("a valid array", "a list")
    return f"{value_text}: {message}" if value_text else message
