"""Renders and tokenises rows in several processes. The results keep the order of the rows.

Rendering conversations takes most of the time. It is Python code, so the tokenizer's own threads help little. Workers are spawned,
because forking a process with threads may deadlock. Spawning takes a few seconds, so this process encodes small data sets itself.
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
from finetune_trainer.data.template import Rendered, RenderOptions, render
from finetune_trainer.data.tokenise import BATCH_ROWS, EncodedRow, TokeniseOptions, encode

ROWS_PER_WORKER = 10_000
"""Minimum number of rows for each worker. With fewer rows, starting a worker would take longer than the work."""
CGROUP_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")
Result = TypeVar("Result", covariant=True)


class RejectedRow(NamedTuple):
    """A row that cannot be rendered: its location and the fields of its RowError."""

    location: str
    code: str
    message: str
    hint: str


class BatchEncoder(Protocol[Result]):
    """A function that a worker applies to a batch of rows. It is pickled, together with its data."""

    def __call__(self, rows: Sequence[tuple[str, Example]]) -> Sequence[Result | RejectedRow]:
        """Return one result for each row (location, example)."""


@dataclass(frozen=True)
class SupervisedEncoder:
    """Renders and tokenises rows of supervised training."""

    render_with: RenderOptions
    options: TokeniseOptions

    def __call__(self, rows: Sequence[tuple[str, Example]]) -> list[EncodedRow | RejectedRow]:
        """Render and tokenise the rows. Errors: ConfigError of `render` and `encode`."""
        rejected: list[tuple[int, RejectedRow]] = []

        def render_rows() -> Iterator[tuple[str, Rendered]]:
            for number, (location, example) in enumerate(rows):
                try:
                    yield location, render(example, self.render_with)
                except RowError as error:
                    rejected.append((number, RejectedRow(location, error.code, error.message, error.hint)))

        results: list[EncodedRow | RejectedRow] = list(encode(render_rows(), self.render_with.tokenizer, self.options))
        for number, row in rejected:
            results.insert(number, row)
        return results


_encoder: BatchEncoder[Any] | None = None


def _start_worker(encoder: BatchEncoder[Any]) -> None:
    global _encoder  # A worker process uses the same encoder for its lifetime.
    _encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # One worker runs per core, so more threads would not help.


def _encode_batch(rows: Sequence[tuple[str, Example]]) -> Sequence[Any]:
    assert _encoder is not None, "`_start_worker` runs first in every worker"
    return _encoder(rows)


def encode_rows(
    rows: Sequence[tuple[Any, Example]], encoder: BatchEncoder[Result], *, processes: int,
    on_bad_row: Callable[[str, str, str, str], None], rows_per_worker: int | None = None,
) -> Iterator[Result]:  # fmt: skip
    """Yield the encoder's result for every row, in order. A rejected row is passed to `on_bad_row`, which either raises an error or
    returns. If it returns, the row is skipped.

    `rows_per_worker`: minimum number of rows for each worker process; None: the default for text.
    """
    batches = _split_into_batches(rows)
    workers = min(processes, len(rows) // (rows_per_worker or ROWS_PER_WORKER))
    pool = _start_pool(encoder, workers) if workers > 1 else None
    with pool or nullcontext():
        for batch in pool.map(_encode_batch, batches) if pool else map(encoder, batches):
            for result in batch:
                if isinstance(result, RejectedRow):
                    on_bad_row(*result)
                else:
                    yield result


def _start_pool(encoder: BatchEncoder[Any], workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (encoder,))


def _split_into_batches(rows: Sequence[tuple[Any, Example]]) -> Iterator[list[tuple[str, Example]]]:
    stream = iter(rows)
    while batch := [(raw.location, example) for raw, example in islice(stream, BATCH_ROWS)]:
        yield batch


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use, according to its CPU affinity and the cgroup's CPU quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CGROUP_CPU_LIMIT.read_text().split()
        return max(1, min(allowed, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup v2, or no limit ("max")
        return allowed
