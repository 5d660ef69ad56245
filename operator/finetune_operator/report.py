"""From facts, a plan and what came of it to the status: computed in memory, compared, written once. Pure.

The status is what was observed, never what is hoped for. Text that others wrote is cut and cleaned before it gets here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from finetune_api.names import Condition as Kind
from finetune_api.names import FailureClass, Phase, Reason
from finetune_api.status import (
    Attempt,
    Checkpoint,
    Condition,
    Failure,
    FineTuneJobStatus,
    Metrics,
    Progress,
    Resolved,
    Stage,
    Workers,
)

from finetune_operator.deadlines import start_timeout_seconds, waiting_since
from finetune_operator.facts import Facts
from finetune_operator.plan import ActionResult, AttemptEnd, Finish, Outcome, Plan, Situation
from finetune_operator.policies import timeouts
from finetune_operator.policies.acceptance import Accepted, Refused
from finetune_operator.policies.blocking import BlockingCondition
from finetune_operator.text import clean, duration

KEPT_ATTEMPTS = 10
KEPT_CHECKPOINTS = 5
NOTHING = "-"
"""Shown in a column that has no value yet: never blank without meaning."""
Truth = Literal["True", "False", "Unknown"]

PHASE_OF_STAGE: dict[Stage, Phase] = {
    Stage.STARTING: Phase.STARTING,
    Stage.DOWNLOADING: Phase.STARTING,
    Stage.CHECKING: Phase.VALIDATING,
    Stage.LOADING: Phase.STARTING,
    Stage.RESTORING: Phase.STARTING,
    Stage.TRAINING: Phase.RUNNING,
    Stage.SAVING: Phase.RUNNING,
    Stage.EVALUATING: Phase.EVALUATING,
    Stage.UPLOADING: Phase.UPLOADING,
    Stage.STOPPING: Phase.RUNNING,
    Stage.DONE: Phase.UPLOADING,
    Stage.FAILED: Phase.RUNNING,
}
PHASE_OF_OUTCOME = {
    Outcome.SUCCEEDED: Phase.SUCCEEDED,
    Outcome.FAILED: Phase.FAILED,
    Outcome.CANCELLED: Phase.CANCELLED,
}


@dataclass(frozen=True)
class View:
    """Everything a status is computed from, with the answers that several fields need."""

    facts: Facts
    plan: Plan
    acted: ActionResult

    @property
    def old(self) -> FineTuneJobStatus:
        """The status as it was."""
        return self.facts.job.status

    @property
    def queued(self) -> bool:
        """A queue holds the Job."""
        job = self.acted.created_job or self.facts.current_job
        return job is not None and job.is_suspended and not job.is_finished

    @property
    def ready(self) -> int:
        """Pods that are ready."""
        return sum(pod.is_ready for pod in self.facts.active_pods)

    @property
    def waiting(self) -> BlockingCondition | None:
        """What keeps the pods from running."""
        return self.acted.blocking or self.plan.blocking

    @property
    def suspended(self) -> bool:
        """No pods, because the user asked for it."""
        between = self.plan.situation is Situation.ENDED and self.plan.finish is None
        return self.facts.suspend_requested and (self.plan.situation is Situation.SUSPENDED or between)

    @property
    def stopping(self) -> Reason | None:
        """Why the attempt is being ended by us."""
        return self.plan.termination.reason if self.plan.termination else self.facts.termination_reason


def report(facts: Facts, plan: Plan, acted: ActionResult) -> FineTuneJobStatus:
    """The status that is true now."""
    if plan.situation is Situation.DELETING:
        return facts.job.status
    view = View(facts, plan, acted)
    if plan.situation is Situation.FINISHED and plan.finish is None:
        return _seen(view.old, facts.job.generation)
    changes: dict[str, Any] = {
        "observed_generation": facts.job.generation,
        "phase": phase(view),
        "attempts": _attempts(view),
        "workers": _workers(view),
        "resolved": _resolved(view),
        "conditions": _conditions(view),
    }
    changes |= _counters(view) | _progress(view) | _checkpoints(view) | _end(view)
    return view.old.model_copy(update=changes)


def _seen(status: FineTuneJobStatus, generation: int) -> FineTuneJobStatus:
    """A final status, for a spec that was edited since: nothing else of it changes any more."""
    conditions = [one.model_copy(update={"observed_generation": generation}) for one in status.conditions]
    return status.model_copy(update={"observed_generation": generation, "conditions": conditions})


def phase(view: View) -> Phase:
    """One word for people."""
    plan, facts = view.plan, view.facts
    if plan.finish is not None:
        return PHASE_OF_OUTCOME[plan.finish.outcome]
    if view.suspended:
        return Phase.SUSPENDED
    recovering = _recovering(view.old)
    match plan.situation:
        case Situation.REFUSED:
            return Phase.PENDING
        case Situation.BLOCKED:
            return Phase.SUSPENDING if facts.suspend_requested else Phase.RECOVERING if recovering else Phase.PENDING
        case Situation.BACKING_OFF | Situation.ENDED:
            return Phase.RECOVERING
        case Situation.STARTING if view.acted.created_job is None:
            return Phase.PENDING
    if view.stopping is not None:
        stops = {Reason.SUSPENDED: Phase.SUSPENDING, Reason.CANCELLED: Phase.CANCELLING}
        stops |= {Reason.DEADLINE_EXCEEDED: Phase.CANCELLING}
        return stops.get(view.stopping, Phase.RECOVERING)
    if view.queued:
        return Phase.QUEUED
    return _phase_of_pods(view, recovering)


def _recovering(status: FineTuneJobStatus) -> bool:
    """Whether the next or current attempt repairs something; continuing after a suspension does not."""
    ended = [one for one in status.attempts if one.end_time is not None]
    return bool(ended) and ended[-1].reason != Reason.SUSPENDED


def _phase_of_pods(view: View, recovering: bool) -> Phase:
    facts, heard = view.facts, view.facts.live_report
    if heard is None:
        if facts.active_pods and facts.attempt_record is not None and facts.attempt_record.last_step:
            # It trained, as far as status remembers; we have only not asked it yet since we started.
            return Phase.RUNNING
        return Phase.RECOVERING if recovering else Phase.STARTING
    found = PHASE_OF_STAGE[heard.report.stage]
    if found is Phase.EVALUATING and not _last_step(heard.report.progress):
        return Phase.RUNNING
    before = found in (Phase.STARTING, Phase.VALIDATING)
    return Phase.RECOVERING if before and recovering else found


def _last_step(progress: Progress) -> bool:
    return progress.total_steps is not None and (progress.step or 0) >= progress.total_steps


def _counters(view: View) -> dict[str, Any]:
    """Attempt number, retries and running time."""
    facts, plan, old = view.facts, view.plan, view.old
    started = view.acted.created_job is not None or facts.current_job is not None or old.start_time is not None
    ended = plan.attempt_end
    attempt = facts.attempt if ended is None or ended.next_attempt is None else ended.next_attempt
    changes: dict[str, Any] = {"restarts": attempt - 1}
    if started or attempt > 1:
        changes["attempt"] = attempt
    if old.start_time is None and (job := view.acted.created_job or facts.current_job) is not None:
        changes["start_time"] = job.created_at
    if ended is not None:
        used = 0 if ended.progressed else (old.retries_used or 0) + ended.counted
        changes["retries_used"] = used
    quota_lost = view.queued and facts.is_true(Kind.QUOTA_RESERVED)
    if facts.running_since is not None and (ended is not None or quota_lost):
        changes["active_seconds"] = round(facts.running_seconds(ended.time if ended is not None else facts.now))
    if ended is not None and ended.adaptation is not None:
        changes["adaptations"] = [*old.adaptations, ended.adaptation][-KEPT_ATTEMPTS * 2 :]
    return changes


def _attempts(view: View) -> list[Attempt]:
    """The attempts, the current one brought up to date."""
    facts, plan = view.facts, view.plan
    attempts = {one.number: one for one in view.old.attempts}
    job = view.acted.created_job or facts.current_job
    current = attempts.get(facts.attempt)
    if current is None and job is not None:
        current = Attempt(number=facts.attempt, start_time=job.created_at, config_sha256=job.config_sha256 or None)
    if current is None:
        return list(view.old.attempts)
    if facts.last_report is not None:
        current = current.model_copy(update=_heard(view, current))
        _count_lost(attempts, current)
    if plan.termination is not None:
        current = current.model_copy(update={"reason": plan.termination.reason, "message": plan.termination.message})
    if plan.attempt_end is not None:
        current = current.model_copy(update=_ended(plan.attempt_end, current))
        _count_lost(attempts, current)
    attempts[current.number] = current
    return [attempts[number] for number in sorted(attempts)][-KEPT_ATTEMPTS:]


def _heard(view: View, current: Attempt) -> dict[str, Any]:
    assert view.facts.last_report is not None  # noqa: S101 -- the caller asked
    found = view.facts.last_report.report
    steps = view.facts.steps_of_this_attempt(found.checkpoints, found.resumed_from_step)
    changes = {
        "last_step": found.progress.step,
        "resumed_from_step": found.resumed_from_step,
        "committed_step": max([*steps, current.committed_step or 0]) or None,
    }
    return {name: value for name, value in changes.items() if value is not None}


def _count_lost(attempts: dict[int, Attempt], current: Attempt) -> None:
    """Steps of the attempt before that this one repeats, known as soon as it says where it started."""
    before = attempts.get(current.number - 1)
    if before is None or before.last_step is None or before.steps_lost is not None or current.last_step is None:
        return
    lost = max(0, before.last_step - (current.resumed_from_step or 0))
    attempts[before.number] = before.model_copy(update={"steps_lost": lost})


def _ended(ended: AttemptEnd, current: Attempt) -> dict[str, Any]:
    failure, words = ended.failure, ended.termination_message
    changes = {
        "end_time": ended.time,
        "reason": ended.reason,
        "message": clean(failure.message) if failure else None,
        "exit_code": failure.exit_code if failure else 0,
        "node": failure.node if failure else None,
        "counted": ended.counted if failure else None,
        "committed_step": ended.committed_step,
        "last_step": (words.step if words else None) or (failure.step if failure else None),
        "resumed_from_step": words.resumed_from_step if words else None,
    }
    return {name: value for name, value in changes.items() if value is not None}


def _workers(view: View) -> Workers:
    total = view.facts.nodes
    ready = view.ready if view.plan.finish is None else 0
    return Workers(ready=ready, total=total, display=f"{ready}/{total}")


def _progress(view: View) -> dict[str, Any]:
    """Progress and metrics: what the pod says, in the end its last words; never back to nothing."""
    words = view.plan.attempt_end.termination_message if view.plan.attempt_end else None
    heard = view.facts.last_report.report if view.facts.last_report else None
    progress = _merged(
        Progress, view.old.progress, heard.progress if heard else None, words.progress if words else None
    )
    metrics = _merged(Metrics, view.old.metrics, heard.metrics if heard else None, words.metrics if words else None)
    if words is not None and words.step is not None and words.step > (progress.step or 0):
        progress = progress.model_copy(update={"step": words.step})
    return {"progress": _displayed(progress, view), "metrics": metrics}


def _merged(model: type[Any], *values: Any) -> Any:
    """One value, the later fields over the earlier."""
    fields: dict[str, Any] = {}
    for value in values:
        if value is not None:
            fields |= {name: found for name, found in value if found is not None}
    return model(**fields)


def _displayed(progress: Progress, view: View) -> Progress:
    step, total = progress.step, progress.total_steps
    changes: dict[str, Any] = {"display": NOTHING, "eta": NOTHING}
    if step is not None and total:
        percent = min(100, 100 * step // total)
        changes |= {"percent": percent, "display": f"{step}/{total} ({percent}%)"}
    elif step is not None:
        changes["display"] = str(step)
    training = view.plan.situation is Situation.ACTIVE and not view.queued and bool(view.facts.active_pods)
    if training and progress.seconds_remaining is not None:
        changes["eta"] = duration(progress.seconds_remaining)
    if view.plan.finish is not None:
        changes["seconds_remaining"] = None
    return progress.model_copy(update=changes)


def _checkpoints(view: View) -> dict[str, Any]:
    """The newest committed checkpoints and the best."""
    words = view.plan.attempt_end.termination_message if view.plan.attempt_end else None
    heard = view.facts.last_report.report if view.facts.last_report else None
    # By step: after a rollback an attempt commits a step in the place of the one that was left behind.
    known = {one.step: one for one in view.old.checkpoints}
    for source in view.facts.reported_checkpoints:
        known = {step: one for step, one in known.items() if not _removed(one, source.checkpoints)}
        known |= {one.step: _merged_checkpoint(known.get(one.step), one) for one in source.checkpoints}
    ordered = sorted(known.values(), key=lambda one: one.step)
    kept = ordered[-KEPT_CHECKPOINTS:]
    judged = [one for one in ordered if one.eval_loss is not None]
    best = min(judged, key=lambda one: one.eval_loss or 0.0, default=None)
    if best is not None and best not in kept:
        kept = [best, *kept]
    latest = _latest(kept, heard.latest_checkpoint if heard else None, words.latest_checkpoint if words else None)
    return {"checkpoints": kept, "latest_checkpoint": latest or view.old.latest_checkpoint}


def _merged_checkpoint(before: Checkpoint | None, now: Checkpoint) -> Checkpoint:
    """What is said now over what was known of the same one: an attempt that took it over does not know how long it took to save."""
    return now if before is None or before.uri != now.uri else _merged(Checkpoint, before, now)


def _removed(one: Checkpoint, told: Sequence[Checkpoint]) -> bool:
    """Whether retention has taken it: rank 0 tells of newer ones and not of it. What lies behind a rollback is newer than all of them."""
    steps = {checkpoint.step for checkpoint in told}
    return bool(steps) and one.step not in steps and one.step < max(steps)


def _latest(kept: list[Checkpoint], *said: str | None) -> str | None:
    return next((uri for uri in reversed(said) if uri), kept[-1].uri if kept else None)


def _resolved(view: View) -> Resolved:
    """What the run really is: from the spec, from the pods, and from the trainer, which knows best."""
    facts, acceptance = view.facts, view.facts.acceptance
    own: dict[str, Any] = {}
    begun = facts.current_job is not None and facts.attempt_record is not None
    if isinstance(acceptance, Accepted) and not begun:
        # What runs keeps what it began with, whatever the operator's configuration says since.
        own = _from_spec(view, acceptance)
    job = view.acted.created_job or facts.current_job
    if job is not None and job.config_sha256:
        own["config_sha256"] = job.config_sha256
    digest = next((pod.image_id for pod in facts.attempt_pods if pod.image_id), None)
    if digest:
        own["image_digest"] = digest
    words = view.plan.attempt_end.termination_message if view.plan.attempt_end else None
    said = [facts.last_report.report.resolved if facts.last_report else None, words.resolved if words else None]
    merged: Resolved = _merged(Resolved, view.old.resolved, Resolved(**own), *said)
    return merged


def _from_spec(view: View, acceptance: Accepted) -> dict[str, Any]:
    spec = view.facts.spec
    gpus = spec.resources.gpus_per_node if spec.resources.gpus_per_node is not None else 1
    ranks = (spec.resources.nodes or 1) * (spec.resources.processes_per_node or max(gpus, 1))
    training = spec.training
    batch = (training.batch_size_per_device or 1) * (training.gradient_accumulation_steps or 1) * ranks
    return {
        "method": spec.method.type,
        "world_size": ranks,
        "effective_batch": batch,
        "image": spec.placement.image or view.facts.config.trainer.image,
        "node_pool": acceptance.pool.name if acceptance.pool else None,
        "defaults": dict(acceptance.defaults) or None,
        "spec_sha256": acceptance.spec_sha256 or None,
        "notes": list(acceptance.notes) or None,
    }


def _end(view: View) -> dict[str, Any]:
    """Failure, output and times."""
    plan, old = view.plan, view.old
    changes: dict[str, Any] = {}
    ended = plan.attempt_end
    if ended is not None:
        wished = ended.reason in (Reason.SUSPENDED, Reason.CANCELLED)
        changes["failure"] = None if wished else ended.failure
        if ended.termination_message is not None and ended.termination_message.output is not None:
            changes["output"] = ended.termination_message.output
    elif view.facts.live_report is not None and view.facts.live_report.report.stage is Stage.TRAINING:
        # The attempt trains: whatever ended the one before is history, told in `attempts`.
        changes["failure"] = None
    if plan.finish is None:
        return changes
    changes["failure"] = _final_failure(plan.finish)
    finished = ended.time if ended is not None else view.facts.now
    changes["completion_time"] = finished
    start = old.start_time or (view.facts.current_job.created_at if view.facts.current_job else None)
    changes["duration"] = duration(timeouts.seconds_between(start, finished)) if start else NOTHING
    return changes


def _final_failure(finish: Finish) -> Failure | None:
    if finish.outcome is Outcome.FAILED:
        return finish.failure or Failure(class_=FailureClass.INTERNAL, code=finish.reason, message="unknown")
    return None


# Conditions


def _conditions(view: View) -> list[Condition]:
    """All conditions, in the order of the vocabulary."""
    found = [
        _accepted(view), _quota(view), _pods_ready(view), _suspended(view), _checkpoints_healthy(view),
        _succeeded(view), _finished(view), _reconciling(view), _stalled(view),
    ]  # fmt: skip
    old = {one.type: one for one in view.old.conditions}
    return [_dated(one, old.get(one.type), view) for one in found if one is not None]


def _dated(new: Condition, old: Condition | None, view: View) -> Condition:
    """With the time its status last changed: its own, if somebody else wrote that down, else this look's."""
    same = old is not None and old.status == new.status and old.last_transition_time is not None
    when = old.last_transition_time if same and old else None
    own = new.last_transition_time
    # The later of both: it may have been lost and won again while nobody looked.
    when = max(when, own) if when and own else when or own or view.facts.now
    return new.model_copy(update={"last_transition_time": when, "observed_generation": view.facts.job.generation})


