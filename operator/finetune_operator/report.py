"""Computes the new status from the facts, the plan and the result of the plan's actions. These functions are pure.

The status contains only observed values, no expected values. `pod_reports` has already limited and cleaned all values from pods.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from finetune_api.names import Condition as Kind
from finetune_api.names import FailureClass, Reason, attempt_of_uri
from finetune_api.sources import model_name
from finetune_api.status import (
    Adaptation,
    Attempt,
    Checkpoint,
    Failure,
    FineTuneJobStatus,
    Metrics,
    Output,
    Progress,
    ResolvedConfig,
    Stage,
    Workers,
)
from pydantic import BaseModel

from finetune_operator.conditions import conditions, with_generation
from finetune_operator.facts import Facts
from finetune_operator.phase import NO_VALUE, phase, reason
from finetune_operator.plan import ActionResult, AttemptEnd, JobEnd, Outcome, Plan, Situation
from finetune_operator.policies.acceptance import AcceptedSpec
from finetune_operator.policies.timeouts import seconds_between
from finetune_operator.status_input import StatusInput
from finetune_operator.text import clean, format_duration

KEPT_ATTEMPTS = 10
KEPT_CHECKPOINTS = 5
KEPT_ADAPTATIONS = 20
REJECTED_FIELD = re.compile(r"\bstatus\.(\w+)(?:\[(\d+)\])?[^\s:]*: (?:Unsupported|Invalid|Required|Too)")
"""Matches a status field or list item in a 422 response, for example `status.phase: Unsupported value: "Preparing"`."""
STEP_IN_URI = re.compile(r"/step-(\d{8,})(?:/|$)")

Model = TypeVar("Model", bound=BaseModel)


def merge(first: Model, *newer: Model | None) -> Model:
    """Return a copy of `first` with all fields that are set in `newer`. Later arguments take precedence."""
    fields = {name: value for source in newer if source is not None for name, value in source if value is not None}
    return first.model_copy(update=fields)


def report(facts: Facts, plan: Plan, result: ActionResult) -> FineTuneJobStatus:
    """Return the new status."""
    old = facts.job.status
    if plan.situation is Situation.DELETING:
        return old
    if plan.situation is Situation.FINISHED and plan.job_end is None:
        return _with_generation(old, facts.job.generation)
    view = StatusInput(facts, plan, result)
    counters, checkpoints = _counters(view), _checkpoints(view)
    all_conditions = conditions(view, checkpoints.latest)
    return FineTuneJobStatus(
        observed_generation=facts.job.generation,
        phase=phase(view),
        reason=reason(view, all_conditions),
        conditions=all_conditions,
        attempt=counters.attempt,
        restarts=counters.restarts,
        retries_used=counters.retries_used,
        active_seconds=counters.active_seconds,
        attempts=_attempts(view),
        progress=_progress(view),
        metrics=_metrics(view),
        checkpoints=checkpoints.kept,
        latest_checkpoint=checkpoints.latest,
        latest_checkpoint_step=checkpoints.latest_step,
        output=_output(view),
        failure=_failure(view),
        adaptations=counters.adaptations,
        workers=_workers(view),
        resolved=_resolved(view),
        start_time=counters.start_time,
        completion_time=_completion_time(view) or old.completion_time,
        duration=_duration(view) or old.duration,
    )


def _with_generation(status: FineTuneJobStatus, generation: int) -> FineTuneJobStatus:
    """Return the status with a new generation. In a finished job, an edit of the spec changes only `observedGeneration`."""
    updated = FineTuneJobStatus(
        observed_generation=generation, conditions=with_generation(status.conditions, generation)
    )
    return status.model_copy(
        update={"observed_generation": updated.observed_generation, "conditions": updated.conditions}
    )


def reduced_status(new: FineTuneJobStatus, stored: FineTuneJobStatus) -> FineTuneJobStatus:
    """Return a reduced status: fields that later decisions need come from `new`, and fields that pods report come from `stored`.

    If the API server rejects `new`, the reduced status is written, so that suspend, cancel and the deadline still work.
    """
    resolved = new.resolved or ResolvedConfig()
    return FineTuneJobStatus(
        observed_generation=new.observed_generation,
        phase=new.phase,
        reason=new.reason,
        conditions=new.conditions,
        attempt=new.attempt,
        restarts=new.restarts,
        retries_used=new.retries_used,
        active_seconds=new.active_seconds,
        attempts=_reduced_attempts(new.attempts, stored.attempts),
        progress=stored.progress,
        metrics=stored.metrics,
        checkpoints=stored.checkpoints,
        latest_checkpoint=stored.latest_checkpoint,
        latest_checkpoint_step=stored.latest_checkpoint_step,
        output=Output(uri=new.output.uri) if new.output else None,
        failure=_reduced_failure(new.failure),
        adaptations=new.adaptations,
        workers=new.workers,
        resolved=merge(
            stored.resolved or ResolvedConfig(), ResolvedConfig(defaults=resolved.defaults, spec_sha256=resolved.spec_sha256)
        ),
        start_time=new.start_time,
        completion_time=new.completion_time,
        duration=new.duration,
    )


def without_rejected_fields(status: FineTuneJobStatus, message: str) -> FineTuneJobStatus:
    """Return the status without the fields and list items that the API server rejected. For example, an older CRD may lack a phase."""
    value = status.to_wire()
    for field, index in sorted(set(REJECTED_FIELD.findall(message)), key=lambda one: int(one[1] or -1), reverse=True):
        if not index:
            value.pop(field, None)
        elif int(index) < len(value.get(field, [])):
            del value[field][int(index)]
    return FineTuneJobStatus.model_validate(value)


def _reduced_attempts(new: list[Attempt], stored: list[Attempt]) -> list[Attempt]:
    stored_by_number = {attempt.number: attempt for attempt in stored}
    return [
        Attempt(
            number=attempt.number, start_time=attempt.start_time, end_time=attempt.end_time, reason=attempt.reason, message=attempt.message,
            exit_code=attempt.exit_code, node=attempt.node, config_sha256=attempt.config_sha256, counted=attempt.counted,
            resumed_from_step=before.resumed_from_step if before else None, last_step=before.last_step if before else None,
            committed_step=before.committed_step if before else None, steps_lost=before.steps_lost if before else None,
        )
        for attempt in new
        for before in [stored_by_number.get(attempt.number)]
    ]  # fmt: skip


def _reduced_failure(failure: Failure | None) -> Failure | None:
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


def _counters(view: StatusInput) -> AttemptCounters:
    facts, old, end, job = view.facts, view.old, view.plan.attempt_end, view.current_job
    attempt = facts.attempt if end is None or end.next_attempt is None else end.next_attempt
    has_started = job is not None or old.start_time is not None or attempt > 1
    retries_used, adaptations = old.retries_used, old.adaptations
    if end is not None:
        retries_used = 0 if end.made_progress else (old.retries_used or 0) + end.counted
        if end.adaptation is not None:
            adaptations = [*old.adaptations, end.adaptation][-KEPT_ADAPTATIONS:]
    return AttemptCounters(
        attempt=attempt if has_started else old.attempt,
        restarts=attempt - 1,
        retries_used=retries_used,
        active_seconds=_active_seconds(view),
        adaptations=adaptations,
        start_time=old.start_time or (job.created_at if job else None),
    )


def _active_seconds(view: StatusInput) -> int | None:
    """Running time of all attempts in seconds. Updated when a period of running time ends."""
    facts, end = view.facts, view.plan.attempt_end
    quota_lost = view.is_queued and facts.is_true(Kind.QUOTA_RESERVED)
    if facts.running_since is None or (end is None and not quota_lost):
        return view.old.active_seconds
    return round(facts.running_seconds(end.time if end is not None else facts.now))


def _attempts(view: StatusInput) -> list[Attempt]:
    """Return the records of the newest attempts, with an updated record of the current attempt."""
    attempts = {attempt.number: attempt for attempt in view.old.attempts}
    number, job, plan = view.facts.attempt, view.current_job, view.plan
    known = attempts.get(number)
    if known is None:
        if job is None:
            return list(view.old.attempts)
        known = Attempt(number=number, start_time=job.created_at, config_sha256=job.config_sha256 or None)
    current = merge(known, _reported_attempt(view, known))
    if plan.termination is not None:
        current = merge(
            current, Attempt(number=number, reason=plan.termination.reason, message=plan.termination.message)
        )
    if plan.attempt_end is not None:
        current = merge(current, _ended_attempt(plan.attempt_end, number))
    attempts[number] = current
    previous = attempts.get(number - 1)
    if previous is not None and (view.last_report is not None or plan.attempt_end is not None):
        attempts[number - 1] = _previous_attempt(previous, current, view)
    return [attempts[number] for number in sorted(attempts)][-KEPT_ATTEMPTS:]


def _reported_attempt(view: StatusInput, known: Attempt) -> Attempt | None:
    """Return those fields of the current attempt's record that the pod reports."""
    received = view.last_report
    if received is None:
        return None
    steps = view.facts.steps_of_this_attempt(received.checkpoints, received.resumed_from_step)
    return Attempt(
        number=known.number,
        last_step=received.progress.step,
        resumed_from_step=received.resumed_from_step,
        committed_step=max([*steps, known.committed_step or 0]) or None,
    )


