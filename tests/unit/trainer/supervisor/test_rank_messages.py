"""What each type of message from a rank changes in the supervisor. If one field of a message cannot be read, the other fields are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from finetune_api.status import Stage
from finetune_trainer.failure import failure_from_message
from finetune_trainer.supervisor.exit_decision import AttemptFacts
from finetune_trainer.supervisor.metric_log import MetricLog
from finetune_trainer.supervisor.rank_messages import RankMessages, apply_report
from finetune_trainer.supervisor.run_state import RunState
from finetune_trainer.supervisor.server import format_metrics
from finetune_trainer.supervisor.staging import Staging


class Pod:
    def __init__(self, work: Path) -> None:
        self.state, self.facts = RunState(), AttemptFacts()
        self.messages = RankMessages(
            self.state, self.facts, Staging(work, self.state, rank_count=1), MetricLog(self.state, "a1-0"), "a1-0"
        )

    def receive(self, kind: str, local_rank: int = 0, **fields: Any) -> None:
        self.messages.handle({"kind": kind, "rank": local_rank, "localRank": local_rank, **fields})


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    return Pod(tmp_path)


def test_only_local_rank_0_reports_progress(pod: Pod) -> None:
    pod.receive("progress", local_rank=1, value={"step": 7})
    pod.receive("heartbeat", local_rank=1, step=7)
    assert pod.state.step == 0 and pod.state.seconds_since_heartbeat() is not None
    pod.receive("progress", value={"step": 3, "totalSteps": 9})
    assert pod.state.report().progress.display == "3/9 (33%)"


@pytest.mark.parametrize(
    ("value", "loss", "rate"),
    [
        ({"trainLoss": 1.5, "learningRate": "fast"}, 1.5, None),
        ({"trainLoss": 1.5, "ofALaterVersion": [1]}, 1.5, None),
        ({"trainLoss": float("nan"), "learningRate": 0.5}, None, 0.5),
    ],
    ids=["wrong-type", "unknown-field", "not-finite"],
)
def test_an_unreadable_field_does_not_discard_the_other_fields(
    pod: Pod, value: Any, loss: float | None, rate: float | None
) -> None:
    pod.receive("metrics", value=value)
    metrics = pod.state.report().metrics
    assert (metrics.train_loss, metrics.learning_rate) == (loss, rate)


def test_an_unknown_stage_keeps_the_current_stage_and_shows_its_detail(pod: Pod) -> None:
    pod.receive("stage", stage="training")
    pod.receive("stage", stage="distilling", detail="teacher 1 of 2")
    report = pod.state.report()
    assert (report.stage, report.detail) == (Stage.TRAINING, "teacher 1 of 2")


def test_pauses_do_not_count_as_time_of_the_steps(pod: Pod) -> None:
    pod.receive("stage", stage="training")
    for part in ("evaluation", "saving", "evaluation"):
        pod.receive("pause", part=part, seconds=1e-9)
    assert pod.state._pauses == {"evaluation": 2e-9, "saving": 1e-9}


def test_reports_that_every_process_may_send_are_applied() -> None:
    state = RunState()
    for message in (
        {"kind": "stage", "stage": "merging", "detail": "1 of 2 layers"}, {"kind": "note", "text": "a note"}, {"kind": "note", "text": "a note"},
        {"kind": "plan", "value": {"measured": {"memoryBytes": 5}, "ofALaterVersion": 1}}, {"kind": "ofALaterVersion"}, {},
    ):  # fmt: skip
        apply_report(state, message)
    report = state.report()
    assert (report.stage, report.detail, report.resolved.notes) == (Stage.MERGING, "1 of 2 layers", ["a note"])
    assert report.plan is not None and report.plan.to_wire() == {"measured": {"memoryBytes": 5}}


def test_each_rank_may_send_advice_of_the_memory_plan(pod: Pod) -> None:
    value = {"neededBytes": 3, "availableBytes": 2, "plannedBytes": 1, "batchSizePerDevice": 4, "ofALaterVersion": 1}
    pod.receive("plan", value={"measured": {"memoryBytes": 5}})
    pod.receive("outOfMemory", local_rank=1, value=value)
    plan = pod.state.report().plan
    assert plan is not None and plan.measured is not None and plan.measured.memory_bytes == 5
    assert plan.out_of_memory is not None and (plan.out_of_memory.needed_bytes, plan.out_of_memory.batch_size_per_device) == (3, 4)


def test_a_failure_with_unreadable_fields_still_names_the_cause() -> None:
    failure = failure_from_message(
        {
            "kind": "failed",
            "exitCode": "?",
            "code": "DatasetEmpty",
            "message": "no row",
            "failureClass": "Weather",
            "timeNs": None,
            "rank": "x",
        }
    )
    assert (failure.error.code, failure.error.message, failure.error.exit_code, failure.rank) == (
        "DatasetEmpty",
        "no row",
        70,
        None,
    )
    failure_with_exit_code = failure_from_message(
        {"exitCode": 65, "code": "DatasetEmpty", "message": "no row", "failureClass": "Weather"}
    )
    assert (failure_with_exit_code.error.exit_code, failure_with_exit_code.error.failure_class) == (65, "Data")


def test_a_stop_request_of_another_pod_also_stops_this_pod(pod: Pod) -> None:
    pod.receive("stopping", local_rank=1, step=12)
    assert pod.facts.stop_requested_at is not None and pod.state.current_stage is Stage.STOPPING


def test_the_first_stop_request_decides_the_deadline(pod: Pod) -> None:
    pod.facts.stop_requested_at = 5.0
    pod.receive("stopping", local_rank=1, step=12)
    pod.receive("stopped", local_rank=1)
    assert (pod.facts.stop_requested_at, pod.facts.stopped_ranks, pod.state.report().detail) == (5.0, {1}, "at step 12")


@pytest.mark.parametrize(("kind", "is_heartbeat"), [("alive", True), ("heartbeat", True), ("note", False), ("metrics", False)])
def test_only_messages_that_show_progress_are_heartbeats(pod: Pod, kind: str, is_heartbeat: bool) -> None:
    pod.receive(kind, step=1, text="x", value={})
    assert (pod.state.seconds_since_heartbeat() is not None) is is_heartbeat


def test_an_output_on_the_pods_disk_is_uploaded(pod: Pod) -> None:
    pod.receive("finished", local_rank=1, folder="unused")
    assert pod.facts.is_output_written and pod.state.current_stage is Stage.UPLOADING


def test_the_times_of_a_log_line_are_stored_but_are_not_metrics(pod: Pod) -> None:
    pod.receive("log", step=3, values={"loss": 1.5, "unix_time": 1.7e9, "training_seconds": 4.5})
    stored_lines = pod.messages._metric_log._lines
    assert stored_lines == ['{"step": 3, "loss": 1.5, "unix_time": 1700000000.0, "training_seconds": 4.5}']
    metrics = format_metrics(pod.state)
    assert "unix_time" not in metrics and "training_seconds" not in metrics
