"""Writes checkpoints in the background: training waits only while its state is copied to host memory.

transformers, PEFT, accelerate and DeepSpeed write the files of a checkpoint with four functions. While a checkpoint is saved, these four functions are
replaced: they only copy the tensors to host memory and return. A thread of the rank then writes the copies to the disk, and reports the checkpoint
when its files are complete. All copies are made between the same two training steps, so they are consistent.

One checkpoint is written at a time. The next checkpoint waits until the current checkpoint is written, because their copies use the same host memory.
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
    """Writes the checkpoints of one rank: in a thread if `writes_in_background`, otherwise while training waits."""

    def __init__(self) -> None:
        self.writes_in_background = False
        """Whether the next checkpoint is written in the background. All ranks must have the same value, because they write sharded files together."""
        self._is_saving = False
        """Whether a checkpoint is being saved: True from `begin_checkpoint` to `finish_checkpoint`."""
        self._tasks: list[Callable[[], object]] = []
        """Functions that write the files of the current checkpoint, and functions that callers have added, in order."""
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._stager: DefaultStager | None = None
        self._process_group: Any = None

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written in the background."""
        return self._thread is not None and self._thread.is_alive()

    @contextmanager
    def begin_checkpoint(self) -> Iterator[None]:
        """Begin a checkpoint.

        If the checkpoint is written in the background, the libraries' save functions only copy tensors to host memory within the context.
        """
        self._tasks, self._is_saving = [], True
        if not self.writes_in_background:
            yield
            return
        with deferred_saves(self._defer):
            yield

    def run_after_files(self, task: Callable[[], object]) -> None:
        """Run `task` after the files that were saved before this call are written. If no checkpoint is being saved, run `task` at once.

        Tasks run in the order in which they were added.
        """
        if self._is_saving:
            self._tasks.append(task)
        else:
            task()

    def finish_checkpoint(self) -> None:
        """Write the files of the current checkpoint and run its tasks: in a thread, or before this method returns."""
        tasks, self._tasks, self._is_saving = self._tasks, [], False
        if not self.writes_in_background:
            _run_tasks(tasks)
            return
        self._thread = threading.Thread(target=self._run_in_thread, args=(tasks,), name="checkpoint-writer", daemon=True)
        self._thread.start()

    def release_copies(self) -> None:
        """Free the host memory of the copies. Called before a checkpoint that is not written in the background, because writing its files needs memory too."""
        if self._stager is not None:
            self._stager.close()
            self._stager = None

    def raise_failure(self) -> None:
        """If writing a checkpoint in the background has failed, raise its exception."""
        if self._failure is not None:
            raise self._failure

    def wait(self, timeout: float | None = None) -> None:
        """Wait at most `timeout` seconds until the checkpoint that is written in the background is complete. Errors: those of `raise_failure`."""
        if self._thread is not None:
            self._thread.join(timeout)
        self.raise_failure()

    def _run_in_thread(self, tasks: list[Callable[[], object]]) -> None:
        try:
            _run_tasks(tasks)
        except BaseException as error:
            log.exception("a checkpoint could not be written in the background")
            self._failure = error

    def _defer(self, save: Callable[..., None], values: Any, is_collective: bool) -> None:
        """Copy `values` to host memory, and call `save` with the copy later. `is_collective`: `save` communicates with the other ranks."""
        copies = self._open_stager().stage(values)
        options = {"process_group": self._open_process_group()} if is_collective else {}
        self._tasks.append(lambda: save(copies, **options))

    def _open_stager(self) -> DefaultStager:
        """Return torch's stager, which copies tensors to host memory. The stager keeps this memory for later checkpoints, and pins it if there is a GPU."""
        if self._stager is None:
            has_gpu = torch.cuda.is_available()
            self._stager = DefaultStager(
                StagingOptions(use_pinned_memory=has_gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=has_gpu)
            )
        return self._stager

    def _open_process_group(self) -> Any:
        """Return a process group for the background thread, because two threads must not use the same group. A collective: every rank must call this method."""
        if self._process_group is None:
            self._process_group = torch.distributed.new_group(backend="gloo")
        return self._process_group


def _run_tasks(tasks: list[Callable[[], object]]) -> None:
    """Run the tasks in order. Each task is dropped after it has run, which frees the memory that only this task uses."""
    tasks.reverse()
    while tasks:
        tasks.pop()()
