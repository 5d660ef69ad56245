"""Moves staged checkpoints to storage while training goes on.

One upload is in flight and at most one waits. A newer checkpoint takes the place of one that waits, and that is said; one
made because the pod must end is never dropped. After a commit the one before it is marked healthy, and old ones go.
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
from typing import Any

from finetune_api.errors import FineTuneError, StorageError
from finetune_api.names import ExitCode
from finetune_api.spec.enums import OutputKind
from finetune_api.status import Checkpoint, Output

from finetune_trainer.checkpoint.manifest import FileEntry, Manifest, Marker, RunFacts, base_of
from finetune_trainer.checkpoint.retention import Kept, removable
from finetune_trainer.checkpoint.tree import Committed, Fenced, Tree
from finetune_trainer.storage.base import join
from finetune_trainer.supervisor.board import Board

log = logging.getLogger(__name__)
PART_TIMEOUT_SECONDS = 1800.0
AGAIN_SECONDS = 1.0
"""Pause before the checkpoint of a stop, which has no successor, is tried once more."""


@dataclass(frozen=True)
class Staged:
    """A checkpoint that lies complete on this pod's disk; step None: the final model."""

    step: int | None
    folder: Path
    incarnation: str
    graceful: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    """What rank 0 said about it: epoch, samples, tokens, evalLoss, kind, extra."""


@dataclass(frozen=True)
class Policy:
    """What to keep."""

    keep: int = 3
    pinned: tuple[int, ...] = ()