def _ended_attempt(end: AttemptEnd, number: int) -> Attempt:
    failure, message = end.failure, end.termination_message
    return Attempt(
        number=number,
        end_time=end.time,
        reason=end.reason,
        message=clean(failure.message) if failure else None,
        exit_code=failure.exit_code if failure else 0,
        node=failure.node if failure else None,
        counted=end.counted if failure else None,
        committed_step=end.committed_step,
        last_step=(message.step if message else None) or (failure.step if failure else None),
        resumed_from_step=message.resumed_from_step if message else None,
    )


def _previous_attempt(previous: Attempt, current: Attempt, view: StatusInput) -> Attempt:
    """Complete the previous attempt's record with the step from which the current attempt resumed.

    If the previous attempt ended while the operator did not run, the status lacks the last steps of that attempt. If the current attempt
    resumed from a later step than the status shows, the previous attempt must have committed that step.
    """
    resumed = current.resumed_from_step
    if resumed is not None and resumed > (previous.last_step or 0) and _committed_by(previous, resumed, view):
        committed = max(resumed, previous.committed_step or 0)
        return merge(
            previous, Attempt(number=previous.number, last_step=resumed, committed_step=committed, steps_lost=0)
        )
    if previous.last_step is None or previous.steps_lost is not None or current.last_step is None:
        return previous
    steps_lost = max(0, previous.last_step - (resumed or 0))
    return merge(previous, Attempt(number=previous.number, steps_lost=steps_lost))


