"""Values for JSON, which has no numbers that are not finite."""

from __future__ import annotations

import math
from typing import Any


def finite_or_none(value: Any) -> Any:
    """Return a value in which numbers that are not finite are None, also within lists and objects."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case list() | tuple():
            return [finite_or_none(item) for item in value]
        case dict():
            return {name: finite_or_none(item) for name, item in value.items()}
        case _:
            return value
