"""Merges specs of test cases."""

from __future__ import annotations

from typing import Any


def merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of `base` with the values of `change`. Nested dictionaries are merged."""
    merged = dict(base)
    for key, value in change.items():
        are_mappings = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if are_mappings else value
    return merged
