"""The status that the operator computes from the facts about a job and from the plan for it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from finetune_api.names import Condition, Phase, Reason
from finetune_api.pod import TerminationMessage
from finetune_api.status import Attempt, FineTuneJobStatus, format_rfc3339, select_immediate_fields
from finetune_operator.decide import decide
from finetune_operator.facts import Facts
from finetune_operator.plan import ActionResult
from finetune_operator.policies.blocking import BlockingCondition
from finetune_operator.report import compute_status

from tests.unit.operator.samples import at, condition, end_pod, facts, job, pod, report, spec, status

RUNNING_STATUS = {
    "attempt": 1,
    "startTime": "2026-11-21T12:00:00Z",
    "attempts": [{"number": 1, "startTime": "2026-11-21T12:00:00Z"}],
}


def compute_status_of(job_facts: Facts, result: ActionResult | None = None) -> FineTuneJobStatus:
    return compute_status(job_facts, decide(job_facts), result or ActionResult())


def compute_running_status(old_status: FineTuneJobStatus | None = None, **reported: Any) -> FineTuneJobStatus:
    """Return the status of a running job whose pod reports these values."""
    job_facts = facts(status=old_status or status(**RUNNING_STATUS), jobs=[job()], pods=[pod()], last_report=report(**reported))
    return compute_status_of(job_facts)


def test_first_status_of_a_new_job() -> None:
    new_status = compute_status_of(facts(), ActionResult(created_job=job()))
    assert (new_status.phase, new_status.attempt, new_status.restarts, new_status.observed_generation) == (Phase.STARTING, 1, 0, 1)
    assert new_status.workers is not None and new_status.workers.display == "0/1"
    assert new_status.progress is not None and (new_status.progress.display, new_status.progress.eta) == ("-", "-")
    assert new_status.resolved is not None
    assert (new_status.resolved.world_size, new_status.resolved.effective_batch, new_status.resolved.model_name) == (1, 16, "tiny")
    assert new_status.resolved.defaults is not None and new_status.resolved.defaults["training.learningRate"] == 2e-4


def test_text_from_the_spec_is_shown_without_control_characters() -> None:
    computed_status = compute_status_of(facts(spec=spec(model={"source": "s3://models/a\x1b]0;x\nb"})))
    assert computed_status.resolved is not None and computed_status.resolved.model_name == "a ]0;x b"


def test_equal_facts_give_equal_statuses() -> None:
    first_status = compute_status_of(facts(status=status(**RUNNING_STATUS), jobs=[job()], pods=[pod()], now=at(10)))
    assert compute_status_of(facts(status=first_status, jobs=[job()], pods=[pod()], now=at(20))).to_wire() == first_status.to_wire()


def test_edited_spec_of_a_finished_job_changes_the_generation_only() -> None:
    finished_fields = {"status": status(**RUNNING_STATUS), "jobs": [job(completed_at=at(90))], "pods": [end_pod(pod(), 0)]}
    done_status = compute_status_of(facts(**finished_fields, now=at(95)))
    edited_status = compute_status_of(facts(**(finished_fields | {"status": done_status}), now=at(99), generation=2))
    assert (edited_status.observed_generation, {condition.observed_generation for condition in edited_status.conditions}) == (2, {2})
    expected = done_status.to_wire() | {"observedGeneration": 2, "conditions": edited_status.to_wire()["conditions"]}
    assert edited_status.to_wire() == expected


# Progress


def test_progress_is_shown_as_text() -> None:
    new_status = compute_running_status(progress={"step": 120, "totalSteps": 500, "secondsRemaining": 4320})
    assert new_status.progress is not None
    assert (new_status.progress.display, new_status.progress.percent, new_status.progress.eta) == ("120/500 (24%)", 24, "1h12m")


def test_progress_alone_is_not_written_promptly() -> None:
    first_status, second_status = (
        compute_running_status(progress={"step": step, "totalSteps": 500}, metrics={"trainLoss": 1 / step}) for step in (7, 9)
    )
    assert select_immediate_fields(first_status.to_wire()) == select_immediate_fields(second_status.to_wire())
    assert first_status.to_wire() != second_status.to_wire()


# Checkpoints


def test_status_keeps_the_newest_five_checkpoints_and_the_best() -> None:
    checkpoints = [{"step": step, "uri": f"s3://b/{step}", "evalLoss": abs(step - 20) + 1.0} for step in range(10, 100, 10)]
    new_status = compute_running_status(checkpoints=checkpoints, latestCheckpoint="s3://b/90")
    assert [checkpoint.step for checkpoint in new_status.checkpoints] == [20, 50, 60, 70, 80, 90]
    assert (new_status.latest_checkpoint, new_status.latest_checkpoint_step) == ("s3://b/90", 90)


@pytest.mark.parametrize(
    ("uri", "step"),
    [
        ("s3://b/x/checkpoints/step-00000400/a1-1f3c9a2b", 400),
        ("s3://b/x/checkpoints/step-123456789/a1-1f3c9a2b", 123456789),
        ("s3://b/elsewhere", None),
    ],
)
def test_step_of_an_unlisted_latest_checkpoint_comes_from_its_uri(uri: str, step: int | None) -> None:
    assert compute_running_status(latestCheckpoint=uri).latest_checkpoint_step == step


# Attempts


def compute_first_attempt_after_resume(
    known_step: int | None, resumed_from_step: int, *, committed_by: int | None = None, second_fields: dict[str, Any] | None = None
) -> Attempt:
    """Return the record of attempt 1 after attempt 2 has reported that it resumed from `resumed_from_step`. The fields in `second_fields` were already
    recorded for attempt 2.
    """
    first_attempt = {"number": 1, "startTime": "2026-11-21T12:00:00Z", "endTime": "2026-11-21T12:05:00Z", "reason": "Preempted", "lastStep": known_step}
    attempts = [first_attempt, {"number": 2, "startTime": "2026-11-21T12:06:00Z", **(second_fields or {})}]
    uri = f"s3://b/checkpoints/step-{resumed_from_step:08d}/a{committed_by}-1f3c9a2b" if committed_by else "s3://b/x"
    checkpoints = [{"step": resumed_from_step, "uri": uri}] if committed_by else []
    received_report = report(attempt=2, resumedFromStep=resumed_from_step, progress={"step": resumed_from_step + 1}, checkpoints=checkpoints)
    pods = [pod(2, uid="pod-1-0")]
    job_facts = facts(status=status(attempt=2, attempts=attempts), jobs=[job(2)], pods=pods, last_report=received_report)
    return compute_status_of(job_facts).attempts[0]


@pytest.mark.parametrize("committed_by", [None, 1], ids=["unknown attempt", "attempt 1"])
def test_last_step_of_an_unobserved_attempt_is_the_step_from_which_the_next_attempt_resumed(committed_by: int | None) -> None:
    """While the operator was stopped, attempt 1 trained from step 80 to step 190 and ended."""
    first_attempt = compute_first_attempt_after_resume(80, 190, committed_by=committed_by)
    assert (first_attempt.last_step, first_attempt.committed_step, first_attempt.steps_lost) == (190, 190, 0)


def test_last_step_of_an_attempt_that_was_never_observed_is_corrected() -> None:
    first_attempt = compute_first_attempt_after_resume(None, 190)
    assert (first_attempt.last_step, first_attempt.committed_step, first_attempt.steps_lost) == (190, 190, 0)


def test_corrected_last_step_is_kept_while_the_next_attempt_trains() -> None:
    old_attempt = {"number": 1, "lastStep": 190, "committedStep": 190, "stepsLost": 0, "endTime": "2026-11-21T12:05:00Z", "reason": "Preempted"}
    old_status = status(attempt=2, attempts=[old_attempt, {"number": 2, "startTime": "2026-11-21T12:06:00Z", "lastStep": 191, "resumedFromStep": 190}])
    received_report = report(attempt=2, resumedFromStep=190, progress={"step": 250})
    first_attempt = compute_status_of(facts(status=old_status, jobs=[job(2)], pods=[pod(2, uid="pod-1-0")], last_report=received_report)).attempts[0]
    assert (first_attempt.last_step, first_attempt.committed_step, first_attempt.steps_lost) == (190, 190, 0)


def test_steps_after_the_last_checkpoint_are_counted_as_lost() -> None:
    first_attempt = compute_first_attempt_after_resume(80, 60)
    assert (first_attempt.last_step, first_attempt.steps_lost) == (80, 20)


@pytest.mark.parametrize(
    ("committed_by", "second_fields"),
    [(2, {}), (2, {"lastStep": 300, "resumedFromStep": 80}), (None, {"lastStep": 300, "resumedFromStep": 80})],
    ids=["own checkpoint", "own checkpoint after its pods were replaced", "unknown attempt after its pods were replaced"],
)
def test_resume_from_an_own_checkpoint_does_not_change_the_previous_attempt(
    committed_by: int | None, second_fields: dict[str, Any]
) -> None:
    """A queue may replace the pods of attempt 2. The new pods resume from a checkpoint of attempt 2, which says nothing about attempt 1."""
    first_attempt = compute_first_attempt_after_resume(80, 290, committed_by=committed_by, second_fields=second_fields)
    assert (first_attempt.last_step, first_attempt.committed_step) == (80, None)


def test_termination_message_is_sufficient_to_report_success() -> None:
    message = TerminationMessage.model_validate(
        {"step": 500, "output": {"uri": "s3://b/model", "kind": "adapter"}, "latestCheckpoint": "s3://b/500"}
    )
    ended_pods = [end_pod(pod(), 0, message)]
    new_status = compute_status_of(facts(status=status(**RUNNING_STATUS), jobs=[job(completed_at=at(90))], pods=ended_pods, now=at(95)))
    assert (new_status.phase, new_status.duration, new_status.completion_time) == (Phase.SUCCEEDED, "1m30s", at(90))
    assert new_status.output is not None and new_status.output.uri == "s3://b/model"
    assert new_status.progress is not None and new_status.progress.step == 500


def test_results_of_the_evaluation_stay_in_the_status() -> None:
    metrics = {"semanticSimilarity": {"value": -0.25, "difference": -0.5}}
    evaluation = {"rows": 20, "metrics": metrics, "gates": [{"metric": "semanticSimilarity", "passed": False}]}
    message = TerminationMessage.model_validate({"step": 500, "output": {"uri": "s3://b/model"}, "evaluation": evaluation})
    job_facts = facts(status=status(**RUNNING_STATUS), jobs=[job(completed_at=at(90))], pods=[end_pod(pod(), 0, message)], now=at(95))
    new_status = compute_status_of(job_facts)
    assert new_status.to_wire()["evaluation"] == evaluation | {"headline": "semanticSimilarity -0.25 (gate failed)"}
    later_status = compute_status_of(facts(status=new_status, jobs=[job(completed_at=at(90))], now=at(200)))
    assert later_status.evaluation == new_status.evaluation


def test_a_termination_message_without_metrics_keeps_those_of_the_last_report() -> None:
    metrics = {"loss": {"value": 1.5, "base": 2.0, "difference": -0.5, "low": -0.6, "high": -0.4}}
    old_status = status(**RUNNING_STATUS, evaluation={"rows": 20, "metrics": metrics})
    gates = [{"metric": "loss", "passed": True}]
    message = TerminationMessage.model_validate({"step": 500, "output": {"uri": "s3://b/model"}, "evaluation": {"gates": gates}})
    job_facts = facts(status=old_status, jobs=[job(completed_at=at(90))], pods=[end_pod(pod(), 0, message)], now=at(95))
    assert compute_status_of(job_facts).to_wire()["evaluation"] == {"rows": 20, "metrics": metrics, "gates": gates}


@pytest.mark.parametrize(
    ("evaluation", "measured", "expected"),
    [
        ({"metrics": ["bleu", "rouge"]}, {"rougeL": 0.51234, "bleu": 12.0}, "bleu 12"),
        ({"metrics": ["bleu", "rouge"]}, {"rougeL": 0.51234, "bleu": None}, "rougeL 0.5123"),
        ({"metrics": ["bleu", "rouge"], "gates": [{"metric": "rouge", "op": "ge", "value": 0.1}]}, {"rougeL": 0.5, "bleu": 12.0}, "rougeL 0.5"),
        ({"metrics": ["bleu"]}, {}, None),
    ],
)
def test_headline_is_the_metric_of_the_first_gate_or_else_the_first_metric(
    evaluation: dict[str, Any], measured: dict[str, float | None], expected: str | None
) -> None:
    metrics = {name: {"value": value} for name, value in measured.items()}
    message = TerminationMessage.model_validate({"step": 500, "output": {"uri": "s3://b/model"}, "evaluation": {"metrics": metrics}})
    job_facts = facts(
        spec=spec(evaluation=evaluation, dataset={"train": "s3://d/a.jsonl", "test": "s3://d/b.jsonl"}), status=status(**RUNNING_STATUS),
        jobs=[job(completed_at=at(90))], pods=[end_pod(pod(), 0, message)], now=at(95),
    )  # fmt: skip
    computed_evaluation = compute_status_of(job_facts).evaluation
    assert computed_evaluation is not None and computed_evaluation.headline == expected


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"trainLoss": 1.5, "evalLoss": 2.25, "bestEvalLoss": 2.0}, {"headline": "validation loss 2.25"}),
        ({"trainLoss": 1.5}, {"headline": "training loss 1.5"}),
        (None, None),
    ],
)
def test_headline_is_a_loss_if_there_are_no_metrics_of_an_evaluation(metrics: dict[str, float] | None, expected: dict[str, str] | None) -> None:
    message = TerminationMessage.model_validate({"step": 500, "output": {"uri": "s3://b/model"}, "metrics": metrics})
    ended_fields = {"pods": [end_pod(pod(), 0, message)], "now": at(95)}
    assert compute_status_of(facts(status=status(**RUNNING_STATUS), jobs=[job(completed_at=at(90))], **ended_fields)).to_wire().get("evaluation") == expected
    running_facts = facts(status=status(**RUNNING_STATUS, metrics=metrics), jobs=[job()], pods=[pod()], now=at(60))
    assert "evaluation" not in compute_status_of(running_facts).to_wire()


def test_the_headline_names_a_failed_gate() -> None:
    gates = [{"metric": "bleu", "passed": True}, {"metric": "accuracy", "passed": False}]
    metrics = {"bleu": {"value": 12.0}, "accuracy": {"value": 0.5}}
    message = TerminationMessage.model_validate({"output": {"uri": "s3://b/model"}, "evaluation": {"metrics": metrics, "gates": gates}})
    ended_pod = end_pod(pod(), 80, message)
    evaluation = compute_status_of(facts(status=status(**RUNNING_STATUS), jobs=[job(failed_at=at(90))], pods=[ended_pod], now=at(95))).evaluation
    assert evaluation is not None and evaluation.headline == "accuracy 0.5 (gate failed)"


def test_failed_gate_ends_the_job_with_its_message_and_keeps_the_model() -> None:
    sentence = "accuracy is 0.79, and the gate requires at least 0.8"
    message = TerminationMessage.model_validate({
        "class": "Model", "code": "GateFailed", "message": sentence, "stage": "comparing", "step": 500,
        "output": {"uri": "s3://b/model", "kind": "adapter", "promoted": False},
        "evaluation": {"gates": [{"metric": "accuracy", "passed": False, "text": sentence}]},
    })  # fmt: skip
    new_status = compute_status_of(facts(status=status(**RUNNING_STATUS), jobs=[job(failed_at=at(90))], pods=[end_pod(pod(), 80, message)], now=at(95)))
    succeeded = new_status.condition(Condition.SUCCEEDED)
    assert succeeded is not None and (succeeded.status, succeeded.reason) == ("False", Reason.GATE_FAILED) and sentence in succeeded.message
    assert (new_status.phase, new_status.reason, new_status.attempt) == (Phase.FAILED, Reason.GATE_FAILED, 1)
    assert new_status.output is not None and (new_status.output.uri, new_status.output.promoted) == ("s3://b/model", False)
    assert new_status.evaluation is not None and (new_status.evaluation.gates or [])[0].text == sentence


def test_a_job_without_training_shows_its_stage_and_no_steps() -> None:
    received_report = report(stage="comparing", progress={}, output={"uri": "s3://b/model", "kind": "adapter"})
    new_status = compute_status_of(facts(status=status(**{**RUNNING_STATUS, "progress": None}), jobs=[job()], pods=[pod()], last_report=received_report))
    assert new_status.phase is Phase.EVALUATING
    assert new_status.progress is not None and (new_status.progress.step, new_status.progress.display) == (None, "-")
    assert new_status.output is not None and new_status.output.uri == "s3://b/model"


def test_long_texts_of_pods_do_not_make_the_status_large() -> None:
    message = TerminationMessage(code="X" * 5000, message="y" * 100_000, hint="z" * 100_000)
    failed_pod = end_pod(pod(), 65, message)
    assert failed_pod.terminated is not None
    failed_pod = replace(failed_pod, terminated=replace(failed_pod.terminated, message=message.model_dump_json(by_alias=True)))
    blocking = BlockingCondition(Reason.QUEUED, "q" * 9999)
    new_status = compute_status_of(facts(status=status(**RUNNING_STATUS), jobs=[job(failed_at=at(60))], pods=[failed_pod], blocking_condition=blocking))
    assert len(str(new_status.to_wire())) < 20_000


def test_image_of_the_spec_takes_precedence_over_the_configured_one() -> None:
    new_status = compute_status_of(facts(spec=spec(placement={"image": "mine:1"})), ActionResult(created_job=job()))
    assert new_status.resolved is not None and new_status.resolved.image == "mine:1"


def test_plan_and_measured_memory_are_shown_and_kept() -> None:
    memory = {"expectedBytes": 5, "upperBytes": 6, "parts": {"weights": 5}}
    first_status = compute_running_status(plan={"memory": memory})
    assert first_status.plan is not None and first_status.plan.memory is not None
    assert (first_status.plan.memory.expected_bytes, first_status.plan.memory.parts.weights) == (5, 5)
    later_status = compute_running_status(first_status, plan={"measured": {"memoryBytes": 4}})
    assert later_status.plan is not None and later_status.plan.memory == first_status.plan.memory
    assert later_status.plan.measured is not None and later_status.plan.measured.memory_bytes == 4
    assert compute_running_status(later_status).plan == later_status.plan


WORK = {"steps": 100, "tokens": 1, "petaflop": 1, "trafficTerabytes": 1}


@pytest.mark.parametrize(
    ("code", "plan", "time_use", "measured"),
    [
        (0, {"work": WORK, "measured": {"memoryBytes": 4}}, {"firstStep": 5, "steps": 30.5}, {"memoryBytes": 4, "seconds": 35.5, "steps": 40}),
        (0, {"work": WORK}, {"steps": 30.5}, {"seconds": 30.5, "steps": 40}),
        (0, {"measured": {"memoryBytes": 4}}, {"firstStep": 5, "steps": 30.5}, {"memoryBytes": 4}),
        (0, {"work": WORK}, {"loading": 5}, None),
        (70, {"work": WORK}, {"firstStep": 5, "steps": 30.5}, None),
    ],
    ids=["success", "no memory", "no planned work", "no steps", "failure"],
)  # fmt: skip
def test_the_time_of_the_steps_is_recorded_after_a_successful_training(
    code: int, plan: dict[str, Any], time_use: dict[str, float], measured: dict[str, float] | None
) -> None:
    message = TerminationMessage.model_validate({"plan": plan, "timeUse": time_use, "progress": {"step": 40}})
    ended_pod = end_pod(pod(scheduled_at=at(0), running_since=at(1)), code, message)
    end_fields = {"completed_at": at(61)} if code == 0 else {"failed_at": at(61)}
    job_facts = facts(spec=spec(policy={"retries": 0}), status=status(**RUNNING_STATUS), jobs=[job(**end_fields)], pods=[ended_pod], now=at(62))
    new_status = compute_status_of(job_facts)
    assert new_status.plan is not None
    assert (new_status.plan.measured.to_wire() if new_status.plan.measured else None) == measured


def test_steps_of_another_job_do_not_count_as_measured_steps() -> None:
    """The job resumed from step 30 of another job, so it did 10 of the 40 steps in its 35.5 seconds."""
    message = TerminationMessage.model_validate(
        {"plan": {"work": WORK}, "timeUse": {"firstStep": 5, "steps": 30.5}, "progress": {"step": 40}, "resumedFromStep": 30}
    )
    ended_pod = end_pod(pod(scheduled_at=at(0), running_since=at(1)), 0, message)
    resumed_spec = spec(checkpoint={"resume": "s3://b/ns/old/uid/checkpoints/step-00000030/a1-1f3c9a2b"})
    new_status = compute_status_of(facts(spec=resumed_spec, status=status(**RUNNING_STATUS), jobs=[job(completed_at=at(61))], pods=[ended_pod], now=at(62)))
    assert new_status.plan is not None and new_status.plan.measured is not None
    assert new_status.plan.measured.to_wire() == {"seconds": 35.5, "steps": 10}


def list_times(value: Any) -> list[str]:
    """Return all times that a status contains, in the format of Kubernetes."""
    if isinstance(value, dict):
        return [time for inner in value.values() for time in list_times(inner)]
    if isinstance(value, list):
        return [time for inner in value for time in list_times(inner)]
    return [value] if isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", value) else []


@pytest.mark.parametrize("exit_code", [0, 64])
def test_no_time_in_the_status_is_later_than_the_completion(exit_code: int) -> None:
    """The times in the status come from several clocks.

    After the start of the job, the container ended at 90 s, PodsReady changed at 92 s, and the operator saw the end at 95 s. The trainer's clock is ahead, so
    its reports contain the times 3000 s and 4000 s.
    """
    old_status = status(**RUNNING_STATUS, conditions=[condition(Condition.PODS_READY, "False", "PodsNotReady", 92)])
    checkpoints = [{"step": 400, "uri": "s3://b/step-00000400/x", "time": at(91).isoformat()}, {"step": 500, "uri": "s3://b/500", "time": at(4000).isoformat()}]
    message = TerminationMessage.model_validate(
        {"step": 500, "output": {"uri": "s3://b/model"}, "checkpoints": checkpoints, "progress": {"step": 500, "updateTime": at(3000).isoformat()}}
    )
    ended_job = job(completed_at=at(90)) if exit_code == 0 else job(failed_at=at(90))
    job_facts = facts(status=old_status, jobs=[ended_job], pods=[end_pod(pod(), exit_code, message)], now=at(95))
    new_status = compute_status_of(job_facts)
    wire = new_status.to_wire()
    assert (new_status.phase, wire["completionTime"]) == (Phase.FAILED if exit_code else Phase.SUCCEEDED, format_rfc3339(at(95)))
    assert max(list_times(wire)) == wire["completionTime"]
    assert {condition_fields["type"]: condition_fields["lastTransitionTime"] for condition_fields in wire["conditions"]}["Finished"] == wire["completionTime"]


def test_the_completion_is_the_end_of_the_last_container_if_nothing_is_later() -> None:
    old_status = status(**RUNNING_STATUS, conditions=[condition(Condition.PODS_READY, "True", "PodsReady", 10)])
    job_facts = facts(status=old_status, jobs=[job(completed_at=at(90))], pods=[end_pod(pod(), 0)], now=at(5000))
    wire = compute_status_of(job_facts).to_wire()
    assert wire["completionTime"] == format_rfc3339(at(90)) == max(list_times(wire))


def test_time_of_a_checkpoint_from_a_fast_clock_does_not_change_with_each_report() -> None:
    checkpoint = {"step": 100, "uri": "s3://b/100", "time": at(4000).isoformat()}
    current_status = status(**RUNNING_STATUS)
    for now in (50, 60, 70):
        current_status = compute_status_of(facts(status=current_status, jobs=[job()], pods=[pod()], last_report=report(checkpoints=[checkpoint]), now=at(now)))
        assert [stored_checkpoint.time for stored_checkpoint in current_status.checkpoints] == [at(50)]


def test_defaults_from_the_trainer_are_added_to_the_recorded_defaults() -> None:
    old_status = status(**RUNNING_STATUS, resolved={"defaults": {"training.learningRate": 2e-4}})
    reported_fields = {"defaults": {"dataset.maxSequenceLength": 1024, "training.learningRate": 9}}
    current_status = compute_running_status(old_status, resolved=reported_fields)
    assert current_status.resolved is not None
    assert current_status.resolved.defaults == {"training.learningRate": 2e-4, "dataset.maxSequenceLength": 1024}
    later_status = compute_running_status(current_status, resolved={})
    assert later_status.resolved is not None and later_status.resolved.defaults == current_status.resolved.defaults
