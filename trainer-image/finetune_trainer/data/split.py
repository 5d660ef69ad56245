"""Stage 4, split: cut validation and test rows from the training data by ratio and seed; mix several sources by weight."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction
from typing import TypeVar

from finetune_api.errors import DataError
from finetune_api.spec.dataset import Split

Item = TypeVar("Item")


def split_sizes(row_count: int, split: Split) -> tuple[int, int, int]:
    """Return the number of rows for training, validation and test, out of `row_count` rows.

    Each size is rounded down. If training has no ratio, it gets all other rows. If training has a ratio and the ratios add up to 1, the last split
    with a ratio gets the rows that rounding leaves over. If the ratios add up to less than 1, the remaining rows are not used. Errors: SplitEmpty.
    """
    ratios = [Fraction(str(x or 0)) for x in (split.train, split.validation, split.test)]
    if split.train is None:
        ratios[0] = 1 - sum(ratios, Fraction(0))
        remainder_index = 0
    else:
        remainder_index = max(index for index, ratio in enumerate(ratios) if ratio)
    ratio_sum = sum(ratios, Fraction(0))
    uses_all_rows = abs(ratio_sum - 1) <= Fraction(1, 10**6)
    sizes = [int(ratio / ratio_sum * row_count if uses_all_rows else ratio * row_count) for ratio in ratios]
    if uses_all_rows:
        sizes[remainder_index] += row_count - sum(sizes)
    train, validation, test = sizes
    for name, size, is_requested in (
        ("training", train, True),
        ("validation", validation, ratios[1] > 0),
        ("test", test, ratios[2] > 0),
    ):
        if is_requested and size < 1:
            raise DataError(
                "SplitEmpty",
                f"dataset.split leaves no row for {name}: of {row_count} rows, {train} are for training, {validation} for validation, {test} for test",
                hint="give more rows, change the ratio, or give separate files in dataset.validation and dataset.test",
            )  # fmt: skip
    return train, validation, test


def cut_into_splits(items: Sequence[Item], split: Split) -> tuple[list[Item], list[Item], list[Item]]:
    """Return the training, validation and test rows, each in file order. Equal seeds, ratios and numbers of rows give equal splits."""
    train_count, validation_count, test_count = split_sizes(len(items), split)
    order = list(range(len(items)))
    random.Random(42 if split.seed is None else split.seed).shuffle(order)
    held_out_count = validation_count + test_count
    indices_of_splits = (order[held_out_count : held_out_count + train_count], order[:validation_count], order[validation_count:held_out_count])
    in_train, in_validation, in_test = ([items[i] for i in sorted(indices)] for indices in indices_of_splits)
    return in_train, in_validation, in_test


def mix(sources: Sequence[Sequence[Item]], weights: Sequence[float], seed: int) -> list[Item]:
    """Mix the rows of the sources in proportion to their weights. The mixture has as many rows as all sources together.

    A source with fewer rows than its share is repeated. From a source with more rows than its share, rows are drawn at random with `seed`.
    Within each repetition, the rows of a source stay in file order.
    """
    row_count = sum(len(source) for source in sources)
    exact_weights = [Fraction(str(w)) for w in weights]
    exact_quotas = [row_count * exact_weight / sum(exact_weights) for exact_weight in exact_weights]
    quotas = [int(x) for x in exact_quotas]
    for i in sorted(range(len(sources)), key=lambda i: (quotas[i] - exact_quotas[i], i))[: row_count - sum(quotas)]:
        quotas[i] += 1
    mixed_items: list[Item] = []
    for number, (source, quota) in enumerate(zip(sources, quotas, strict=True)):
        generator = random.Random(seed * 1000003 + number)
        while quota > 0 and source:
            drawn_indices = sorted(generator.sample(range(len(source)), min(quota, len(source))))
            mixed_items += [source[i] for i in drawn_indices]
            quota -= len(drawn_indices)
    return mixed_items
