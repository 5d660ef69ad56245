"""Converters: functions that turn a value from another tool's file into a value of the spec.

The argument of a converter is the value that the YAML or JSON parser returned. If the value is invalid, the converter raises a `ConversionError` with
the allowed values. If the allowed values are words, the error also has the most similar word. Converters are strict: they never accept a boolean as a
number, and they accept no string as a boolean except `true` and `false`.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any

from finetune_cli.suggestions import find_closest_name

NUMBER_PATTERN = re.compile(r"^[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?$")
INTEGER_PATTERN = re.compile(r"^[+-]?\d+$")
MAX_NUMBER_LENGTH = 400
"""Maximum length of a string that is read as a number."""
RUN_NAME_PATTERN = re.compile(r"^[^$#@&*!]*$")


class ConversionError(Exception):
    """The value of an option is not allowed. `problem`: the reason. `allowed`: the valid values. `closest`: the most similar valid word, or an empty text."""

    def __init__(self, problem: str, allowed_text: str, closest: str = ""):
        super().__init__(problem)
        self.problem, self.allowed, self.closest = problem, allowed_text, closest


Converter = Callable[[Any], Any]


def _parse_number(value: Any) -> float | int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, str) and len(value) <= MAX_NUMBER_LENGTH and NUMBER_PATTERN.match(value.strip()):
        value = int(value) if INTEGER_PATTERN.match(value.strip()) else float(value)
    return value if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)) else None


def to_number(
    low: float = -math.inf, high: float = math.inf, *, exclusive_low: float | None = None, exclusive_high: float | None = None
) -> Converter:
    """Return a converter that accepts numbers in a range. The range includes the bounds `low` and `high`, but not `exclusive_low` and `exclusive_high`."""
    allowed_text = _describe_range("a number", low, high, exclusive_low, exclusive_high)

    def convert(value: Any) -> float | int:
        converted_number = _parse_number(value)
        if converted_number is None:
            raise ConversionError("is not a number", allowed_text)
        _check_range(converted_number, low, high, exclusive_low, exclusive_high, allowed_text)
        return converted_number

    return convert


def to_integer(low: float = -math.inf, high: float = math.inf) -> Converter:
    """Return a converter for an integer from `low` to `high`."""
    allowed_text = _describe_range("an integer", low, high, None, None)

    def convert(value: Any) -> int:
        converted_number = _parse_number(value)
        if (
            converted_number is None
            or converted_number != int(converted_number)
            or (isinstance(value, str) and not INTEGER_PATTERN.match(value.strip()))
        ):
            raise ConversionError("is not an integer", allowed_text)
        _check_range(converted_number, low, high, None, None, allowed_text)
        return int(converted_number)

    return convert


def _check_range(value: float, low: float, high: float, exclusive_low: float | None, exclusive_high: float | None, allowed_text: str) -> None:
    if not low <= value <= high or (exclusive_low is not None and value <= exclusive_low) or (exclusive_high is not None and value >= exclusive_high):
        raise ConversionError("is out of range", allowed_text)


def _describe_range(number_kind: str, low: float, high: float, exclusive_low: float | None, exclusive_high: float | None) -> str:
    bounds = []
    if low > -math.inf and high < math.inf and exclusive_low is None and exclusive_high is None:
        return f"{number_kind} from {_format_bound(low)} to {_format_bound(high)}"
    if low > -math.inf and (exclusive_low is None or exclusive_low < low):
        bounds.append(f"of at least {_format_bound(low)}")
    if exclusive_low is not None:
        bounds.append(f"greater than {_format_bound(exclusive_low)}")
    if high < math.inf:
        bounds.append(f"of at most {_format_bound(high)}")
    if exclusive_high is not None:
        bounds.append(f"below {_format_bound(exclusive_high)}")
    return " ".join([number_kind, " and ".join(bounds)]).strip()


def _format_bound(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:g}"


def to_boolean(value: Any) -> bool:
    """Convert `true` or `false`, in upper or lower case, to a boolean. `yes`, `1` and `on` are refused, because tools disagree on their meaning."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    raise ConversionError("is not true or false", "true, false")


