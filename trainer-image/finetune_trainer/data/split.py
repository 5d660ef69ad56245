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
    """Rows for training, validation and test, all rounded down but one, which takes the rest: training if it has no ratio, else the last that has one.

    Ratios that do not add up to 1 leave rows over. Errors: SplitEmpty.
    """
    parts = [Fraction(str(x or 0)) for x in (split.train, split.validation, split.test)]
    if split.train is None:
        parts[0] = 1 - sum(parts, Fraction(0))
        last = 0
    else:
        last = max(place for place, part in enumerate(parts) if part)
    total = sum(parts, Fraction(0))
    whole = abs(total - 1) <= Fraction(1, 10**6)
    sizes = [int(part / total * rows if whole else part * rows) for part in parts]
    if whole:
        sizes[last] += rows - sum(sizes)
    train, validation, test = sizes
    for name, size, asked in (
        ("training", train, True),
        ("validation", validation, parts[1] > 0),
        ("test", test, parts[2] > 0),
    ):
        if asked and size < 1:
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
