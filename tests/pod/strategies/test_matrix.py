"""The matrix of methods, objectives and strategies is what the reference says, and no cell ends without a name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.matrix import METHODS, OBJECTIVES, STRATEGIES, expected, run

pytestmark = pytest.mark.pod
QUICK = "one rank"


@pytest.mark.parametrize(
    "strategy", [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in STRATEGIES]
)
def test_the_matrix_is_what_the_reference_says(strategy: str, tmp_path: Path) -> None:
    found = run(strategy, tmp_path)
    assert len(found) == len(METHODS) * len(OBJECTIVES)
    assert found == expected(strategy)
