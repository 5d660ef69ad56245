"""Rows to token ids in as many processes as there are cores, in the rows' own order.

The tokenizer's own threads only help while it runs; most of the time goes into rendering conversations, which is Python. Workers
are started fresh (a fork of a process with threads may hang) and cost a few seconds each, so few rows stay in this process.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from finetune_trainer.data.rows import Example, RowError
from finetune_trainer.data.template import Rendered, Style, render
from finetune_trainer.data.tokenise import BATCH, Rules, encoded

ROWS_OF_A_WORKER = 10_000
"""Fewer do not pay for the start of a process."""
CGROUP = Path("/sys/fs/cgroup/cpu.max")
Row = tuple[str, list[int], list[int]]
"""Place, token ids, labels."""
Made = TypeVar("Made", covariant=True)


class Refused(NamedTuple):
    """A row that cannot be used."""

    place: str
    code: str
    found: str
    write: str


class Task(Protocol[Made]):
    """What a worker does with a batch of rows, and all that it needs to know for that. It can be pickled."""

    def __call__(self, rows: Sequence[tuple[str, Example]]) -> Sequence[Made | Refused]:
        """What is made of each row, or why nothing is."""


@dataclass(frozen=True)
class Work:
    """Rows of supervised training: rendered and tokenised."""

    style: Style
    rules: Rules

    def __call__(self, rows: Sequence[tuple[str, Example]]) -> list[Row | Refused]:
        """Every row of a batch as token ids, or why not. Errors: ConfigError of the stages."""
        refused: list[tuple[int, Refused]] = []

        def rendered() -> Iterator[tuple[str, Rendered]]:
            for number, (place, example) in enumerate(rows):
                try:
                    yield place, render(example, self.style)
                except RowError as error:
                    refused.append((number, Refused(place, error.code, error.found, error.write)))

        result: list[Row | Refused] = list(encoded(rendered(), self.style.tokenizer, self.rules))
        for number, why in refused:
            result.insert(number, why)
        return result


_work: Task[Any] | None = None


def _begin(work: Task[Any]) -> None:
    global _work  # a worker process has one task all its life
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are shared out already


def _do(rows: Sequence[tuple[str, Example]]) -> Sequence[Any]:
    assert _work is not None, "the pool starts every worker with its work"
    return _work(rows)


def encoded_rows(
    rows: Sequence[tuple[Any, Example]], work: Task[Made], *, processes: int,
    on_bad_row: Callable[[str, str, str, str], None],
) -> Iterator[Made]:  # fmt: skip
    """What `work` makes of every row, in order; a row that cannot be rendered is told to `on_bad_row`, which raises or returns."""
    batches = _batches(rows)
    workers = min(processes, len(rows) // ROWS_OF_A_WORKER)
    pool = _pool(work, workers) if workers > 1 else None
    with pool or nullcontext():
        for batch in pool.map(_do, batches) if pool else map(work, batches):
            for one in batch:
                if isinstance(one, Refused):
                    on_bad_row(*one)
                else:
                    yield one


def _pool(work: Task[Any], workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, (work,))


def _batches(rows: Sequence[tuple[Any, Example]]) -> Iterator[list[tuple[str, Example]]]:
    stream = iter(rows)
    while batch := [(raw.place, example) for raw, example in islice(stream, BATCH)]:
        yield batch


def cores() -> int:
    """CPUs that this process may use: those it may run on, and no more than the pod's limit."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CGROUP.read_text().split()
        return max(1, min(allowed, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup, or no limit ("max")
        return allowed
