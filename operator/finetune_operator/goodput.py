"""Computes `status.goodput`: what the time of a job was used for. All functions are pure.

The time of a job is a chain of intervals: one for each attempt, from the end of the previous attempt. Within an attempt, rank 0's pods stand for
all pods. The trainer splits the time of its container itself (`ProgressReport.time_use`); all other parts come from times of the API server.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from finetune_api.names import Reason
from finetune_api.status import PART_OF_STAGE, Attempt, AttemptTime, Goodput, Stage, TimeUse

from finetune_operator.facts import Facts
from finetune_operator.plan import AttemptEnd
from finetune_operator.views import JobView, PodView

Seconds = dict[str, float]
"""Seconds by part, with the names of `TimeUse` in JSON."""
PARTS_BEFORE_NODES = ("waiting", "suspended", "queued", "preparation", "scheduling")
"""Parts in which rank 0's pod had no node."""


@dataclass(frozen=True)
class PodTime:
    """The times of one pod of rank 0, and what it reported about its container."""

    created_at: datetime
    scheduled_at: datetime | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    reported: Mapping[str, float] | None = None
    """Seconds by part in the newest report or in the termination message."""
    last_part: str = "starting"
    """The part to which the time between the newest report and the end of a container without a termination message belongs."""


@dataclass(frozen=True)
class AttemptTimes:
    """The times of one attempt. It begins with the end of the previous attempt."""

    begins_at: datetime
    ends_at: datetime
    prepared: tuple[datetime, datetime] | None = None
    """Start and end of the preparation."""
    job_created_at: datetime | None = None
    has_queue: bool = False
    follows_suspension: bool = False
    pods: Sequence[PodTime] = ()


class _Timeline:
    """Adds the seconds between consecutive moments to parts. Moments before the last one add nothing, so all parts are at least 0."""

    def __init__(self, begins_at: datetime, ends_at: datetime) -> None:
        self.seconds: Seconds = {}
        self._now, self._end = begins_at, max(begins_at, ends_at)

    def add_until(self, moment: datetime | None, part: str) -> None:
        """Add the time until `moment` to a part. None: until the end."""
        self.add(self.seconds_until(moment), part)
        self._now = max(self._now, self._end if moment is None else min(moment, self._end))

    def seconds_until(self, moment: datetime | None) -> float:
        """Return the seconds until `moment`. None: until the end."""
        until = self._end if moment is None else min(moment, self._end)
        return max(0.0, (until - self._now).total_seconds())

    def add(self, seconds: float, part: str) -> None:
        """Add seconds to a part."""
        if seconds > 0:
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def add_container(self, pod: PodTime) -> None:
        """Add the time of a container: the reported parts, and the rest. If the clocks differ, the largest parts are shortened."""
        rest, parts = self.seconds_until(pod.ended_at), dict(pod.reported or {})
        for part, seconds in sorted(parts.items(), key=lambda item: item[1]):
            taken = min(max(0.0, seconds), rest)
            self.add(taken, part)
            rest -= taken
        self.add(rest, pod.last_part)
        self._now += timedelta(seconds=self.seconds_until(pod.ended_at))


def split_time(times: AttemptTimes) -> Seconds:
    """Return the seconds of each part of an attempt. Their sum is the time from `begins_at` to `ends_at`."""
    timeline = _Timeline(times.begins_at, times.ends_at)
    before = "suspended" if times.follows_suspension else "waiting"
    if times.prepared is not None:
        timeline.add_until(times.prepared[0], before)
        timeline.add_until(times.prepared[1], "preparation")
    timeline.add_until(times.job_created_at, before)
    without_pod = "queued" if times.has_queue else "scheduling"
    for pod in sorted(times.pods, key=lambda pod: pod.created_at):
        timeline.add_until(pod.created_at, without_pod)
        timeline.add_until(pod.scheduled_at or pod.started_at or pod.ended_at, "scheduling")
        if pod.scheduled_at is not None or pod.started_at is not None:
            timeline.add_until(pod.started_at or pod.ended_at, "podStart")
        if pod.started_at is not None:
            timeline.add_container(pod)
    timeline.add_until(None, "other" if times.pods else without_pod)
    return timeline.seconds


def split_lost_steps(entries: Sequence[AttemptTime], attempts: Sequence[Attempt]) -> list[AttemptTime]:
    """Divide the time of each attempt's steps into steps that count and steps that a later attempt repeated, in proportion to their numbers."""
    settled, first_repeated = [], None
    records = {attempt.number: attempt for attempt in attempts}
    for entry in reversed(entries):
        record = records.get(entry.number)
        start = (record.resumed_from_step or 0) if record is not None else 0
        settled.append(entry if record is None or first_repeated is None else _with_lost_steps(entry, start, record.last_step or start, first_repeated))
        if record is not None and (record.resumed_from_step is not None or record.last_step):
            first_repeated = start if first_repeated is None else min(start, first_repeated)
    return settled[::-1]