def _condition(kind: Kind, status: Truth, reason: Reason, message: str) -> Condition:
    return Condition(type=kind, status=status, reason=reason.value, message=clean(message))


def _accepted(view: View) -> Condition:
    acceptance = view.facts.acceptance
    if isinstance(acceptance, Refused):
        message = acceptance.message + (f"; {acceptance.hint}" if acceptance.hint and not acceptance.is_final else "")
        return _condition(Kind.ACCEPTED, "False", acceptance.reason, message)
    return _condition(Kind.ACCEPTED, "True", Reason.ACCEPTED, "the spec can be run as written")


def _quota(view: View) -> Condition | None:
    queue = view.facts.spec.placement.queue_name
    if not queue and not view.queued and view.facts.condition(Kind.QUOTA_RESERVED) is None:
        return None
    where = f"queue {queue}" if queue else "the queue"
    job = view.acted.created_job or view.facts.current_job
    if job is not None and not view.queued and not job.is_finished:
        reserved = _condition(Kind.QUOTA_RESERVED, "True", Reason.PROGRESSING, f"{where} admitted attempt {job.attempt}")
        return reserved.model_copy(update={"last_transition_time": view.facts.admitted_at})
    if job is not None and job.is_finished:
        return _condition(Kind.QUOTA_RESERVED, "False", Reason.PROGRESSING, "the attempt is over, its quota is free")
    if job is None:
        return _condition(Kind.QUOTA_RESERVED, "False", Reason.PROGRESSING, "there is no Job that asks for quota")
    return _condition(Kind.QUOTA_RESERVED, "False", Reason.QUEUED, f"waiting for quota in {where}")


