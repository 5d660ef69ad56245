"""Converts values for JSON, which has no NaN and no infinite numbers."""

from __future__ import annotations

import math
from typing import Any


def replace_non_finite_numbers(value: Any) -> Any:
    """Return a copy of a JSON value in which None replaces every number that is not finite, including numbers in lists and dictionaries."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case list() | tuple():
            return [replace_non_finite_numbers(item) for item in value]
        case dict():
            return {name: replace_non_finite_numbers(item) for name, item in value.items()}
        case _:
            return value