class Uploader:
    """One pod's uploader. Rank 0's pod commits; the others bring in their files and say so."""

    def __init__(
        self, tree: Tree, board: Board, facts: RunFacts, policy: Policy, *, job: str, attempt: int, node: int = 0,
        nodes: int = 1, before_commit: Callable[[], None] = lambda: None, after_commit: Callable[[], None] = lambda: None,
        part_timeout: float = PART_TIMEOUT_SECONDS, final_upload_timeout: float = 0,
    ) -> None:  # fmt: skip
        self.tree, self._board, self._facts, self._policy = tree, board, facts, policy
        self._job, self._attempt, self._node, self._nodes = job, attempt, node, nodes
        self._before_commit, self._after_commit, self._part_timeout = before_commit, after_commit, part_timeout
        self._final_upload_timeout = final_upload_timeout
        self._hurry: float | None = None
        self._changed = threading.Condition()
        self._waiting: Staged | None = None
        self._final: Staged | None = None
        self._busy: Staged | None = None
        self._closing = False
        self._committed: dict[int, Kept] = {}
        self._passed: dict[int | None, Marker] = {}
        """Markers that were there before, of steps that this attempt does again: ours will take their place."""
        self._own_step = 0
        """Newest step that this life has committed."""
        self._failure: FineTuneError | None = None
        self._retries = tree.store.retries
        """Repeated requests that are counted already."""
        self.output: Output | None = None
        self.graceful_step: int | None = None
        self.brought_step = 0
        """Newest step that this pod has brought its part of, if it is not rank 0's."""
        self._thread = threading.Thread(target=self._work, name="uploader", daemon=True)
        self._thread.start()

    # ---- from the supervisor ----

    @property
    def failure(self) -> FineTuneError | None:
        """What ended uploading for good: fenced out, or the final model could not be stored."""
        return self._failure

    @property
    def committed_step(self) -> int:
        """Newest committed step, 0 without any."""
        return max(self._committed, default=0)

    def adopt(self, checkpoints: list[Checkpoint]) -> None:
        """Checkpoints that were committed before this attempt, on the way to where it starts."""
        for one in checkpoints:
            self._committed[one.step] = Kept(one.step, bool(one.healthy), one.eval_loss)
            self._board.saved(one)

    def pass_over(self, committed: Iterable[Committed]) -> None:
        """What was committed before this attempt and is not on its way: damaged, or behind a rollback.

        It is nobody's progress and proves nobody's health. It gives way when this attempt comes to the same step, and goes
        when this attempt has passed it.
        """
        self._passed |= {one.step: one.marker for one in committed}

    def offer(self, staged: Staged) -> None:
        """Take a staged checkpoint, or the final model; its folder is ours from now on."""
        dropped = None
        with self._changed:
            before = self._waiting
            if staged.step is None:
                self._final = staged
            elif before is not None and before.graceful and not staged.graceful:
                dropped = staged
            else:
                dropped, self._waiting = before, staged
            self._changed.notify_all()
        if dropped is not None:
            self._drop(dropped, staged.step)

    def _drop(self, dropped: Staged, newer: int | None) -> None:
        shutil.rmtree(dropped.folder, ignore_errors=True)
        self._board.count("checkpoints_skipped")
        sentence = f"the checkpoint of step {dropped.step} was replaced by that of step {newer} before its upload began"
        log.warning("storage is slower than checkpoints are made: %s", sentence)
        self._board.note("storage is slower than checkpoints are made: some were skipped")
        if self._node > 0:  # beside: who offers hears the ranks, and a slow store must not make it deaf
            threading.Thread(target=self._tell_dropped, args=(dropped,), name="dropped", daemon=True).start()

    def _tell_dropped(self, dropped: Staged) -> None:
        with contextlib.suppress(FineTuneError):
            self.tree.report_part(base_of(dropped.step), dropped.incarnation, self._node, None)

    def hurry(self, seconds: float) -> None:
        """The gang has failed: other pods' parts that are not there within `seconds` will not come."""
        self._hurry = time.monotonic() + seconds

    def drain(self, timeout: float) -> bool:
        """Wait until everything offered is committed (or failed); False if time ran out."""
        with self._changed:
            return self._changed.wait_for(self._idle, timeout)

    def _idle(self) -> bool:
        return self._waiting is None and self._busy is None and self._final is None

    def close(self) -> None:
        """Let the thread end after what it is doing."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    # ---- the thread ----

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not self._idle() or self._closing)
                if self._idle():
                    return
                if self._waiting is not None:
                    self._busy, self._waiting = self._waiting, None
                else:
                    self._busy, self._final = self._final, None
            try:
                self._store(self._busy)
            finally:
                with self._changed:
                    self._busy = None
                    self._changed.notify_all()

    def _store(self, staged: Staged | None) -> None:
        assert staged is not None
        started = time.monotonic()
        try:
            while self._failure is None and not self._stored(staged, started):
                self._wait_a_little()
        except Fenced as error:
            self._failure = error
        except FineTuneError as error:
            self._refused(staged, error)
        except Exception as error:
            log.exception("uploading failed")
            self._refused(staged, StorageError("UploadFailed", f"{type(error).__name__}: {error}"))
        finally:
            self._board.count("storage_retries", self.tree.store.retries - self._retries)
            self._retries = self.tree.store.retries
            shutil.rmtree(staged.folder, ignore_errors=True)

    def _stored(self, staged: Staged, started: float) -> bool:
        """Whether it is done with; False: nothing comes after it, storage did not take it, and there is still time."""
        if staged.step is not None and staged.step <= self._own_step:
            return True  # what a marker of ours names is never written again
        try:
            self._move(staged, started)
        except StorageError as error:
            final = staged.step is None and time.monotonic() - started < self._final_upload_timeout
            if not (staged.graceful or final) or self._closing or error.exit_code is not ExitCode.STORAGE:
                raise
            log.warning("%s was not taken, once more: %s", base_of(staged.step), error)
            return False
        return True

    def _wait_a_little(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closing, AGAIN_SECONDS)

    def _refused(self, staged: Staged, error: FineTuneError) -> None:
        """A checkpoint that cannot be stored is a problem; a final model that cannot is the end."""
        log.error("step %s could not be stored: %s", staged.step, error)
        self._board.count("checkpoint_failures")
        if staged.step is None:
            self._failure = error
            return
        self._board.problem(error.code, f"step {staged.step} was not stored: {error.message}")
        if self._node > 0:  # rank 0's pod must not wait for it, and let newer ones pass meanwhile
            self._tell_dropped(staged)

    def _move(self, staged: Staged, started: float) -> None:
        base = base_of(staged.step)
        entries = self.tree.upload(base, staged.incarnation, staged.folder, count=self._count)
        if self._node > 0:
            self.tree.report_part(base, staged.incarnation, self._node, entries)
            self.brought_step = staged.step or 0
            return
        if self._nodes > 1 and staged.step is not None:
            others = self.tree.wait_parts(base, staged.incarnation, self._nodes, self._part_timeout, self._overtaken)
            entries = self.tree.together(base, entries, others)
        manifest = self._manifest(staged, entries)
        # Nothing stands before a stop's commit: its time is short, and the end of the pod tells the rest.
        if not staged.graceful and not self._overtaken():
            self._before_commit()
        marker = self.tree.commit(base, manifest, instead_of=self._passed.get(staged.step))
        self._passed.pop(staged.step, None)
        seconds = time.monotonic() - started
        log.info("committed %s/%s in %.2f s (%d bytes)", base, staged.incarnation, seconds, manifest.total_bytes)
        uri = self.tree.uri(join(base, staged.incarnation))
        if staged.step is None:
            self._mark_healthy(None)  # the run ended finite: what was committed last is healthy
            self.output = Output(
                uri=uri, sha256=marker.manifest_sha256, kind=manifest.kind, evaluation=manifest.extra.get("evaluation")
            )
        else:
            self._landed(staged, manifest, uri, marker.manifest_sha256, seconds)

    def _overtaken(self) -> bool:
        """Whether to wait no longer for other pods' parts: a graceful checkpoint waits, or the gang has failed."""
        if self._hurry is not None and time.monotonic() > self._hurry:
            return True
        return self._waiting is not None and self._waiting.graceful

    def _landed(self, staged: Staged, manifest: Manifest, uri: str, sha256: str, seconds: float) -> None:
        step = self._own_step = manifest.step
        if staged.graceful:
            self.graceful_step = step
        self._mark_healthy(step)
        self._committed[step] = Kept(step, staged.graceful, manifest.eval_loss)
        self._board.count("checkpoints")
        self._board.saved(
            Checkpoint(
                step=step, uri=uri, sha256=sha256, bytes=manifest.total_bytes, time=datetime.now(UTC), healthy=staged.graceful,
                eval_loss=manifest.eval_loss, save_seconds=round(seconds, 3),
            ),
            seconds,
        )  # fmt: skip
        self._board.well_again()
        self._after_commit()
        if staged.graceful:
            with self._warning("marking a checkpoint healthy"):
                self.tree.mark_healthy(step)
        self.retain()

    def _mark_healthy(self, before: int | None) -> None:
        """Everything committed before this finite step proved healthy."""
        for step, kept in sorted(self._committed.items()):
            if not kept.healthy and (before is None or step < before):
                with self._warning("marking a checkpoint healthy"):
                    self.tree.mark_healthy(step)
                    self._committed[step] = Kept(step, True, kept.eval_loss)
                    self._board.healthy(step)

    def retain(self, *, finished: bool = False) -> None:
        """Remove what need not be kept. What storage does not let us remove stays, with a warning."""
        steps = removable(
            list(self._committed.values()), self._policy.keep, pinned=self._policy.pinned, finished=finished
        )
        for step in steps:
            with self._warning(f"removing the checkpoint of step {step}"):
                self.tree.remove(step)
                self._committed.pop(step, None)
                self._board.removed(step)
        for passed in [step for step in self._passed if step is not None and step < self.committed_step]:
            if passed not in self._policy.pinned:
                with self._warning(f"removing the checkpoint of step {passed}, which was passed over"):
                    self.tree.remove(passed)
                    self._passed.pop(passed)

    @contextlib.contextmanager
    def _warning(self, what: str) -> Iterator[None]:
        try:
            yield
        except FineTuneError as error:
            log.warning("%s failed: %s", what, error)
            self._board.note(f"{what} failed: {error.code}")

    def _manifest(self, staged: Staged, entries: list[FileEntry]) -> Manifest:
        said = staged.facts
        return Manifest(
            job=self._job,
            attempt=self._attempt,
            incarnation=staged.incarnation,
            step=staged.step if staged.step is not None else int(said.get("step") or self._board.step),
            epoch=said.get("epoch"),
            samples=said.get("samples"),
            tokens=said.get("tokens"),
            eval_loss=said.get("evalLoss"),
            graceful=staged.graceful,
            kind=OutputKind(said["outputKind"]) if said.get("outputKind") else None,
            facts=self._facts,
            extra=said.get("extra") or {},
            files=sorted(entries, key=lambda entry: entry.path),
        )

    def _count(self, count: int) -> None:
        self._board.count("uploaded_bytes", count)


def committed_checkpoints(tree: Tree, committed: Iterable[Committed]) -> list[Checkpoint]:
    """Committed checkpoints for the status; those whose manifest is damaged come without size."""
    found = []
    for one in committed:
        manifest = tree.manifest(one)
        found.append(
            Checkpoint(
                step=one.step or 0, uri=tree.uri(one.folder), sha256=one.marker.manifest_sha256, healthy=one.healthy,
                bytes=manifest.total_bytes if manifest else None, eval_loss=manifest.eval_loss if manifest else None,
            )
        )  # fmt: skip
    return found