def _committed_by(attempt: Attempt, step: int, view: StatusInput) -> bool:
    """Whether `attempt` committed the checkpoint of `step`.

    A checkpoint's URI usually names its attempt. If no URI names an attempt, only the first report of the current attempt is a proof. Later,
    a queue may have replaced the current attempt's pods, and the new pods resume from the current attempt's own checkpoints.
    """
    reported = [checkpoint for source in view.facts.reported_checkpoints for checkpoint in source.checkpoints]
    attempts = {attempt_of_uri(c.uri) for c in [*view.old.checkpoints, *reported] if c.step == step} - {None}
    if attempts:
        return attempt.number in attempts
    record = view.facts.attempt_record
    return record is None or record.last_step is None


def _workers(view: StatusInput) -> Workers:
    total = view.facts.nodes
    ready = view.ready_pods if view.plan.job_end is None else 0
    return Workers(ready=ready, total=total, display=f"{ready}/{total}")


# Progress


def _progress(view: StatusInput) -> Progress:
    """Return the progress from the last report and, after the end, from the termination message. Missing fields keep their old values."""
    received, message = view.last_report, view.termination_message
    merged = merge(
        view.old.progress or Progress(), received.progress if received else None, message.progress if message else None
    )
    if message is not None and message.step is not None and message.step > (merged.step or 0):
        merged = merge(merged, Progress(step=message.step))
    if view.plan.job_end is not None:
        merged = merged.model_copy(update={"seconds_remaining": None})
    return merge(merged, _display_fields(merged, view))


