"""From facts to a plan. Pure: no clock, no network, no memory; the same facts give the same plan.

The order of the questions is the story of a job: is it over, may it start, is an attempt on its way, did it end, what comes
next. What must not be forgotten is written to status before it is acted on: the reason an attempt is ended for (`condemn`), the
number of the next attempt (`ended`). Each of these is one look at the job; the next look continues from what was written.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_api.exits import RetryPolicy
from finetune_api.names import Condition, ExitCode, FailureClass, Reason, attempt_job_name, attempt_of_uri
from finetune_api.pod import ProgressReport, TerminationMessage
from finetune_api.status import Checkpoint, Failure

from finetune_operator.facts import Facts
from finetune_operator.plan import AttemptEnd, Finish, Outcome, Plan, Situation, Termination
from finetune_operator.policies import timeouts
from finetune_operator.policies.acceptance import Refused
from finetune_operator.policies.blocking import BlockingCondition, blocking_condition_of_pods
from finetune_operator.policies.cause import Cause, cause_of
from finetune_operator.policies.retry import GiveUp, Retry, deadline_failure, retry_or_give_up
from finetune_operator.views import JobView, PodView


def decide(facts: Facts) -> Plan:
    """The plan for one job."""
    if facts.job.is_deleting:
        return Plan(Situation.DELETING)
    if facts.is_finished:
        return _finished(facts)
    current = facts.current_job
    if current is not None:
        return _with_job(facts, current)
    record = facts.attempt_record
    if record is not None and record.start_time is not None and record.end_time is None:
        return _job_gone(facts)
    return _before_attempt(facts)


def _finished(facts: Facts) -> Plan:
    """Nothing runs any more; Jobs and Pods go when their time has come."""
    ttl = (facts.job.spec.get("policy") or {}).get("ttlSecondsAfterFinished")
    expiry = timeouts.ttl_expires_at(ttl if isinstance(ttl, int) else None, facts.job.status.completion_time)
    expired = expiry is not None and facts.now >= expiry
    unwanted = tuple(one for one in facts.owned_jobs if not one.is_deleting and (expired or not one.is_finished))
    # Pods go with their Job; those that somebody took from it would stay for ever.
    known = {one.uid for one in facts.owned_jobs}
    left = [pod for pod in facts.owned_pods if not (pod.is_deleted or pod.deletion_timestamp) and pod.job_uid not in known]
    pods = tuple(pod for pod in left if expired or not pod.is_finished)
    wake = None if expired else timeouts.next_reconcile_at(facts.now, expiry)
    return Plan(Situation.FINISHED, delete_jobs=unwanted, delete_pods=pods, reconcile_at=wake, is_clean=not (unwanted or pods))


def _before_attempt(facts: Facts) -> Plan:
    """No Job of the current attempt was ever made."""
    if facts.cancel_requested:
        return Plan(Situation.FINISHED, finish=Finish(Outcome.CANCELLED, Reason.CANCELLED))
    refused = facts.acceptance if isinstance(facts.acceptance, Refused) else None
    if refused is not None and refused.is_final:
        return _rejected(refused)
    leftovers = _leftovers(facts)
    if leftovers is not None:
        return leftovers
    if facts.suspend_requested:
        return Plan(Situation.SUSPENDED)
    if refused is not None:
        return Plan(Situation.REFUSED, refused=refused, reconcile_at=timeouts.next_reconcile_at(facts.now, _start_timeout(facts)))
    taken = next((one for one in facts.jobs if one.name == attempt_job_name(facts.job.name, facts.attempt)), None)
    if taken is not None:
        message = f"Job {taken.name} belongs to another object (uid {taken.owner_uid or 'unknown'})"
        waiting = BlockingCondition(Reason.CHILDREN_CONFLICT, message)
        return Plan(Situation.BLOCKED, blocking=waiting, reconcile_at=timeouts.next_reconcile_at(facts.now, _start_timeout(facts)))
    began, over = _pause(facts)
    # A pause never lasts longer than it was meant to, whatever the clocks say.
    if began is not None and over is not None and began <= facts.now < over:
        return Plan(Situation.BACKING_OFF, reconcile_at=timeouts.next_reconcile_at(facts.now, over))
    return Plan(Situation.STARTING, create_attempt=facts.attempt, delete_jobs=_old_jobs(facts))


FORCE_AGAIN = 30.0
"""Seconds after which a pod that was removed by force and is still there is removed again."""
UNHARMED = (Reason.SUSPENDED, Reason.OUT_OF_MEMORY, Reason.DIVERGED)
"""Ends of attempts after which the next starts at once: the user's wish, or something was changed."""


