"""Computes `status.goodput`: for what purposes the time of a job was used. All functions are pure.

The time of an attempt begins at the end of the previous attempt, so the attempts cover the whole time of the job. The time is split into parts by
purpose, for example `scheduling` and `steps`. Only rank 0's pods are considered. The trainer reports the parts within its container
(`ProgressReport.time_use`); all other parts come from times of the API server.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from finetune_api.names import Reason
from finetune_api.status import TIME_USE_OF_STAGE, Attempt, AttemptTime, Goodput, Stage, TimeUse

from finetune_operator.facts import Facts
from finetune_operator.plan import AttemptEnd
from finetune_operator.views import JobView, PodView

SecondsByPart = dict[str, float]
"""Seconds that an attempt spent in each part of its time, for example `starting` or `steps`. The keys are the JSON names of the fields of `TimeUse`."""
PARTS_WITHOUT_NODE = ("waiting", "suspended", "queued", "preparation", "scheduling")
"""Parts during which rank 0's pod has no node."""


@dataclass(frozen=True)
class PodTimes:
    """The times of one pod of rank 0, and the parts that the pod reported about its container."""

    created_at: datetime
    scheduled_at: datetime | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    reported: Mapping[str, float] | None = None
    """How many seconds the container spent in each part of its time, such as `steps`, according to the pod's termination message or else its newest
    report."""
    last_part: str = "starting"
    """The part to which the time after the newest report is added if the container ended without a termination message."""


@dataclass(frozen=True)
class AttemptTimes:
    """The times of one attempt. An attempt begins at the end of the previous attempt."""

    begins_at: datetime
    ends_at: datetime
    prepared: tuple[datetime, datetime] | None = None
    """Start and end of the preparation."""
    job_created_at: datetime | None = None
    has_queue: bool = False
    follows_suspension: bool = False
    pods: Sequence[PodTimes] = ()


class _Timeline:
    """Splits the time from `begins_at` to `ends_at` into parts, from one moment to the next. A moment before the previous moment adds 0 seconds."""

    def __init__(self, begins_at: datetime, ends_at: datetime) -> None:
        self.seconds: SecondsByPart = {}
        self._previous_moment, self._ends_at = begins_at, max(begins_at, ends_at)

    def add_until(self, moment: datetime | None, part: str) -> None:
        """Add the time from the previous moment to `moment` to the part of the attempt named `part`. `moment` None: the end of the attempt."""
        self.add(self.seconds_until(moment), part)
        self._previous_moment = max(self._previous_moment, self._ends_at if moment is None else min(moment, self._ends_at))

    def seconds_until(self, moment: datetime | None) -> float:
        """Return the seconds from the previous moment to `moment`, or to the end of the attempt if `moment` is None."""
        end = self._ends_at if moment is None else min(moment, self._ends_at)
        return max(0.0, (end - self._previous_moment).total_seconds())

    def add(self, seconds: float, part: str) -> None:
        """Add seconds to a part."""
        if seconds > 0:
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def add_container(self, pod: PodTimes) -> None:
        """Add the reported parts of a container, and add the rest of the container's running time to `pod.last_part`.

        If the sum of the reported parts is longer than the running time, the longest parts are shortened.
        """
        remaining_seconds, parts = self.seconds_until(pod.ended_at), dict(pod.reported or {})
        for part, seconds in sorted(parts.items(), key=lambda item: item[1]):
            counted_seconds = min(max(0.0, seconds), remaining_seconds)
            self.add(counted_seconds, part)
            remaining_seconds -= counted_seconds
        self.add(remaining_seconds, pod.last_part)
        self._previous_moment += timedelta(seconds=self.seconds_until(pod.ended_at))


