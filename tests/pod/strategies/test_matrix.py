"""docs/reference/matrix.md shows which methods, objectives and strategies work together; every refusal has a message."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.matrix import (
    RANKS_BY_STRATEGY,
    SPEC_BY_METHOD,
    TRAINER_BY_OBJECTIVE,
    read_expected_table,
    run_strategy,
)

pytestmark = pytest.mark.pod
QUICK_STRATEGY = "one rank"


@pytest.mark.parametrize(
    "strategy", [name if name == QUICK_STRATEGY else pytest.param(name, marks=pytest.mark.slow) for name in RANKS_BY_STRATEGY]
)
def test_the_reference_page_shows_the_actual_matrix(strategy: str, tmp_path: Path) -> None:
    matrix = run_strategy(strategy, tmp_path)
    assert len(matrix) == len(SPEC_BY_METHOD) * len(TRAINER_BY_OBJECTIVE)
    assert matrix == read_expected_table(strategy)
