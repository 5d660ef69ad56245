"""Describes where a value of a spec comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ValueOrigin:
    """Where a value comes from. `location`: `file:line`, `command line`, an option, or the reason for a default."""

    location: str
    written_by_user: bool = True


@dataclass(frozen=True)
class AssignedValue:
    """A value of the spec with its origin. `key`: the name under which the user gave the value; empty for a default."""

    value: Any
    origin: ValueOrigin
    key: str = ""
