"""Computes the new status from the facts, the plan and the result of the plan's actions. All functions are pure.

The status describes only what happened, not what is expected to happen. `pod_reports` has already limited and cleaned all values from pods.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from finetune_api.compatibility import read_spec
from finetune_api.names import Condition as ConditionType
from finetune_api.names import FailureClass, Reason, parse_attempt_of_uri
from finetune_api.rules import effective_batch, gpus_per_node, world_size
from finetune_api.sources import model_name
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import (
    Adaptation,
    Attempt,
    Checkpoint,
    EvaluationResult,
    Failure,
    FineTuneJobStatus,
    Goodput,
    MeasuredRun,
    Metrics,
    Output,
    Preparation,
    Progress,
    ResolvedConfig,
    RunPlan,
    Stage,
    Workers,
)
from pydantic import BaseModel

from finetune_operator.conditions import compute_conditions, set_generation
from finetune_operator.costs import add_planned_cost, compute_cost
from finetune_operator.facts import Facts
from finetune_operator.goodput import compute_goodput
from finetune_operator.phase import NO_VALUE, compute_phase, compute_reason
from finetune_operator.plan import ActionResult, AttemptEnd, JobEnd, Outcome, Plan, Situation
from finetune_operator.policies.acceptance import AcceptedSpec
from finetune_operator.policies.choices import accept_choices
from finetune_operator.policies.timeouts import seconds_between
from finetune_operator.status_input import StatusInput
from finetune_operator.text import clean, format_duration

KEPT_ATTEMPT_COUNT = 10
KEPT_CHECKPOINT_COUNT = 5
KEPT_ADAPTATION_COUNT = 20
HEADLINE_METRIC_NAMES = {"rouge": "rougeL"}
"""Names of metrics in the status that differ from their names in the spec. The keys are the names in the spec."""
REJECTED_FIELD_PATTERN = re.compile(r"\bstatus\.(\w+)(?:\[(\d+)\])?[^\s:]*: (?:Unsupported|Invalid|Required|Too)")
"""Matches the name of a rejected status field or list item in a 422 response, for example `status.phase: Unsupported value: "Preparing"`."""
STEP_IN_URI_PATTERN = re.compile(r"/step-(\d{8,})(?:/|$)")

Model = TypeVar("Model", bound=BaseModel)


def merge_fields(base: Model, *newer_values: Model | None) -> Model:
    """Return a copy of `base` in which fields are replaced by those that are set in `newer_values`. Later arguments take precedence."""
    fields = {name: value for source in newer_values if source is not None for name, value in source if value is not None}
    return base.model_copy(update=fields)


def compute_status(facts: Facts, plan: Plan, result: ActionResult) -> FineTuneJobStatus:
    """Return the new status of the job."""
    old_status = facts.job.status
    if plan.situation is Situation.DELETING:
        return old_status
    if plan.situation is Situation.FINISHED and plan.job_end is None:
        return _set_generation(old_status, facts.job.generation)
    inputs = StatusInput(facts, plan, result)
    counters, checkpoints, metrics = _compute_counters(inputs), _compute_checkpoints(inputs), _compute_metrics(inputs)
    attempts, progress, resolved = _compute_attempts(inputs), _compute_progress(inputs), _compute_resolved(inputs)
    completion_time = _compute_completion_time(inputs, attempts, progress, checkpoints, counters.adaptations)
    goodput = compute_goodput(facts, old_status.goodput, attempts, plan.attempt_end, inputs.current_job, KEPT_ATTEMPT_COUNT)
    all_conditions = compute_conditions(inputs, checkpoints.latest_uri, transition_time=completion_time or facts.now)
    return FineTuneJobStatus(
        observed_generation=facts.job.generation,
        phase=compute_phase(inputs),
        reason=compute_reason(inputs, all_conditions),
        conditions=all_conditions,
        attempt=counters.attempt,
        restarts=counters.restarts,
        retries_used=counters.retries_used,
        active_seconds=counters.active_seconds,
        attempts=attempts,
        preparation=_compute_preparation(inputs),
        data=(plan.preparation_message.data if plan.preparation_message else None) or old_status.data,
        progress=progress,
        metrics=metrics,
        checkpoints=checkpoints.kept_checkpoints,
        latest_checkpoint=checkpoints.latest_uri,
        latest_checkpoint_step=checkpoints.latest_step,
        output=_compute_output_status(inputs),
        evaluation=_compute_evaluation(inputs, metrics),
        failure=_compute_failure(inputs),
        adaptations=counters.adaptations,
        workers=_compute_workers(inputs),
        resolved=resolved,
        plan=_add_measured_time(add_planned_cost(_compute_plan(inputs), facts, resolved.device), inputs, goodput, progress, attempts),
        cost=compute_cost(facts, plan.attempt_end),
        goodput=goodput,
        start_time=counters.start_time,
        completion_time=completion_time or old_status.completion_time,
        duration=_compute_duration(inputs, completion_time) or old_status.duration,
    )


def _set_generation(status: FineTuneJobStatus, generation: int) -> FineTuneJobStatus:
    """Return the finished job's status, with the generation of the edited spec as `observedGeneration`.

    An edit of the spec has no other effect on a finished job.
    """
    observed_generations = (status.observed_generation, *(condition.observed_generation for condition in status.conditions))
    if all(observed == generation for observed in observed_generations):
        return status
    updated_fields = FineTuneJobStatus(
        observed_generation=generation, conditions=set_generation(status.conditions, generation)
    )
    return status.model_copy(
        update={"observed_generation": updated_fields.observed_generation, "conditions": updated_fields.conditions}
    )


def reduce_status(new_status: FineTuneJobStatus, stored_status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Return a status that is written if the API server rejects `new_status`, so that suspend, cancel and the deadline still work.

    Fields that later decisions need come from `new_status`. Fields that pods report come from `stored_status`.
    """
    resolved_config = new_status.resolved or ResolvedConfig()
    return FineTuneJobStatus(
        observed_generation=new_status.observed_generation,
        phase=new_status.phase,
        reason=new_status.reason,
        conditions=new_status.conditions,
        attempt=new_status.attempt,
        restarts=new_status.restarts,
        retries_used=new_status.retries_used,
        active_seconds=new_status.active_seconds,
        attempts=_reduce_attempts(new_status.attempts, stored_status.attempts),
        preparation=new_status.preparation,
        data=stored_status.data,
        progress=stored_status.progress,
        metrics=stored_status.metrics,
        checkpoints=stored_status.checkpoints,
        latest_checkpoint=stored_status.latest_checkpoint,
        latest_checkpoint_step=stored_status.latest_checkpoint_step,
        output=Output(uri=new_status.output.uri, adopted_uid=new_status.output.adopted_uid) if new_status.output else None,
        evaluation=stored_status.evaluation,
        failure=_reduce_failure(new_status.failure),
        adaptations=new_status.adaptations,
        workers=new_status.workers,
        resolved=merge_fields(
            stored_status.resolved or ResolvedConfig(),
            ResolvedConfig(
                defaults=resolved_config.defaults, spec_sha256=resolved_config.spec_sha256, max_duration_seconds=resolved_config.max_duration_seconds
            ),
        ),
        plan=_reduce_plan(new_status.plan, stored_status.plan),
        cost=new_status.cost,
        goodput=stored_status.goodput,
        start_time=new_status.start_time,
        completion_time=new_status.completion_time,
        duration=new_status.duration,
    )


