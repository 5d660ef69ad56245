"""A run that does nothing is worse than one that fails: it holds GPUs and tells nobody.

After the first steps, a pod in training must show a sign of life (a step, a micro-step, an evaluation batch) within the stall
timeout: what the spec says (from the beginning of training), else twenty times the median step and never less than ten minutes. Before
that nothing is watched here: loading and tokenising take what they take, and collectives have time limits of their own. Before the attempt
is ended every rank is asked for the stacks of its threads.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from finetune_api.errors import PeerError
from finetune_api.status import Stage

from finetune_trainer.supervisor.board import Board

LEAST_SECONDS = 600.0
MEDIANS = 20.0
DUMP_SECONDS = 1.0
WATCHED = (Stage.TRAINING, Stage.EVALUATING, Stage.STOPPING)


class StallWatch:
    """Knows when the last sign of life came and how long it may take."""

    def __init__(self, board: Board, timeout: float | None) -> None:
        self._board, self._timeout = board, timeout
        self._began = time.monotonic()

    def sign_of_life(self) -> None:
        """Something moved."""
        self._board.alive()

    def allowed(self) -> float:
        """Seconds without a sign of life that are allowed now."""
        if self._timeout is not None:
            return float(self._timeout)
        return max(LEAST_SECONDS, MEDIANS * (self._board.median_step() or 0.0))

    def stalled(self) -> PeerError | None:
        """The failure, if the run stalls."""
        if self._board.current_stage not in WATCHED or (self._timeout is None and self._board.median_step() is None):
            return None
        since = self._board.seconds_since_heartbeat()
        silent = time.monotonic() - self._began if since is None else since
        if silent <= self.allowed():
            return None
        return PeerError(
            "Stalled", f"no step for {silent:.0f} s after step {self._board.step}; a step takes {self._board.median_step() or 0:.2f} s",
            hint="the stacks of all ranks are in the pod's log; raise policy.stallTimeoutSeconds if steps may take that long",
        )  # fmt: skip

    def dump_stacks(self, pids: list[int]) -> None:
        """Ask ranks for their threads' stacks, and give them a moment to write them."""
        for pid in pids:
            with contextlib.suppress(OSError):
                if b"train" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                    os.kill(pid, signal.SIGUSR1)
        time.sleep(DUMP_SECONDS)
