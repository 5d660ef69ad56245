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
from finetune_operator.plan import Condemned, Ending, Finish, Outcome, Plan, Situation
from finetune_operator.policies import clock
from finetune_operator.policies.acceptance import Refused
from finetune_operator.policies.cause import Cause, cause_of
from finetune_operator.policies.retry import Again, Stop, after, deadline_failure
from finetune_operator.policies.waiting import Waiting, pods_waiting
from finetune_operator.views import JobView, PodView


def decide(facts: Facts) -> Plan:
    """The plan for one job."""
    if facts.job.deleting:
        return Plan(Situation.LEAVING)
    if facts.finished:
        return _finished(facts)
    current = facts.current
    if current is not None:
        return _with_job(facts, current)
    record = facts.record
    if record is not None and record.start_time is not None and record.end_time is None:
        return _job_gone(facts)
    return _before_attempt(facts)


def _finished(facts: Facts) -> Plan:
    """Nothing runs any more; Jobs and Pods go when their time has come."""
    ttl = (facts.job.spec.get("policy") or {}).get("ttlSecondsAfterFinished")
    expiry = clock.expiry(ttl if isinstance(ttl, int) else None, facts.job.status.completion_time)
    expired = expiry is not None and facts.now >= expiry
    unwanted = tuple(one for one in facts.mine if not one.deleting and (expired or not one.finished))
    # Pods go with their Job; those that somebody took from it would stay for ever.
    known = {one.uid for one in facts.mine}
    left = [pod for pod in facts.own_pods if not (pod.gone or pod.deleting) and pod.job_uid not in known]
    pods = tuple(pod for pod in left if expired or not pod.over)
    wake = None if expired else clock.next_look(facts.now, expiry)
    return Plan(Situation.FINISHED, delete=unwanted, delete_pods=pods, wake=wake, cleaned=not (unwanted or pods))


def _before_attempt(facts: Facts) -> Plan:
    """No Job of the current attempt was ever made."""
    if facts.cancel:
        return Plan(Situation.FINISHED, finish=Finish(Outcome.CANCELLED, Reason.CANCELLED))
    refused = facts.acceptance if isinstance(facts.acceptance, Refused) else None
    if refused is not None and refused.final:
        return _rejected(refused)
    leftovers = _leftovers(facts)
    if leftovers is not None:
        return leftovers
    if facts.suspend:
        return Plan(Situation.SUSPENDED)
    if refused is not None:
        return Plan(Situation.REFUSED, refused=refused, wake=clock.next_look(facts.now, _start_timeout(facts)))
    taken = next((one for one in facts.jobs if one.name == attempt_job_name(facts.job.name, facts.attempt)), None)
    if taken is not None:
        message = f"Job {taken.name} belongs to another object (uid {taken.owner_uid or 'unknown'})"
        waiting = Waiting(Reason.CHILDREN_CONFLICT, message)
        return Plan(Situation.BLOCKED, waiting=waiting, wake=clock.next_look(facts.now, _start_timeout(facts)))
    began, over = _pause(facts)
    # A pause never lasts longer than it was meant to, whatever the clocks say.
    if began is not None and over is not None and began <= facts.now < over:
        return Plan(Situation.PAUSING, wake=clock.next_look(facts.now, over))
    return Plan(Situation.STARTING, create=facts.attempt, delete=_old_jobs(facts))


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
    jobs = tuple(one for one in facts.mine if not one.finished or one.deleting)
    known = {one.uid for one in facts.mine}
    pods = tuple(pod for pod in facts.own_pods if not pod.over and pod.job_uid not in known)
    if not jobs and not pods:
        return None
    return Plan(
        Situation.BLOCKED,
        delete=tuple(one for one in jobs if not one.deleting),
        delete_pods=tuple(pod for pod in pods if not pod.deleting),
        force=tuple(clock.lost(facts.own_pods, facts.config.lost_node_seconds, facts.now)),
        waiting=Waiting(Reason.PROGRESSING, "waiting for the pods of the last attempt to end"),
        wake=clock.next_look(facts.now, _force_time(facts, facts.own_pods), _start_timeout(facts)),
    )


