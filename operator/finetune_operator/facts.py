"""The facts: all data about one FineTuneJob at one moment. `decide` and `compute_status` read only the facts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property

from finetune_api.names import (
    Condition,
    Reason,
    attempt_job_name,
    make_preparation_job_name,
    parse_attempt_of_uri,
    parse_preparation_number,
)
from finetune_api.pod import ProgressReport, TerminationMessage
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import OnExistingResult
from finetune_api.status import Attempt, Checkpoint, Stage
from finetune_api.status import Condition as StatusCondition

from finetune_operator.policies.acceptance import AcceptedSpec, RefusedSpec
from finetune_operator.policies.adaptations import apply_adaptations, find_max_start_step, find_rolled_back_attempt
from finetune_operator.policies.blocking import BlockingCondition
from finetune_operator.policies.timeouts import seconds_between
from finetune_operator.settings import OperatorConfig
from finetune_operator.views import FineTuneJobView, JobView, PodView


@dataclass(frozen=True)
class ReceivedReport:
    """A progress report of rank 0's pod, and the time at which the operator received the report."""

    report: ProgressReport
    received_at: datetime
    pod_uid: str = ""


@dataclass(frozen=True)
class ReportedCheckpoints:
    """The committed checkpoints in one report of rank 0's pod, and the step from which that pod resumed."""

    checkpoints: tuple[Checkpoint, ...]
    resumed_from_step: int | None


