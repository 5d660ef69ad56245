"""Uploads and commits staged checkpoints while training continues.

One upload runs at a time, and at most one checkpoint is queued. A newer checkpoint replaces the queued checkpoint, and a note
in the status reports the replacement. The checkpoint of a graceful stop is never dropped. After each commit, the uploader marks the previous
checkpoints as healthy and removes old checkpoints.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from finetune_api.errors import FineTuneError, StorageError
from finetune_api.spec.enums import OutputKind
from finetune_api.status import Checkpoint, Output

from finetune_trainer.checkpoint.manifest import CommitMarker, FileEntry, Manifest, RunFacts, checkpoint_folder_key
from finetune_trainer.checkpoint.retention import RetentionCandidate, choose_steps_to_remove
from finetune_trainer.checkpoint.tree import CheckpointTree, CommittedCheckpoint, FencedOutError
from finetune_trainer.storage.base import join_key

log = logging.getLogger(__name__)
PART_TIMEOUT_SECONDS = 1800.0
RETRY_PAUSE_SECONDS = 1.0
"""Pause between two tries to upload the final model or the checkpoint of a graceful stop."""
ALLOWED_UNSAVED_INTERVALS = 3
"""A run may always continue for this many checkpoint intervals without a commit, even if the timeout is shorter."""


class CheckpointReporter(Protocol):
    """Receives the reports of the uploader. `supervisor.run_state.RunState` implements this protocol."""

    @property
    def step(self) -> int:
        """Newest optimizer step."""

    @property
    def checkpoint_problem(self) -> str | None:
        """The reason and the message of the failure to store the last checkpoint; None after a commit."""

    def increment_counter(self, name: str, amount: float = 1) -> None: ...
    def add_note(self, text: str) -> None: ...
    def record_checkpoint_problem(self, reason: str, description: str) -> None: ...
    def clear_checkpoint_problem(self) -> None: ...
    def add_checkpoint(self, checkpoint: Checkpoint, upload_seconds: float | None = None) -> None: ...
    def mark_checkpoint_healthy(self, step: int) -> None: ...
    def remove_checkpoint(self, step: int) -> None: ...


@dataclass(frozen=True)
class StagedCheckpoint:
    """A checkpoint that is complete on this pod's disk, or the final model (step None)."""

    step: int | None
    folder: Path
    incarnation: str
    is_graceful_stop: bool = False
    """Whether the checkpoint was saved because of a stop request. After such a checkpoint, the attempt saves no other."""
    rank0_report: dict[str, Any] = field(default_factory=dict)
    """Fields of rank 0's report: epoch, samples, tokens, evalLoss, outputKind, extra."""


@dataclass(frozen=True)
class KeepPolicy:
    """Which checkpoints to keep."""

    keep_count: int = 3
    """Number of newest checkpoints to keep; 0 keeps all."""
    pinned_steps: tuple[int, ...] = ()
    """`checkpoint.pinned` of the spec: steps whose checkpoints are always kept."""


