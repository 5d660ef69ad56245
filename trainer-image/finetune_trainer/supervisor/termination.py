"""Builds and writes the termination message: the summary that the operator reads after the pod has ended."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from finetune_api.names import ExitCode, FailureClass
from finetune_api.pod import ProgressReport, TerminationMessage
from finetune_api.status import Output

from finetune_trainer.supervisor.exit_decision import ExitDecision

log = logging.getLogger(__name__)


def build_termination_message(
    exit_decision: ExitDecision, report: ProgressReport, *, output: Output | None, start_step: int, node_name: str
) -> TerminationMessage:
    """Return the termination message for an exit decision. `start_step`: the step from which this incarnation started."""
    newest_checkpoint = report.checkpoints[0] if report.checkpoints else None
    common_fields: dict[str, Any] = {
        "exit_code": int(exit_decision.exit_code), "node": node_name or None, "step": report.progress.step,
        "committed_step": newest_checkpoint.step if newest_checkpoint else None, "checkpoint": newest_checkpoint.uri if newest_checkpoint else None,
        "latest_checkpoint": newest_checkpoint.uri if newest_checkpoint else None, "resumed_from_step": report.resumed_from_step,
        "progress": report.progress, "metrics": report.metrics, "checkpoints": report.checkpoints, "resolved": report.resolved,
        "plan": report.plan, "time_use": report.time_use,
        "output": output, "evaluation": report.evaluation, "stage": exit_decision.stage,
    }  # fmt: skip
    if exit_decision.exit_code == ExitCode.OK:
        return TerminationMessage(**common_fields)
    failure = exit_decision.failure
    if failure is None:
        is_saved = exit_decision.exit_code == ExitCode.PREEMPTED_SAVED
        location = "after training" if output is not None else f"at step {report.progress.step or start_step}"
        return TerminationMessage(
            **common_fields, class_=FailureClass.PREEMPTED, code="StoppedSaved" if is_saved else "StoppedUnsaved",
            message=f"stopped on request {location}, " + ("the state is saved" if is_saved else "the newest steps are not saved"),
            origin=True, time_ns=time.time_ns(),
        )  # fmt: skip
    error = failure.error
    common_fields |= {"rank": failure.rank, "step": failure.step if failure.step is not None else common_fields["step"]}
    return TerminationMessage(
        **common_fields, class_=error.failure_class, code=error.code, message=error.message, hint=error.hint,
        origin=failure.is_origin, time_ns=failure.time_ns or time.time_ns(),
    )  # fmt: skip


def write_termination_message(message: TerminationMessage, path: Path) -> None:
    """Write the message to the container's termination log, or print the message if the log cannot be written (local runs)."""
    if message.message:
        log.error("%s: %s%s", message.code, message.message, f" ({message.hint})" if message.hint else "")
    try:
        path.write_text(message.to_json())
    except OSError:
        print(message.to_json(), flush=True)