def _with_job(facts: Facts, current: JobView) -> Plan:
    """The current attempt's Job exists."""
    if current.complete is not None:
        return _ended(facts, None, current.complete)
    if facts.condemned is not None or current.deleting:
        return _stopping(facts, current)
    if current.failed is not None:
        return _ended(facts, cause_of(current, facts.last_pods), current.failed)
    condemn = _condemn(facts)
    if condemn is not None:
        return Plan(Situation.ACTIVE, condemn=condemn)
    pods = facts.live
    rank0 = next((pod for pod in pods if pod.index == 0 and pod.phase == "Running"), None)
    ready = sum(pod.ready for pod in pods) >= facts.nodes
    waiting = None if ready or current.suspended else (pods_waiting(pods) or facts.obstacle)
    limit = None if current.suspended else clock.deadline(facts.spec, facts.active, facts.running_since)
    wakes = [limit, _force_time(facts, pods), _stall_time(facts), None if ready else _start_timeout(facts)]
    return Plan(
        Situation.ACTIVE,
        waiting=waiting,
        scrape=rank0 if rank0 is not None and rank0.ip else None,
        wake=clock.next_look(facts.now, *wakes),
        delete=_old_jobs(facts),
    )


def _condemn(facts: Facts) -> Condemned | None:
    """Whether the running attempt must be ended, and why."""
    if facts.cancel:
        return Condemned(Reason.CANCELLED, "spec.cancel is true")
    if facts.suspend:
        return Condemned(Reason.SUSPENDED, "spec.suspend is true")
    limit = facts.spec.policy.active_deadline_seconds
    if limit is not None and facts.running_since is not None and facts.ran(facts.now) >= limit:
        return Condemned(Reason.DEADLINE_EXCEEDED, f"policy.activeDeadlineSeconds {limit} passed")
    gone = clock.lost(facts.live, facts.config.lost_node_seconds, facts.now)
    if gone:
        return Condemned(Reason.NODE_LOST, f"pod {gone[0].name} does not end: node {gone[0].node or 'unknown'} is lost")
    report, spoke = _last_heard(facts)
    late = clock.stalled(facts.spec, report, spoke, facts.live, facts.now, _unready_since(facts))
    return Condemned(Reason.STALLED, late) if late else None


def _stopping(facts: Facts, current: JobView) -> Plan:
    """The attempt's Job is to go, or going. Its name in status tells why, unless somebody else deleted it."""
    if facts.condemned is None:
        return Plan(Situation.STOPPING, condemn=Condemned(Reason.PREEMPTED, "somebody deleted the Job of this attempt"))
    return Plan(
        Situation.STOPPING,
        delete=() if current.deleting else (current,),
        force=tuple(clock.lost(facts.attempt_pods, facts.config.lost_node_seconds, facts.now)),
        wake=clock.next_look(facts.now, _force_time(facts, facts.attempt_pods)),
    )


def _job_gone(facts: Facts) -> Plan:
    """The attempt had a Job and it is gone: pods may be left behind, then the attempt is over."""
    left = tuple(pod for pod in facts.attempt_pods if not pod.over)
    if left:
        return Plan(
            Situation.STOPPING,
            delete_pods=tuple(pod for pod in left if not pod.deleting),
            force=tuple(clock.lost(left, facts.config.lost_node_seconds, facts.now)),
            wake=clock.next_look(facts.now, _force_time(facts, left)),
        )
    if succeeded(facts):
        return _ended(facts, None, facts.last_alive)
    return _ended(facts, _condemned_cause(facts) or cause_of(None, facts.last_pods), facts.last_alive)


def succeeded(facts: Facts) -> bool:
    """Whether every rank's last pod ended with 0: by contract the final artefact is committed then."""
    ends = [pod.terminated.exit_code if pod.terminated else None for pod in facts.last_pods]
    return len(ends) == facts.nodes and all(code == ExitCode.OK for code in ends)