def _rejected(refused: Refused) -> Plan:
    failure = Failure(class_=FailureClass.USER, code=refused.reason, message=refused.message, hint=refused.hint or None)
    finish = Finish(Outcome.FAILED, refused.reason, failure)
    return Plan(Situation.FINISHED, refused=refused, finish=finish)


def _leftovers(facts: Facts) -> Plan | None:
    """Earlier attempts must be over before another begins: at most one is ever active."""
    jobs = tuple(one for one in facts.owned_jobs if not one.is_finished or one.is_deleting)
    known = {one.uid for one in facts.owned_jobs}
    pods = tuple(pod for pod in facts.owned_pods if not pod.is_finished and pod.job_uid not in known)
    if not jobs and not pods:
        return None
    return Plan(
        Situation.BLOCKED,
        delete_jobs=tuple(one for one in jobs if not one.is_deleting),
        delete_pods=tuple(pod for pod in pods if not pod.deletion_timestamp),
        force_delete_pods=tuple(timeouts.pods_of_lost_nodes(facts.owned_pods, facts.config.lost_node_seconds, facts.now)),
        blocking=BlockingCondition(Reason.PROGRESSING, "waiting for the pods of the last attempt to end"),
        reconcile_at=timeouts.next_reconcile_at(facts.now, _force_time(facts, facts.owned_pods), _start_timeout(facts)),
    )


def _with_job(facts: Facts, current: JobView) -> Plan:
    """The current attempt's Job exists."""
    if current.completed_at is not None:
        return _ended(facts, None, current.completed_at)
    if facts.termination_reason is not None or current.is_deleting:
        return _stopping(facts, current)
    if current.failed_at is not None:
        return _ended(facts, cause_of(current, facts.newest_pods), current.failed_at)
    condemn = _condemn(facts)
    if condemn is not None:
        return Plan(Situation.ACTIVE, termination=condemn)
    pods = facts.active_pods
    rank0 = next((pod for pod in pods if pod.index == 0 and pod.phase == "Running"), None)
    ready = sum(pod.is_ready for pod in pods) >= facts.nodes
    waiting = None if ready or current.is_suspended else (blocking_condition_of_pods(pods) or facts.blocking)
    limit = None if current.is_suspended else timeouts.deadline_at(facts.spec, facts.earlier_running_seconds, facts.running_since)
    wakes = [limit, _force_time(facts, pods), _stall_time(facts), None if ready else _start_timeout(facts)]
    return Plan(
        Situation.ACTIVE,
        blocking=waiting,
        scrape_pod=rank0 if rank0 is not None and rank0.ip else None,
        reconcile_at=timeouts.next_reconcile_at(facts.now, *wakes),
        delete_jobs=_old_jobs(facts),
    )


