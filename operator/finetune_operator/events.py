"""Events: the story of a run's last hour, for `kubectl describe`. On transitions only, just before the status is written.

`transitions` compares two statuses and is pure; `Recorder` posts, never fails a reconcile, and counts repeats in a series instead
of writing them again. An event's note cannot be changed, so its name hashes it.

Before and not after, because the written status is the only memory of what was told: a process that dies between the two finds the
transition again and tells it again, under the same name and from the same version of the job, which makes it the same event.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from finetune_api import names
from finetune_api.names import Condition as Kind
from finetune_api.names import FailureClass, Phase, Reason
from finetune_api.status import Attempt, FineTuneJobStatus

from finetune_operator.kube import AlreadyExists, Kube, KubeError
from finetune_operator.objects import EVENT, Object
from finetune_operator.text import clean
from finetune_operator.views import JobObject

logger = logging.getLogger(__name__)

Type = Literal["Normal", "Warning"]
MAX_NOTE = 1000
MAX_BUCKETS = 4096
PATIENCE = 5.0
"""Seconds that an event may take: a status waits for it."""
FINISH = "Finish"
"""The action of a job's last event, which is never dropped."""
BURST, REFILL_SECONDS = 25, 60.0
"""Events of one job that may come at once, and the time after which one more may."""
OBSTACLES = frozenset({
    Reason.UNSCHEDULABLE, Reason.IMAGE_PULL_FAILED, Reason.CONFIG_MISSING, Reason.QUOTA_EXCEEDED,
    Reason.FORBIDDEN_BY_POLICY, Reason.CHILDREN_CONFLICT,
})  # fmt: skip


@dataclass(frozen=True)
class Note:
    """One event to be."""

    reason: Reason
    note: str
    type: Type = "Normal"
    action: str = "Reconcile"


def transitions(old: FineTuneJobStatus, new: FineTuneJobStatus) -> list[Note]:
    """What happened between two statuses, in the order of a run's life."""
    return [*_acceptance(old, new), *_attempts(old, new), *_waiting(old, new), *_training(old, new), *_end(old, new)]


def _status(status: FineTuneJobStatus, kind: Kind) -> tuple[str, str, str]:
    """(status, reason, message) of a condition; empty words if it is absent."""
    found = status.condition(kind)
    return (found.status, found.reason, found.message) if found else ("", "", "")


def _acceptance(old: FineTuneJobStatus, new: FineTuneJobStatus) -> Iterator[Note]:
    was, before, _ = _status(old, Kind.ACCEPTED)
    now, reason, message = _status(new, Kind.ACCEPTED)
    if now == "True" and was != "True":
        yield Note(Reason.ACCEPTED, message, action="Accept")
    elif now == "False" and (was != "False" or before != reason):
        yield Note(Reason(reason), message, "Warning", "Accept")


def _attempts(old: FineTuneJobStatus, new: FineTuneJobStatus) -> Iterator[Note]:
    before = {one.number: one for one in old.attempts}
    for attempt in new.attempts:
        known = before.get(attempt.number)
        if known is None:
            yield Note(Reason.ATTEMPT_STARTED, f"created the Job of attempt {attempt.number}", action="Create")
        if attempt.resumed_from_step and (known is None or known.resumed_from_step != attempt.resumed_from_step):
            note = f"attempt {attempt.number} continued from step {attempt.resumed_from_step}"
            yield Note(Reason.RESUMED_FROM_CHECKPOINT, note)
        if attempt.end_time is not None and (known is None or known.end_time is None):
            yield from _ending(attempt)
    for change in new.adaptations[len(old.adaptations) :]:
        yield Note(Reason(change.reason), f"changed for the next attempt: {change.change}", "Warning", "Adapt")
    if (new.attempt or 1) > (old.attempt or 1) and not _final(new) and new.phase is not Phase.SUSPENDED:
        yield Note(Reason.RETRYING, f"attempt {new.attempt} will be made")


def _ending(attempt: Attempt) -> Iterator[Note]:
    if attempt.reason in (Reason.SUCCEEDED, Reason.SUSPENDED, Reason.CANCELLED) or not attempt.reason:
        return
    code = f", exit code {attempt.exit_code}" if attempt.exit_code is not None else ""
    where = f" on node {attempt.node}" if attempt.node else ""
    note = f"attempt {attempt.number} ended{where}{code}: {attempt.message or attempt.reason}"
    yield Note(Reason(attempt.reason), note, "Warning", "Observe")


def _waiting(old: FineTuneJobStatus, new: FineTuneJobStatus) -> Iterator[Note]:
    was, before, _ = _status(old, Kind.QUOTA_RESERVED)
    now, reason, message = _status(new, Kind.QUOTA_RESERVED)
    if now == "False" and reason == Reason.QUEUED and (was, before) != (now, reason):
        if was == "True":
            yield Note(Reason.PREEMPTED, "the queue took the quota back; the pods save and wait", "Warning", "Queue")
        yield Note(Reason.QUEUED, message, action="Queue")
    _, before, _ = _status(old, Kind.PODS_READY)
    _, reason, message = _status(new, Kind.PODS_READY)
    if reason != before and reason in OBSTACLES:
        yield Note(Reason(reason), message, "Warning", "Wait")
    if _status(new, Kind.STALLED)[0] == "True" and _status(old, Kind.STALLED)[0] != "True" and not _final(new):
        _, reason, message = _status(new, Kind.STALLED)
        yield Note(Reason(reason), message, "Warning", "Wait")


