"""What a written value means: converters from a file's words to the spec's values, and what they allow.

A converter takes the parsed value (what the file's own grammar made of it) and raises `Unfit`, which says what is allowed
and, for words, which one is nearest. They are strict: a truth value is never a number, a text never a truth value that it
does not spell.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any

NUMBER = re.compile(r"^[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?$")
INTEGER = re.compile(r"^[+-]?\d+$")
MAX_DIGITS = 400
"""Longer texts are no numbers that anybody means."""
RUN_NAME = re.compile(r"^[^$#@&*!]*$")


class Unfit(Exception):
    """A value that cannot be: what is wrong with it, what is allowed, and the nearest allowed word."""

    def __init__(self, what: str, allowed: str, near: str = ""):
        super().__init__(what)
        self.what, self.allowed, self.near = what, allowed, near


Convert = Callable[[Any], Any]


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word most like this one, or an empty text; of dotted keys, one of the same group if there is one."""
    candidates = list(dict.fromkeys(known))
    head, dot, tail = word.rpartition(".")
    siblings = {one.rpartition(".")[2]: one for one in candidates if one.rpartition(".")[0] == head}
    initials = {_initials(name): one for name, one in reversed(siblings.items())}
    if len(tail.strip("-")) <= 3 and tail.strip("-").lower() in initials:
        return initials[tail.strip("-").lower()]
    found = _closest(tail, siblings, 0.55)
    if found:
        return siblings[found]
    start = next((one for name, one in siblings.items() if tail.startswith(name) or name.startswith(tail)), "")
    if not dot:
        return start if len(tail) > 1 else ""
    elsewhere = next((one for one in candidates if one.rpartition(".")[2] == tail), "")
    return start or elsewhere or ("" if siblings else _closest(word, candidates, 0.8))


def _closest(word: str, known: Iterable[str], cutoff: float) -> str:
    lower = {one.lower(): one for one in known}
    found = difflib.get_close_matches(word.lower(), lower, 1, cutoff)
    return lower[found[0]] if found else ""


def _initials(name: str) -> str:
    """`learning_rate` is `lr`."""
    return "".join(part[:1] for part in re.split("[-_]", name.strip("-").lower()))


def _number(value: Any) -> float | int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, str) and len(value) <= MAX_DIGITS and NUMBER.match(value.strip()):
        value = int(value) if INTEGER.match(value.strip()) else float(value)
    return value if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)) else None


def number(
    low: float = -math.inf, high: float = math.inf, *, above: float | None = None, below: float | None = None
) -> Convert:
    """A number in an inclusive range; `above` and `below` exclude their end."""
    allowed = _range("a number", low, high, above, below)

    def convert(value: Any) -> float | int:
        found = _number(value)
        if found is None:
            raise Unfit("is not a number", allowed)
        _within(found, low, high, above, below, allowed)
        return found

    return convert


def integer(low: float = -math.inf, high: float = math.inf) -> Convert:
    """A whole number in an inclusive range."""
    allowed = _range("an integer", low, high, None, None)

    def convert(value: Any) -> int:
        found = _number(value)
        if found is None or found != int(found) or (isinstance(value, str) and not INTEGER.match(value.strip())):
            raise Unfit("is not an integer", allowed)
        _within(found, low, high, None, None, allowed)
        return int(found)

    return convert


def _within(found: float, low: float, high: float, above: float | None, below: float | None, allowed: str) -> None:
    if not low <= found <= high or (above is not None and found <= above) or (below is not None and found >= below):
        raise Unfit("is out of range", allowed)


def _range(kind: str, low: float, high: float, above: float | None, below: float | None) -> str:
    parts = []
    if low > -math.inf and high < math.inf:
        return f"{kind} from {_bound(low)} to {_bound(high)}"
    if low > -math.inf:
        parts.append(f"of at least {_bound(low)}")
    if above is not None:
        parts.append(f"greater than {_bound(above)}")
    if high < math.inf:
        parts.append(f"of at most {_bound(high)}")
    if below is not None:
        parts.append(f"below {_bound(below)}")
    return " ".join([kind, " and ".join(parts)]).strip()


