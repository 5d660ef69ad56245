"""docs/reference/matrix.md shows which methods, objectives and strategies work together; every refusal has a message."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.matrix import METHODS, OBJECTIVES, STRATEGIES, expected, run

pytestmark = pytest.mark.pod
QUICK_STRATEGY = "one rank"


@pytest.mark.parametrize(
    "strategy", [name if name == QUICK_STRATEGY else pytest.param(name, marks=pytest.mark.slow) for name in STRATEGIES]
)
def test_the_reference_page_shows_the_actual_matrix(strategy: str, tmp_path: Path) -> None:
    matrix = run(strategy, tmp_path)
    assert len(matrix) == len(METHODS) * len(OBJECTIVES)
    assert matrix == expected(strategy)