def _condemn(facts: Facts) -> Termination | None:
    """Whether the running attempt must be ended, and why."""
    if facts.cancel_requested:
        return Termination(Reason.CANCELLED, "spec.cancel is true")
    if facts.suspend_requested:
        return Termination(Reason.SUSPENDED, "spec.suspend is true")
    limit = facts.spec.policy.active_deadline_seconds
    if limit is not None and facts.running_since is not None and facts.running_seconds(facts.now) >= limit:
        return Termination(Reason.DEADLINE_EXCEEDED, f"policy.activeDeadlineSeconds {limit} passed")
    gone = timeouts.pods_of_lost_nodes(facts.active_pods, facts.config.lost_node_seconds, facts.now)
    if gone:
        return Termination(Reason.NODE_LOST, f"pod {gone[0].name} does not end: node {gone[0].node or 'unknown'} is lost")
    report, spoke = _last_heard(facts)
    late = timeouts.stall_message(facts.spec, report, spoke, facts.active_pods, facts.now, _unready_since(facts))
    return Termination(Reason.STALLED, late) if late else None


def _stopping(facts: Facts, current: JobView) -> Plan:
    """The attempt's Job is to go, or going. Its name in status tells why, unless somebody else deleted it."""
    if facts.termination_reason is None:
        return Plan(Situation.TERMINATING, termination=Termination(Reason.PREEMPTED, "somebody deleted the Job of this attempt"))
    return Plan(
        Situation.TERMINATING,
        delete_jobs=() if current.is_deleting else (current,),
        force_delete_pods=tuple(timeouts.pods_of_lost_nodes(facts.attempt_pods, facts.config.lost_node_seconds, facts.now)),
        reconcile_at=timeouts.next_reconcile_at(facts.now, _force_time(facts, facts.attempt_pods)),
    )


def _job_gone(facts: Facts) -> Plan:
    """The attempt had a Job and it is gone: pods may be left behind, then the attempt is over."""
    left = tuple(pod for pod in facts.attempt_pods if not pod.is_finished)
    if left:
        return Plan(
            Situation.TERMINATING,
            delete_pods=tuple(pod for pod in left if not pod.deletion_timestamp),
            force_delete_pods=tuple(timeouts.pods_of_lost_nodes(left, facts.config.lost_node_seconds, facts.now)),
            reconcile_at=timeouts.next_reconcile_at(facts.now, _force_time(facts, left)),
        )
    if succeeded(facts):
        return _ended(facts, None, facts.last_seen_at)
    return _ended(facts, _condemned_cause(facts) or cause_of(None, facts.newest_pods), facts.last_seen_at)


def succeeded(facts: Facts) -> bool:
    """Whether every rank's last pod ended with 0: by contract the final artefact is committed then."""
    ends = [pod.terminated.exit_code if pod.terminated else None for pod in facts.newest_pods]
    return len(ends) == facts.nodes and all(code == ExitCode.OK for code in ends)


def _condemned_cause(facts: Facts) -> Cause | None:
    """The cause of an attempt that we ended: the reason that was written down, unless a pod tells of something graver."""
    reason, record = facts.termination_reason, facts.attempt_record
    if reason is None or record is None:
        return None
    own = cause_of(None, facts.newest_pods)
    if own.retry is RetryPolicy.NEVER:
        return own
    message = record.message or str(reason)
    if reason is Reason.STALLED:
        failure = Failure(
            class_=FailureClass.INFRASTRUCTURE, code=Reason.STALLED, message=message, exit_code=ExitCode.PEER
        )
        return Cause(reason, failure, RetryPolicy.COUNTED)
    failure = Failure(
        class_=FailureClass.PREEMPTED, code=reason, message=message,
        exit_code=own.failure.exit_code, node=own.failure.node,
    )  # fmt: skip
    # Somebody who deletes our Jobs may go on doing so: only that end, of all we write down, counts.
    return Cause(reason, failure, RetryPolicy.COUNTED if reason is Reason.PREEMPTED else RetryPolicy.FREE)


