"""Stage 4, split: cut validation and test rows from the training data by ratio and seed; mix several sources by weight."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction
from typing import TypeVar

from finetune_api.errors import DataError
from finetune_api.spec.dataset import Split

Item = TypeVar("Item")


def split_sizes(rows: int, split: Split) -> tuple[int, int, int]:
    """Return the number of rows for training, validation and test.

    The sizes are rounded down. If the ratios add up to 1, or training has no ratio, one part also gets the remaining rows: training
    if it has no ratio, else the last part with a ratio. Otherwise some rows are not used. Errors: SplitEmpty.
    """
    ratios = [Fraction(str(x or 0)) for x in (split.train, split.validation, split.test)]
    if split.train is None:
        ratios[0] = 1 - sum(ratios, Fraction(0))
        rest_index = 0
    else:
        rest_index = max(index for index, ratio in enumerate(ratios) if ratio)
    total = sum(ratios, Fraction(0))
    is_whole = abs(total - 1) <= Fraction(1, 10**6)
    sizes = [int(ratio / total * rows if is_whole else ratio * rows) for ratio in ratios]
    if is_whole:
        sizes[rest_index] += rows - sum(sizes)
    train, validation, test = sizes
    for name, size, is_asked in (
        ("training", train, True),
        ("validation", validation, ratios[1] > 0),
        ("test", test, ratios[2] > 0),
    ):
        if is_asked and size < 1:
            raise DataError(
                "SplitEmpty", f"dataset.split leaves no row for {name}: {rows} rows, cut to {train}, {validation}, {test}",
                hint="give more rows, change the ratio, or give separate files in dataset.validation and dataset.test",
            )  # fmt: skip
    return train, validation, test


def cut(items: Sequence[Item], split: Split) -> tuple[list[Item], list[Item], list[Item]]:
    """Return training, validation and test rows, each in file order. The split depends only on the seed, the ratios and the number of rows."""
    train, validation, test = split_sizes(len(items), split)
    order = list(range(len(items)))
    random.Random(42 if split.seed is None else split.seed).shuffle(order)
    held_out = validation + test
    indices_of_splits = (order[held_out : held_out + train], order[:validation], order[validation:held_out])
    in_train, in_validation, in_test = ([items[i] for i in sorted(indices)] for indices in indices_of_splits)
    return in_train, in_validation, in_test


def mix(parts: Sequence[Sequence[Item]], weights: Sequence[float], seed: int) -> list[Item]:
    """Mix the parts in proportion to their weights. The mixture has as many rows as all parts together.

    A part with fewer rows than its share is repeated. If a part has more rows than its share, rows are drawn at random with `seed`.
    Within each repetition, the rows of a part stay in file order.
    """
    total = sum(len(part) for part in parts)
    shares = [Fraction(str(w)) for w in weights]
    exact_shares = [total * share / sum(shares) for share in shares]
    quotas = [int(x) for x in exact_shares]
    for i in sorted(range(len(parts)), key=lambda i: (quotas[i] - exact_shares[i], i))[: total - sum(quotas)]:
        quotas[i] += 1
    mixed: list[Item] = []
    for number, (part, quota) in enumerate(zip(parts, quotas, strict=True)):
        source = random.Random(seed * 1000003 + number)
        while quota > 0 and part:
            taken = sorted(source.sample(range(len(part)), min(quota, len(part))))
            mixed += [part[i] for i in taken]
            quota -= len(taken)
    return mixed