def _pods_ready(view: View) -> Condition:
    total, ready = view.facts.nodes, view.ready
    if view.plan.finish is not None:
        return _condition(Kind.PODS_READY, "False", Reason.PODS_NOT_READY, "the job is over")
    if ready >= total:
        return _condition(Kind.PODS_READY, "True", Reason.PODS_READY, f"all {total} pods are ready")
    waiting = view.waiting
    if waiting is not None:
        message = f"waiting for {total - ready} of {total} pods: {waiting.message}"
        return _condition(Kind.PODS_READY, "False", waiting.reason, message)
    return _condition(Kind.PODS_READY, "False", Reason.PODS_NOT_READY, f"{ready} of {total} pods are ready")


def _suspended(view: View) -> Condition:
    if view.suspended:
        step = view.facts.next_start_step
        where = f"the next attempt continues from step {step}" if step else "nothing is committed yet"
        return _condition(Kind.SUSPENDED, "True", Reason.SUSPENDED, f"spec.suspend is true and no pod is left; {where}")
    if view.facts.suspend_requested and view.plan.finish is None:
        return _condition(Kind.SUSPENDED, "False", Reason.SUSPENDING, "spec.suspend is true; the pods are saving")
    if view.facts.condition(Kind.SUSPENDED) is not None and view.facts.is_true(Kind.SUSPENDED):
        return _condition(Kind.SUSPENDED, "False", Reason.RESUMED, "spec.suspend is false again")
    return _condition(Kind.SUSPENDED, "False", Reason.PROGRESSING, "spec.suspend is false")