def _ended(facts: Facts, cause: Cause | None, when: datetime) -> Plan:
    """The attempt is over (`cause` None: with success). What comes next is written with its end, in one write."""
    words = rank0_termination_message(facts)
    committed = newest_step_committed_by_attempt(facts, words)
    if cause is None:
        ending = AttemptEnd(Reason.SUCCEEDED, when, None, words, committed_step=committed)
        return Plan(Situation.ENDED, attempt_end=ending, finish=Finish(Outcome.SUCCEEDED, Reason.SUCCEEDED))
    progressed = committed is not None and committed > facts.newest_step_of_earlier_attempts
    finish, follow = _follow(facts, cause, progressed, when)
    ending = AttemptEnd(
        reason=cause.reason,
        time=when,
        failure=cause.failure,
        termination_message=words,
        counted=follow.counted if follow else False,
        progressed=progressed,
        committed_step=committed,
        next_attempt=None if finish else facts.attempt + 1,
        adaptation=follow.adaptation if follow else None,
    )
    return Plan(Situation.ENDED, attempt_end=ending, finish=finish)


def _follow(
    facts: Facts, cause: Cause, progressed: bool, when: datetime
) -> tuple[Finish | None, Retry | None]:
    """The end of the job, or what the next attempt is."""
    if facts.cancel_requested or cause.reason is Reason.CANCELLED:
        return Finish(Outcome.CANCELLED, Reason.CANCELLED), None
    limit = facts.spec.policy.active_deadline_seconds
    too_late = Finish(Outcome.FAILED, Reason.DEADLINE_EXCEEDED, deadline_failure(limit or 0))
    if cause.reason is Reason.DEADLINE_EXCEEDED:
        return too_late, None
    follow = retry_or_give_up(
        cause, facts.spec, facts.job.status, progressed=progressed, now=facts.now, attempt=facts.attempt
    )  # fmt: skip
    if isinstance(follow, GiveUp):
        return Finish(Outcome.FAILED, follow.reason, follow.failure), None
    if limit is not None and facts.running_seconds(when) >= limit:
        return too_late, None  # nobody looked when the time was over: the next attempt would have none
    return None, follow


def rank0_termination_message(facts: Facts) -> TerminationMessage | None:
    """The last words of the newest pod of rank 0 that left any."""
    pods = sorted((p for p in facts.attempt_pods if p.index == 0), key=lambda p: p.created_at, reverse=True)
    return next((words for pod in pods if (words := pod.termination_message) is not None), None)


def newest_step_committed_by_attempt(facts: Facts, words: TerminationMessage | None) -> int | None:
    """Newest step that the current attempt is known to have committed; None: none that is known.

    Pods tell of all checkpoints there are, also of those that earlier attempts made.
    """
    # A checkpoint that a replaced pod of this attempt reported is known from status only.
    steps = [one.step for one in facts.job.status.checkpoints if attempt_of_uri(one.uri) == facts.attempt]
    for source in facts.reported_checkpoints:
        steps += facts.steps_of_this_attempt(source.checkpoints, source.resumed_from_step)
    if words is not None and words.committed_step is not None:
        newest = Checkpoint(step=words.committed_step, uri=words.checkpoint or "")
        steps += facts.steps_of_this_attempt([newest], words.resumed_from_step)
    record = facts.attempt_record
    if record is not None and record.committed_step is not None:
        steps.append(record.committed_step)
    return max(steps) if steps else None


def _old_jobs(facts: Facts) -> tuple[JobView, ...]:
    """Finished Jobs that nobody needs: all but the newest of the earlier attempts, which is kept for its logs."""
    earlier = sorted((one for one in facts.owned_jobs if one.attempt < facts.attempt), key=lambda one: one.attempt)
    return tuple(one for one in earlier[:-1] if one.is_finished and not one.is_deleting)


def _start_timeout(facts: Facts) -> datetime | None:
    """When a job that does not get its pods counts as stalled."""
    begin = waiting_since(facts)
    return _later(begin, facts.spec.policy.start_timeout_seconds or DEFAULT_START_TIMEOUT_SECONDS) if begin else None