class Uploader:
    """The uploader of one pod. Rank 0's pod commits. Each other pod uploads its files and reports to rank 0's pod which files it uploaded."""

    def __init__(
        self, tree: CheckpointTree, reporter: CheckpointReporter, run_facts: RunFacts, keep_policy: KeepPolicy, *, job_id: str, attempt: int,
        node_rank: int = 0, node_count: int = 1, before_commit: Callable[[], None] = lambda: None, after_commit: Callable[[], None] = lambda: None,
        part_timeout_seconds: float = PART_TIMEOUT_SECONDS, final_upload_timeout_seconds: float = 0,
    ) -> None:  # fmt: skip
        self.tree, self._reporter, self._run_facts, self._keep_policy = tree, reporter, run_facts, keep_policy
        self._job_id, self._attempt, self._node_rank, self._node_count = job_id, attempt, node_rank, node_count
        self._before_commit, self._after_commit, self._part_timeout_seconds = before_commit, after_commit, part_timeout_seconds
        self._final_upload_timeout_seconds = final_upload_timeout_seconds
        self._part_wait_end_time: float | None = None
        self._state_changed = threading.Condition()
        self._queued_checkpoint: StagedCheckpoint | None = None
        self._queued_final: StagedCheckpoint | None = None
        self._uploading_checkpoint: StagedCheckpoint | None = None
        self._is_closing = False
        self._candidate_by_step: dict[int, RetentionCandidate] = {}
        self._skipped_marker_by_step: dict[int | None, CommitMarker] = {}
        """Markers of the checkpoints after the restored step, by step. If this attempt repeats one of these steps, its new checkpoint replaces the old one."""
        self._newest_own_step = 0
        """Newest step that this incarnation has committed."""
        self._unsaved_since: float | None = None
        """Monotonic time at which the first checkpoint after the last commit was due; None if no checkpoint is waiting for a commit."""
        self._queued_at = self._last_due_time = 0.0
        self._interval_seconds = 0.0
        """Seconds between the due times of the last two checkpoints."""
        self._failure: FineTuneError | None = None
        self._counted_retries = tree.store.retries
        self.output: Output | None = None
        self.uploaded_step = 0
        """Newest step whose checkpoint files this pod has uploaded. Stays 0 in rank 0's pod."""
        self._thread = threading.Thread(target=self._run_uploads, name="uploader", daemon=True)
        self._thread.start()

    # ---- called by the supervisor ----

    @property
    def failure(self) -> FineTuneError | None:
        """Why the uploader has stopped uploading: this incarnation is fenced out, or the final model could not be stored.

        None if the uploader has not stopped.
        """
        return self._failure

    @property
    def committed_step(self) -> int:
        """Newest committed step; 0 if no step is committed."""
        return max(self._candidate_by_step, default=0)

    def adopt_committed(self, checkpoints: list[Checkpoint]) -> None:
        """Add the committed checkpoints of earlier attempts up to the restored step."""
        for checkpoint in checkpoints:
            self._candidate_by_step[checkpoint.step] = RetentionCandidate(checkpoint.step, bool(checkpoint.healthy), checkpoint.eval_loss)
            self._reporter.add_checkpoint(checkpoint)

    def add_skipped(self, checkpoints: Iterable[CommittedCheckpoint]) -> None:
        """Add the committed checkpoints after the restored step. Each of them is damaged or not trusted, or it is later than the step of a rollback.

        These checkpoints do not count as progress, and a later commit does not mark them healthy. A skipped checkpoint is replaced when this
        attempt commits the same step, or removed when this attempt commits a later step.
        """
        self._skipped_marker_by_step |= {checkpoint.step: checkpoint.marker for checkpoint in checkpoints}

    def enqueue(self, staged_checkpoint: StagedCheckpoint) -> None:
        """Queue a staged checkpoint or the final model. The uploader removes the local folder after the upload."""
        dropped_checkpoint = None
        if staged_checkpoint.step is not None:
            self.record_unsaved()
        with self._state_changed:
            queued_before = self._queued_checkpoint
            if staged_checkpoint.step is None:
                self._queued_final = staged_checkpoint
            elif queued_before is not None and queued_before.is_graceful_stop and not staged_checkpoint.is_graceful_stop:
                dropped_checkpoint = staged_checkpoint
            else:
                dropped_checkpoint, self._queued_checkpoint, self._queued_at = queued_before, staged_checkpoint, time.monotonic()
            self._state_changed.notify_all()
        if dropped_checkpoint is not None:
            self._drop_staged(dropped_checkpoint, staged_checkpoint.step)

    def record_unsaved(self) -> None:
        """Record that a checkpoint is due now. The checkpoint counts as unsaved until the next commit."""
        with self._state_changed:
            now = time.monotonic()
            self._interval_seconds = now - self._last_due_time if self._last_due_time else 0.0
            self._last_due_time = now
            if self._unsaved_since is None:
                self._unsaved_since = now

    def unsaved_error(self, timeout_seconds: float, stall_timeout_seconds: float | None) -> StorageError | None:
        """Return an error if no checkpoint has been committed for too long, else None.

        The limit is the longest of `timeout_seconds`, the job's stall timeout and `ALLOWED_UNSAVED_INTERVALS` checkpoint intervals.
        """
        with self._state_changed:
            if self._unsaved_since is None:
                return None
            unsaved_seconds = time.monotonic() - self._unsaved_since
            limit_seconds = max(timeout_seconds, stall_timeout_seconds or 0.0, ALLOWED_UNSAVED_INTERVALS * self._interval_seconds)
        if unsaved_seconds <= limit_seconds:
            return None
        problem = self._reporter.checkpoint_problem or "the upload has not ended"
        return StorageError(
            "CheckpointsNotSaved", f"no checkpoint was committed for {unsaved_seconds:.0f} s although some were due: {problem}",
            hint="check the store; the next attempt continues from the newest committed checkpoint",
        )  # fmt: skip

    def _drop_staged(self, dropped_checkpoint: StagedCheckpoint, newer_step: int | None) -> None:
        shutil.rmtree(dropped_checkpoint.folder, ignore_errors=True)
        self._reporter.increment_counter("checkpoints_skipped")
        log.warning(
            "checkpoints are saved faster than storage accepts them: step %s was replaced by step %s before its upload began",
            dropped_checkpoint.step, newer_step,
        )  # fmt: skip
        self._reporter.add_note("checkpoints are saved faster than storage accepts them: some were skipped")
        if self._node_rank > 0:  # Report in a separate thread, because `enqueue` must not delay the thread that receives the ranks' messages.
            threading.Thread(
                target=self._report_skipped_part, args=(dropped_checkpoint,), name="skipped-part", daemon=True
            ).start()

    def _report_skipped_part(self, skipped_checkpoint: StagedCheckpoint) -> None:
        """Report to rank 0's pod that this pod skips the checkpoint, so that rank 0's pod does not wait for this pod's files."""
        with contextlib.suppress(FineTuneError):
            self.tree.report_part(checkpoint_folder_key(skipped_checkpoint.step), skipped_checkpoint.incarnation, self._node_rank, None)

    def limit_part_wait(self, seconds: float) -> None:
        """Let the uploader wait for the files of other pods for at most `seconds` from now. Called after the gang has failed."""
        self._part_wait_end_time = time.monotonic() + seconds

    def wait_until_idle(self, timeout_seconds: float) -> bool:
        """Wait until every queued checkpoint and the final model are committed or have failed. Returns False after `timeout_seconds` seconds."""
        with self._state_changed:
            return self._state_changed.wait_for(self._is_idle, timeout_seconds)

    def _is_idle(self) -> bool:
        return self._queued_checkpoint is None and self._uploading_checkpoint is None and self._queued_final is None

    def close(self) -> None:
        """End the uploader's thread after the current and the queued uploads. Failed uploads are no longer retried."""
        with self._state_changed:
            self._is_closing = True
            self._state_changed.notify_all()

    # ---- the uploader's thread ----

    def _run_uploads(self) -> None:
        while True:
            with self._state_changed:
                self._state_changed.wait_for(lambda: not self._is_idle() or self._is_closing)
                if self._is_idle():
                    return
                if self._queued_checkpoint is not None:
                    staged_checkpoint, self._queued_checkpoint = self._queued_checkpoint, None
                else:
                    assert self._queued_final is not None
                    staged_checkpoint, self._queued_final = self._queued_final, None
                self._uploading_checkpoint = staged_checkpoint
            try:
                self._store(staged_checkpoint)
            finally:
                with self._state_changed:
                    self._uploading_checkpoint = None
                    self._state_changed.notify_all()

    def _store(self, staged_checkpoint: StagedCheckpoint) -> None:
        """Upload and commit one checkpoint or the final model. If this fails, record the reason."""
        started_at = time.monotonic()
        try:
            while self._failure is None and not self._try_to_store_staged(staged_checkpoint, started_at):
                self._wait_before_retry()
        except FencedOutError as error:
            self._failure = error
        except FineTuneError as error:
            self._record_failure(staged_checkpoint, error)
        except Exception as error:
            log.exception("uploading failed")
            self._record_failure(staged_checkpoint, StorageError("UploadFailed", f"{type(error).__name__}: {error}"))
        finally:
            self._reporter.increment_counter("storage_retries", self.tree.store.retries - self._counted_retries)
            self._counted_retries = self.tree.store.retries
            shutil.rmtree(staged_checkpoint.folder, ignore_errors=True)

    def _try_to_store_staged(self, staged_checkpoint: StagedCheckpoint, started_at: float) -> bool:
        """Try once to upload and commit. Returns False if the try failed and must be repeated, because no later checkpoint follows."""
        if staged_checkpoint.step is not None and staged_checkpoint.step <= self._newest_own_step:
            self._record_saved()
            return True  # The data of a committed checkpoint is never written a second time.
        try:
            self._upload_and_commit(staged_checkpoint, started_at)
        except StorageError as error:
            must_retry_final = staged_checkpoint.step is None and time.monotonic() - started_at < self._final_upload_timeout_seconds
            if not (staged_checkpoint.is_graceful_stop or must_retry_final) or self._is_closing:
                raise
            log.warning("%s was not stored, will retry: %s", checkpoint_folder_key(staged_checkpoint.step), error)
            return False
        return True

    def _wait_before_retry(self) -> None:
        with self._state_changed:
            self._state_changed.wait_for(lambda: self._is_closing, RETRY_PAUSE_SECONDS)

    def _record_failure(self, staged_checkpoint: StagedCheckpoint, error: FineTuneError) -> None:
        """Record that an upload failed.

        A failed upload of a checkpoint is reported in the job's status; a failed upload of the final model ends the attempt.
        """
        log.error("step %s could not be stored: %s", staged_checkpoint.step, error)
        self._reporter.increment_counter("checkpoint_failures")
        if staged_checkpoint.step is None:
            self._failure = error
            return
        self._reporter.record_checkpoint_problem(error.code, f"step {staged_checkpoint.step} was not stored: {error.message}")
        if self._node_rank > 0:
            self._report_skipped_part(staged_checkpoint)

    def _upload_and_commit(self, staged_checkpoint: StagedCheckpoint, started_at: float) -> None:
        folder_key = checkpoint_folder_key(staged_checkpoint.step)
        entries = self.tree.upload(folder_key, staged_checkpoint.incarnation, staged_checkpoint.folder, byte_counter=self._count_uploaded_bytes)
        if self._node_rank > 0:
            self.tree.report_part(folder_key, staged_checkpoint.incarnation, self._node_rank, entries)
            self.uploaded_step = staged_checkpoint.step or 0
            self._record_saved()
            return
        if self._node_count > 1 and staged_checkpoint.step is not None:
            other_entries = self.tree.wait_for_parts(
                folder_key, staged_checkpoint.incarnation, self._node_count, self._part_timeout_seconds, self._must_end_wait
            )
            entries = self.tree.merge_parts(folder_key, entries, other_entries)
        manifest = self._build_manifest(staged_checkpoint, entries)
        if (
            not staged_checkpoint.is_graceful_stop and not self._must_end_wait()
        ):  # After a stop request, little time is left, so commit at once.
            self._before_commit()
        marker = self.tree.commit(folder_key, manifest, replaceable_marker=self._skipped_marker_by_step.get(staged_checkpoint.step))
        self._skipped_marker_by_step.pop(staged_checkpoint.step, None)
        save_seconds = time.monotonic() - started_at
        log.info("committed %s/%s in %.2f s (%d bytes)", folder_key, staged_checkpoint.incarnation, save_seconds, manifest.total_bytes)
        uri = self.tree.uri(join_key(folder_key, staged_checkpoint.incarnation))
        if staged_checkpoint.step is None:
            self._mark_healthy(before_step=None)  # The run has ended, and its losses were finite.
            self.output = Output(
                uri=uri, sha256=marker.manifest_sha256, kind=manifest.kind, evaluation=manifest.extra.get("evaluation")
            )
        else:
            self._record_commit(staged_checkpoint, manifest, uri, marker.manifest_sha256, save_seconds)

    def _must_end_wait(self) -> bool:
        """Whether the wait for other pods' files must end: a checkpoint of a graceful stop is queued, or the time of `limit_part_wait` has passed."""
        if self._part_wait_end_time is not None and time.monotonic() > self._part_wait_end_time:
            return True
        return self._queued_checkpoint is not None and self._queued_checkpoint.is_graceful_stop

    def _record_saved(self) -> None:
        """Record that a checkpoint is saved. If another checkpoint is queued, the queued checkpoint still counts as unsaved."""
        with self._state_changed:
            self._unsaved_since = self._queued_at if self._queued_checkpoint is not None else None

    def _record_commit(self, staged_checkpoint: StagedCheckpoint, manifest: Manifest, uri: str, sha256: str, save_seconds: float) -> None:
        step = self._newest_own_step = manifest.step
        self._record_saved()
        self._mark_healthy(before_step=step)
        self._candidate_by_step[step] = RetentionCandidate(step, staged_checkpoint.is_graceful_stop, manifest.eval_loss)
        self._reporter.increment_counter("checkpoints")
        self._reporter.add_checkpoint(
            Checkpoint(
                step=step, uri=uri, sha256=sha256, bytes=manifest.total_bytes, time=datetime.now(UTC), healthy=staged_checkpoint.is_graceful_stop,
                eval_loss=manifest.eval_loss, save_seconds=round(save_seconds, 3),
            ),
            save_seconds,
        )  # fmt: skip
        self._reporter.clear_checkpoint_problem()
        self._after_commit()
        if staged_checkpoint.is_graceful_stop:
            with self._record_failure_as_note("marking a checkpoint healthy"):
                self.tree.mark_healthy(step)
        self.apply_retention()

    def _mark_healthy(self, *, before_step: int | None) -> None:
        """Mark the checkpoints before this step (None: all) as healthy, because the losses after them were finite."""
        for step, candidate in sorted(self._candidate_by_step.items()):
            if not candidate.is_healthy and (before_step is None or step < before_step):
                with self._record_failure_as_note("marking a checkpoint healthy"):
                    self.tree.mark_healthy(step)
                    self._candidate_by_step[step] = RetentionCandidate(step, True, candidate.eval_loss)
                    self._reporter.mark_checkpoint_healthy(step)

    def apply_retention(self, *, is_run_finished: bool = False) -> None:
        """Remove the checkpoints that the keep policy does not protect. If storage refuses a removal, the checkpoint stays and a note is added."""
        steps_to_remove = choose_steps_to_remove(
            list(self._candidate_by_step.values()), self._keep_policy.keep_count, pinned_steps=self._keep_policy.pinned_steps, is_run_finished=is_run_finished
        )
        for step in steps_to_remove:
            with self._record_failure_as_note(f"removing the checkpoint of step {step}"):
                self.tree.remove(step)
                self._candidate_by_step.pop(step, None)
                self._reporter.remove_checkpoint(step)
        for step in [step for step in self._skipped_marker_by_step if step is not None and step < self.committed_step]:
            if step not in self._keep_policy.pinned_steps:
                with self._record_failure_as_note(f"removing the skipped checkpoint of step {step}"):
                    self.tree.remove(step)
                    self._skipped_marker_by_step.pop(step)

    @contextlib.contextmanager
    def _record_failure_as_note(self, action: str) -> Iterator[None]:
        try:
            yield
        except FineTuneError as error:
            log.warning("%s failed: %s", action, error)
            self._reporter.add_note(f"{action} failed: {error.code}")

    def _build_manifest(self, staged_checkpoint: StagedCheckpoint, entries: list[FileEntry]) -> Manifest:
        rank0_report = staged_checkpoint.rank0_report
        return Manifest(
            job=self._job_id,
            attempt=self._attempt,
            incarnation=staged_checkpoint.incarnation,
            step=staged_checkpoint.step if staged_checkpoint.step is not None else int(rank0_report.get("step") or self._reporter.step),
            epoch=rank0_report.get("epoch"),
            samples=rank0_report.get("samples"),
            tokens=rank0_report.get("tokens"),
            eval_loss=rank0_report.get("evalLoss"),
            graceful=staged_checkpoint.is_graceful_stop,
            kind=OutputKind(rank0_report["outputKind"]) if rank0_report.get("outputKind") else None,
            facts=self._run_facts,
            extra=rank0_report.get("extra") or {},
            files=sorted(entries, key=lambda entry: entry.path),
        )

    def _count_uploaded_bytes(self, byte_count: int) -> None:
        self._reporter.increment_counter("uploaded_bytes", byte_count)


def to_status_checkpoints(tree: CheckpointTree, committed_checkpoints: Iterable[CommittedCheckpoint]) -> list[Checkpoint]:
    """Convert committed checkpoints to entries of the job's status. If the manifest is damaged, size and loss are left out."""
    status_checkpoints = []
    for checkpoint in committed_checkpoints:
        manifest = tree.read_manifest(checkpoint)
        status_checkpoints.append(
            Checkpoint(
                step=checkpoint.step or 0, uri=tree.uri(checkpoint.folder), sha256=checkpoint.marker.manifest_sha256, healthy=checkpoint.is_healthy,
                bytes=manifest.total_bytes if manifest else None, eval_loss=manifest.eval_loss if manifest else None,
            )
        )  # fmt: skip
    return status_checkpoints