def remove_rejected_fields(status: FineTuneJobStatus, message: str) -> FineTuneJobStatus:
    """Return the status without the fields and list items that the API server rejected, for example a phase that an older CRD lacks.

    `message`: the API server's error message.
    """
    status_json = status.to_wire()
    for field, index in sorted(set(REJECTED_FIELD_PATTERN.findall(message)), key=lambda match: int(match[1] or -1), reverse=True):
        if not index:
            status_json.pop(field, None)
        elif int(index) < len(status_json.get(field, [])):
            del status_json[field][int(index)]
    return FineTuneJobStatus.model_validate(status_json)


def _reduce_attempts(new_attempts: list[Attempt], stored_attempts: list[Attempt]) -> list[Attempt]:
    stored_attempts_by_number = {attempt.number: attempt for attempt in stored_attempts}
    return [
        Attempt(
            number=attempt.number, start_time=attempt.start_time, end_time=attempt.end_time, reason=attempt.reason, message=attempt.message,
            exit_code=attempt.exit_code, node=attempt.node, config_sha256=attempt.config_sha256, counted=attempt.counted,
            resumed_from_step=stored_attempt.resumed_from_step if stored_attempt else None, last_step=stored_attempt.last_step if stored_attempt else None,
            committed_step=stored_attempt.committed_step if stored_attempt else None, steps_lost=stored_attempt.steps_lost if stored_attempt else None,
        )
        for attempt in new_attempts
        for stored_attempt in [stored_attempts_by_number.get(attempt.number)]
    ]  # fmt: skip


