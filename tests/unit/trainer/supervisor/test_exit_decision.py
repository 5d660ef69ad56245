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
    ("facts", "saved", "code", "error_code"),
    [
        (AttemptFacts(output=Output(uri="u"), error=STALLED_ERROR, stop_requested_at=1.0, stages=StageReport()), False, 0, None),
        (AttemptFacts(output=Output(uri="u"), stop_requested_at=1.0), False, 75, None),
        (AttemptFacts(output=Output(uri="u"), stop_requested_at=1.0, stages=StageReport([Stage.EVALUATING])), False, 75, None),
        (AttemptFacts(output=Output(uri="u"), error=STALLED_ERROR, stages=FAILED_STAGES), False, 65, "DatasetEmpty"),
        (AttemptFacts(stop_requested_at=1.0), True, 75, None),
        (AttemptFacts(stop_requested_at=1.0), False, 76, None),
        (AttemptFacts(stop_requested_at=1.0, rank_failures=[PEER_LOST_FAILURE]), True, 75, None),
        (AttemptFacts(stop_requested_at=1.0, rank_failures=[PEER_LOST_FAILURE, DIVERGED_FAILURE]), True, 72, "LossNotFinite"),
        (AttemptFacts(stop_requested_at=1.0, error=StorageError("Gone", "m")), True, 69, "Gone"),
        (AttemptFacts(error=DataError("Empty", "m"), rank_failures=[DIVERGED_FAILURE]), False, 65, "Empty"),
        (AttemptFacts(error=STALLED_ERROR, rank_failures=[DIVERGED_FAILURE]), False, 72, "LossNotFinite"),
        (AttemptFacts(error=STALLED_ERROR, rank_failures=[PEER_LOST_FAILURE]), False, 74, "Stalled"),
        (AttemptFacts(rank_failures=[PEER_LOST_FAILURE, DIVERGED_FAILURE], agent_code=1), False, 72, "LossNotFinite"),
        (AttemptFacts(agent_code=0), False, 70, "NoArtefact"),
        (AttemptFacts(agent_code=-9), False, 74, "AgentKilled"),
        (AttemptFacts(agent_code=1), False, 74, "AgentFailed"),
        (AttemptFacts(agent_code=78), False, 78, "InstallationBroken"),
    ],
    ids=[
        "an-artefact-is-success", "stopped-before-the-stages-began", "stopped-before-a-stage-was-done", "a-failed-stage",
        "stopped-and-saved", "stopped-and-not-saved", "a-lost-peer-does-not-explain-a-stop",
        "a-failure-before-the-stop", "storage-failed-during-the-stop", "the-supervisor's-own-failure",
        "a-rank's-own-failure-explains-a-stall", "a-stall", "the-rank-that-failed-first", "no-artefact", "agent-killed", "agent-failed", "agent-without-torch",
    ],
)  # fmt: skip
def test_facts_decide_the_exit_code(facts: AttemptFacts, saved: bool, code: int, error_code: str | None) -> None:
    decided = decide_exit(facts, [], is_saved=saved, node_rank=0)
    assert (decided.code, decided.failure.error.code if decided.failure else None) == (code, error_code)


def test_an_exit_code_explains_only_ranks_that_reported_nothing() -> None:
    killed = failure_from_exit_code(1, -9)
    silent = decide_exit(AttemptFacts(rank_failures=[PEER_LOST_FAILURE]), [killed], is_saved=False, node_rank=0)
    assert silent.failure is not None and silent.failure.error.code == "RankKilled"
    reported = decide_exit(AttemptFacts(rank_failures=[DIVERGED_FAILURE]), [killed], is_saved=False, node_rank=0)
    assert reported.failure is DIVERGED_FAILURE


def test_only_rank_0s_pod_needs_an_artefact_for_success() -> None:
    facts = AttemptFacts(agent_code=0)
    assert decide_exit(facts, [], is_saved=False, node_rank=1).code == 0
    failed: FineTuneError = InternalError("x", "m")
    assert decide_exit(AttemptFacts(agent_code=0, error=failed), [], is_saved=False, node_rank=1).code == 70


@pytest.mark.parametrize(
    ("step", "committed", "uploaded", "node_rank", "stopped", "too_late", "saved"),
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
    step: int, committed: int, uploaded: int, node_rank: int, stopped: set[int], too_late: bool, saved: bool
) -> None:
    facts = AttemptFacts(start_step=5, stopped_ranks=stopped, deadline_passed=too_late)
    result = is_state_saved(facts, step=step, committed_step=committed, uploaded_step=uploaded, node_rank=node_rank)
    assert result == saved


@pytest.mark.parametrize(("grace", "deadline"), [(10, 109.0), (30, 127.0), (300, 395.0)])
def test_the_deadline_leaves_time_for_the_termination_message(grace: float, deadline: float) -> None:
    assert stop_deadline(100.0, grace) == deadline


@pytest.mark.parametrize(
    ("agent_code", "node_rank", "code", "text"),
    [
        (-9, 0, 74, "was killed by signal 9"), (-1, 1, 74, "was killed by signal 1"), (1, 1, 74, "ended with 1"), (0, 0, 70, "without a final artefact"),
        (None, 1, 74, "ended with None"),
    ],
)  # fmt: skip
def test_the_end_of_the_agent_is_named(agent_code: int | None, node_rank: int, code: int, text: str) -> None:
    decided = decide_exit(AttemptFacts(agent_code=agent_code), [], is_saved=False, node_rank=node_rank)
    assert decided.code == code and decided.failure is not None and text in decided.failure.error.message
    assert not decided.failure.is_reported


@pytest.mark.parametrize(("step", "committed", "is_saved"), [(0, 0, True), (1, 0, False), (1, 1, True), (1, 2, True)])
def test_an_attempt_from_zero_has_saved_what_it_committed(step: int, committed: int, is_saved: bool) -> None:
    assert is_state_saved(AttemptFacts(), step=step, committed_step=committed, uploaded_step=0, node_rank=0) is is_saved


def test_files_uploaded_beyond_the_agreed_step_are_saved() -> None:
    facts = AttemptFacts(stopped_ranks={1})
    assert is_state_saved(facts, step=9, committed_step=0, uploaded_step=10, node_rank=1)


@pytest.mark.parametrize(("grace", "deadline"), [(49, 144.1), (50, 145.0), (51, 146.0)])
def test_the_margin_for_the_termination_message_is_at_most_five_seconds(grace: float, deadline: float) -> None:
    assert stop_deadline(100.0, grace) == pytest.approx(deadline)