def split_attempt_time(times: AttemptTimes) -> SecondsByPart:
    """Return the seconds of each part of an attempt. The sum of all parts is the time from `begins_at` to `ends_at`."""
    timeline = _Timeline(times.begins_at, times.ends_at)
    waiting_part = "suspended" if times.follows_suspension else "waiting"
    if times.prepared is not None:
        timeline.add_until(times.prepared[0], waiting_part)
        timeline.add_until(times.prepared[1], "preparation")
    timeline.add_until(times.job_created_at, waiting_part)
    part_without_pod = "queued" if times.has_queue else "scheduling"
    for pod in sorted(times.pods, key=lambda pod: pod.created_at):
        timeline.add_until(pod.created_at, part_without_pod)
        timeline.add_until(pod.scheduled_at or pod.started_at or pod.ended_at, "scheduling")
        if pod.scheduled_at is not None or pod.started_at is not None:
            timeline.add_until(pod.started_at or pod.ended_at, "podStart")
        if pod.started_at is not None:
            timeline.add_container(pod)
    timeline.add_until(None, "other" if times.pods else part_without_pod)
    return timeline.seconds


def split_lost_steps(entries: Sequence[AttemptTime], attempts: Sequence[Attempt]) -> list[AttemptTime]:
    """Split the time of each attempt's steps: steps that a later attempt repeated count as `lostSteps`, all others as `steps`.

    The time is split in proportion to the numbers of steps.
    """
    split_entries, last_kept_step = [], None
    records_by_number = {attempt.number: attempt for attempt in attempts}
    for entry in reversed(entries):
        record = records_by_number.get(entry.number)
        start_step = (record.resumed_from_step or 0) if record is not None else 0
        if record is not None and last_kept_step is not None:
            entry = _split_steps(entry, start_step, record.last_step or start_step, last_kept_step)
        split_entries.append(entry)
        if record is not None and (record.resumed_from_step is not None or record.last_step):
            last_kept_step = start_step if last_kept_step is None else min(start_step, last_kept_step)
    return split_entries[::-1]


def _split_steps(entry: AttemptTime, start_step: int, last_step: int, last_kept_step: int) -> AttemptTime:
    """Split the seconds of an attempt's steps between `steps` and `lostSteps`.

    The attempt did the steps after `start_step`, up to `last_step`. Of these, the steps after `last_kept_step` are lost.
    """
    seconds = entry.parts.get("steps", 0.0) + entry.parts.get("lostSteps", 0.0)
    kept_share = min(max(last_kept_step - start_step, 0) / (last_step - start_step), 1.0) if last_step > start_step else 0.0
    kept_seconds = round(seconds * kept_share, 3)
    parts = {**entry.parts, "steps": kept_seconds, "lostSteps": round(seconds - kept_seconds, 3)}
    return entry.model_copy(update={"parts": {part: value for part, value in parts.items() if value}})


def compute_goodput(
    facts: Facts, old_goodput: Goodput | None, attempts: Sequence[Attempt], attempt_end: AttemptEnd | None, current_job: JobView | None, kept_attempt_count: int
) -> Goodput | None:
    """Return the goodput until the end of the current attempt, or until its newest report.

    If the attempt has neither an end nor a report, return the old goodput. `attempts`: the new records of the attempts. `current_job`: the Job of
    the current attempt. `kept_attempt_count`: the number of attempts that are listed separately.
    """
    if attempt_end is None and facts.live_report is None:
        return old_goodput
    ends_at = attempt_end.ended_at if attempt_end is not None else facts.live_report.received_at if facts.live_report else facts.now
    entries_by_number = {entry.number: entry for entry in old_goodput.attempts} if old_goodput else {}
    earlier_entries = [entry for number, entry in entries_by_number.items() if number < facts.attempt]
    earlier_parts: SecondsByPart = dict(old_goodput.earlier or {}) if old_goodput else {}
    begins_at = facts.job.created_at + timedelta(seconds=sum(earlier_parts.values()) + sum(entry.wall_seconds for entry in earlier_entries))
    times = _collect_attempt_times(facts, attempts, current_job, begins_at, ends_at)
    parts = {part: round(seconds, 3) for part, seconds in split_attempt_time(times).items()}
    if facts.attempt in entries_by_number and not times.pods:
        parts = _keep_known_parts(entries_by_number[facts.attempt], sum_parts(parts))
    entries = split_lost_steps([*earlier_entries, AttemptTime(number=facts.attempt, wall_seconds=sum_parts(parts), parts=parts)], attempts)
    for entry in entries[:-kept_attempt_count]:
        earlier_parts = add_parts([earlier_parts, entry.parts])
    return build_goodput(entries[-kept_attempt_count:], earlier_parts)


