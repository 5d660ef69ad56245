"""Writes checkpoints in the background: training waits only while the state is copied to host memory.

transformers, PEFT, accelerate and DeepSpeed write the files of a checkpoint with four functions. While a checkpoint is saved,
these functions copy their tensors to host memory and return. A thread of the rank then writes the copies to the disk, and reports
the checkpoint when its files are complete. All copies are made between the same two steps, so they are consistent.

Only one checkpoint is written at a time. The next one waits, because it reuses the host memory of its predecessor.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from finetune_trainer.library_internals import deferred_saves

log = logging.getLogger(__name__)


class BackgroundWriter:
    """Writes one rank's checkpoints, in a thread or at once (`in_background` is False)."""

    def __init__(self) -> None:
        self.in_background = False
        """Whether the next checkpoint is written in the background. All ranks must agree, because sharded files need collectives."""
        self._is_open = False
        """Whether a checkpoint is being saved: it begins with `collect_files`, and ends with `finish_checkpoint`."""
        self._tasks: list[Callable[[], object]] = []
        """What remains to be done for the current checkpoint, in order."""
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._stager: DefaultStager | None = None
        self._group: Any = None

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written in the background."""
        return self._thread is not None and self._thread.is_alive()

    @contextmanager
    def collect_files(self) -> Iterator[None]:
        """Within the context, the libraries' functions for large files copy their tensors to host memory instead of writing them."""
        self._tasks, self._is_open = [], True
        if not self.in_background:
            yield
            return
        with deferred_saves(self._defer):
            yield

    def run_after_files(self, task: Callable[[], object]) -> None:
        """Run `task` when this rank has written the files that the current checkpoint has so far; at once if no checkpoint is being saved.

        Files and tasks are processed in the order in which they were saved or added.
        """
        if self._is_open:
            self._tasks.append(task)
        else:
            task()

    def finish_checkpoint(self) -> None:
        """Complete the current checkpoint: in a thread, or before this method returns."""
        tasks, self._tasks, self._is_open = self._tasks, [], False
        if not self.in_background:
            _run_all(tasks)
            return
        self._thread = threading.Thread(target=self._run_in_thread, args=(tasks,), name="checkpoint-writer", daemon=True)
        self._thread.start()

    def release_copies(self) -> None:
        """Free the memory of the copies. Called before a checkpoint or model is written at once, because its files need memory, too."""
        if self._stager is not None:
            self._stager.close()
            self._stager = None

    def raise_failure(self) -> None:
        """Raise the exception that ended the writing of a checkpoint in the background, if any."""
        if self._failure is not None:
            raise self._failure

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the checkpoint in the background is complete, at most `timeout` seconds. Errors: as `raise_failure`."""
        if self._thread is not None:
            self._thread.join(timeout)
        self.raise_failure()

    def _run_in_thread(self, tasks: list[Callable[[], object]]) -> None:
        try:
            _run_all(tasks)
        except BaseException as error:
            log.exception("a checkpoint could not be written in the background")
            self._failure = error

    def _defer(self, save: Callable[..., None], values: Any, is_collective: bool) -> None:
        """Copy `values` to host memory, and call `save` with the copy later. `is_collective`: `save` communicates with the other ranks."""
        copies = self._open_stager().stage(values)
        options = {"process_group": self._open_group()} if is_collective else {}
        self._tasks.append(lambda: save(copies, **options))

    def _open_stager(self) -> DefaultStager:
        """torch's copier to host memory. It keeps its memory, pinned for copies from a GPU, for the following checkpoints."""
        if self._stager is None:
            has_gpu = torch.cuda.is_available()
            self._stager = DefaultStager(
                StagingOptions(use_pinned_memory=has_gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=has_gpu)
            )
        return self._stager

    def _open_group(self) -> Any:
        """A process group of the background threads, because a group allows the calls of one thread only. A collective call."""
        if self._group is None:
            self._group = torch.distributed.new_group(backend="gloo")
        return self._group


def _run_all(tasks: list[Callable[[], object]]) -> None:
    """Run the tasks in order. Each task is dropped after it has run, and with it the copies that are not kept for the next checkpoint."""
    tasks.reverse()
    while tasks:
        tasks.pop()()
