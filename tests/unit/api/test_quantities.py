"""Quantities of `spec.resources`: valid values, and the hint for invalid values."""

from __future__ import annotations

import re

import pytest
from finetune_api.quantities import CPU_KIND, SIZE_KIND, QuantityKind, find_quantity_problem


@pytest.mark.parametrize(
    ("kind", "value"),
    [(SIZE_KIND, value) for value in ("32Gi", "1.5Gi", "500M", "32G", "1e9", "8000000000", 8_000_000_000)]
    + [(CPU_KIND, value) for value in (4, "4", "0.5", "500m", "1000m")],
)
def test_models_and_crd_accept_a_valid_quantity(kind: QuantityKind, value: str | int) -> None:
    assert find_quantity_problem(value, kind) is None
    assert re.match(kind.pattern, value) if isinstance(value, str) else value >= kind.minimum


@pytest.mark.parametrize(
    ("kind", "value", "message", "hint"),
    [
        (SIZE_KIND, "32GB", "'32GB' is not an amount of memory or disk", "write 32Gi"),
        (SIZE_KIND, "32 GiB", "'32 GiB' is not an amount of memory or disk", "write 32Gi"),
        (SIZE_KIND, "-4Gi", "'-4Gi' is not an amount of memory or disk", "write 4Gi"),
        (SIZE_KIND, "100m", "'100m' is not an amount of memory or disk", "write 100Mi"),
        (SIZE_KIND, "10%", "'10%' is not an amount of memory or disk", "write a number with a unit, for example 32Gi"),
        (SIZE_KIND, 4, "4 means 4 bytes", "write 4Gi"),
        (SIZE_KIND, "4", "4 means 4 bytes", "write 4Gi"),
        (CPU_KIND, "4 cores", "'4 cores' is not a number of CPUs", "write 4"),
        (CPU_KIND, "-2", "'-2' is not a number of CPUs", "write 2"),
        (CPU_KIND, "10%", "'10%' is not a number of CPUs", "write a number of CPUs, for example 4"),
        (CPU_KIND, "4Gi", "'4Gi' is not a number of CPUs", "write a number of CPUs, for example 4"),
        (CPU_KIND, 0, "'0' is not a number of CPUs", "write a number of CPUs, for example 4"),
    ],
)
def test_models_and_crd_refuse_an_invalid_quantity(kind: QuantityKind, value: str | int, message: str, hint: str) -> None:
    assert find_quantity_problem(value, kind) == (message, hint)
    assert not re.match(kind.pattern, value) if isinstance(value, str) else value < kind.minimum


@pytest.mark.parametrize(("kind", "value"), [(SIZE_KIND, "0Gi"), (SIZE_KIND, "0.1k"), (CPU_KIND, "0"), (CPU_KIND, "0m")])
def test_an_amount_of_zero_is_refused(kind: QuantityKind, value: str) -> None:
    assert find_quantity_problem(value, kind) is not None
