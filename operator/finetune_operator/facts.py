"""What is known about one FineTuneJob at one moment: everything `decide` may look at, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime

from finetune_api.names import Condition, Reason, attempt_job_name, attempt_of_uri
from finetune_api.pod import ProgressReport, TerminationMessage
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import Attempt, Checkpoint
from finetune_api.status import Condition as StatusCondition

from finetune_operator.policies.acceptance import Accepted, Refused
from finetune_operator.policies.adaptations import apply_adaptations, max_start_step
from finetune_operator.policies.blocking import BlockingCondition
from finetune_operator.policies.timeouts import seconds_between
from finetune_operator.settings import OperatorConfig
from finetune_operator.views import JobObject, JobView, PodView


@dataclass(frozen=True)
class ReceivedReport:
    """What rank 0's pod said, and when."""

    report: ProgressReport
    time: datetime
    pod_uid: str = ""


@dataclass(frozen=True)
class ReportedCheckpoints:
    """The committed checkpoints that rank 0's pod listed at one moment, and the step that the pod started from."""

    checkpoints: tuple[Checkpoint, ...]
    resumed_from_step: int | None


@dataclass(frozen=True)
class Facts:
    """One job, its children, and the time."""

    job: JobObject
    acceptance: Accepted | Refused
    now: datetime
    config: OperatorConfig
    jobs: tuple[JobView, ...] = ()
    """All Jobs that carry the job's name, also foreign ones."""
    pods: tuple[PodView, ...] = ()
    """All pods that carry the job's name, also memories."""
    last_report: ReceivedReport | None = None
    blocking: BlockingCondition | None = None
    """What events about the current Job or its pods say."""
    spec: FineTuneJobSpec = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", self._spec())

    def _spec(self) -> FineTuneJobSpec:
        """The spec that holds now: resolved and adapted, if it is accepted; as far as it can be read, if not."""
        found = self.acceptance.spec or FineTuneJobSpec()
        adaptations = self.job.status.adaptations
        return apply_adaptations(found, adaptations) if adaptations else found

    @property
    def suspend_requested(self) -> bool:
        """The user wants it to wait."""
        return self.job.spec.get("suspend") is True

    @property
    def cancel_requested(self) -> bool:
        """The user wants it to end."""
        return self.job.spec.get("cancel") is True

    @property
    def owned_jobs(self) -> tuple[JobView, ...]:
        """Jobs that this very FineTuneJob controls."""
        return tuple(one for one in self.jobs if one.is_owned and one.owner_uid == self.job.uid)

    @property
    def attempt(self) -> int:
        """Number of the current attempt; 1 before there is one."""
        return max([self.job.status.attempt or 1, *(one.attempt for one in self.owned_jobs)])

    @property
    def current_job(self) -> JobView | None:
        """The Job of the current attempt."""
        name = attempt_job_name(self.job.name, self.attempt)
        return next((one for one in self.owned_jobs if one.name == name), None)

    @property
    def attempt_record(self) -> Attempt | None:
        """What status remembers of the current attempt."""
        return next((one for one in self.job.status.attempts if one.number == self.attempt), None)

    @property
    def attempt_pods(self) -> tuple[PodView, ...]:
        """Pods of the current attempt, also memories."""
        return tuple(pod for pod in self.owned_pods if pod.attempt == self.attempt)

    @property
    def owned_pods(self) -> tuple[PodView, ...]:
        """Pods of this very FineTuneJob."""
        return tuple(pod for pod in self.pods if pod.owner_uid == self.job.uid)

    @property
    def nodes(self) -> int:
        """Pods wanted."""
        return self.spec.resources.nodes or 1

    @property
    def active_pods(self) -> tuple[PodView, ...]:
        """Newest pod of each rank of the current attempt that is not over (a queue may have replaced some)."""
        newest: dict[int, PodView] = {}
        for pod in sorted(self.attempt_pods, key=lambda one: one.created_at):
            if not pod.is_finished:
                newest[pod.index] = pod
        return tuple(newest[index] for index in sorted(newest))

    @property
    def newest_pods(self) -> tuple[PodView, ...]:
        """Newest pod of each rank of the current attempt, over or not."""
        newest: dict[int, PodView] = {}
        for pod in sorted(self.attempt_pods, key=lambda one: one.created_at):
            newest[pod.index] = pod
        return tuple(newest[index] for index in sorted(newest))

    @property
    def rank0(self) -> PodView | None:
        """The pod that speaks for the attempt, if it lives."""
        return next((pod for pod in self.active_pods if pod.index == 0), None)

    @property
    def live_report(self) -> ReceivedReport | None:
        """What was heard, if the pod that said it still runs: a queue may have replaced it within the attempt."""
        rank0 = self.rank0
        same = self.last_report is not None and rank0 is not None and rank0.uid == self.last_report.pod_uid
        return self.last_report if same else None

    @property
    def reported_checkpoints(self) -> tuple[ReportedCheckpoints, ...]:
        """Lists of checkpoints from rank 0's pods of the current attempt, oldest first.

        A queue may replace the pods within one attempt. The termination message of a replaced pod may be the only source for
        the checkpoints that this pod committed last. It is left out once the status knows these checkpoints: retention may have
        removed some of them since.
        """
        pods = sorted((pod for pod in self.attempt_pods if pod.index == 0), key=lambda pod: pod.created_at)
        received = self.last_report
        found: list[ProgressReport | TerminationMessage] = []
        if received is not None and received.pod_uid not in {pod.uid for pod in pods}:
            found.append(received.report)
        for pod in pods:
            if received is not None and received.pod_uid == pod.uid:
                found.append(received.report)
            message = pod.termination_message
            if message is not None and (pod is pods[-1] or self._lists_newer_checkpoints(message)):
                found.append(message)
        return tuple(ReportedCheckpoints(tuple(one.checkpoints), one.resumed_from_step) for one in found)

    def _lists_newer_checkpoints(self, message: TerminationMessage) -> bool:
        """Whether the message lists a step of the current attempt that is newer than all of its steps in status."""
        listed = self.steps_of_this_attempt(message.checkpoints, message.resumed_from_step)
        return max(listed, default=0) > max(self.steps_of_this_attempt(self.job.status.checkpoints, None), default=0)

    def condition(self, kind: Condition) -> StatusCondition | None:
        """A condition as status has it."""
        return self.job.status.condition(kind)

    def is_true(self, kind: Condition) -> bool:
        """Whether a condition is True in status."""
        return self.job.status.holds(kind)

    @property
    def is_finished(self) -> bool:
        """Status says that no further attempt will be made; that is never taken back."""
        return self.is_true(Condition.FINISHED)

    @property
    def running_since(self) -> datetime | None:
        """When the current stretch of running time began; None while queued, suspended or between attempts."""
        record, job = self.attempt_record, self.current_job
        if record is None and job is not None:
            # Not written yet: the Job tells, and so does its queue.
            return self.admitted_at if self.spec.placement.queue_name else job.created_at
        if record is None or record.start_time is None or record.end_time is not None:
            return None
        quota = self.condition(Condition.QUOTA_RESERVED)
        if quota is None:
            return record.start_time
        if self.admitted_at is not None:
            return max(record.start_time, self.admitted_at)
        if quota.status != "True" or quota.last_transition_time is None:
            return None
        return max(record.start_time, quota.last_transition_time)

    @property
    def admitted_at(self) -> datetime | None:
        """When a queue let the Job begin, whoever looked when; None: it is held, or its controller has not seen its release yet."""
        job = self.current_job
        return None if job is None or job.is_suspended or job.suspended_since is not None else job.started_at

    @property
    def earlier_running_seconds(self) -> float:
        """Seconds of running time before the current stretch."""
        return float(self.job.status.active_seconds or 0)

    def running_seconds(self, until: datetime) -> float:
        """Seconds of running time until then, of all attempts. What a queue took ran until then, whoever looked when."""
        held = self.current_job.suspended_since if self.current_job else None
        return self.earlier_running_seconds + seconds_between(self.running_since, min(until, held) if held else until)

    @property
    def last_seen_at(self) -> datetime:
        """When the current attempt, whose Job is gone, ended: now, unless its pods or status tell that nobody looked in time."""
        ends = [_end_of(pod) for pod in self.newest_pods]
        if None in ends:
            return self.now
        progress, ready = self.job.status.progress, self.condition(Condition.PODS_READY)
        told = [progress.update_time if progress else None, ready.last_transition_time if ready else None]
        told += [self.attempt_record.start_time if self.attempt_record else None, self.last_report.time if self.last_report else None]
        known = [one for one in (ends or told) if one is not None]
        return min(self.now, max(known, default=self.now))

    @property
    def newest_committed_step(self) -> int:
        """Newest step known to be committed, of all attempts."""
        status = self.job.status
        steps = [one.step for one in status.checkpoints]
        steps += [one.committed_step for one in status.attempts if one.committed_step is not None]
        return max([*steps, 0])

    def steps_of_this_attempt(self, checkpoints: Iterable[Checkpoint], start: int | None) -> list[int]:
        """Steps of those checkpoints that the current attempt made itself, having started from step `start`."""
        found = [(one.step, attempt_of_uri(one.uri)) for one in checkpoints]
        return [step for step, maker in found if (step > (start or 0) if maker is None else maker == self.attempt)]

    @property
    def newest_step_of_earlier_attempts(self) -> int:
        """Newest step that earlier attempts committed: what the current one must exceed to have made progress."""
        status = self.job.status
        steps = [one.committed_step for one in status.attempts if one.number < self.attempt]
        # Records of attempts are kept for the newest ten only.
        steps += [one.step for one in status.checkpoints if (attempt_of_uri(one.uri) or self.attempt) < self.attempt]
        return max([step for step in steps if step is not None] + [0])

    @property
    def max_start_step(self) -> int | None:
        """Newest step that the next attempt may start from, after a rollback; None: the newest there is."""
        return max_start_step(self.job.status.adaptations, self.job.status.checkpoints)

    @property
    def next_start_step(self) -> int:
        """Step that the next attempt starts from, as far as is known."""
        limit = self.max_start_step
        return self.newest_committed_step if limit is None else min(limit, self.newest_committed_step)

    @property
    def termination_reason(self) -> Reason | None:
        """Why the current attempt is being ended by us, as status remembers."""
        record = self.attempt_record
        if record is None or record.end_time is not None or not record.reason:
            return None
        try:
            return Reason(record.reason)
        except ValueError:
            return Reason.PREEMPTED


def _end_of(pod: PodView) -> datetime | None:
    """When a pod ended, or should have; None: nobody wrote it down."""
    return (pod.terminated.finished_at if pod.terminated else None) or pod.deletion_timestamp
