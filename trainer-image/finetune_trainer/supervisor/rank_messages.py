"""Applies the messages of ranks to the state of the run.

If a field of a message cannot be read, `finetune_api.base.ReportModel` skips it, and the other fields are used.
"""

from __future__ import annotations

import time
from typing import Any

from finetune_api.status import MemoryAdvice, Metrics, Progress, ResolvedConfig, RunPlan, Stage

from finetune_trainer.failure import failure_from_message
from finetune_trainer.supervisor.exit_decision import AttemptFacts
from finetune_trainer.supervisor.metric_log import MetricLog
from finetune_trainer.supervisor.run_state import RunState
from finetune_trainer.supervisor.staging import Staging

HEARTBEAT_MESSAGE_KINDS = ("heartbeat", "alive", "stage", "staged", "log")
"""Kinds of messages that count as heartbeats."""


class RankMessages:
    """Handles the messages of one pod's ranks. Only local rank 0 reports progress; every rank reports its failures and its files of checkpoints."""

    def __init__(
        self, run_state: RunState, facts: AttemptFacts, staging: Staging, metric_log: MetricLog, incarnation: str
    ) -> None:
        self._state, self._facts, self._staging, self._metric_log = run_state, facts, staging, metric_log
        self._incarnation = incarnation

    def handle(self, message: dict[str, Any]) -> None:
        """Handle one message. Errors: StorageError `StagingFailed` if the final artefact cannot be staged."""
        kind = message.get("kind")
        if kind in HEARTBEAT_MESSAGE_KINDS:
            self._state.record_heartbeat()
        match kind:
            case "note":
                apply_report(self._state, message)
            case "staged":
                self._staging.add_rank_files(message)
            case "finished":
                self._facts.is_output_written = True
                self._state.enter_stage(Stage.UPLOADING)
                self._staging.add_final(message, self._incarnation)
            case "outOfMemory":
                self._state.merge_plan(RunPlan(out_of_memory=MemoryAdvice.model_validate(message["value"])))
            case "failed":
                self._facts.rank_failures.append(failure_from_message(message))
            case "stopping":
                if self._facts.stop_requested_at is None:  # The signal was sent to another pod of the gang.
                    self._facts.stop_requested_at = time.monotonic()
                self._state.enter_stage(Stage.STOPPING, f"at step {message['step']}")
            case "stopped":
                self._facts.stopped_ranks.add(int(message["rank"]))
            case _ if message.get("localRank") == 0:
                self._handle_report(message)

    def _handle_report(self, message: dict[str, Any]) -> None:
        """Handle a report of local rank 0."""
        state = self._state
        match message.get("kind"):
            case "heartbeat":
                state.record_step(int(message["step"]))
            case "progress":
                state.merge_progress(Progress.model_validate(message["value"]))
            case "metrics":
                state.merge_metrics(Metrics.model_validate(message["value"]))
            case "resolved":
                state.merge_resolved(ResolvedConfig.model_validate(message["value"]))
            case "pause":
                state.record_pause(str(message["part"]), float(message["seconds"]))
            case "log":
                self._metric_log.append(message["step"], message["values"])
            case "skipped":
                self._staging.skip_checkpoint(str(message["reason"]), str(message["sentence"]))
            case _:
                apply_report(state, message)


def apply_report(run_state: RunState, message: dict[str, Any]) -> None:
    """Apply a report that every process of a pod may send: its stage, a note or a plan. Messages of other kinds are ignored.

    If this version does not know the reported stage, for example because a later release sent it, the current stage stays.
    """
    match message.get("kind"):
        case "stage":
            stage = message.get("stage")
            run_state.enter_stage(Stage(stage) if stage in list(Stage) else run_state.current_stage, message.get("detail"))
        case "note":
            run_state.add_note(str(message["text"]))
        case "plan":
            run_state.merge_plan(RunPlan.model_validate(message["value"]))
