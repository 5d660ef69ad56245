"""Compares values with the patterns of the platform's policy.

In a pattern, `*` matches any text. The last pattern of a list that matches a value decides: it allows the value, or refuses it if the pattern begins
with `!`. A value that no pattern matches is refused. `{namespace}` stands for the job's namespace, and `{storage}` for the default storage. If the
default storage is not an S3 store, patterns with `{storage}` are ignored.

Some rules compare paths and addresses. In these rules, `X/*` also matches the folder `X` itself. `!X/*` also matches all folders above `X`, because access to a
folder above `X` includes access to `X`.

Each pattern becomes one regular expression with the same meaning in Python and in RE2, the library of the API server. The chart's template
`admission-policy.yaml` builds the same expressions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, Any

from pydantic import AfterValidator, WithJsonSchema

PATTERN_SYNTAX = r"^!?([^\s{}!%]|\{namespace\})+$"
ADDRESS_SYNTAX = r"^!?([^\s{}!%]|\{namespace\}|\{storage\})+$"
NAMESPACE_TOKEN = "%namespace%"  # noqa: S105 -- not a password
"""Placeholder for the namespace in a regular expression; it is replaced when the namespace is known."""
ALLOW_EVERYTHING = ("*",)
"""The only list of patterns that also allows ambiguous values, such as a path with `..`."""


def _check_pattern(pattern: str) -> str:
    if re.fullmatch(PATTERN_SYNTAX[1:-1], pattern) is None:
        raise ValueError(f"{pattern!r} is not a pattern: write text with `*` and `{{namespace}}`, without spaces and `%`; a leading `!` refuses")
    return pattern


def _check_address_pattern(pattern: str) -> str:
    if re.fullmatch(ADDRESS_SYNTAX[1:-1], pattern) is None:
        raise ValueError(
            f"{pattern!r} is not a pattern: write text with `*`, `{{namespace}}` and `{{storage}}`, without spaces and `%`; a leading `!` refuses"
        )
    return pattern


def _make_json_schema_of_pattern(syntax: str) -> dict[str, Any]:
    return {"type": "string", "pattern": syntax}


Pattern = Annotated[str, AfterValidator(_check_pattern), WithJsonSchema(_make_json_schema_of_pattern(PATTERN_SYNTAX))]
AddressPattern = Annotated[str, AfterValidator(_check_address_pattern), WithJsonSchema(_make_json_schema_of_pattern(ADDRESS_SYNTAX))]


def _quote(text: str) -> str:
    """Return a regular expression that matches the text literally, except that `*` matches any text."""
    return re.sub(r"([\\.+?()|\[\]{}^$])", r"\\\1", text).replace("*", ".*")


def build_regex(pattern: str, *, compares_folders: bool, storage: str) -> str | None:
    """Return the regular expression of a pattern without its `!`. None: the pattern contains `{storage}`, but `storage` is empty."""
    pattern_body = pattern.removeprefix("!")
    if "{storage}" in pattern_body and not storage:
        return None
    pattern_body = pattern_body.replace("{storage}", storage).replace("{namespace}", NAMESPACE_TOKEN)
    if not compares_folders or not pattern_body.endswith("/*"):
        return f"(?s)^({_quote(pattern_body)})$"
    folder = pattern_body.removesuffix("/*")
    if pattern.startswith("!") and "*" not in folder:
        return f"(?s)^({_build_regex_of_folder_and_parents(folder.split('/'))})$"
    return f"(?s)^({_quote(folder)}(/.*)?)$"


def _build_regex_of_folder_and_parents(folder_names: Sequence[str]) -> str:
    """Return an expression that matches a folder, everything in it, and each folder above it: `a(/b(/.*)?)?` for a/b."""
    return "(/".join(map(_quote, folder_names)) + "(/.*" + ")?" * len(folder_names)


@lru_cache(maxsize=4096)
def _compile_pattern(pattern: str, compares_folders: bool, storage: str, namespace: str) -> re.Pattern[str] | None:
    regex = build_regex(pattern, compares_folders=compares_folders, storage=storage)
    return None if regex is None else re.compile(regex.replace(NAMESPACE_TOKEN, namespace))


def allows(patterns: Sequence[str], text: str, *, compares_folders: bool, storage: str, namespace: str) -> bool:
    """Whether the patterns allow the text: the last pattern that matches the text must not begin with `!`. A text that no pattern matches is not allowed."""
    for pattern in reversed(patterns):
        regex = _compile_pattern(pattern, compares_folders, storage, namespace)
        if regex is not None and regex.fullmatch(text):
            return not pattern.startswith("!")
    return False