def _training(old: FineTuneJobStatus, new: FineTuneJobStatus) -> Iterator[Note]:
    if not old.steps_done and new.steps_done and not _final(new):
        assert new.progress is not None  # noqa: S101 -- a step was found
        yield Note(
            Reason.TRAINING_STARTED, f"first step of {new.progress.total_steps or 'unknown'} done", action="Train"
        )
    if new.latest_checkpoint and not old.latest_checkpoint:
        yield Note(Reason.FIRST_CHECKPOINT_COMMITTED, f"committed {new.latest_checkpoint}", action="Checkpoint")
    was, _, _ = _status(old, Kind.CHECKPOINTS_HEALTHY)
    now, reason, message = _status(new, Kind.CHECKPOINTS_HEALTHY)
    if now == "False" and was != "False":
        yield Note(Reason(reason), message, "Warning", "Checkpoint")


def _end(old: FineTuneJobStatus, new: FineTuneJobStatus) -> Iterator[Note]:
    was, _, _ = _status(old, Kind.SUSPENDED)
    now, reason, message = _status(new, Kind.SUSPENDED)
    if now == "True" and was != "True":
        yield Note(Reason.SUSPENDED, message, action="Suspend")
    if now == "False" and was == "True" and reason == Reason.RESUMED and not _final(new):
        yield Note(Reason.RESUMED, message, action="Resume")
    if not _final(new) or _final(old):
        return
    if new.phase is Phase.SUCCEEDED:
        where = new.output.uri if new.output and new.output.uri else "storage"
        yield Note(Reason.SUCCEEDED, f"the final artefact is committed: {where}", action=FINISH)
    elif new.phase is Phase.CANCELLED:
        yield Note(Reason.CANCELLED, _status(new, Kind.SUCCEEDED)[2], action=FINISH)
    else:
        failure = new.failure
        shown = f"{failure.class_} {failure.code}: {failure.message}" if failure else "unknown"
        hint = f"; {failure.hint}" if failure and failure.hint else ""
        named = failure.class_ if failure else FailureClass.INTERNAL
        yield Note(Reason.FAILED, shown + hint if named else shown, "Warning", FINISH)


def _final(status: FineTuneJobStatus) -> bool:
    return status.holds(Kind.FINISHED)


def build_event(job: JobObject, note: Note, instance: str, now: datetime) -> Object:
    """The object of one event; the same event of the same job always has the same name."""
    text = clean(note.note, MAX_NOTE)
    digest = hashlib.sha256("\0".join((job.uid, note.type, note.reason, note.action, text)).encode()).hexdigest()
    return {
        "apiVersion": EVENT.api_version,
        "kind": EVENT.kind,
        "metadata": {
            "name": f"{job.name}.{digest[:16]}",
            "namespace": job.namespace,
            "annotations": {names.Annotation.OBSERVED_VERSION.value: job.resource_version},
        },
        "eventTime": _micro(now),
        "reportingController": names.GROUP,
        "reportingInstance": instance[:128],
        "action": note.action,
        "reason": note.reason.value,
        "type": note.type,
        "note": text,
        "regarding": {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "namespace": job.namespace,
            "name": job.name,
            "uid": job.uid,
        },
    }


def _micro(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@dataclass
class _Bucket:
    tokens: float
    at: float


class Recorder:
    """Posts events. What one job tells too fast is dropped, with a log line."""

    def __init__(self, kube: Kube, instance: str):
        self._kube = kube
        self._instance = instance
        self._buckets: dict[str, _Bucket] = {}
        self._untold: dict[str, set[str]] = {}
        """Names of what was posted for a status that is not written yet, by uid of the job."""

    async def tell(self, job: JobObject, notes: list[Note]) -> None:
        """Post these, for the status that is to be written next; none of them twice until `settle`. Raises nothing of the API's."""
        for note in notes:
            event = build_event(job, note, self._instance, self._kube.clock.now())
            posted = self._untold.setdefault(job.uid, set())
            if event["metadata"]["name"] in posted:
                continue
            posted.add(event["metadata"]["name"])
            if not self._allowed(job.uid) and note.action != FINISH:
                logger.info("too many events of %s/%s: %s is dropped", job.namespace, job.name, note.reason)
                continue
            try:
                async with asyncio.timeout(PATIENCE):
                    await self._post(event)
            except (KubeError, TimeoutError) as error:
                # An event is a courtesy: a namespace that is going away or a missing permission must not matter.
                logger.info("an event was not posted: %s", error or "no answer in time")

    def settle(self, uid: str) -> None:
        """The status that the last events tell of is written: from now on the same again is a repeat."""
        self._untold.pop(uid, None)

    async def _post(self, event: Object) -> None:
        meta = event["metadata"]
        try:
            await self._kube.create(EVENT, meta["namespace"], event)
        except AlreadyExists:
            found = await self._kube.get(EVENT, meta["namespace"], meta["name"])
            if (found["metadata"].get("annotations") or {}) == meta["annotations"]:
                return
            count = int((found.get("series") or {}).get("count", 1)) + 1
            series = {"count": count, "lastObservedTime": event["eventTime"]}
            change = {"metadata": {"annotations": meta["annotations"]}, "series": series}
            await self._kube.patch(EVENT, meta["namespace"], meta["name"], change)

    def _allowed(self, uid: str) -> bool:
        now = asyncio.get_running_loop().time()
        bucket = self._buckets.setdefault(uid, _Bucket(BURST, now))
        bucket.tokens = min(BURST, bucket.tokens + (now - bucket.at) / REFILL_SECONDS)
        bucket.at = now
        if bucket.tokens < 1:
            return False
        bucket.tokens -= 1
        if len(self._buckets) > MAX_BUCKETS:
            full = [key for key, one in self._buckets.items() if now - one.at > BURST * REFILL_SECONDS]
            for key in full:
                del self._buckets[key]
        return True