def _keep_known_parts(known_entry: AttemptTime, wall_seconds: float) -> SecondsByPart:
    """Return the last known parts of an attempt whose pods were removed while the operator was stopped. The rest of the attempt's time counts as `other`."""
    unknown_seconds = wall_seconds - known_entry.wall_seconds
    return add_parts([known_entry.parts, {"other": unknown_seconds}]) if unknown_seconds >= 0 else known_entry.parts


def build_goodput(entries: Sequence[AttemptTime], earlier_parts: SecondsByPart) -> Goodput:
    """Return the goodput of all attempts. `earlier_parts`: parts of attempts that are not in `entries`."""
    parts = add_parts([earlier_parts, *(entry.parts for entry in entries)])
    seconds_on_nodes = sum(seconds for part, seconds in parts.items() if part not in PARTS_WITHOUT_NODE)
    useful_seconds = parts.get("firstStep", 0.0) + parts.get("steps", 0.0)
    return Goodput(
        wall_seconds=sum_parts(parts), percent=round(100 * useful_seconds / seconds_on_nodes, 1) if seconds_on_nodes else None,
        parts=TimeUse.model_validate(parts), attempts=list(entries), earlier=earlier_parts or None,
    )  # fmt: skip


def sum_parts(parts: Mapping[str, float]) -> float:
    """Return the sum of all parts in seconds."""
    return round(sum(parts.values()), 3)


def add_parts(part_mappings: Iterable[Mapping[str, float]]) -> SecondsByPart:
    """Return, for each part, the sum of its seconds in all given mappings."""
    sums: SecondsByPart = {}
    for parts in part_mappings:
        for part, seconds in parts.items():
            sums[part] = round(sums.get(part, 0.0) + seconds, 3)
    return sums


def _collect_attempt_times(
    facts: Facts, attempts: Sequence[Attempt], current_job: JobView | None, begins_at: datetime, ends_at: datetime
) -> AttemptTimes:
    records_by_number = {attempt.number: attempt for attempt in attempts}
    record, previous_record = records_by_number.get(facts.attempt), records_by_number.get(facts.attempt - 1)
    preparation = facts.job.status.preparation
    preparation_start, preparation_end = (preparation.start_time, preparation.end_time) if preparation is not None else (None, None)
    start_time = current_job.created_at if current_job is not None else record.start_time if record is not None else None
    return AttemptTimes(
        begins_at=begins_at, ends_at=ends_at, prepared=(preparation_start, preparation_end) if preparation_start and preparation_end else None,
        job_created_at=start_time, has_queue=bool(facts.spec.placement.queue_name or (current_job is not None and current_job.queue)),
        follows_suspension=previous_record is not None and previous_record.reason == Reason.SUSPENDED,
        pods=[_collect_pod_times(facts, pod) for pod in facts.attempt_pods if pod.completion_index == 0],
    )  # fmt: skip


def _collect_pod_times(facts: Facts, pod: PodView) -> PodTimes:
    received_report, message, terminated_state = facts.last_report, pod.termination_message, pod.terminated
    report = received_report.report if received_report is not None and received_report.pod_uid == pod.uid else None
    time_use = (message.time_use if message else None) or (report.time_use if report else None)
    last_part = TIME_USE_OF_STAGE[report.stage if report else Stage.STARTING]
    if (message is not None and message.time_use is not None) or not pod.is_finished:
        last_part = "other"
    return PodTimes(
        created_at=pod.created_at, scheduled_at=pod.scheduled_at, started_at=(terminated_state.started_at if terminated_state else None) or pod.running_since,
        ended_at=(terminated_state.finished_at if terminated_state else None) or (pod.deletion_timestamp or pod.removed_at if pod.is_deleted else None),
        reported=time_use.seconds() if time_use is not None else None, last_part=last_part,
    )  # fmt: skip
