"""Splits by ratio, and mixtures by weight."""

from __future__ import annotations

import pytest
from finetune_api.errors import DataError
from finetune_api.spec.dataset import Split
from finetune_trainer.data.split import cut_into_splits, mix, split_sizes


@pytest.mark.parametrize(
    ("rows", "split", "expected_sizes"),
    [
        (10, Split(validation=0.1, test=0.1), (8, 1, 1)),
        (100, Split(validation=0.29), (71, 29, 0)),  # 0.29 * 100 is 28.999999999999996 in floats
        (7, Split(validation=0.3, test=0.3), (3, 2, 2)),
        (10, Split(train=0.7, validation=0.2, test=0.1), (7, 2, 1)),
        (15, Split(train=0.8, validation=0.1, test=0.1), (12, 1, 2)),
        (15, Split(validation=0.1, test=0.1), (13, 1, 1)),
        (7, Split(train=0.85, validation=0.15, test=0), (5, 2, 0)),
        (7, Split(train=0.85, test=0.15), (5, 0, 2)),
        (3, Split(train=0.6666666, validation=0.3333333), (2, 1, 0)),
        (7, Split(train=1.0, validation=0.0), (7, 0, 0)),
    ],
)
def test_sizes_are_rounded_down_and_one_split_gets_the_remaining_rows(
    rows: int, split: Split, expected_sizes: tuple[int, int, int]
) -> None:
    assert split_sizes(rows, split) == expected_sizes
    assert tuple(map(len, cut_into_splits(range(rows), split))) == expected_sizes


def test_a_split_without_rows_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        split_sizes(1, Split(validation=1.0))
    assert caught.value.code == "SplitEmpty" and "no row for training" in caught.value.message
    for split, empty_split in (
        (Split(validation=0.3), "validation"),
        (Split(train=0.5, validation=0.2, test=0.3), "validation"),
    ):
        with pytest.raises(DataError, match=f"SplitEmpty: .*no row for {empty_split}: of 3 rows"):
            split_sizes(3, split)


def test_the_seed_alone_decides_the_split_and_each_split_keeps_the_order_of_the_file() -> None:
    rows = list(range(20))
    train, validation, test = cut_into_splits(rows, Split(validation=0.2, test=0.1, seed=1))
    assert (len(train), len(validation), len(test)) == (14, 4, 2)
    assert sorted(train + validation + test) == rows and train == sorted(train)
    assert cut_into_splits(rows, Split(validation=0.2, test=0.1, seed=1)) == (train, validation, test)
    assert cut_into_splits(rows, Split(validation=0.2, test=0.1, seed=2)) != (train, validation, test)


def test_a_mixture_follows_the_weights() -> None:
    large_source, small_source = [f"a{i}" for i in range(30)], [f"b{i}" for i in range(10)]
    mixture = mix([large_source, small_source], [1, 1], seed=3)
    assert len(mixture) == 40
    assert sum(row.startswith("a") for row in mixture) == 20
    assert {row: mixture.count(row) for row in small_source} == dict.fromkeys(small_source, 2)
    assert len({row for row in mixture if row.startswith("a")}) == 20
    assert mix([large_source, small_source], [1, 1], seed=3) == mixture
    assert mix([large_source, small_source], [3, 1], seed=3).count("b0") == 1


def test_the_seed_decides_which_rows_of_a_large_source_are_drawn() -> None:
    sources = [[f"a{i}" for i in range(30)], [f"b{i}" for i in range(10)]]
    assert len({tuple(mix(sources, [1, 1], seed)) for seed in range(5)}) == 5
