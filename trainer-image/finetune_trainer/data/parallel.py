"""Renders and tokenises rows in several processes. The results keep the order of the rows.

Rendering conversations takes most of the time. Rendering is Python code, so the tokenizer's own threads help little. Workers are spawned,
because forking a process with threads may deadlock. Spawning takes a few seconds, so this process encodes the first rows itself. Workers return
Arrow batches, which need eight bytes for a token with its label; Python objects need more than 40. Only a few batches exist at a time, so that
memory use does not depend on the number of rows.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain
from pathlib import Path

from finetune_trainer.data.batches import BatchEncoder, EncodedBatch
from finetune_trainer.data.checks import all_texts
from finetune_trainer.data.rows import Conversation, Example, ImageFile, TokenSequence
from finetune_trainer.data.tokenise import BATCH_ROWS

ROWS_WITHOUT_WORKERS = 10_000
"""Number of rows that this process encodes before it starts workers. For fewer rows, starting workers takes longer than encoding."""
BATCH_CHARACTERS = 500_000
"""A batch is complete when its texts have at least this many characters. A token id in a row counts as one character. The Python objects for the
tokens of a batch of this size need some tens of megabytes."""
BATCH_IMAGE_BYTES = 32 << 20
"""A batch is complete when the images inside its rows have at least this many bytes."""
BATCHES_PER_WORKER = 2
"""Number of batches per worker that are submitted at a time: the worker encodes one batch, while the next batch waits."""
CGROUP_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")
Batch = list[tuple[str, Example]]

_encoder: BatchEncoder | None = None


def _start_worker(encoder: BatchEncoder) -> None:
    global _encoder  # a worker process keeps one encoder for its lifetime
    _encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # One worker runs per core, so threads of the tokenizer would not help.


def _encode_batch(rows: Sequence[tuple[str, Example]]) -> EncodedBatch:
    assert _encoder is not None, "`_start_worker` runs first in every worker"
    return _encoder(rows)


def encode_rows(
    rows: Iterable[tuple[str, Example]], encoder: BatchEncoder, *, processes: int, rows_without_workers: int | None = None
) -> Iterator[EncodedBatch]:
    """Yield the encoder's results for all rows, in order. Rows are read only when workers need them.

    `rows_without_workers`: number of rows that this process encodes before it starts workers; None for `ROWS_WITHOUT_WORKERS`.
    """
    batches = _split_into_batches(rows)
    encoded_row_count = 0
    for batch in batches:
        if processes > 1 and encoded_row_count >= (rows_without_workers or ROWS_WITHOUT_WORKERS):
            yield from _encode_in_workers(chain([batch], batches), encoder, processes)
            return
        encoded_row_count += len(batch)
        yield encoder(batch)


def _encode_in_workers(batches: Iterable[Batch], encoder: BatchEncoder, worker_count: int) -> Iterator[EncodedBatch]:
    pending_batches: deque[Future[EncodedBatch]] = deque()
    with _start_pool(encoder, worker_count) as pool:
        try:
            for batch in batches:
                pending_batches.append(pool.submit(_encode_batch, batch))
                if len(pending_batches) >= BATCHES_PER_WORKER * worker_count:
                    yield pending_batches.popleft().result()
            while pending_batches:
                yield pending_batches.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start_pool(encoder: BatchEncoder, worker_count: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(worker_count, multiprocessing.get_context("spawn"), _start_worker, (encoder,))


def _split_into_batches(rows: Iterable[tuple[str, Example]]) -> Iterator[Batch]:
    batch: Batch = []
    batch_characters = image_bytes = 0
    for location, example in rows:
        batch.append((location, example))
        batch_characters += len(example.ids) if isinstance(example, TokenSequence) else sum(map(len, all_texts(example)))
        image_bytes += _count_image_bytes(example)
        if len(batch) >= BATCH_ROWS or batch_characters >= BATCH_CHARACTERS or image_bytes >= BATCH_IMAGE_BYTES:
            yield batch
            batch, batch_characters, image_bytes = [], 0, 0
    if batch:
        yield batch


def _count_image_bytes(example: Example) -> int:
    """Return the number of bytes of the images inside the row. Images in files do not count, because the worker reads them."""
    turns = example.turns if isinstance(example, Conversation) else ()
    parts = (part for turn in turns for part in turn.parts)
    return sum(len(part.content or b"") for part in parts if isinstance(part, ImageFile))


def count_usable_cpus() -> int:
    """Return the number of CPUs that this process may use, according to its CPU affinity and the cgroup's CPU quota."""
    allowed_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CGROUP_CPU_LIMIT.read_text().split()
        return max(1, min(allowed_cpus, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup v2, or no limit ("max")
        return allowed_cpus
