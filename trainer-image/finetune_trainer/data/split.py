"""Stage 4, split: parts cut from the training data by ratio and seed, and mixtures of several sources by weight."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction
from typing import TypeVar

from finetune_api.errors import DataError
from finetune_api.spec.dataset import Split

Item = TypeVar("Item")


def split_sizes(rows: int, split: Split) -> tuple[int, int, int]:
    """Rows for training, validation and test: the latter two rounded down, the rest goes to training.

    Where training has a ratio of its own and the three do not add up to 1, it is rounded down too and rows are left over.
    Errors: SplitEmpty.
    """
    parts = [Fraction(str(x)) if x is not None else Fraction(0) for x in (split.validation, split.test)]
    validation, test = (int(part * rows) for part in parts)
    train = rows - validation - test
    if split.train is not None and abs(Fraction(str(split.train)) + sum(parts) - 1) > Fraction(1, 10**6):
        train = min(train, int(Fraction(str(split.train)) * rows))
    for name, size, asked in (
        ("training", train, True),
        ("validation", validation, parts[0] > 0),
        ("test", test, parts[1] > 0),
    ):
        if asked and size == 0:
            raise DataError(
                "SplitEmpty", f"dataset.split leaves no row for {name}: {rows} rows, cut to {train}, {validation}, {test}",
                hint="give more rows, another ratio, or files of their own (dataset.validation, dataset.test)",
            )  # fmt: skip
    return train, validation, test


def cut(items: Sequence[Item], split: Split) -> tuple[list[Item], list[Item], list[Item]]:
    """Training, validation and test rows, each in file order; who goes where is decided by the seed alone."""
    train, validation, test = split_sizes(len(items), split)
    order = list(range(len(items)))
    random.Random(42 if split.seed is None else split.seed).shuffle(order)
    held = (
        order[:validation],
        order[validation : validation + test],
        order[validation + test : validation + test + train],
    )
    return [items[i] for i in sorted(held[2])], [items[i] for i in sorted(held[0])], [items[i] for i in sorted(held[1])]


def mix(parts: Sequence[Sequence[Item]], weights: Sequence[float], seed: int) -> list[Item]:
    """As many rows as all parts have together, taken from each part in proportion to its weight.

    A part with fewer rows than its share is gone through again, in another order; one with more gives a random choice.
    """
    total = sum(len(part) for part in parts)
    shares = [Fraction(str(w)) for w in weights]
    exact = [total * share / sum(shares) for share in shares]
    quotas = [int(x) for x in exact]
    for i in sorted(range(len(parts)), key=lambda i: (quotas[i] - exact[i], i))[: total - sum(quotas)]:
        quotas[i] += 1
    mixed: list[Item] = []
    for number, (part, quota) in enumerate(zip(parts, quotas, strict=True)):
        source = random.Random(seed * 1000003 + number)
        while quota > 0 and part:
            taken = sorted(source.sample(range(len(part)), min(quota, len(part))))
            mixed += [part[i] for i in taken]
            quota -= len(taken)
    return mixed
