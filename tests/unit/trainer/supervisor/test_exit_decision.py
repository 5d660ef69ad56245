"""The supervisor decides the exit code of the pod from the facts of the attempt."""

from __future__ import annotations

import pytest
from finetune_api.errors import DataError, DivergedError, FineTuneError, InternalError, PeerError, StorageError
from finetune_api.status import Output, Stage
from finetune_trainer.failure import RankFailure, failure_from_exit_code
from finetune_trainer.supervisor.exit_decision import (
    AttemptFacts,
    StageFailure,
    StageReport,
    decide_exit,
    is_state_saved,
    stop_deadline,
)

DIVERGED_FAILURE = RankFailure(DivergedError("LossNotFinite", "m"), rank=1)
PEER_LOST_FAILURE = RankFailure(PeerError("PeerLost", "m"), rank=0, is_origin=False)
FAILED_STAGES = StageReport([Stage.EVALUATING], StageFailure(Stage.EVALUATING, DataError("DatasetEmpty", "m")))
STALLED_ERROR = PeerError("Stalled", "m")


@pytest.mark.parametrize(
    ("facts", "is_saved", "code", "error_code"),
    [
        (AttemptFacts(output=Output(uri="u"), supervisor_error=STALLED_ERROR, stop_requested_at=1.0, stage_report=StageReport()), False, 0, None),
        (AttemptFacts(output=Output(uri="u"), stop_requested_at=1.0), False, 75, None),
        (AttemptFacts(output=Output(uri="u"), stop_requested_at=1.0, stage_report=StageReport([Stage.EVALUATING])), False, 75, None),
        (AttemptFacts(output=Output(uri="u"), supervisor_error=STALLED_ERROR, stage_report=FAILED_STAGES), False, 65, "DatasetEmpty"),
        (AttemptFacts(stop_requested_at=1.0), True, 75, None),
        (AttemptFacts(stop_requested_at=1.0), False, 76, None),
        (AttemptFacts(stop_requested_at=1.0, rank_failures=[PEER_LOST_FAILURE]), True, 75, None),
        (AttemptFacts(stop_requested_at=1.0, rank_failures=[PEER_LOST_FAILURE, DIVERGED_FAILURE]), True, 72, "LossNotFinite"),
        (AttemptFacts(stop_requested_at=1.0, supervisor_error=StorageError("Gone", "m")), True, 69, "Gone"),
        (AttemptFacts(supervisor_error=DataError("Empty", "m"), rank_failures=[DIVERGED_FAILURE]), False, 65, "Empty"),
        (AttemptFacts(supervisor_error=STALLED_ERROR, rank_failures=[DIVERGED_FAILURE]), False, 72, "LossNotFinite"),
        (AttemptFacts(supervisor_error=STALLED_ERROR, rank_failures=[PEER_LOST_FAILURE]), False, 74, "Stalled"),
        (AttemptFacts(rank_failures=[PEER_LOST_FAILURE, DIVERGED_FAILURE], agent_exit_code=1), False, 72, "LossNotFinite"),
        (AttemptFacts(agent_exit_code=0), False, 70, "NoArtefact"),
        (AttemptFacts(agent_exit_code=-9), False, 74, "AgentKilled"),
        (AttemptFacts(agent_exit_code=1), False, 74, "AgentFailed"),
        (AttemptFacts(agent_exit_code=78), False, 78, "InstallationBroken"),
    ],
    ids=[
        "an-artefact-is-success", "stopped-before-the-stages-began", "stopped-before-a-stage-was-done", "a-failed-stage",
        "stopped-and-saved", "stopped-and-not-saved", "a-lost-peer-does-not-explain-a-stop",
        "a-failure-before-the-stop", "storage-failed-during-the-stop", "the-supervisor's-own-failure",
        "a-rank's-own-failure-explains-a-stall", "a-stall", "the-rank-that-failed-first", "no-artefact", "agent-killed", "agent-failed", "agent-without-torch",
    ],
)  # fmt: skip
def test_the_facts_of_the_attempt_decide_the_exit_code(facts: AttemptFacts, is_saved: bool, code: int, error_code: str | None) -> None:
    decision = decide_exit(facts, [], is_saved=is_saved, node_rank=0)
    assert (decision.exit_code, decision.failure.error.code if decision.failure else None) == (code, error_code)


