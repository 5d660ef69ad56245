"""Evaluates JSONPath expressions as `kubectl wait --for=jsonpath=...` writes them: fields, indexes, `[*]` and filters for equality."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from finetune_cli.output import CommandError

EXAMPLE = "{.status.phase}"
_NAME = re.compile(r"\.((?:\\.|[^.\[\]{}\\?*'\"])+)")
_QUOTED_NAME = re.compile(r"""\[(?P<quote>['"])(?P<name>.+?)(?P=quote)\]""")
_INDEX = re.compile(r"\[(-?\d+)\]")
_ALL = re.compile(r"\[\*\]|\.\*")
_FILTER = re.compile(r"""\[\?\(@(?P<path>\.[^=!<>]+?)\s*==\s*(?P<value>"[^"]*"|'[^']*'|[^)'"]+?)\s*\)\]""")


class InvalidJsonPath(CommandError):
    """An expression that is no JSONPath, or uses a part that this program does not know."""


@dataclass(frozen=True)
class JsonPath:
    """An expression and its parts: the name of a field, an index, `*`, or the path and value of a filter."""

    text: str
    parts: tuple[str | int | tuple[JsonPath, str], ...]

    def find(self, value: Any) -> list[Any]:
        """Return the values at the path. Fields that do not exist give no value."""
        found = [value]
        for part in self.parts:
            found = [inner for one in found for inner in _step(one, part)]
        return found


def parse_json_path(text: str) -> JsonPath:
    """Parse `{.a.b}`, `.a.b` or `a.b`. Raises InvalidJsonPath."""
    rest = text.strip().strip("'\"")
    rest = rest[1:-1] if rest.startswith("{") and rest.endswith("}") else rest
    rest = rest.removeprefix("$")
    rest = rest if rest.startswith((".", "[")) else f".{rest}"
    parts: list[str | int | tuple[JsonPath, str]] = []
    while rest:
        part, length = _next_part(text, rest)
        parts.append(part)
        rest = rest[length:]
    if not parts:
        raise InvalidJsonPath(f"{text}: the path is empty; write for example {EXAMPLE}")
    return JsonPath(text, tuple(parts))


def _next_part(text: str, rest: str) -> tuple[str | int | tuple[JsonPath, str], int]:
    """Return the first part of the rest of an expression, and its length."""
    if match := _ALL.match(rest):
        return "*", match.end()
    if match := _INDEX.match(rest):
        return int(match[1]), match.end()
    if match := _FILTER.match(rest):
        return (parse_json_path(match["path"]), match["value"].strip("'\"")), match.end()
    if match := _QUOTED_NAME.match(rest):
        return f".{match['name']}", match.end()
    if match := _NAME.match(rest):
        return "." + re.sub(r"\\(.)", r"\1", match[1]), match.end()
    raise InvalidJsonPath(
        f'{text}: {rest!r} is not understood; write a path such as {EXAMPLE} or {{.status.conditions[?(@.type=="Finished")].status}}'
    )


def _step(value: Any, part: str | int | tuple[JsonPath, str]) -> list[Any]:
    if isinstance(part, int):
        return [value[part]] if isinstance(value, list) and -len(value) <= part < len(value) else []
    if isinstance(part, tuple):
        path, expected = part
        return [item for item in value if expected in map(text_of, path.find(item))] if isinstance(value, list) else []
    if part == "*":
        return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    name = part[1:]
    return [value[name]] if isinstance(value, dict) and name in value else []


def text_of(value: Any) -> str:
    """Return a value as text, as kubectl prints it: strings without quotes, all other values as JSON."""
    return value if isinstance(value, str) else json.dumps(value)
