"""Passes complete checkpoints of this pod's ranks, and the final artefact, to the uploader.

A rank reports a folder when its files are complete. The files are then hard-linked below `<work>/staged`, so that the Trainer can remove its own
folder while the upload still runs.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from finetune_api.errors import StorageError

from finetune_trainer.checkpoint.uploader import StagedCheckpoint, Uploader
from finetune_trainer.supervisor.run_state import RunState


class Staging:
    """The staging folder of one pod. During the preparation of the pod, `uploader` is None and no checkpoint is staged."""

    def __init__(self, work_folder: Path, run_state: RunState, *, rank_count: int) -> None:
        self._folder = work_folder / "staged"
        self._state = run_state
        self._rank_count = rank_count
        self._reports_by_step: dict[int, dict[int, dict[str, Any]]] = {}
        """The messages of ranks about their files of checkpoints that are not complete yet, by step and local rank."""
        self.uploader: Uploader | None = None

    def add_rank_files(self, message: dict[str, Any]) -> None:
        """Record that the files of one rank are complete. After the last rank of this pod, queue the checkpoint for upload."""
        step, local_rank = int(message["step"]), int(message["localRank"])
        reports_by_rank = self._reports_by_step.setdefault(step, {})
        reports_by_rank[local_rank] = message
        if local_rank == 0:
            self._state.increment_counter("checkpoint_stall_seconds", float(message.get("stallSeconds", 0)))
        if len(reports_by_rank) < self._rank_count:
            return
        del self._reports_by_step[step]
        if self.uploader is None:
            return
        source_folder, target_folder = Path(message["folder"]), self._folder / f"step-{step}"
        try:
            hard_link_tree(source_folder, target_folder)
        except OSError as error:
            self.skip_checkpoint("StagingFailed", f"step {step}: {error.strerror or error}")
            return
        finally:  # The Trainer does not read this folder again, because the module `best` keeps the best weights.
            shutil.rmtree(source_folder, ignore_errors=True)
        rank0_report = reports_by_rank.get(0, message)
        self.uploader.enqueue(
            StagedCheckpoint(step, target_folder, str(message["incarnation"]), is_graceful_stop=bool(message.get("graceful")), rank0_report=rank0_report)
        )

    def skip_checkpoint(self, reason: str, description: str) -> None:
        """Record that a checkpoint was due but could not be staged."""
        self._state.increment_counter("checkpoints_skipped")
        self._state.record_checkpoint_problem(reason, description)
        if self.uploader is not None:
            self.uploader.record_unsaved()

    def add_final(self, message: dict[str, Any], incarnation: str) -> None:
        """Stage the complete final artefact and queue it for upload. Errors: StorageError `StagingFailed`."""
        if self.uploader is None:
            return
        final_folder = self._folder / "final"
        try:
            hard_link_tree(Path(message["folder"]), final_folder)
        except OSError as error:
            raise StorageError(
                "StagingFailed", f"the final model cannot be staged on the pod's disk: {error.strerror or error}"
            ) from error
        self.uploader.enqueue(StagedCheckpoint(None, final_folder, incarnation, rank0_report=message | {"step": self._state.step}))


def hard_link_tree(source_folder: Path, target_folder: Path) -> None:
    """Hard-link every file of a folder. Links need no disk space, and the files remain after the original folder is removed."""
    shutil.rmtree(target_folder, ignore_errors=True)
    shutil.copytree(source_folder, target_folder, copy_function=lambda file, link: os.link(os.path.realpath(file), link))
