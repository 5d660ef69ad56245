"""Evaluates JSONPath expressions in the syntax of `kubectl wait --for=jsonpath=...`: fields, indexes, `[*]` and filters for equality."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from finetune_cli.output import CommandError

EXAMPLE = "{.status.phase}"
_NAME_PATTERN = re.compile(r"\.((?:\\.|[^.\[\]{}\\?*'\"])+)")
_QUOTED_NAME_PATTERN = re.compile(r"""\[(?P<quote>['"])(?P<name>.+?)(?P=quote)\]""")
_INDEX_PATTERN = re.compile(r"\[(-?\d+)\]")
_ALL_PATTERN = re.compile(r"\[\*\]|\.\*")
_FILTER_PATTERN = re.compile(r"""\[\?\(@(?P<path>\.[^=!<>]+?)\s*==\s*(?P<value>"[^"]*"|'[^']*'|[^)'"]+?)\s*\)\]""")


class InvalidJsonPath(CommandError):
    """The text is not a JSONPath, or uses syntax that this program does not support."""


@dataclass(frozen=True)
class JsonPath:
    """A parsed expression.

    It consists of steps. A step is the name of a field, an index, `*`, or a filter, which is a path and the value that must be at this path.
    """

    text: str
    steps: tuple[str | int | tuple[JsonPath, str], ...]

    def find(self, value: Any) -> list[Any]:
        """Return all values at the path. A field that does not exist adds no value."""
        found_values = [value]
        for step in self.steps:
            found_values = [inner_value for outer_value in found_values for inner_value in _apply_step(outer_value, step)]
        return found_values


def parse_json_path(text: str) -> JsonPath:
    """Parse `{.a.b}`, `.a.b` or `a.b`. Raises InvalidJsonPath."""
    remaining_text = text.strip().strip("'\"")
    remaining_text = remaining_text[1:-1] if remaining_text.startswith("{") and remaining_text.endswith("}") else remaining_text
    remaining_text = remaining_text.removeprefix("$")
    remaining_text = remaining_text if remaining_text.startswith((".", "[")) else f".{remaining_text}"
    steps: list[str | int | tuple[JsonPath, str]] = []
    while remaining_text:
        step, length = _parse_next_step(text, remaining_text)
        steps.append(step)
        remaining_text = remaining_text[length:]
    if not steps:
        raise InvalidJsonPath(f"{text}: the path is empty; write for example {EXAMPLE}")
    return JsonPath(text, tuple(steps))


def _parse_next_step(expression: str, remaining_text: str) -> tuple[str | int | tuple[JsonPath, str], int]:
    """Parse the first step of `remaining_text`, the part of the expression that is not parsed yet. Return the step and its length."""
    if match := _ALL_PATTERN.match(remaining_text):
        return "*", match.end()
    if match := _INDEX_PATTERN.match(remaining_text):
        return int(match[1]), match.end()
    if match := _FILTER_PATTERN.match(remaining_text):
        return (parse_json_path(match["path"]), match["value"].strip("'\"")), match.end()
    if match := _QUOTED_NAME_PATTERN.match(remaining_text):
        return f".{match['name']}", match.end()
    if match := _NAME_PATTERN.match(remaining_text):
        return "." + re.sub(r"\\(.)", r"\1", match[1]), match.end()
    raise InvalidJsonPath(
        f'{expression}: {remaining_text!r} is not understood; write a path such as {EXAMPLE} or {{.status.conditions[?(@.type=="Finished")].status}}'
    )


def _apply_step(value: Any, step: str | int | tuple[JsonPath, str]) -> list[Any]:
    if isinstance(step, int):
        return [value[step]] if isinstance(value, list) and -len(value) <= step < len(value) else []
    if isinstance(step, tuple):
        path, expected_text = step
        return [item for item in value if expected_text in map(to_kubectl_text, path.find(item))] if isinstance(value, list) else []
    if step == "*":
        return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    name = step[1:]
    return [value[name]] if isinstance(value, dict) and name in value else []


def to_kubectl_text(value: Any) -> str:
    """Return a value as text, as kubectl prints it: strings without quotes, all other values as JSON."""
    return value if isinstance(value, str) else json.dumps(value)