def _reduce_plan(new_plan: RunPlan | None, stored_plan: RunPlan | None) -> RunPlan | None:
    """Return the stored plan with the new choices. The choices must not be lost, because the first attempt is built from them."""
    if new_plan is None or new_plan.choices is None:
        return stored_plan
    return (stored_plan or RunPlan()).model_copy(update={"choices": new_plan.choices})


def _reduce_failure(failure: Failure | None) -> Failure | None:
    if failure is None:
        return None
    return Failure(class_=failure.class_, code=failure.code, message=failure.message, hint=failure.hint)


# Attempts and counters


@dataclass(frozen=True)
class AttemptCounters:
    """Status fields about attempts: their number, retries, adaptations and running time."""

    attempt: int | None
    restarts: int
    retries_used: int | None
    active_seconds: int | None
    adaptations: list[Adaptation]
    start_time: datetime | None


def _compute_counters(inputs: StatusInput) -> AttemptCounters:
    facts, old_status, attempt_end, job = inputs.facts, inputs.old_status, inputs.plan.attempt_end, inputs.current_job
    attempt = facts.attempt if attempt_end is None or attempt_end.next_attempt is None else attempt_end.next_attempt
    has_started = job is not None or old_status.start_time is not None or attempt > 1
    retries_used, adaptations = old_status.retries_used, old_status.adaptations
    if attempt_end is not None:
        retries_used = 0 if attempt_end.made_progress else (old_status.retries_used or 0) + attempt_end.is_counted
        if attempt_end.adaptation is not None:
            adaptations = [*old_status.adaptations, attempt_end.adaptation][-KEPT_ADAPTATION_COUNT:]
    return AttemptCounters(
        attempt=attempt if has_started else old_status.attempt,
        restarts=attempt - 1,
        retries_used=retries_used,
        active_seconds=_compute_active_seconds(inputs),
        adaptations=adaptations,
        start_time=old_status.start_time or (job.created_at if job else None),
    )


def _compute_active_seconds(inputs: StatusInput) -> int | None:
    """Return the running time of all attempts in seconds. The value changes only when an attempt ends, or when a queue revokes the Job's quota."""
    facts, attempt_end = inputs.facts, inputs.plan.attempt_end
    has_lost_quota = inputs.is_queued and facts.is_true(ConditionType.QUOTA_RESERVED)
    if facts.running_since is None or (attempt_end is None and not has_lost_quota):
        return inputs.old_status.active_seconds
    return round(facts.compute_running_seconds(attempt_end.ended_at if attempt_end is not None else facts.now))


def _compute_attempts(inputs: StatusInput) -> list[Attempt]:
    """Return the records of the newest attempts, with an updated record of the current attempt."""
    attempts_by_number = {attempt.number: attempt for attempt in inputs.old_status.attempts}
    number, job, plan = inputs.facts.attempt, inputs.current_job, inputs.plan
    old_record = attempts_by_number.get(number)
    if old_record is None:
        if job is None:
            return list(inputs.old_status.attempts)
        old_record = Attempt(number=number, start_time=job.created_at, config_sha256=job.config_sha256 or None)
    current_record = merge_fields(old_record, _build_reported_attempt(inputs, old_record))
    if plan.termination is not None:
        current_record = merge_fields(
            current_record, Attempt(number=number, reason=plan.termination.reason, message=plan.termination.message)
        )
    if plan.attempt_end is not None:
        current_record = merge_fields(current_record, _build_ended_attempt(plan.attempt_end, number))
    attempts_by_number[number] = current_record
    previous_record = attempts_by_number.get(number - 1)
    if previous_record is not None and (inputs.last_report is not None or plan.attempt_end is not None):
        attempts_by_number[number - 1] = _complete_previous_attempt(previous_record, current_record, inputs)
    return [attempts_by_number[number] for number in sorted(attempts_by_number)][-KEPT_ATTEMPT_COUNT:]


