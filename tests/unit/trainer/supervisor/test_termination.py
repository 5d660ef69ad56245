"""The termination message: every error of a rank reaches the operator with its code, class, message and hint."""

from __future__ import annotations

from pathlib import Path

import pytest
from finetune_api.errors import ERROR_OF_EXIT_CODE, FineTuneError, InternalError
from finetune_api.exits import EXIT_POLICIES
from finetune_api.names import MAX_TERMINATION_BYTES, ExitCode, FailureClass
from finetune_api.pod import TerminationMessage
from finetune_api.status import Checkpoint, Output, Progress
from finetune_trainer.channel import Channel
from finetune_trainer.failure import RankFailure, classify_error, failure_from_message
from finetune_trainer.supervisor.exit_decision import AttemptFacts, ExitDecision, decide_exit
from finetune_trainer.supervisor.run_state import RunState
from finetune_trainer.supervisor.termination import build_termination_message, write_termination_message

ERROR_TYPES = sorted(ERROR_OF_EXIT_CODE.values(), key=lambda error_type: error_type.exit_code)


def pass_to_operator(exit_decision: ExitDecision, *, step: int = 7, output: Output | None = None) -> TerminationMessage:
    """Return the termination message after it was written and parsed, as the operator gets it."""
    state = RunState()
    state.merge_progress(Progress(step=step))
    state.add_checkpoint(Checkpoint(step=5, uri="s3://b/step-5"))
    message = build_termination_message(exit_decision, state.report(), output=output, start_step=0, node_name="node-1")
    return TerminationMessage.model_validate_json(message.to_json())


@pytest.mark.parametrize("error_type", ERROR_TYPES, ids=[error_type.__name__ for error_type in ERROR_TYPES])
def test_every_error_of_a_rank_is_reported(tmp_path: Path, error_type: type[FineTuneError]) -> None:
    channel = Channel.create_recording(tmp_path, rank=3)
    error, is_origin = classify_error(error_type("Expected", "what was wrong", hint="what to write"))
    channel.report_failure(error, is_origin=is_origin)
    facts = AttemptFacts(rank_failures=[failure_from_message(channel.sent[0])])
    message = pass_to_operator(decide_exit(facts, [], is_saved=False, node_rank=0))
    assert (message.exit_code, message.code, message.message, message.hint) == (
        error_type.exit_code, "Expected", "what was wrong", "what to write"
    )  # fmt: skip
    assert message.class_ is EXIT_POLICIES[error_type.exit_code].failure_class
    assert (message.rank, message.node, message.step, message.committed_step, message.checkpoint) == (3, "node-1", 7, 5, "s3://b/step-5")


@pytest.mark.parametrize(
    ("code", "error_code"), [(ExitCode.PREEMPTED_SAVED, "StoppedSaved"), (ExitCode.PREEMPTED_UNSAVED, "StoppedUnsaved")]
)
def test_a_stop_is_reported_as_preemption(code: ExitCode, error_code: str) -> None:
    message = pass_to_operator(ExitDecision(code))
    assert (message.exit_code, message.code, message.class_, message.origin) == (code, error_code, FailureClass.PREEMPTED, True)
    assert "at step 7" in (message.message or "")


def test_success_has_the_output_and_no_failure() -> None:
    message = pass_to_operator(ExitDecision(ExitCode.OK), output=Output(uri="s3://b/model"))
    assert (message.exit_code, message.class_, message.code) == (0, None, None)
    assert message.output is not None and message.output.uri == "s3://b/model"


def test_a_message_is_cut_to_the_maximum_size_of_the_kubelet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failure = failure_from_message({"exitCode": 70, "code": "TrainerCrashed", "message": "\N{SNOWMAN}" * 5000, "hint": "h" * 5000})
    message = pass_to_operator(ExitDecision(70, failure))
    write_termination_message(message, tmp_path / "termination")
    assert len((tmp_path / "termination").read_bytes()) <= MAX_TERMINATION_BYTES
    write_termination_message(message, tmp_path / "missing" / "termination")
    assert TerminationMessage.model_validate_json(capsys.readouterr().out).code == "TrainerCrashed", "without a termination log the message is printed"


@pytest.mark.parametrize(
    ("step", "start_step", "code", "text"),
    [
        (None, 4, ExitCode.PREEMPTED_SAVED, "stopped on request at step 4, the state is saved"),
        (7, 4, ExitCode.PREEMPTED_UNSAVED, "stopped on request at step 7, the newest steps are not saved"),
    ],
)
def test_a_stop_names_the_newest_step(step: int | None, start_step: int, code: ExitCode, text: str) -> None:
    state = RunState()
    state.merge_progress(Progress(step=step))
    message = build_termination_message(ExitDecision(code), state.report(), output=None, start_step=start_step, node_name="")
    assert (message.message, message.step, message.node) == (text, step, None)
    assert (message.committed_step, message.checkpoint, message.latest_checkpoint) == (None, None, None)
    assert message.time_ns and message.time_ns > 10**18


@pytest.mark.parametrize(("failed_step", "step"), [(None, 7), (0, 0), (3, 3)])
def test_a_failure_names_the_step_and_time_of_the_rank(failed_step: int | None, step: int) -> None:
    failure = RankFailure(InternalError("x", "m"), rank=0, step=failed_step, time_ns=5)
    message = pass_to_operator(ExitDecision(70, failure))
    assert (message.step, message.rank, message.time_ns, message.origin, message.latest_checkpoint) == (step, 0, 5, True, "s3://b/step-5")


@pytest.mark.parametrize(("hint", "text"), [("write x", "Code: wrong (write x)"), (None, "Code: wrong")])
def test_a_failure_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture, hint: str | None, text: str) -> None:
    write_termination_message(TerminationMessage(exit_code=70, code="Code", message="wrong", hint=hint), tmp_path / "log")
    write_termination_message(TerminationMessage(exit_code=0), tmp_path / "log")
    assert caplog.messages == [text]