def _with_lost_steps(entry: AttemptTime, start: int, last: int, first_repeated: int) -> AttemptTime:
    """Split the seconds of all steps from `start` to `last`. Steps after `first_repeated` are lost."""
    seconds = entry.parts.get("steps", 0.0) + entry.parts.get("lostSteps", 0.0)
    kept_share = min(max(first_repeated - start, 0) / (last - start), 1.0) if last > start else 0.0
    kept = round(seconds * kept_share, 3)
    parts = {**entry.parts, "steps": kept, "lostSteps": round(seconds - kept, 3)}
    return entry.model_copy(update={"parts": {part: value for part, value in parts.items() if value}})


def compute_goodput(
    facts: Facts, old: Goodput | None, attempts: Sequence[Attempt], attempt_end: AttemptEnd | None, job: JobView | None, kept_attempts: int
) -> Goodput | None:
    """Return the goodput until the newest report or the end of the current attempt. Without either, return the old goodput.

    `attempts`: the new records of the attempts. `job`: the Job of the current attempt.
    """
    if attempt_end is None and facts.live_report is None:
        return old
    ends_at = attempt_end.time if attempt_end is not None else facts.live_report.time if facts.live_report else facts.now
    known = {entry.number: entry for entry in old.attempts} if old else {}
    earlier_entries = [entry for number, entry in known.items() if number < facts.attempt]
    earlier: Seconds = dict(old.earlier or {}) if old else {}
    begins_at = facts.job.created_at + timedelta(seconds=sum(earlier.values()) + sum(entry.wall_seconds for entry in earlier_entries))
    times = _times_of_attempt(facts, attempts, job, begins_at, ends_at)
    parts = {part: round(seconds, 3) for part, seconds in split_time(times).items()}
    if facts.attempt in known and not times.pods:
        parts = _without_pods(known[facts.attempt], total(parts))
    entries = split_lost_steps([*earlier_entries, AttemptTime(number=facts.attempt, wall_seconds=total(parts), parts=parts)], attempts)
    for entry in entries[:-kept_attempts]:
        earlier = add_parts([earlier, entry.parts])
    return summarise(entries[-kept_attempts:], earlier)


def _without_pods(known: AttemptTime, wall_seconds: float) -> Seconds:
    """Return the known parts of an attempt whose pods were removed while the operator did not run. The time since then is `other`."""
    rest = wall_seconds - known.wall_seconds
    return add_parts([known.parts, {"other": rest}]) if rest >= 0 else known.parts


def summarise(entries: Sequence[AttemptTime], earlier: Seconds) -> Goodput:
    """Return the goodput of all attempts. `earlier`: parts of attempts that are not in `entries`."""
    parts = add_parts([earlier, *(entry.parts for entry in entries)])
    seconds_on_nodes = sum(seconds for part, seconds in parts.items() if part not in PARTS_BEFORE_NODES)
    useful_seconds = parts.get("firstStep", 0.0) + parts.get("steps", 0.0)
    return Goodput(
        wall_seconds=total(parts), percent=round(100 * useful_seconds / seconds_on_nodes, 1) if seconds_on_nodes else None,
        parts=TimeUse.model_validate(parts), attempts=list(entries), earlier=earlier or None,
    )  # fmt: skip


def total(parts: Mapping[str, float]) -> float:
    """Return the sum of all parts."""
    return round(sum(parts.values()), 3)


def add_parts(several: Iterable[Mapping[str, float]]) -> Seconds:
    """Return the sum of each part."""
    sums: Seconds = {}
    for parts in several:
        for part, seconds in parts.items():
            sums[part] = round(sums.get(part, 0.0) + seconds, 3)
    return sums


def _times_of_attempt(
    facts: Facts, attempts: Sequence[Attempt], job: JobView | None, begins_at: datetime, ends_at: datetime
) -> AttemptTimes:
    records = {attempt.number: attempt for attempt in attempts}
    record, previous = records.get(facts.attempt), records.get(facts.attempt - 1)
    preparation = facts.job.status.preparation
    prepared = (preparation.start_time, preparation.end_time) if preparation is not None else (None, None)
    start_time = job.created_at if job is not None else record.start_time if record is not None else None
    return AttemptTimes(
        begins_at=begins_at, ends_at=ends_at, prepared=(prepared[0], prepared[1]) if prepared[0] and prepared[1] else None,
        job_created_at=start_time, has_queue=bool(facts.spec.placement.queue_name or (job is not None and job.queue)),
        follows_suspension=previous is not None and previous.reason == Reason.SUSPENDED,
        pods=[_time_of_pod(facts, pod) for pod in facts.attempt_pods if pod.completion_index == 0],
    )  # fmt: skip


def _time_of_pod(facts: Facts, pod: PodView) -> PodTime:
    received, message, ended = facts.last_report, pod.termination_message, pod.terminated
    report = received.report if received is not None and received.pod_uid == pod.uid else None
    time_use = (message.time_use if message else None) or (report.time_use if report else None)
    last_part = PART_OF_STAGE[report.stage if report else Stage.STARTING]
    if (message is not None and message.time_use is not None) or not pod.is_finished:
        last_part = "other"
    return PodTime(
        created_at=pod.created_at, scheduled_at=pod.scheduled_at, started_at=(ended.started_at if ended else None) or pod.running_since,
        ended_at=(ended.finished_at if ended else None) or (pod.deletion_timestamp or pod.removed_at if pod.is_deleted else None),
        reported=time_use.seconds() if time_use is not None else None, last_part=last_part,
    )  # fmt: skip