@dataclass(frozen=True)
class Facts:
    """All data about one FineTuneJob at the time `now`. Most properties are derived from the fields."""

    job: FineTuneJobView
    acceptance: AcceptedSpec | RefusedSpec
    now: datetime
    config: OperatorConfig
    jobs: tuple[JobView, ...] = ()
    """All Jobs whose label names the FineTuneJob. Other objects may own some of these Jobs."""
    pods: tuple[PodView, ...] = ()
    """All pods whose label names the FineTuneJob, including deleted pods that are still cached."""
    last_report: ReceivedReport | None = None
    """The newest progress report of the current attempt."""
    preparation_report: ReceivedReport | None = None
    """The newest progress report of a preparation pod."""
    blocking_condition: BlockingCondition | None = None
    """The blocking condition found in events about the current Job or its pods."""
    crd_has_preparation_field: bool = True
    """Whether the installed CRD keeps `status.preparation`. An old CRD removes this field, so the operator would forget that a preparation has ended. With
    an old CRD, jobs are therefore not prepared."""
    spec: FineTuneJobSpec = field(init=False)
    """The resolved and adapted spec. If the spec was refused, only the fields that the operator could read are set."""

    def __post_init__(self) -> None:
        spec, adaptations = self.acceptance.spec or FineTuneJobSpec(), self.job.status.adaptations
        object.__setattr__(self, "spec", apply_adaptations(spec, adaptations) if adaptations else spec)

    # The spec. Fields that stop a job are read from the raw spec, so that these fields work even if the spec cannot be parsed.

    @property
    def is_suspend_requested(self) -> bool:
        """Whether `spec.suspend` is true."""
        return self.job.spec.get("suspend") is True

    @property
    def is_cancel_requested(self) -> bool:
        """Whether `spec.cancel` is true."""
        return self.job.spec.get("cancel") is True

    @property
    def active_deadline_seconds(self) -> int | None:
        """`policy.activeDeadlineSeconds`, or the platform's limit at the time of acceptance if that is lower. None if there is no limit."""
        resolved_config = self.job.status.resolved
        limits = (self._policy_seconds("activeDeadlineSeconds"), resolved_config.max_duration_seconds if resolved_config else None)
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def deadline_source(self) -> str:
        """The name of the setting from which `active_deadline_seconds` comes, for messages."""
        is_limit_of_job = self.active_deadline_seconds == self._policy_seconds("activeDeadlineSeconds")
        return "policy.activeDeadlineSeconds" if is_limit_of_job else "the platform's rule policy.maxDurationSeconds"

    @property
    def max_cost(self) -> float | None:
        """`policy.maxCost` as the user wrote it, or None if it is not set."""
        policy = self.job.spec.get("policy")
        value = policy.get("maxCost") if isinstance(policy, dict) else None
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    @property
    def ttl_seconds_after_finished(self) -> int | None:
        """`policy.ttlSecondsAfterFinished` as the user wrote it, or None if it is not set."""
        return self._policy_seconds("ttlSecondsAfterFinished")

    def _policy_seconds(self, name: str) -> int | None:
        policy = self.job.spec.get("policy")
        value = policy.get(name) if isinstance(policy, dict) else None
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    @property
    def is_spec_readable(self) -> bool:
        """Whether the operator can use the stored spec.

        The operator cannot use a spec that was refused with OperatorTooOld (unknown field or value) or SpecChanged (an older CRD may have removed a field).
        """
        refusal_reason = self.acceptance.reason if isinstance(self.acceptance, RefusedSpec) else None
        return refusal_reason not in (Reason.OPERATOR_TOO_OLD, Reason.SPEC_CHANGED)

    @property
    def requires_result_comparison(self) -> bool:
        """Whether the user wrote `policy.onExistingResult: adopt` or `fail`, so that the job must not start without a preparation."""
        is_default = not isinstance(self.acceptance, AcceptedSpec) or "policy.onExistingResult" in self.acceptance.defaults
        return not is_default and self.spec.policy.on_existing_result in (OnExistingResult.ADOPT, OnExistingResult.FAIL)

    # Jobs and pods

    @cached_property
    def owned_jobs(self) -> tuple[JobView, ...]:
        """Jobs whose controller is this FineTuneJob."""
        return tuple(job for job in self.jobs if job.is_owned and job.owner_uid == self.job.uid)

    @cached_property
    def owned_pods(self) -> tuple[PodView, ...]:
        """Pods of this FineTuneJob."""
        return tuple(pod for pod in self.pods if pod.owner_uid == self.job.uid)

    @cached_property
    def attempt(self) -> int:
        """Number of the current attempt, or 1 before the first attempt."""
        return max([self.job.status.attempt or 1, *(job.attempt for job in self.owned_jobs)])

    @cached_property
    def current_job(self) -> JobView | None:
        """The Job of the current attempt."""
        name = attempt_job_name(self.job.name, self.attempt)
        return next((job for job in self.owned_jobs if job.name == name), None)

    @cached_property
    def attempt_record(self) -> Attempt | None:
        """The entry of the current attempt in `status.attempts`."""
        return next((record for record in self.job.status.attempts if record.number == self.attempt), None)

    # The preparation

    @cached_property
    def preparation_number(self) -> int:
        """Number of the newest preparation: from the status or, if the status lacks it, from the names of the Jobs. It is 1 before the first preparation."""
        record = self.job.status.preparation
        numbers = [parse_preparation_number(job.name, self.job.name) or 1 for job in self.owned_jobs]
        return record.number if record is not None else max(numbers, default=1)

    @cached_property
    def preparation_job(self) -> JobView | None:
        """The Job of the newest preparation, or None if it does not exist or the status already records the result of the preparation."""
        record, name = self.job.status.preparation, make_preparation_job_name(self.job.name, self.preparation_number)
        if record is not None and record.reason is not None:
            return None
        return next((job for job in self.owned_jobs if job.name == name), None)

    @cached_property
    def preparation_pods(self) -> tuple[PodView, ...]:
        """Pods of `preparation_job`, including deleted pods."""
        job = self.preparation_job
        return tuple(pod for pod in self.owned_pods if pod.job_uid == job.uid) if job is not None else ()

    @property
    def pod_count(self) -> int:
        """Number of pods of the current Job or, if there is no Job, the number of nodes in the spec."""
        job = self.current_job
        return job.pod_count if job is not None and job.pod_count else self.spec.resources.nodes or 1

    @cached_property
    def attempt_pods(self) -> tuple[PodView, ...]:
        """Pods of the current attempt, including deleted pods."""
        return tuple(pod for pod in self.owned_pods if pod.attempt == self.attempt)

    @cached_property
    def active_pods(self) -> tuple[PodView, ...]:
        """The newest unfinished pod of each rank of the current attempt. A rank has several pods if a queue replaced its pod."""
        return _find_newest_pod_of_each_rank(pod for pod in self.attempt_pods if not pod.is_finished)

    @cached_property
    def newest_pods(self) -> tuple[PodView, ...]:
        """The newest pod of each rank of the current attempt, finished or not."""
        return _find_newest_pod_of_each_rank(self.attempt_pods)

    @cached_property
    def rank0_pod(self) -> PodView | None:
        """The active pod of rank 0, which serves the attempt's progress over HTTP."""
        return next((pod for pod in self.active_pods if pod.completion_index == 0), None)

    # Reports

    @property
    def live_report(self) -> ReceivedReport | None:
        """The last report, or None if its pod is no longer active, for example because a queue replaced the pod within the attempt."""
        rank0_pod = self.rank0_pod
        is_live = self.last_report is not None and rank0_pod is not None and rank0_pod.uid == self.last_report.pod_uid
        return self.last_report if is_live else None

    @property
    def is_model_committed(self) -> bool:
        """Whether the final model is in storage, according to the last report or the status."""
        return self.job.status.output is not None or (self.last_report is not None and self.last_report.report.output is not None)

    @property
    def reported_stage(self) -> Stage | None:
        """The stage in the last report."""
        return self.last_report.report.stage if self.last_report is not None else None

    @property
    def reported_checkpoints(self) -> tuple[ReportedCheckpoints, ...]:
        """The lists of checkpoints that rank 0's pods of the current attempt have reported, oldest first.

        If a queue replaces a pod within the attempt, only the pod's termination message may list the last checkpoints that the pod committed.
        Once the status lists these checkpoints, the termination message is ignored, because the retention policy may have removed some of them.
        """
        pods = sorted((pod for pod in self.attempt_pods if pod.completion_index == 0), key=lambda pod: pod.created_at)
        last_report = self.last_report
        reports_and_messages: list[ProgressReport | TerminationMessage] = []
        if last_report is not None and last_report.pod_uid not in {pod.uid for pod in pods}:
            reports_and_messages.append(last_report.report)
        for pod in pods:
            if last_report is not None and last_report.pod_uid == pod.uid:
                reports_and_messages.append(last_report.report)
            message = pod.termination_message
            if message is not None and (pod is pods[-1] or self._lists_newer_checkpoints(message)):
                reports_and_messages.append(message)
        return tuple(ReportedCheckpoints(tuple(source.checkpoints), source.resumed_from_step) for source in reports_and_messages)

    def _lists_newer_checkpoints(self, message: TerminationMessage) -> bool:
        """Whether the termination message lists a newer step of the current attempt than the status does."""
        listed_steps = self.list_steps_of_this_attempt(message.checkpoints, message.resumed_from_step)
        return max(listed_steps, default=0) > max(self.list_steps_of_this_attempt(self.job.status.checkpoints, None), default=0)

    # Status

    def condition(self, condition_type: Condition) -> StatusCondition | None:
        """Return the status condition of this type."""
        return self.job.status.condition(condition_type)

    def is_true(self, condition_type: Condition) -> bool:
        """Whether the status condition of this type is True."""
        return self.job.status.is_true(condition_type)

    @property
    def is_finished(self) -> bool:
        """Whether the status says that the job is finished. A finished job never starts another attempt."""
        return self.is_true(Condition.FINISHED)

    @property
    def termination_reason(self) -> Reason | None:
        """Why the operator ends the current attempt, as recorded in the status, or None if the attempt may continue."""
        record = self.attempt_record
        if record is None or record.end_time is not None or not record.reason:
            return None
        try:
            return Reason(record.reason)
        except ValueError:
            return Reason.PREEMPTED

    # Running time

    @property
    def running_since(self) -> datetime | None:
        """The time since which the job has been running without a pause, or None while the job is queued, suspended or between attempts."""
        record, job = self.attempt_record, self.current_job
        if record is None and job is not None:
            # The status does not list the attempt yet.
            return self.admitted_at if self.spec.placement.queue_name or job.queue else job.created_at
        if record is None or record.start_time is None or record.end_time is not None:
            return None
        quota_condition = self.condition(Condition.QUOTA_RESERVED)
        if quota_condition is None:
            return record.start_time
        if self.admitted_at is not None:
            return max(record.start_time, self.admitted_at)
        if quota_condition.status != "True" or quota_condition.last_transition_time is None:
            return None
        return max(record.start_time, quota_condition.last_transition_time)

    @property
    def admitted_at(self) -> datetime | None:
        """When the queue admitted the Job, or None while the Job waits for the queue or for the Job controller to resume it."""
        job = self.current_job
        return None if job is None or job.is_suspended or job.suspended_since is not None else job.started_at

    @property
    def earlier_running_seconds(self) -> float:
        """Seconds for which the job ran before `running_since`."""
        return float(self.job.status.active_seconds or 0)

    def compute_running_seconds(self, end_time: datetime) -> float:
        """Return the running time of all attempts until `end_time`, in seconds. If a queue suspended the Job, the time after the suspension does not count."""
        suspended_since = self.current_job.suspended_since if self.current_job else None
        if suspended_since is None:
            return self.earlier_running_seconds + seconds_between(self.running_since, end_time)
        # While the operator was stopped, the queue may have suspended and resumed the Job. So only the time since the newest pods were created counts.
        counted_since = max([time for time in (self.running_since, *(pod.created_at for pod in self.newest_pods)) if time], default=None)
        return self.earlier_running_seconds + seconds_between(counted_since, min(end_time, suspended_since, self.last_seen_at))

    @property
    def last_seen_at(self) -> datetime:
        """The last time at which the current attempt is known to have run. This time is used as the attempt's end if the attempt's Job was deleted.

        Usually this is the current time. If the Job was deleted while the operator was stopped, the pods or the status show an earlier time.
        """
        pod_end_times = [_find_pod_end_time(pod) for pod in self.newest_pods]
        if None in pod_end_times:
            return self.now
        progress, pods_ready = self.job.status.progress, self.condition(Condition.PODS_READY)
        recorded_times = [progress.update_time if progress else None, pods_ready.last_transition_time if pods_ready else None]
        recorded_times += [
            self.attempt_record.start_time if self.attempt_record else None,
            self.last_report.received_at if self.last_report else None,
        ]
        known_times = [time for time in (pod_end_times or recorded_times) if time is not None]
        return min(self.now, max(known_times, default=self.now))

    # Steps

    @property
    def newest_committed_step(self) -> int:
        """Newest committed step of all attempts, or 0 if no committed step is known."""
        status = self.job.status
        steps = [checkpoint.step for checkpoint in status.checkpoints]
        steps += [attempt.committed_step for attempt in status.attempts if attempt.committed_step is not None]
        return max([*steps, 0])

    def list_steps_of_this_attempt(self, checkpoints: Iterable[Checkpoint], start_step: int | None) -> list[int]:
        """Return the steps of the given checkpoints that the current attempt committed.

        A checkpoint's URI usually names its attempt. A checkpoint whose URI names no attempt counts if its step is after `start_step`, the step from which the
        current attempt started.
        """
        steps_and_attempts = [(checkpoint.step, parse_attempt_of_uri(checkpoint.uri)) for checkpoint in checkpoints]
        return [step for step, attempt in steps_and_attempts if (step > (start_step or 0) if attempt is None else attempt == self.attempt)]

    @property
    def newest_step_of_earlier_attempts(self) -> int:
        """Newest step that earlier attempts committed. The current attempt makes progress if it commits a newer step."""
        status = self.job.status
        committed_steps = [attempt.committed_step for attempt in status.attempts if attempt.number < self.attempt]
        # `status.attempts` has only the newest ten attempts, but `status.checkpoints` can contain checkpoints of older attempts.
        committed_steps += [c.step for c in status.checkpoints if (parse_attempt_of_uri(c.uri) or self.attempt) < self.attempt]
        return max([step for step in committed_steps if step is not None] + [0])

    @property
    def max_start_step(self) -> int | None:
        """Newest step that the next attempt may start from after a rollback. None means no limit."""
        return find_max_start_step(self.job.status.adaptations, self.job.status.checkpoints)

    @property
    def rolled_back_attempt(self) -> int | None:
        """Number of the first attempt after the last rollback, or None if there was no rollback."""
        return find_rolled_back_attempt(self.job.status.adaptations)

    @property
    def next_start_step(self) -> int:
        """The step from which the next attempt is expected to start."""
        limit = self.max_start_step
        return self.newest_committed_step if limit is None else min(limit, self.newest_committed_step)


def _find_newest_pod_of_each_rank(pods: Iterable[PodView]) -> tuple[PodView, ...]:
    newest_pods_by_index = {pod.completion_index: pod for pod in sorted(pods, key=lambda pod: pod.created_at)}
    return tuple(newest_pods_by_index[index] for index in sorted(newest_pods_by_index))


def _find_pod_end_time(pod: PodView) -> datetime | None:
    """Return when a pod ended or should have ended, or None if the time is unknown."""
    return (pod.terminated.finished_at if pod.terminated else None) or pod.deletion_timestamp