def _condemned_cause(facts: Facts) -> Cause | None:
    """The cause of an attempt that we ended: the reason that was written down, unless a pod tells of something graver."""
    reason, record = facts.condemned, facts.record
    if reason is None or record is None:
        return None
    own = cause_of(None, facts.last_pods)
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
    words = rank0_words(facts)
    committed = committed_by(facts, words)
    if cause is None:
        ending = Ending(Reason.SUCCEEDED, when, None, words, committed_step=committed)
        return Plan(Situation.ENDED, ended=ending, finish=Finish(Outcome.SUCCEEDED, Reason.SUCCEEDED))
    progressed = committed is not None and committed > facts.committed_before
    finish, follow = _follow(facts, cause, progressed, when)
    ending = Ending(
        reason=cause.reason,
        time=when,
        failure=cause.failure,
        words=words,
        counted=follow.counted if follow else False,
        progressed=progressed,
        committed_step=committed,
        next_attempt=None if finish else facts.attempt + 1,
        adaptation=follow.adaptation if follow else None,
    )
    return Plan(Situation.ENDED, ended=ending, finish=finish)


def _follow(
    facts: Facts, cause: Cause, progressed: bool, when: datetime
) -> tuple[Finish | None, Again | None]:
    """The end of the job, or what the next attempt is."""
    if facts.cancel or cause.reason is Reason.CANCELLED:
        return Finish(Outcome.CANCELLED, Reason.CANCELLED), None
    limit = facts.spec.policy.active_deadline_seconds
    too_late = Finish(Outcome.FAILED, Reason.DEADLINE_EXCEEDED, deadline_failure(limit or 0))
    if cause.reason is Reason.DEADLINE_EXCEEDED:
        return too_late, None
    follow = after(
        cause, facts.spec, facts.job.status, progressed=progressed, now=facts.now, attempt=facts.attempt
    )  # fmt: skip
    if isinstance(follow, Stop):
        return Finish(Outcome.FAILED, follow.reason, follow.failure), None
    if limit is not None and facts.ran(when) >= limit:
        return too_late, None  # nobody looked when the time was over: the next attempt would have none
    return None, follow


def rank0_words(facts: Facts) -> TerminationMessage | None:
    """The last words of the newest pod of rank 0 that left any."""
    pods = sorted((p for p in facts.attempt_pods if p.index == 0), key=lambda p: p.created, reverse=True)
    return next((words for pod in pods if (words := pod.words) is not None), None)


def committed_by(facts: Facts, words: TerminationMessage | None) -> int | None:
    """Newest step that the current attempt is known to have committed; None: none that is known.

    Pods tell of all checkpoints there are, also of those that earlier attempts made.
    """
    # A checkpoint that a replaced pod of this attempt reported is known from status only.
    steps = [one.step for one in facts.job.status.checkpoints if attempt_of_uri(one.uri) == facts.attempt]
    for source in facts.reported_checkpoints:
        steps += facts.own_steps(source.checkpoints, source.resumed_from_step)
    if words is not None and words.committed_step is not None:
        newest = Checkpoint(step=words.committed_step, uri=words.checkpoint or "")
        steps += facts.own_steps([newest], words.resumed_from_step)
    record = facts.record
    if record is not None and record.committed_step is not None:
        steps.append(record.committed_step)
    return max(steps) if steps else None


def _old_jobs(facts: Facts) -> tuple[JobView, ...]:
    """Finished Jobs that nobody needs: all but the newest of the earlier attempts, which is kept for its logs."""
    earlier = sorted((one for one in facts.mine if one.attempt < facts.attempt), key=lambda one: one.attempt)
    return tuple(one for one in earlier[:-1] if one.finished and not one.deleting)


