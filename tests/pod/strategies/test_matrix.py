"""docs/reference/matrix.md shows which methods and objectives work together on one rank.

The page gives a message for every combination that is refused.
`tests/image/test_matrix.py` compares the page with runs of all strategies in the trainer image. The test in this file needs no image.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.matrix import SPEC_BY_METHOD, TRAINER_BY_OBJECTIVE, read_expected_table, run_strategy

pytestmark = [pytest.mark.pod, pytest.mark.slow]  # `make test` runs cells of each strategy in tests/image/test_matrix.py


def test_the_reference_page_shows_the_matrix_of_one_rank(tmp_path: Path) -> None:
    matrix = run_strategy("one rank", tmp_path)
    assert len(matrix) == len(SPEC_BY_METHOD) * len(TRAINER_BY_OBJECTIVE)
    assert matrix == read_expected_table("one rank")