def to_text(value: Any) -> str:
    """Convert to a non-empty string."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or str(value) == "":
        raise ConversionError("is not text", "text")
    return str(value)


def to_any_text(value: Any) -> str:
    """Convert to a string that may be empty."""
    return "" if value == "" else to_text(value)


def to_text_or_none(value: Any) -> str | None:
    """Convert to a string. An empty or null value becomes None."""
    return None if value is None or value == "" else to_text(value)


def to_run_name(value: Any) -> str:
    """Convert a run name, or its prefix or suffix, to text."""
    name = to_any_text(value)
    if not RUN_NAME_PATTERN.match(name):
        raise ConversionError("contains one of $ # @ & * !", "text without $ # @ & * !")
    return name


def to_text_matching(is_valid: Callable[[str], bool], problem: str, allowed_text: str) -> Converter:
    """Return a converter for strings that accepts a string only if `is_valid` returns true for it."""

    def convert(value: Any) -> str:
        string = to_text(value)
        if not is_valid(string):
            raise ConversionError(problem, allowed_text)
        return string

    return convert


def to_name_list(value: Any) -> list[str]:
    """Convert a list of strings, or one comma-separated string, to a list of names."""
    if isinstance(value, str):
        value = [part.strip() for part in value.strip("[]").split(",")]
    if not isinstance(value, list) or not value or not all(isinstance(name, str) and name for name in value):
        raise ConversionError("is not a list of names", "a list of names, or one string with commas")
    return list(value)


def to_module_names(value: Any) -> list[str] | None:
    """Convert a list of module names. `auto` becomes None, which means that the trainer chooses the modules."""
    if isinstance(value, str) and value.strip().lower() == "auto":
        return None
    return to_name_list(value)


def to_layer_numbers(value: Any) -> list[int]:
    """Return a list of layer numbers unchanged, and refuse every other value."""
    if not isinstance(value, list) or not all(
        isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in value
    ):
        raise ConversionError("is not a list of layer numbers", "a list of integers of at least 0")
    return list(value)


def to_mapping(value: Any) -> dict[str, Any]:
    """Return a mapping unchanged, and refuse every other value."""
    if not isinstance(value, dict):
        raise ConversionError("is not a mapping", "a mapping of names to values")
    return value


def to_template_variables(value: Any) -> dict[str, str]:
    """Convert the arguments of a chat template to texts.

    An argument that is not a string becomes its JSON text. A string that is itself valid JSON, such as `3`, is put into quotes. On a command line,
    one JSON object contains all arguments.
    """
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    return {str(name): _variable_to_text(variable) for name, variable in to_mapping(value).items()}


def _variable_to_text(value: Any) -> str:
    if not isinstance(value, str):
        return json.dumps(value)
    try:
        json.loads(value)
    except ValueError:
        return value
    return json.dumps(value)


def keep_value(value: Any) -> Any:
    """Return the value unchanged. An option has this converter if it has no effect, or if the code of an importer converts its value."""
    return value


def to_choice(allowed_values: Mapping[str, Any] | Iterable[str], *, ignore_case: bool = True) -> Converter:
    """Return a converter that accepts only the words in `allowed_values`.

    If `allowed_values` is a mapping, the converter returns the value to which the mapping maps the word.

    YAML reads an unquoted `no` or `off` as false. If `no` is an allowed word, the converter therefore reads false as `no`.
    """
    value_by_name = dict(allowed_values) if isinstance(allowed_values, Mapping) else {word: word for word in allowed_values}
    words = ", ".join(value_by_name)
    value_by_word = {word.lower() if ignore_case else word: value for word, value in value_by_name.items()}

    def convert(value: Any) -> Any:
        if value is False and "no" in value_by_word:
            value = "no"
        if isinstance(value, str):
            normalised_word = value.strip().lower() if ignore_case else value.strip()
            if normalised_word in value_by_word:
                spec_value = value_by_word[normalised_word]
                return spec_value.value if isinstance(spec_value, Enum) else spec_value
        closest_name = find_closest_name(str(value), value_by_name)
        raise ConversionError("is not an allowed value", f"one of {words}", closest_name)

    return convert


def to_list_of(convert_item: Converter) -> Converter:
    """Return a converter for a list that converts each item with `convert_item`. A string is first split at its commas."""

    def convert(value: Any) -> list[Any]:
        if isinstance(value, str):
            value = [part.strip() for part in value.strip("[]").split(",") if part.strip()]
        if not isinstance(value, list):
            raise ConversionError("is not a list", "a list")
        return [convert_item(item) for item in value]

    return convert


def try_converters(*converters: Converter) -> Converter:
    """Return a converter that tries several converters in order, and returns the result of the first converter that accepts the value."""

    def convert(value: Any) -> Any:
        errors: list[ConversionError] = []
        for converter in converters:
            try:
                return converter(value)
            except ConversionError as error:
                errors.append(error)
        last_error = errors[-1]
        raise ConversionError(last_error.problem, " or ".join(failure.allowed for failure in errors), last_error.closest)

    return convert