def _start_timeout(facts: Facts) -> datetime | None:
    """When a job that does not get its pods counts as stalled."""
    begin = start_of_waiting(facts)
    return _later(begin, facts.spec.policy.start_timeout_seconds or START_TIMEOUT) if begin else None


START_TIMEOUT = 1800
"""`policy.startTimeoutSeconds` where the spec is not resolved."""


def start_of_waiting(facts: Facts) -> datetime | None:
    """Since when the pods, or the Job that would make them, are waited for; None: they are not (queued, suspended)."""
    ready = facts.condition(Condition.PODS_READY)
    if facts.running_since is not None:
        lost_ready = ready.last_transition_time if ready and ready.status == "False" else None
        return max(facts.running_since, lost_ready) if lost_ready else facts.running_since
    accepted = facts.condition(Condition.ACCEPTED)
    if isinstance(facts.acceptance, Refused) and accepted is not None and accepted.status == "False":
        return accepted.last_transition_time
    if facts.current is not None or ready is None or ready.status == "True" or ready.last_transition_time is None:
        return None
    if facts.holds(Condition.SUSPENDED):
        return None  # until this look: what came before it was no waiting
    suspended, (_, paused_until) = facts.condition(Condition.SUSPENDED), _pause(facts)
    others = [suspended.last_transition_time if suspended else None, paused_until]
    return max([ready.last_transition_time, *(one for one in others if one is not None)])


def _pause(facts: Facts) -> tuple[datetime | None, datetime | None]:
    """From when to when nothing is begun after the last attempt; None: there is none that ended."""
    attempts = facts.job.status.attempts
    ended = attempts[-1].end_time if attempts else None
    return ended, _later(ended, clock.pause(attempts, facts.config.retry, UNHARMED)) if ended else None


def _stall_time(facts: Facts) -> datetime | None:
    report, spoke = _last_heard(facts)
    unready = _unready_since(facts)
    silent = [one for one in (spoke, unready) if one is not None and one <= facts.now]
    return _later(max(silent), clock.stall_limit(facts.spec, report) + 1) if spoke and silent else None


def _last_heard(facts: Facts) -> tuple[ProgressReport | None, datetime | None]:
    """What the attempt's pods said last, if this operator heard it, and when they spoke."""
    heard = facts.speaking
    return (heard.report, heard.time) if heard else (None, _silent_since(facts))


def _silent_since(facts: Facts) -> datetime | None:
    """When this attempt's pods, which have trained and are not ready, spoke last or could first have: as status tells, for an
    operator that was started meanwhile and has heard nothing itself. None: they are ready, do not run (yet), or have never trained.
    """
    record, progress, ready = facts.record, facts.job.status.progress, facts.condition(Condition.PODS_READY)
    rank0 = facts.rank0
    if record is None or not record.last_step or rank0 is None or rank0.phase != "Running":
        return None
    if ready is None or ready.status == "True" or ready.last_transition_time is None:
        return None
    # A queue may have replaced the pod within the attempt. What was told last has its node's clock: it can only delay.
    began, told = rank0.running_since or rank0.created, progress.update_time if progress else None
    return max(began, told) if told else began


def _unready_since(facts: Facts) -> datetime | None:
    """Since when status finds the pods not ready: from this look on, if it still finds them ready. None: it does not say."""
    ready = facts.condition(Condition.PODS_READY)
    return facts.now if ready is not None and ready.status == "True" else ready.last_transition_time if ready else None


def _force_time(facts: Facts, pods: tuple[PodView, ...]) -> datetime | None:
    """When the first pod that is going counts as lost; where one does already, when to remove it once more: a finalizer may hold it."""
    going = [pod.deleting for pod in pods if pod.deleting and not pod.gone]
    if clock.lost(pods, facts.config.lost_node_seconds, facts.now):
        return _later(facts.now, FORCE_AGAIN)
    return _later(min(going), facts.config.lost_node_seconds + 1) if going else None


def _later(moment: datetime, seconds: float) -> datetime:
    return moment + timedelta(seconds=seconds)
