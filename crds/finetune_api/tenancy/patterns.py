"""Patterns in `policy`: text with `*`, which matches any text. The last matching pattern of a list decides: it allows the value, or refuses
it if the pattern begins with `!`. If no pattern matches, the value is refused. `{namespace}` is replaced by the job's namespace, and
`{storage}` by the default storage if it is an S3 store. Without such a store, patterns with `{storage}` are ignored.

Some rules compare paths and addresses. There, `X/*` also matches the folder `X` itself. `!X/*` also matches all folders above `X`, because
access to such a folder includes access to `X`.

Every pattern becomes one regular expression, which Python and the RE2 library of the API server read in the same way. The chart's template
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
"""Replaces `{namespace}` in regular expressions until the namespace is known."""
EVERYTHING = ("*",)
"""The list of patterns that allows every value, even one that no pattern can be compared with."""


def _check_pattern(text: str) -> str:
    if re.fullmatch(PATTERN_SYNTAX[1:-1], text) is None:
        raise ValueError(f"{text!r} is not a pattern: write text with `*` and `{{namespace}}`, without spaces and `%`; `!` in front refuses")
    return text


def _check_address_pattern(text: str) -> str:
    if re.fullmatch(ADDRESS_SYNTAX[1:-1], text) is None:
        raise ValueError(
            f"{text!r} is not a pattern: write text with `*`, `{{namespace}}` and `{{storage}}`, without spaces and `%`; `!` in front refuses"
        )
    return text


def _schema(syntax: str) -> dict[str, Any]:
    return {"type": "string", "pattern": syntax}


Pattern = Annotated[str, AfterValidator(_check_pattern), WithJsonSchema(_schema(PATTERN_SYNTAX))]
AddressPattern = Annotated[str, AfterValidator(_check_address_pattern), WithJsonSchema(_schema(ADDRESS_SYNTAX))]


def _quote(text: str) -> str:
    """Return a regular expression for the text, in which `*` matches any text."""
    return re.sub(r"([\\.+?()|\[\]{}^$])", r"\\\1", text).replace("*", ".*")


def regex_of(pattern: str, *, compares_folders: bool, storage: str) -> str | None:
    """Return the regular expression of a pattern without its `!`, or None if the pattern names `{storage}` and `storage` is empty."""
    body = pattern.removeprefix("!")
    if "{storage}" in body and not storage:
        return None
    body = body.replace("{storage}", storage).replace("{namespace}", NAMESPACE_TOKEN)
    if not compares_folders or not body.endswith("/*"):
        return f"(?s)^({_quote(body)})$"
    folder = body.removesuffix("/*")
    if pattern.startswith("!") and "*" not in folder:
        return f"(?s)^({_nested(folder.split('/'))})$"
    return f"(?s)^({_quote(folder)}(/.*)?)$"


def _nested(parts: Sequence[str]) -> str:
    """Return an expression that matches the folder, everything in it, and each folder above it: `a(/b(/.*)?)?` for a/b."""
    return "(/".join(map(_quote, parts)) + "(/.*" + ")?" * len(parts)


@lru_cache(maxsize=4096)
def _compiled(pattern: str, compares_folders: bool, storage: str, namespace: str) -> re.Pattern[str] | None:
    regex = regex_of(pattern, compares_folders=compares_folders, storage=storage)
    return None if regex is None else re.compile(regex.replace(NAMESPACE_TOKEN, namespace))


def allows(patterns: Sequence[str], text: str, *, compares_folders: bool, storage: str, namespace: str) -> bool:
    """Whether the last pattern that matches `text` allows it."""
    for pattern in reversed(patterns):
        regex = _compiled(pattern, compares_folders, storage, namespace)
        if regex is not None and regex.fullmatch(text):
            return not pattern.startswith("!")
    return False
