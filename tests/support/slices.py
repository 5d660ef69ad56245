"""The part of a table of test cases that `make test` runs. `make test-faults` runs the others, which are marked as slow."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def quick_slice(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """Return all cases as parameters of a test, and mark those that are not quick as slow. A tuple has one value for each parameter.

    Errors: ValueError if a quick case does not exist.
    """
    every = list(cases)
    unknown = [case for case in quick if case not in every]
    if unknown:
        raise ValueError(f"these cases do not exist: {unknown}")
    return [case if case in quick else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in every]