def _build_reported_attempt(inputs: StatusInput, old_record: Attempt) -> Attempt | None:
    """Return the fields of the current attempt's record that come from rank 0's progress report."""
    last_report = inputs.last_report
    if last_report is None:
        return None
    committed_steps = inputs.facts.list_steps_of_this_attempt(last_report.checkpoints, last_report.resumed_from_step)
    return Attempt(
        number=old_record.number,
        last_step=last_report.progress.step,
        resumed_from_step=last_report.resumed_from_step,
        committed_step=max([*committed_steps, old_record.committed_step or 0]) or None,
    )


def _build_ended_attempt(attempt_end: AttemptEnd, number: int) -> Attempt:
    failure, message = attempt_end.failure, attempt_end.termination_message
    return Attempt(
        number=number,
        end_time=attempt_end.ended_at,
        reason=attempt_end.reason,
        message=clean(failure.message) if failure else None,
        exit_code=failure.exit_code if failure else 0,
        node=failure.node if failure else None,
        counted=attempt_end.is_counted if failure else None,
        committed_step=attempt_end.committed_step,
        last_step=(message.step if message else None) or (failure.step if failure else None),
        resumed_from_step=message.resumed_from_step if message else None,
    )


def _complete_previous_attempt(previous_record: Attempt, current_record: Attempt, inputs: StatusInput) -> Attempt:
    """Complete the previous attempt's record with the step from which the current attempt resumed.

    If the previous attempt ended while the operator was stopped, its record lacks its last steps. If the current attempt resumed from a later
    step than the record shows, the previous attempt must have committed this step.
    """
    resumed_step = current_record.resumed_from_step
    if resumed_step is not None and resumed_step > (previous_record.last_step or 0) and _has_committed(previous_record, resumed_step, inputs):
        committed_step = max(resumed_step, previous_record.committed_step or 0)
        return merge_fields(
            previous_record, Attempt(number=previous_record.number, last_step=resumed_step, committed_step=committed_step, steps_lost=0)
        )
    if previous_record.last_step is None or previous_record.steps_lost is not None or current_record.last_step is None:
        return previous_record
    steps_lost = max(0, previous_record.last_step - (resumed_step or 0))
    return merge_fields(previous_record, Attempt(number=previous_record.number, steps_lost=steps_lost))


def _has_committed(attempt: Attempt, step: int, inputs: StatusInput) -> bool:
    """Whether `attempt` committed the checkpoint of `step`.

    A checkpoint's URI usually names its attempt. If no URI names an attempt, the result is True only for the first report of the current attempt. Before a
    later report, a queue may have replaced the pods, and the new pods resume from checkpoints of the current attempt itself.
    """
    reported_checkpoints = [checkpoint for source in inputs.facts.reported_checkpoints for checkpoint in source.checkpoints]
    attempt_numbers = {parse_attempt_of_uri(c.uri) for c in [*inputs.old_status.checkpoints, *reported_checkpoints] if c.step == step} - {None}
    if attempt_numbers:
        return attempt.number in attempt_numbers
    record = inputs.facts.attempt_record
    return record is None or record.last_step is None


def _compute_workers(inputs: StatusInput) -> Workers:
    pod_count = inputs.facts.pod_count
    ready_count = inputs.ready_pod_count if inputs.plan.job_end is None else 0
    return Workers(ready=ready_count, total=pod_count, display=f"{ready_count}/{pod_count}")