def _bound(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:g}"


def boolean(value: Any) -> bool:
    """true or false, in any letter case; `yes`, `1` and `on` as texts are refused, since tools differ on them."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    raise Unfit("is not true or false", "true, false")


def text(value: Any) -> str:
    """A non-empty text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or str(value) == "":
        raise Unfit("is not a text", "a text")
    return str(value)


def any_text(value: Any) -> str:
    """A text that may be empty."""
    return "" if value == "" else text(value)


def text_or_none(value: Any) -> str | None:
    """A text, or nothing where the file says that there is none."""
    return None if value is None or value == "" else text(value)


def run_name(value: Any) -> str:
    """A part of a run's name."""
    found = any_text(value)
    if not RUN_NAME.match(found):
        raise Unfit("holds one of $ # @ & * !", "a text without $ # @ & * !")
    return found


def exactly(check: Callable[[str], bool], what: str, allowed: str) -> Convert:
    """A text that a predicate accepts."""

    def convert(value: Any) -> str:
        found = text(value)
        if not check(found):
            raise Unfit(what, allowed)
        return found

    return convert


def words(value: Any) -> list[str]:
    """A list of texts, or one text with commas."""
    if isinstance(value, str):
        value = [part.strip() for part in value.strip("[]").split(",")]
    if not isinstance(value, list) or not value or not all(isinstance(one, str) and one for one in value):
        raise Unfit("is not a list of names", "a list of names, or one text with commas")
    return list(value)


def modules(value: Any) -> list[str] | None:
    """Names of modules; `auto` and `all-linear` leave the choice to us."""
    if isinstance(value, str) and value.strip().lower() == "auto":
        return None
    return words(value)


def integers(value: Any) -> list[int]:
    """A list of whole numbers that are not negative."""
    if not isinstance(value, list) or not all(
        isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in value
    ):
        raise Unfit("is not a list of layer numbers", "a list of integers of at least 0")
    return list(value)


def table(value: Any) -> dict[str, Any]:
    """A mapping."""
    if not isinstance(value, dict):
        raise Unfit("is not a table", "a table of names and values")
    return value


def anything(value: Any) -> Any:
    """Any value: for keys whose value is not looked at."""
    return value


def choice(allowed: Mapping[str, Any] | Iterable[str], *, fold: bool = True) -> Convert:
    """One of some words; a mapping translates them. YAML's unquoted `no` and `off` arrive as false and mean `no` here."""
    meaning = dict(allowed) if isinstance(allowed, Mapping) else {word: word for word in allowed}
    shown = ", ".join(meaning)
    folded = {word.lower() if fold else word: value for word, value in meaning.items()}

    def convert(value: Any) -> Any:
        if value is False and "no" in folded:
            value = "no"
        if isinstance(value, str):
            key = value.strip().lower() if fold else value.strip()
            if key in folded:
                found = folded[key]
                return found.value if isinstance(found, Enum) else found
        near = nearest(str(value), meaning)
        raise Unfit("is not a word known here", f"one of {shown}", near)

    return convert


def each(one: Convert) -> Convert:
    """A list, every item converted by `one`; a single item or a text with commas counts as a list."""

    def convert(value: Any) -> list[Any]:
        if isinstance(value, str):
            value = [part.strip() for part in value.strip("[]").split(",") if part.strip()]
        if not isinstance(value, list):
            raise Unfit("is not a list", "a list")
        return [one(item) for item in value]

    return convert


def one_of(*converters: Convert) -> Convert:
    """The first converter that takes the value."""

    def convert(value: Any) -> Any:
        failures: list[Unfit] = []
        for converter in converters:
            try:
                return converter(value)
            except Unfit as unfit:
                failures.append(unfit)
        raise Unfit(failures[-1].what, " or ".join(unfit.allowed for unfit in failures), failures[-1].near)

    return convert
