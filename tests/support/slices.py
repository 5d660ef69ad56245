"""Splits the cases of a parametrised test: `make test` runs only the quick cases, and `make test-faults` runs the other cases, which are marked as slow."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def quick_slice(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """Return all cases as test parameters, with the mark `slow` on each case that is not in `quick`. If a case is a tuple, it has one value for each
    parameter of the test.

    Errors: ValueError if a quick case does not exist.
    """
    all_cases = list(cases)
    unknown_cases = [case for case in quick if case not in all_cases]
    if unknown_cases:
        raise ValueError(f"these cases do not exist: {unknown_cases}")
    return [case if case in quick else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in all_cases]
