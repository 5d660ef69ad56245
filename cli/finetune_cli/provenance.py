"""The origin of a value of a spec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ValueOrigin:
    """The origin of a value. `location`: `file:line`, `command line`, or the reason for a default."""

    location: str
    written_by_user: bool = True


@dataclass(frozen=True)
class AssignedValue:
    """A value of the spec with its origin. `key`: the option as the user wrote it; empty for a default."""

    value: Any
    origin: ValueOrigin
    key: str = ""
