"""The converters of the importers check the bounds of numbers."""

from __future__ import annotations

import pytest
from finetune_cli.importers.converters import ConversionError, Converter, to_integer, to_number


@pytest.mark.parametrize(
    ("convert", "value"),
    [
        (to_number(exclusive_low=0), 1e-12),
        (to_number(exclusive_high=0), -1e-12),
        (to_number(0, 1), 0),
        (to_number(0, 1), 1),
        (to_number(0, 1, exclusive_low=0), 1),
        (to_number(0, exclusive_high=1), 0),
        (to_integer(0), 0),
        (to_integer(high=0), 0),
    ],
)
def test_a_number_within_its_bounds_is_accepted(convert: Converter, value: float) -> None:
    assert convert(value) == value


@pytest.mark.parametrize(
    ("convert", "value", "allowed"),
    [
        (to_number(exclusive_low=0), 0, "a number greater than 0"),
        (to_number(exclusive_low=0), "0.0", "a number greater than 0"),
        (to_number(exclusive_low=0), -1e-12, "a number greater than 0"),
        (to_number(exclusive_high=0), 0, "a number below 0"),
        (to_number(0, 1, exclusive_low=0), 0, "a number greater than 0 and of at most 1"),
        (to_number(0, exclusive_high=1), 1, "a number of at least 0 and below 1"),
        (to_integer(0), -1, "an integer of at least 0"),
        (to_integer(high=0), 1, "an integer of at most 0"),
    ],
)
def test_a_number_outside_its_bounds_or_on_an_exclusive_bound_is_refused(convert: Converter, value: object, allowed: str) -> None:
    with pytest.raises(ConversionError) as error:
        convert(value)
    assert (error.value.problem, error.value.allowed) == ("is out of range", allowed)