def test_an_exit_code_counts_only_for_ranks_that_reported_no_failure() -> None:
    killed_failure = failure_from_exit_code(1, -9)
    silent_decision = decide_exit(AttemptFacts(rank_failures=[PEER_LOST_FAILURE]), [killed_failure], is_saved=False, node_rank=0)
    assert silent_decision.failure is not None and silent_decision.failure.error.code == "RankKilled"
    reported_decision = decide_exit(AttemptFacts(rank_failures=[DIVERGED_FAILURE]), [killed_failure], is_saved=False, node_rank=0)
    assert reported_decision.failure is DIVERGED_FAILURE


def test_only_rank_0s_pod_needs_an_artefact_for_success() -> None:
    facts = AttemptFacts(agent_exit_code=0)
    assert decide_exit(facts, [], is_saved=False, node_rank=1).exit_code == 0
    supervisor_error: FineTuneError = InternalError("x", "m")
    assert decide_exit(AttemptFacts(agent_exit_code=0, supervisor_error=supervisor_error), [], is_saved=False, node_rank=1).exit_code == 70


@pytest.mark.parametrize(
    ("step", "committed_step", "uploaded_step", "node_rank", "stopped_ranks", "is_deadline_passed", "is_saved"),
    [
        (5, 0, 0, 0, set(), False, True),
        (9, 9, 0, 0, set(), False, True),
        (9, 8, 9, 0, {0}, False, False),
        (9, 0, 9, 1, {1}, False, True),
        (9, 0, 8, 1, {1}, False, False),
        (9, 0, 9, 1, set(), False, False),
        (9, 0, 9, 1, {1}, True, False),
    ],
    ids=["no-new-step", "committed", "not-committed", "uploaded", "not-uploaded", "rank-did-not-stop", "too-late"],
)
def test_a_stop_is_saved_only_if_every_step_is_stored(
    step: int, committed_step: int, uploaded_step: int, node_rank: int, stopped_ranks: set[int], is_deadline_passed: bool, is_saved: bool
) -> None:
    facts = AttemptFacts(start_step=5, stopped_ranks=stopped_ranks, is_deadline_passed=is_deadline_passed)
    result = is_state_saved(facts, step=step, committed_step=committed_step, uploaded_step=uploaded_step, node_rank=node_rank)
    assert result == is_saved


@pytest.mark.parametrize(("grace_seconds", "deadline"), [(10, 109.0), (30, 127.0), (300, 395.0)])
def test_the_deadline_leaves_time_for_the_termination_message(grace_seconds: float, deadline: float) -> None:
    assert stop_deadline(100.0, grace_seconds) == deadline


@pytest.mark.parametrize(
    ("agent_code", "node_rank", "code", "text"),
    [
        (-9, 0, 74, "was killed by signal 9"), (-1, 1, 74, "was killed by signal 1"), (1, 1, 74, "ended with 1"), (0, 0, 70, "without a final artefact"),
        (None, 1, 74, "ended with None"),
    ],
)  # fmt: skip
def test_the_message_says_how_the_agent_ended(agent_code: int | None, node_rank: int, code: int, text: str) -> None:
    decision = decide_exit(AttemptFacts(agent_exit_code=agent_code), [], is_saved=False, node_rank=node_rank)
    assert decision.exit_code == code and decision.failure is not None and text in decision.failure.error.message
    assert not decision.failure.is_reported


@pytest.mark.parametrize(("step", "committed_step", "is_saved"), [(0, 0, True), (1, 0, False), (1, 1, True), (1, 2, True)])
def test_steps_of_an_attempt_from_zero_are_saved_if_they_are_committed(step: int, committed_step: int, is_saved: bool) -> None:
    assert is_state_saved(AttemptFacts(), step=step, committed_step=committed_step, uploaded_step=0, node_rank=0) is is_saved


def test_files_uploaded_beyond_the_agreed_step_are_saved() -> None:
    facts = AttemptFacts(stopped_ranks={1})
    assert is_state_saved(facts, step=9, committed_step=0, uploaded_step=10, node_rank=1)


@pytest.mark.parametrize(("grace_seconds", "deadline"), [(49, 144.1), (50, 145.0), (51, 146.0)])
def test_the_margin_for_the_termination_message_is_at_most_five_seconds(grace_seconds: float, deadline: float) -> None:
    assert stop_deadline(100.0, grace_seconds) == pytest.approx(deadline)
