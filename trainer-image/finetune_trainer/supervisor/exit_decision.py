"""Decides the exit code of a pod. The decision depends only on recorded facts; this module does not access processes, storage or the clock.

After the final artefact is committed, only the stages after training can fail. After a requested stop, the pod exits with 75 or 76. In all other
cases, the root cause of the failures determines the exit code.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from finetune_api.errors import FineTuneError, InstallationBrokenError, InternalError, PeerError
from finetune_api.names import ExitCode
from finetune_api.status import Output, Stage

from finetune_trainer.failure import RankFailure, choose_root_cause

MAX_GRACE_MARGIN_SECONDS = 5.0
GRACE_MARGIN_FRACTION = 0.1
"""Fraction of the grace period that is reserved for the termination message, at most `MAX_GRACE_MARGIN_SECONDS`."""


@dataclass(frozen=True)
class StageFailure:
    """The failure of a stage after training."""

    stage: Stage
    error: FineTuneError


@dataclass
class StageReport:
    """The results of the stages after training in this pod."""

    open_stages: list[Stage] = field(default_factory=list)
    """Planned stages that are not finished."""
    failure: StageFailure | None = None
    output: Output | None = None
    """The committed model, including fields that the stages have added."""


@dataclass
class AttemptFacts:
    """Facts about this pod's attempt from which `decide_exit` chooses the exit code."""

    supervisor_error: FineTuneError | None = None
    """The supervisor's own failure: preparation, storage or a stall."""
    rank_failures: list[RankFailure] = field(default_factory=list)
    """Failures that ranks reported."""
    stop_requested_at: float | None = None
    """Monotonic time at which this pod received SIGTERM, or learned that another pod of the gang received SIGTERM."""
    is_ended_by_user: bool = False
    """Whether the stop was requested with Ctrl-C. After Ctrl-C, no other attempt follows."""
    stopped_ranks: set[int] = field(default_factory=set)
    is_output_written: bool = False
    """Whether rank 0 has written the final artefact to the pod's disk."""
    is_deadline_passed: bool = False
    """Whether the grace period has ended, or the rest of it is too short for another checkpoint."""
    agent_exit_code: int | None = None
    output: Output | None = None
    """The committed final artefact."""
    stage_report: StageReport | None = None
    """The results of the stages after training. None if the stages have not begun in this pod, or if another pod runs the stages."""
    start_step: int = 0
    """Step that this incarnation started from."""


@dataclass(frozen=True)
class ExitDecision:
    """The exit code of a pod, and the failure that caused it. After success or a requested stop, there is no failure."""

    exit_code: int
    failure: RankFailure | None = None
    stage: Stage | None = None
    """The stage after training that failed."""


def decide_exit(facts: AttemptFacts, exit_code_failures: list[RankFailure], *, is_saved: bool, node_rank: int) -> ExitDecision:
    """Decide how this pod exits. `exit_code_failures`: failures that are known only from exit codes; `is_saved`: the result of `is_state_saved`."""
    if facts.output is not None:
        return _exit_after_commit(facts, node_rank)
    if facts.supervisor_error is None and facts.stop_requested_at is not None:
        return _exit_after_stop(facts, is_saved)
    failure = _find_root_cause(facts, exit_code_failures)
    if failure is None and node_rank > 0 and facts.agent_exit_code == 0:
        return ExitDecision(ExitCode.OK)  # Rank 0's pod commits the final artefact.
    if failure is None:
        failure = RankFailure(_build_agent_error(facts.agent_exit_code), is_reported=False)
    return ExitDecision(int(failure.error.exit_code), failure)


def _exit_after_commit(facts: AttemptFacts, node_rank: int) -> ExitDecision:
    """Return the exit of a pod whose model is committed: only the stages after training can fail. After a stop, the next attempt runs the open stages."""
    if facts.stage_report is None:  # The stages have not begun in this pod, because the stop was requested before the committed model was found.
        return ExitDecision(ExitCode.OK if node_rank > 0 else ExitCode.PREEMPTED_SAVED)
    failure = facts.stage_report.failure
    if failure is not None:
        return ExitDecision(int(failure.error.exit_code), RankFailure(failure.error), failure.stage)
    return ExitDecision(ExitCode.PREEMPTED_SAVED if facts.stage_report.open_stages else ExitCode.OK)


def _exit_after_stop(facts: AttemptFacts, is_saved: bool) -> ExitDecision:
    """Return the exit after a stop request.

    If a failure began in a rank, its exit code is returned; otherwise 75 if the trained steps are saved, or 76 if they are not.
    """
    rank_failure = choose_root_cause(failure for failure in facts.rank_failures if failure.is_origin)
    if rank_failure is not None:
        return ExitDecision(int(rank_failure.error.exit_code), rank_failure)
    return ExitDecision(ExitCode.PREEMPTED_SAVED if is_saved else ExitCode.PREEMPTED_UNSAVED)


def _find_root_cause(facts: AttemptFacts, exit_code_failures: list[RankFailure]) -> RankFailure | None:
    """Return the supervisor's failure or, if there is none, the root cause among the ranks.

    A failure that began in a rank takes precedence over a PeerError of the supervisor.
    """
    if facts.supervisor_error is None:
        reported_ranks = {failure.rank for failure in facts.rank_failures}
        unreported_failures = [failure for failure in exit_code_failures if failure.rank not in reported_ranks]
        return choose_root_cause([*facts.rank_failures, *unreported_failures])
    rank_failure = choose_root_cause(failure for failure in facts.rank_failures if failure.is_origin)
    return rank_failure if rank_failure is not None and isinstance(facts.supervisor_error, PeerError) else RankFailure(facts.supervisor_error)


def _build_agent_error(agent_exit_code: int | None) -> FineTuneError:
    if agent_exit_code is not None and agent_exit_code < 0:
        return PeerError("AgentKilled", f"the torchelastic agent was killed by signal {-agent_exit_code}")
    if agent_exit_code == ExitCode.INSTALLATION_BROKEN:
        return InstallationBrokenError(
            "InstallationBroken", "the trainer image lacks a part that the torchelastic agent needs", hint="the pod's log names the missing part"
        )  # fmt: skip
    if agent_exit_code == 0:
        return InternalError("NoArtefact", "all ranks ended without an error and without a final artefact")
    return PeerError(
        "AgentFailed", f"the torchelastic agent ended with {agent_exit_code} before the ranks reported a reason", hint="see the pod's log"
    )  # fmt: skip


def is_state_saved(facts: AttemptFacts, *, step: int, committed_step: int, uploaded_step: int, node_rank: int) -> bool:
    """Whether every step up to `step` is saved when the pod stops.

    In rank 0's pod, and after the deadline in every pod, the step is saved if `committed_step` has reached it. The other pods only upload their
    files. There, the step is saved if `uploaded_step` has reached it and the ranks have stopped.
    """
    if step <= facts.start_step:
        return True
    if node_rank == 0 or facts.is_deadline_passed:
        return committed_step >= step
    return bool(facts.stopped_ranks) and uploaded_step >= step


def stop_deadline(stop_requested_at: float, grace_seconds: float) -> float:
    """Return the monotonic time by which a stopped pod must have written its termination message, shortly before the kubelet kills the pod."""
    return stop_requested_at + grace_seconds - min(MAX_GRACE_MARGIN_SECONDS, GRACE_MARGIN_FRACTION * grace_seconds)
