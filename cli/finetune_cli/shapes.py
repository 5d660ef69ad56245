"""What the API's models say about a value that does not fit, in words for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from finetune_cli.paths import example_of


@dataclass(frozen=True)
class Misshapen:
    """A field whose value its model does not take; `path` below spec. `unknown`: there is no such field."""

    path: str
    message: str
    hint: str = ""
    unknown: bool = False


def inside(path: str, group: str) -> bool:
    """Whether a path is a group, or stands in it or in one of its items."""
    return path == group or path.startswith((f"{group}.", f"{group}["))


def misshapen(error: ValidationError, known: Iterable[Misshapen] = ()) -> Iterator[Misshapen]:
    """Every error of a model; not that something is missing which was only taken out because of a `known` one."""
    earlier = list(known)
    for one in error.errors():
        path = path_of(one["loc"])
        if one["type"] == "missing" and any(inside(other.path, path.rpartition(".")[0] or path) for other in earlier):
            continue
        yield Misshapen(path, _message(one), _hint(one, path), one["type"] == "extra_forbidden")


def unreadable(error: ValidationError) -> Iterator[tuple[Any, ...]]:
    """What must be left out so that the rest can be read: the values that do not fit, and groups in which something is missing."""
    for one in error.errors():
        location = one["loc"][:-1] if one["type"] == "missing" else one["loc"]
        if location:
            yield location


def path_of(location: tuple[Any, ...]) -> str:
    """A place that pydantic names, as users write paths."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


def _message(one: Any) -> str:
    if one["type"] == "missing":
        return "it is missing, and it is required"
    value = one["input"]
    if one["type"] == "string_too_short":
        return "it is empty"
    shown = f"{value!r}: " if isinstance(value, str | int | float) and len(str(value)) <= 200 else ""
    if one["type"] == "string_pattern_mismatch":
        return f"{shown}it is not of the right form"
    return shown + str(one["msg"]).removeprefix("Value error, ").removeprefix("Input ")


def _hint(one: Any, path: str) -> str:
    """An example where the message alone does not say what to write."""
    if one["type"] in ("missing", "string_too_short", "string_pattern_mismatch", "list_type"):
        example = example_of(path)
        return f"for example {path.rpartition('.')[2]}: {example}" if example else ""
    return ""
