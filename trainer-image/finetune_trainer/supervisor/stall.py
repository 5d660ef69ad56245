"""Detects a run without progress. Without this check, a stalled run would occupy its GPUs forever and report no error.

In the stages in `WATCHED_STAGES`, such as training, a rank must send a heartbeat (a step, a micro-step, an evaluation batch) within the
stall timeout. The timeout is `policy.stallTimeoutSeconds`. The default is twenty times the median step and at least ten
minutes; it applies from the first measured step.

Loading and tokenising take an unknown time and send no heartbeats. In the stage `loading`, the run counts as stalled if the processes of the ranks
neither compute nor read for the stall timeout (`work.WorkWatch`). In a job of several pods, a pod can also be idle because it waits for another pod. A
run of several pods therefore counts as stalled only if a thread is blocked in the kernel, for example by a dead file server. While the ranks wait for
the start of a vLLM server, they neither compute nor read, so the time limit for the start of the server is added to the stall timeout.

Before a stalled attempt ends, every rank writes the stacks of its threads to the log.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from finetune_api.errors import PeerError
from finetune_api.status import Stage

from finetune_trainer.supervisor.run_state import RunState
from finetune_trainer.supervisor.work import WorkWatch

MIN_TIMEOUT_SECONDS = 600.0
TIMEOUT_IN_MEDIAN_STEPS = 20.0
STACK_DUMP_SECONDS = 1.0
WINDOWS_PER_TIMEOUT = 4
"""Number of measurements of the ranks' work within one stall timeout."""
RANK_COMMANDS = {b"train", b"stage"}
"""Commands of `finetune-trainer` whose processes write their stacks on a signal: ranks and stages after training."""
WATCHED_STAGES = (
    Stage.TRAINING, Stage.EVALUATING, Stage.COMPARING, Stage.MERGING, Stage.VERIFYING, Stage.BENCHMARKING, Stage.STOPPING,
)  # fmt: skip


class StallWatch:
    """Compares the time since the last heartbeat with the stall timeout."""

    def __init__(
        self, run_state: RunState, timeout_seconds: float | None, *, pod_count: int = 1, longest_wait_seconds: float = 0.0, work_watch: WorkWatch | None = None
    ) -> None:
        """`pod_count`: number of pods of the job. `longest_wait_seconds`: longest time for which ranks may be idle before training, because
        they wait for another process such as a vLLM server.

        `work_watch`: measures the work of the ranks.
        """
        self._state, self._timeout_seconds, self._pod_count = run_state, timeout_seconds, pod_count
        self._longest_wait_seconds = longest_wait_seconds
        self._start_time = time.monotonic()
        self._work_watch = work_watch or WorkWatch()

    def timeout_seconds(self) -> float:
        """Return the current stall timeout: the longest time without a heartbeat."""
        if self._timeout_seconds is not None:
            return float(self._timeout_seconds)
        return max(MIN_TIMEOUT_SECONDS, TIMEOUT_IN_MEDIAN_STEPS * (self._state.median_step_seconds() or 0.0))

    def stall_error(self) -> PeerError | None:
        """Return an error if the run has stalled, otherwise None."""
        if self._state.current_stage is Stage.LOADING:
            return self._find_loading_stall()
        self._work_watch.restart()
        has_no_timeout = self._timeout_seconds is None and self._state.median_step_seconds() is None
        if self._state.current_stage not in WATCHED_STAGES or has_no_timeout:
            return None
        seconds_since_heartbeat = self._state.seconds_since_heartbeat()
        silent_seconds = time.monotonic() - self._start_time if seconds_since_heartbeat is None else seconds_since_heartbeat
        if silent_seconds <= self.timeout_seconds():
            return None
        return PeerError(
            "Stalled", f"no progress for {silent_seconds:.0f} s after step {self._state.step}; a step takes {self._state.median_step_seconds() or 0:.2f} s",
            hint="the stacks of all ranks are in the pod's log; raise policy.stallTimeoutSeconds if steps may take that long",
        )  # fmt: skip

    def _find_loading_stall(self) -> PeerError | None:
        """Return an error if ranks that load have neither computed nor read for the stall timeout, otherwise None."""
        timeout_seconds = self.timeout_seconds() + self._longest_wait_seconds
        idle_seconds = self._work_watch.measure_idle_seconds(timeout_seconds / WINDOWS_PER_TIMEOUT)
        if idle_seconds <= timeout_seconds or (self._pod_count > 1 and not self._work_watch.was_blocked):
            return None
        blocked_note = "; a thread waits for a disk or a file server" if self._work_watch.was_blocked else ""
        return PeerError(
            "Stalled", f"no progress for {idle_seconds:.0f} s while loading model and data: the ranks neither compute nor read{blocked_note}",
            hint="the stacks of all ranks are in the pod's log; check the mounted volumes and the network, or raise policy.stallTimeoutSeconds",
        )  # fmt: skip


def dump_rank_stacks(pids: list[int]) -> None:
    """Make the ranks among these processes write the stacks of their threads to the log, and wait `STACK_DUMP_SECONDS`."""
    for pid in pids:
        with contextlib.suppress(OSError):
            if RANK_COMMANDS & set(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")):
                os.kill(pid, signal.SIGUSR1)
    time.sleep(STACK_DUMP_SECONDS)
