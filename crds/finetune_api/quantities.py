"""Check the Kubernetes quantities in `spec.resources` and suggest a correction for each invalid quantity."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

CPU_PATTERN = r"^([0-9]+(\.[0-9]{1,3})?|\.[0-9]{1,3}|[0-9]+m)$"
"""A number of CPUs, such as `4`, `0.5` or `500m`."""
SIZE_PATTERN = r"^([0-9]{7,}|[0-9]+(\.[0-9]+)?([KMGTPE]i|[kMGTPE])|[0-9]+[eE][0-9]+)$"
"""A number of bytes, such as `32Gi` or `500M`. A number without a unit needs at least 7 digits, because users who write `4` usually mean `4Gi`."""
MIN_SIZE_BYTES = 1_000_000
_NUMBER_WITH_UNIT_PATTERN = re.compile(r"^\s*[-+]?(\d+(?:\.\d+)?)\s*([A-Za-z%]*)\s*$")
_LARGE_UNIT_FACTORS: dict[str, int] = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15, "E": 10**18} | {
    f"{letter}i": 2 ** (10 * power) for power, letter in enumerate("KMGTPE", 1)
}

_FACTOR_BY_UNIT: dict[str, int | Decimal] = {
    "n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"), **_LARGE_UNIT_FACTORS,
}  # fmt: skip


@dataclass(frozen=True)
class QuantityKind:
    """A kind of quantity (CPUs or bytes): the pattern for strings, the minimum for integers, and a valid example."""

    pattern: str
    minimum: int
    example: str

    @property
    def schema(self) -> dict[str, Any]:
        """The CRD schema of a field with this kind of quantity."""
        return {"x-kubernetes-int-or-string": True, "pattern": self.pattern, "minimum": self.minimum}


CPU_KIND = QuantityKind(CPU_PATTERN, 1, "4")
SIZE_KIND = QuantityKind(SIZE_PATTERN, MIN_SIZE_BYTES, "32Gi")


def find_quantity_problem(value: str | int, kind: QuantityKind) -> tuple[str, str] | None:
    """Return (problem, hint) for an invalid quantity, or None for a valid one."""
    quantity_text = str(value)
    if isinstance(value, int) and value >= kind.minimum:
        return None
    if (
        isinstance(value, str)
        and re.match(kind.pattern, quantity_text)
        and parse_amount(quantity_text) >= (kind.minimum if kind is SIZE_KIND else Decimal("0.001"))
    ):
        return None
    suggestion = _suggest_quantity(quantity_text, kind)
    expected_form = "a number of CPUs" if kind is CPU_KIND else "a number with a unit"
    hint = f"write {suggestion}" if suggestion else f"write {expected_form}, for example {kind.example}"
    if kind is SIZE_KIND and re.match(r"^\d+$", quantity_text):
        return f"{quantity_text} means {quantity_text} bytes", hint
    return f"{quantity_text!r} is not {expected_form}" if kind is CPU_KIND else f"{quantity_text!r} is not an amount of memory or disk", hint


def parse_amount(quantity_text: str) -> Decimal:
    """Return the number of CPUs or bytes that a Kubernetes quantity means. Errors: decimal.InvalidOperation if the text is not a quantity."""
    unit = next((suffix for suffix in sorted(_FACTOR_BY_UNIT, key=len, reverse=True) if quantity_text.endswith(suffix)), "")
    return Decimal(quantity_text.removesuffix(unit)) * _FACTOR_BY_UNIT.get(unit, 1)


def _suggest_quantity(quantity_text: str, kind: QuantityKind) -> str:
    """Return the quantity that the user probably means, or an empty string if the meaning is unclear."""
    match = _NUMBER_WITH_UNIT_PATTERN.match(quantity_text)
    if match is None or "%" in quantity_text or Decimal(match.group(1)) == 0:
        return ""
    number, unit = match.groups()
    if kind is CPU_KIND:
        return number if unit.lower() in ("", "c", "cpu", "cpus", "core", "cores", "vcpu", "vcpus") else ""
    unit_letter = unit[:1].upper()
    if not unit:
        return f"{number}Gi"
    return f"{number}{unit_letter}i" if unit_letter in "KMGTPE" and unit.lower() in _UNIT_SPELLINGS[unit_letter] else ""


_UNIT_PREFIXES = {"K": "kilo", "M": "mega", "G": "giga", "T": "tera", "P": "peta", "E": "exa"}
_UNIT_SPELLINGS = {
    letter: {unit.lower() for unit in (letter, f"{letter}i", f"{letter}b", f"{letter}ib", f"{prefix}byte", f"{prefix}bytes")}
    for letter, prefix in _UNIT_PREFIXES.items()
}