def _display_fields(progress: Progress, view: StatusInput) -> Progress:
    """Return the progress fields that contain text for people."""
    step, total = progress.step, progress.total_steps
    is_training = view.plan.situation is Situation.ACTIVE and not view.is_queued and bool(view.facts.active_pods)
    remaining = progress.seconds_remaining
    eta = format_duration(remaining) if is_training and remaining is not None else NO_VALUE
    if step is None:
        return Progress(display=NO_VALUE, eta=eta)
    if not total:
        return Progress(display=str(step), eta=eta)
    percent = min(100, 100 * step // total)
    return Progress(percent=percent, display=f"{step}/{total} ({percent}%)", eta=eta)


def _metrics(view: StatusInput) -> Metrics:
    received, message = view.last_report, view.termination_message
    return merge(view.old.metrics or Metrics(), received.metrics if received else None, message.metrics if message else None)


# Checkpoints


@dataclass(frozen=True)
class Checkpoints:
    """`kept`: the newest committed checkpoints and the best one. `latest`, `latest_step`: URI and step of the newest checkpoint."""

    kept: list[Checkpoint]
    latest: str | None
    latest_step: int | None


def _checkpoints(view: StatusInput) -> Checkpoints:
    # The key is the step, because an attempt after a rollback commits a step again and replaces the earlier checkpoint of that step.
    by_step = {checkpoint.step: checkpoint for checkpoint in view.old.checkpoints}
    for source in view.facts.reported_checkpoints:
        by_step = {step: known for step, known in by_step.items() if not _is_removed(known, source.checkpoints)}
        by_step |= {new.step: _merge_checkpoint(by_step.get(new.step), new) for new in source.checkpoints}
    ordered = sorted(by_step.values(), key=lambda checkpoint: checkpoint.step)
    kept = ordered[-KEPT_CHECKPOINTS:]
    evaluated = [checkpoint for checkpoint in ordered if checkpoint.eval_loss is not None]
    best = min(evaluated, key=lambda checkpoint: checkpoint.eval_loss or 0.0, default=None)
    if best is not None and best not in kept:
        kept = [best, *kept]
    latest = _latest_uri(view, kept) or view.old.latest_checkpoint
    return Checkpoints(kept, latest, _step_of(latest, kept))


def _merge_checkpoint(known: Checkpoint | None, reported: Checkpoint) -> Checkpoint:
    """Add the known fields to the reported checkpoint. Only the attempt that saved it reports some fields, such as the upload duration."""
    return reported if known is None or known.uri != reported.uri else merge(known, reported)


def _is_removed(checkpoint: Checkpoint, listed: Sequence[Checkpoint]) -> bool:
    """Whether the retention policy removed the checkpoint: the pod lists newer checkpoints, but not this checkpoint.

    A checkpoint that a rollback skipped is newer than all listed checkpoints. Such a checkpoint still exists.
    """
    steps = {other.step for other in listed}
    return bool(steps) and checkpoint.step not in steps and checkpoint.step < max(steps)


def _latest_uri(view: StatusInput, kept: list[Checkpoint]) -> str | None:
    received, message = view.last_report, view.termination_message
    reported = (message.latest_checkpoint if message else None) or (received.latest_checkpoint if received else None)
    return reported or (kept[-1].uri if kept else None)


def _step_of(uri: str | None, kept: list[Checkpoint]) -> int | None:
    if uri is None:
        return None
    match = STEP_IN_URI.search(uri)
    return next((checkpoint.step for checkpoint in kept if checkpoint.uri == uri), int(match[1]) if match else None)


# The resolved configuration


def _resolved(view: StatusInput) -> ResolvedConfig:
    """Merge the run's configuration from the spec, the pods and the trainer's report. Later sources in this list take precedence."""
    facts, received, message = view.facts, view.last_report, view.termination_message
    # A running attempt keeps the values of its start, even if the operator's configuration changes later.
    is_running = facts.current_job is not None and facts.attempt_record is not None
    from_spec = _from_spec(view, facts.acceptance) if isinstance(facts.acceptance, AcceptedSpec) and not is_running else None
    job = view.current_job
    observed = ResolvedConfig(
        config_sha256=(job.config_sha256 if job else None) or None,
        image_digest=next((pod.image_id for pod in facts.attempt_pods if pod.image_id), None),
    )
    trainer = [received.resolved if received else None, message.resolved if message else None]
    return merge(view.old.resolved or ResolvedConfig(), from_spec, observed, *trainer)


def _from_spec(view: StatusInput, acceptance: AcceptedSpec) -> ResolvedConfig:
    spec = view.facts.spec
    gpus = spec.resources.gpus_per_node if spec.resources.gpus_per_node is not None else 1
    ranks = (spec.resources.nodes or 1) * (spec.resources.processes_per_node or max(gpus, 1))
    training = spec.training
    return ResolvedConfig(
        method=spec.method.type,
        model_name=" ".join(clean(model_name(spec.model.source)).split()) if spec.model.source else None,
        world_size=ranks,
        effective_batch=(training.batch_size_per_device or 1) * (training.gradient_accumulation_steps or 1) * ranks,
        image=spec.placement.image or view.facts.config.trainer.image,
        node_pool=acceptance.pool.name if acceptance.pool else None,
        defaults=dict(acceptance.defaults) or None,
        spec_sha256=acceptance.spec_sha256 or None,
        notes=[clean(note) for note in acceptance.notes] or None,
    )


# The end


def _output(view: StatusInput) -> Output | None:
    message = view.termination_message
    return (message.output if message else None) or view.old.output


def _failure(view: StatusInput) -> Failure | None:
    """Return the failure of a finished job. In an unfinished job, return the last attempt's failure until the next attempt trains."""
    plan = view.plan
    if plan.job_end is not None:
        return _final_failure(plan.job_end)
    if plan.attempt_end is not None:
        is_requested = plan.attempt_end.reason in (Reason.SUSPENDED, Reason.CANCELLED)
        return None if is_requested else plan.attempt_end.failure
    received = view.facts.live_report
    is_training = received is not None and received.report.stage is Stage.TRAINING
    return None if is_training else view.old.failure


def _final_failure(job_end: JobEnd) -> Failure | None:
    if job_end.outcome is not Outcome.FAILED:
        return None
    return job_end.failure or Failure(class_=FailureClass.INTERNAL, code=job_end.reason, message="unknown")


def _completion_time(view: StatusInput) -> datetime | None:
    if view.plan.job_end is None:
        return None
    return view.plan.attempt_end.time if view.plan.attempt_end is not None else view.facts.now


def _duration(view: StatusInput) -> str | None:
    end = _completion_time(view)
    if end is None:
        return None
    job = view.facts.current_job
    start = view.old.start_time or (job.created_at if job else None)
    return format_duration(seconds_between(start, end)) if start else NO_VALUE