def _compute_preparation(inputs: StatusInput) -> Preparation | None:
    """Return the record of the preparation, with the progress that its pod reports."""
    plan, report = inputs.plan, inputs.facts.preparation_report
    if plan.preparation is not None:
        data = plan.preparation_message.data if plan.preparation_message else None
        return plan.preparation.model_copy(update={"stage": None, "tokenised_rows": data.tokenised_rows if data else None})
    record = inputs.old_status.preparation
    if record is None or report is None or plan.pod_to_scrape is None or report.pod_uid != plan.pod_to_scrape.uid:
        return record
    data = report.report.data
    return record.model_copy(update={"stage": report.report.stage.value, "tokenised_rows": data.tokenised_rows if data else None})


# Progress


def _compute_progress(inputs: StatusInput) -> Progress:
    """Return the progress from the last report and, after the end, from the termination message.

    Fields that both of them lack keep the values in the old status.
    """
    last_report, message = inputs.last_report, inputs.termination_message
    merged_progress = merge_fields(
        inputs.old_status.progress or Progress(), last_report.progress if last_report else None, message.progress if message else None
    )
    if message is not None and message.step is not None and message.step > (merged_progress.step or 0):
        merged_progress = merge_fields(merged_progress, Progress(step=message.step))
    if inputs.plan.job_end is not None:
        merged_progress = merged_progress.model_copy(update={"seconds_remaining": None})
    if merged_progress.update_time is not None and merged_progress.update_time > inputs.facts.now:
        merged_progress = merged_progress.model_copy(update={"update_time": inputs.facts.now})
    return merge_fields(merged_progress, _compute_display_fields(merged_progress, inputs))


