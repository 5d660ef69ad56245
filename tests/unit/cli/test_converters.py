"""Bounds of numbers in the converters for values from files of other tools."""

from __future__ import annotations

import pytest
from finetune_cli.importers.converters import ConversionError, Convert, integer, number


@pytest.mark.parametrize(
    ("convert", "value"),
    [
        (number(above=0), 1e-12),
        (number(below=0), -1e-12),
        (number(0, 1), 0),
        (number(0, 1), 1),
        (number(0, 1, above=0), 1),
        (number(0, below=1), 0),
        (integer(0), 0),
        (integer(high=0), 0),
    ],
)
def test_number_within_its_bounds_is_accepted(convert: Convert, value: float) -> None:
    assert convert(value) == value


@pytest.mark.parametrize(
    ("convert", "value", "allowed"),
    [
        (number(above=0), 0, "a number greater than 0"),
        (number(above=0), "0.0", "a number greater than 0"),
        (number(above=0), -1e-12, "a number greater than 0"),
        (number(below=0), 0, "a number below 0"),
        (number(0, 1, above=0), 0, "a number greater than 0 and of at most 1"),
        (number(0, below=1), 1, "a number of at least 0 and below 1"),
        (integer(0), -1, "an integer of at least 0"),
        (integer(high=0), 1, "an integer of at most 0"),
    ],
)
def test_number_on_an_exclusive_bound_is_refused(convert: Convert, value: object, allowed: str) -> None:
    with pytest.raises(ConversionError) as error:
        convert(value)
    assert (error.value.problem, error.value.allowed) == ("is out of range", allowed)