def _checkpoints_healthy(view: View) -> Condition:
    heard = view.facts.last_report
    problem = heard.report.health.checkpoint_problem if heard else None
    if problem:
        word = problem.split(":")[0].strip()
        own = {one.value: one for one in (Reason.STAGING_DISK_FULL, Reason.CHECKPOINT_DAMAGED)}
        return _condition(Kind.CHECKPOINTS_HEALTHY, "False", own.get(word, Reason.CHECKPOINT_NOT_STORED), problem)
    latest = _checkpoints(view)["latest_checkpoint"]
    if latest:
        return _condition(Kind.CHECKPOINTS_HEALTHY, "True", Reason.CHECKPOINT_COMMITTED, f"newest: {latest}")
    return _condition(Kind.CHECKPOINTS_HEALTHY, "Unknown", Reason.PROGRESSING, "no checkpoint is committed yet")


def _succeeded(view: View) -> Condition:
    finish = view.plan.finish
    if finish is None:
        return _condition(Kind.SUCCEEDED, "Unknown", Reason.PROGRESSING, "the job is not over")
    if finish.outcome is Outcome.SUCCEEDED:
        return _condition(Kind.SUCCEEDED, "True", Reason.SUCCEEDED, "the final artefact is committed")
    return _condition(Kind.SUCCEEDED, "False", finish.reason, _why(finish))