DEFAULT_START_TIMEOUT_SECONDS = 1800
"""`policy.startTimeoutSeconds` where the spec is not resolved."""


def waiting_since(facts: Facts) -> datetime | None:
    """Since when the pods, or the Job that would make them, are waited for; None: they are not (queued, suspended)."""
    ready = facts.condition(Condition.PODS_READY)
    if facts.running_since is not None:
        lost_ready = ready.last_transition_time if ready and ready.status == "False" else None
        return max(facts.running_since, lost_ready) if lost_ready else facts.running_since
    accepted = facts.condition(Condition.ACCEPTED)
    if isinstance(facts.acceptance, Refused) and accepted is not None and accepted.status == "False":
        return accepted.last_transition_time
    if facts.current_job is not None or ready is None or ready.status == "True" or ready.last_transition_time is None:
        return None
    if facts.is_true(Condition.SUSPENDED):
        return None  # until this look: what came before it was no waiting
    suspended, (_, paused_until) = facts.condition(Condition.SUSPENDED), _pause(facts)
    others = [suspended.last_transition_time if suspended else None, paused_until]
    return max([ready.last_transition_time, *(one for one in others if one is not None)])


def _pause(facts: Facts) -> tuple[datetime | None, datetime | None]:
    """From when to when nothing is begun after the last attempt; None: there is none that ended."""
    attempts = facts.job.status.attempts
    ended = attempts[-1].end_time if attempts else None
    return ended, _later(ended, timeouts.backoff_seconds(attempts, facts.config.retry, UNHARMED)) if ended else None


def _stall_time(facts: Facts) -> datetime | None:
    report, spoke = _last_heard(facts)
    unready = _unready_since(facts)
    silent = [one for one in (spoke, unready) if one is not None and one <= facts.now]
    return _later(max(silent), timeouts.stall_limit_seconds(facts.spec, report) + 1) if spoke and silent else None


def _last_heard(facts: Facts) -> tuple[ProgressReport | None, datetime | None]:
    """What the attempt's pods said last, if this operator heard it, and when they spoke."""
    heard = facts.live_report
    return (heard.report, heard.time) if heard else (None, _silent_since(facts))


def _silent_since(facts: Facts) -> datetime | None:
    """When this attempt's pods, which have trained and are not ready, spoke last or could first have: as status tells, for an
    operator that was started meanwhile and has heard nothing itself. None: they are ready, do not run (yet), or have never trained.
    """
    record, progress, ready = facts.attempt_record, facts.job.status.progress, facts.condition(Condition.PODS_READY)
    rank0 = facts.rank0
    if record is None or not record.last_step or rank0 is None or rank0.phase != "Running":
        return None
    if ready is None or ready.status == "True" or ready.last_transition_time is None:
        return None
    # A queue may have replaced the pod within the attempt. What was told last has its node's clock: it can only delay.
    began, told = rank0.running_since or rank0.created_at, progress.update_time if progress else None
    return max(began, told) if told else began


def _unready_since(facts: Facts) -> datetime | None:
    """Since when status finds the pods not ready: from this look on, if it still finds them ready. None: it does not say."""
    ready = facts.condition(Condition.PODS_READY)
    return facts.now if ready is not None and ready.status == "True" else ready.last_transition_time if ready else None


def _force_time(facts: Facts, pods: tuple[PodView, ...]) -> datetime | None:
    """When the first pod that is going counts as lost; where one does already, when to remove it once more: a finalizer may hold it."""
    going = [pod.deletion_timestamp for pod in pods if pod.deletion_timestamp and not pod.is_deleted]
    if timeouts.pods_of_lost_nodes(pods, facts.config.lost_node_seconds, facts.now):
        return _later(facts.now, FORCE_AGAIN)
    return _later(min(going), facts.config.lost_node_seconds + 1) if going else None


def _later(moment: datetime, seconds: float) -> datetime:
    return moment + timedelta(seconds=seconds)