def _compute_display_fields(progress: Progress, inputs: StatusInput) -> Progress:
    """Return the progress fields that are shown to people: the text, the percentage and the remaining time."""
    step, total = progress.step, progress.total_steps
    is_training = inputs.plan.situation is Situation.ACTIVE and not inputs.is_queued and bool(inputs.facts.active_pods)
    seconds_remaining = progress.seconds_remaining
    eta_text = format_duration(seconds_remaining) if is_training and seconds_remaining is not None else NO_VALUE
    if step is None:
        return Progress(display=NO_VALUE, eta=eta_text)
    if not total:
        return Progress(display=str(step), eta=eta_text)
    percent = min(100, 100 * step // total)
    return Progress(percent=percent, display=f"{step}/{total} ({percent}%)", eta=eta_text)


def _compute_metrics(inputs: StatusInput) -> Metrics:
    last_report, message = inputs.last_report, inputs.termination_message
    return merge_fields(inputs.old_status.metrics or Metrics(), last_report.metrics if last_report else None, message.metrics if message else None)


# Checkpoints


@dataclass(frozen=True)
class StatusCheckpoints:
    """The newest committed checkpoints and the best one (`kept_checkpoints`), and the URI and the step of the newest checkpoint."""

    kept_checkpoints: list[Checkpoint]
    latest_uri: str | None
    latest_step: int | None


def _compute_checkpoints(inputs: StatusInput) -> StatusCheckpoints:
    # The key is the step: an attempt after a rollback commits the same step again, and its checkpoint replaces the earlier one of this step.
    checkpoints_by_step = {checkpoint.step: checkpoint for checkpoint in inputs.old_status.checkpoints}
    for source in inputs.facts.reported_checkpoints:
        checkpoints_by_step = {
            step: known_checkpoint for step, known_checkpoint in checkpoints_by_step.items() if not _is_removed(known_checkpoint, source.checkpoints)
        }
        checkpoints_by_step |= {new.step: _merge_checkpoint(checkpoints_by_step.get(new.step), new, inputs.facts.now) for new in source.checkpoints}
    ordered_checkpoints = sorted(checkpoints_by_step.values(), key=lambda checkpoint: checkpoint.step)
    kept_checkpoints = ordered_checkpoints[-KEPT_CHECKPOINT_COUNT:]
    evaluated_checkpoints = [checkpoint for checkpoint in ordered_checkpoints if checkpoint.eval_loss is not None]
    best_checkpoint = min(evaluated_checkpoints, key=lambda checkpoint: checkpoint.eval_loss or 0.0, default=None)
    if best_checkpoint is not None and best_checkpoint not in kept_checkpoints:
        kept_checkpoints = [best_checkpoint, *kept_checkpoints]
    latest_uri = _find_latest_uri(inputs, kept_checkpoints) or inputs.old_status.latest_checkpoint
    return StatusCheckpoints(kept_checkpoints, latest_uri, _find_step(latest_uri, kept_checkpoints))


def _merge_checkpoint(known_checkpoint: Checkpoint | None, reported_checkpoint: Checkpoint, now: datetime) -> Checkpoint:
    """Return the reported checkpoint with known values for the fields that the report lacks.

    For example, only the attempt that saved a checkpoint reports the duration of the upload. The clock of a node may be fast, so a time in the
    future is replaced by the time of the first report about the checkpoint.
    """
    if known_checkpoint is None or known_checkpoint.uri != reported_checkpoint.uri:
        merged_checkpoint, first_seen_at = reported_checkpoint, now
    else:
        merged_checkpoint, first_seen_at = merge_fields(known_checkpoint, reported_checkpoint), known_checkpoint.time or now
    is_in_future = merged_checkpoint.time is not None and merged_checkpoint.time > now
    return merged_checkpoint.model_copy(update={"time": first_seen_at}) if is_in_future else merged_checkpoint


def _is_removed(checkpoint: Checkpoint, listed_checkpoints: Sequence[Checkpoint]) -> bool:
    """Whether the retention policy removed the checkpoint: the pod lists a newer checkpoint, but not this one.

    A checkpoint that a rollback skipped is newer than all listed checkpoints. This checkpoint does not count as removed, because storage still contains it.
    """
    listed_steps = {listed.step for listed in listed_checkpoints}
    return bool(listed_steps) and checkpoint.step not in listed_steps and checkpoint.step < max(listed_steps)


def _find_latest_uri(inputs: StatusInput, kept_checkpoints: list[Checkpoint]) -> str | None:
    last_report, message = inputs.last_report, inputs.termination_message
    reported_uri = (message.latest_checkpoint if message else None) or (last_report.latest_checkpoint if last_report else None)
    return reported_uri or (kept_checkpoints[-1].uri if kept_checkpoints else None)


def _find_step(uri: str | None, kept_checkpoints: list[Checkpoint]) -> int | None:
    if uri is None:
        return None
    match = STEP_IN_URI_PATTERN.search(uri)
    return next((checkpoint.step for checkpoint in kept_checkpoints if checkpoint.uri == uri), int(match[1]) if match else None)


# The resolved configuration


def _compute_resolved(inputs: StatusInput) -> ResolvedConfig:
    """Merge the resolved configuration from the spec, the pods and the trainer's reports. In this order, each source overrides those before it."""
    facts, last_report, message = inputs.facts, inputs.last_report, inputs.termination_message
    # A running attempt keeps the values with which it started, even if the operator's configuration changes.
    is_running = facts.current_job is not None and facts.attempt_record is not None
    config_from_spec = _resolve_from_spec(inputs, facts.acceptance) if isinstance(facts.acceptance, AcceptedSpec) and not is_running else None
    job = inputs.current_job
    observed_config = ResolvedConfig(
        config_sha256=(job.config_sha256 if job else None) or None,
        image_digest=next((pod.image_id for pod in facts.attempt_pods if pod.image_id), None),
    )
    config_from_preparation = inputs.plan.preparation_message.resolved if inputs.plan.preparation_message else None
    trainer_configs = [config_from_preparation, last_report.resolved if last_report else None, message.resolved if message else None]
    resolved_config = merge_fields(inputs.old_status.resolved or ResolvedConfig(), config_from_spec, observed_config, *trainer_configs)
    operator_defaults = (config_from_spec or inputs.old_status.resolved or ResolvedConfig()).defaults or {}
    trainer_defaults = [trainer_config.defaults for trainer_config in trainer_configs if trainer_config is not None and trainer_config.defaults]
    if not trainer_defaults:
        return resolved_config
    # A default that the operator filled in is never replaced by a default of the trainer, because the next attempt uses the operator's default.
    return resolved_config.model_copy(update={"defaults": trainer_defaults[-1] | operator_defaults})


def _resolve_from_spec(inputs: StatusInput, acceptance: AcceptedSpec) -> ResolvedConfig:
    spec = inputs.facts.spec
    return ResolvedConfig(
        method=spec.method.type,
        model_name=" ".join(clean(model_name(spec.model.source)).split()) if spec.model.source else None,
        world_size=world_size(spec),
        effective_batch=effective_batch(spec),
        image=spec.placement.image or inputs.facts.config.trainer.image,
        node_pool=acceptance.pool.name if acceptance.pool else None,
        defaults=dict(acceptance.defaults) or None,
        spec_sha256=acceptance.spec_sha256 or None,
        max_duration_seconds=acceptance.max_duration_seconds,
        notes=[clean(note) for note in acceptance.notes] or None,
    )


def _add_measured_time(
    plan: RunPlan | None, inputs: StatusInput, goodput: Goodput | None, progress: Progress, attempts: list[Attempt]
) -> RunPlan | None:
    """Add the measured seconds of the optimizer steps to the plan of a job that trained successfully, to compare them with the planned time."""
    job_end = inputs.plan.job_end
    has_trained = job_end is not None and job_end.outcome is Outcome.SUCCEEDED and not inputs.adopts_result
    if plan is None or plan.work is None or goodput is None or not has_trained or not goodput.parts.steps:
        return plan
    start_step = 0
    if inputs.facts.spec.checkpoint.resume not in (None, "auto", "never"):  # another job trained the first steps
        start_step = next((attempt.resumed_from_step or 0 for attempt in attempts if attempt.number == 1), progress.step or 0)
    if (progress.step or 0) <= start_step:
        return plan
    training_seconds = round((goodput.parts.first_step or 0.0) + goodput.parts.steps, 3)
    measured_run = (plan.measured or MeasuredRun()).model_copy(update={"seconds": training_seconds, "steps": (progress.step or 0) - start_step})
    return plan.model_copy(update={"measured": measured_run})


# The end


def _compute_output_status(inputs: StatusInput) -> Output | None:
    return _merge_reports(Output(), "output", inputs)


def _compute_evaluation(inputs: StatusInput, metrics: Metrics) -> EvaluationResult | None:
    evaluation = _merge_reports(EvaluationResult(), "evaluation", inputs)
    headline = _compute_headline(inputs.facts.spec, evaluation) if evaluation is not None else None
    if headline is None and inputs.plan.job_end is not None and inputs.plan.job_end.outcome is Outcome.SUCCEEDED:
        headline = _compute_loss_headline(metrics)
    if evaluation is None and headline is None:
        return None
    return (evaluation or EvaluationResult()).model_copy(update={"headline": headline})


def _merge_reports(empty_model: Model, field_name: str, inputs: StatusInput) -> Model | None:
    """Merge the values of the field `field_name` from the status, the preparation, the live report and the termination message.

    Later sources take precedence. The earlier sources are also needed, because a termination message has a limited size and can lack values. Returns
    None if no source has a value.
    """
    live_report = inputs.facts.live_report
    sources = (inputs.old_status, inputs.plan.preparation_message, live_report.report if live_report else None, inputs.termination_message)
    values = [value for source in sources if (value := getattr(source, field_name, None)) is not None]
    return merge_fields(empty_model, *values) if values else None


def _compute_plan(inputs: StatusInput) -> RunPlan | None:
    """Return the job's plan. Choices in the reports of attempts are ignored, because user code may have written them.

    Only a preparation makes choices. Once the status contains choices, they never change.
    """
    facts, message = inputs.facts, inputs.plan.preparation_message
    plan, old_plan = _merge_reports(RunPlan(), "plan", inputs), inputs.old_status.plan or RunPlan()
    choices, no_choices = old_plan.choices, old_plan.no_choices
    if choices is None and isinstance(facts.acceptance, AcceptedSpec) and facts.attempt_record is None:
        if message is not None and message.plan is not None:
            spec, _ = read_spec(facts.job.spec)
            choices = accept_choices(message.plan.choices, spec, facts.acceptance, facts.config, facts.job.namespace)
            no_choices = None if choices else message.plan.no_choices
        no_choices = no_choices or (None if choices else _explain_missing_choices(inputs))
    if plan is None and choices is None and no_choices is None:
        return None
    return (plan or RunPlan()).model_copy(update={"choices": choices, "no_choices": no_choices})


def _explain_missing_choices(inputs: StatusInput) -> str | None:
    """Return why a job starts without choices, or None until its preparation ends or its first attempt starts."""
    facts, preparation = inputs.facts, inputs.plan.preparation or inputs.old_status.preparation
    if gpus_per_node(facts.spec) == 0:
        reason = "the job uses no GPU"
    elif preparation is None:
        reason = "the job is not prepared"
    elif preparation.reason == Reason.PREPARATION_SKIPPED:
        reason = "the preparation was skipped"
    else:
        reason = "the preparation reported no usable choices"
    is_decided = inputs.current_job is not None or (preparation is not None and preparation.reason is not None)
    return reason if is_decided else None


def _compute_headline(spec: FineTuneJobSpec, evaluation: EvaluationResult) -> str | None:
    """Return the name and the value of the most important metric as text, or None if there is no metric.

    The metrics of failed gates are the most important, then the metrics of other gates, then `evaluation.metrics`.
    """
    if evaluation.metrics is None:
        return None
    failed_metrics = [gate.metric for gate in evaluation.gates or [] if not gate.passed]
    requested_metrics = [*failed_metrics, *(gate.metric for gate in spec.evaluation.gates or []), *(spec.evaluation.metrics or [])]
    for name in (HEADLINE_METRIC_NAMES.get(metric_name, str(metric_name)) for metric_name in requested_metrics):
        metric = evaluation.metrics.get(name)
        if metric is not None and metric.value is not None:
            return f"{name} {metric.value:.4g}" + (" (gate failed)" if failed_metrics else "")
    return None


def _compute_loss_headline(metrics: Metrics) -> str | None:
    """Return the last validation loss as text or, without a validation loss, the last training loss. Return None if nothing was trained."""
    if metrics.eval_loss is not None:
        return f"validation loss {metrics.eval_loss:.4g}"
    return None if metrics.train_loss is None else f"training loss {metrics.train_loss:.4g}"


def _compute_failure(inputs: StatusInput) -> Failure | None:
    """Return the failure of a finished job. For an unfinished job, return the failure of the last attempt until the next attempt trains."""
    plan = inputs.plan
    if plan.job_end is not None:
        return _choose_final_failure(plan.job_end)
    if plan.attempt_end is not None:
        is_requested = plan.attempt_end.reason in (Reason.SUSPENDED, Reason.CANCELLED)
        return None if is_requested else plan.attempt_end.failure
    live_report = inputs.facts.live_report
    is_training = live_report is not None and live_report.report.stage is Stage.TRAINING
    return None if is_training else inputs.old_status.failure


def _choose_final_failure(job_end: JobEnd) -> Failure | None:
    if job_end.outcome is not Outcome.FAILED:
        return None
    return job_end.failure or Failure(class_=FailureClass.INTERNAL, code=job_end.reason, message="unknown")


def _compute_completion_time(
    inputs: StatusInput, attempts: list[Attempt], progress: Progress, checkpoints: StatusCheckpoints, adaptations: list[Adaptation]
) -> datetime | None:
    """Return the later of the end of the last attempt and the latest time that the status shows. Return None if the job is not finished.

    The end of a container has no fractions of a second, and other times come from other clocks. Without this rule, a checkpoint or a
    condition could have a later time than the end of the job.
    """
    if inputs.plan.job_end is None:
        return None
    end_time = inputs.plan.attempt_end.ended_at if inputs.plan.attempt_end is not None else inputs.facts.now
    shown_times = [
        inputs.old_status.start_time, progress.update_time,
        *(time for attempt in attempts for time in (attempt.start_time, attempt.end_time)),
        *(checkpoint.time for checkpoint in checkpoints.kept_checkpoints), *(adaptation.time for adaptation in adaptations),
        *(condition.last_transition_time for condition in inputs.old_status.conditions),
    ]  # fmt: skip
    return max([end_time, *(time for time in shown_times if time is not None)])


def _compute_duration(inputs: StatusInput, completion_time: datetime | None) -> str | None:
    if completion_time is None:
        return None
    job = inputs.facts.current_job
    start_time = inputs.old_status.start_time or (job.created_at if job else None)
    return format_duration(seconds_between(start_time, completion_time)) if start_time else NO_VALUE