def _finished(view: View) -> Condition:
    finish = view.plan.finish
    if finish is None:
        return _condition(Kind.FINISHED, "False", Reason.PROGRESSING, "the job is not over")
    reasons = {
        Outcome.SUCCEEDED: Reason.SUCCEEDED, Outcome.FAILED: Reason.FAILED, Outcome.CANCELLED: Reason.CANCELLED,
    }  # fmt: skip
    return _condition(Kind.FINISHED, "True", reasons[finish.outcome], "no further attempt will be made")


def _why(finish: Finish) -> str:
    if finish.outcome is Outcome.CANCELLED:
        return "spec.cancel is true; the newest checkpoint is kept"
    failure = finish.failure
    if failure is None:
        return "the job ended without its artefact"
    return f"{failure.class_} {failure.code}: {failure.message}" + (f"; {failure.hint}" if failure.hint else "")


def _reconciling(view: View) -> Condition | None:
    """kstatus: there is work going on."""
    if view.plan.finish is not None or view.suspended:
        return None
    reason, message = _doing(view)
    return _condition(Kind.RECONCILING, "True", reason, message)


def _doing(view: View) -> tuple[Reason, str]:
    """What is going on, in one sentence."""
    plan, facts = view.plan, view.facts
    if plan.refused is not None:
        return plan.refused.reason, plan.refused.message
    if view.stopping is not None:
        record = facts.attempt_record
        why = plan.termination.message if plan.termination else (record.message if record else "") or view.stopping
        return view.stopping, f"attempt {facts.attempt} is being ended: {why}"
    if plan.attempt_end is not None:
        failure = plan.attempt_end.failure
        return Reason.RETRYING, f"attempt {facts.attempt} ended: {failure.message if failure else plan.attempt_end.reason}"
    if plan.situation is Situation.BACKING_OFF:
        until = plan.reconcile_at.strftime("%H:%M:%SZ") if plan.reconcile_at else "soon"
        return Reason.RETRYING, f"attempt {facts.attempt} starts at {until}"
    if view.waiting is not None:
        return view.waiting.reason, view.waiting.message
    if view.queued:
        return Reason.QUEUED, "waiting for quota in the queue"
    heard = facts.live_report
    detail = heard.report.detail if heard else None
    stage = (
        heard.report.stage
        if heard
        else Stage.TRAINING
        if _phase_of_pods(view, False) is Phase.RUNNING
        else Stage.STARTING
    )
    return Reason.PROGRESSING, f"attempt {facts.attempt}: {stage}" + (f", {detail}" if detail else "")


def _stalled(view: View) -> Condition | None:
    """kstatus: a terminal failure, or a human is needed."""
    plan, facts = view.plan, view.facts
    if plan.finish is not None:
        if plan.finish.outcome is Outcome.FAILED:
            return _condition(Kind.STALLED, "True", plan.finish.reason, _why(plan.finish))
        return None
    begin = waiting_since(facts)
    limit = start_timeout_seconds(facts)
    late = begin is not None and timeouts.seconds_between(begin, facts.now) >= limit
    if facts.is_true(Kind.PODS_READY):
        return None  # until this look: what came before it was no waiting
    starting = plan.situation in (Situation.STARTING, Situation.BLOCKED) and view.waiting is not None
    running = plan.situation is Situation.ACTIVE and plan.termination is None and not view.queued
    blocked = plan.refused is not None or starting or (running and view.ready < facts.nodes)
    if not (late and blocked):
        return None
    why = plan.refused.message if plan.refused else view.waiting.message if view.waiting else "the pods are not ready"
    return _condition(Kind.STALLED, "True", Reason.START_TIMEOUT, f"policy.startTimeoutSeconds {limit} passed: {why}")
