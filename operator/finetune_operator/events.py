"""Emits Kubernetes events about changes of the status, for `kubectl describe`.

`draft_events` is a pure function that compares two statuses. `EventRecorder` posts events and counts repeated events in a series. If the recorder cannot
post an event, the reconcile continues. The API server does not allow changes of an event's message, so the event's name contains a hash of the message.

`kubectl get events` and `kubectl describe` sort events by a field that only the older events API (`v1`) has. Both commands sort events without this field
by name. The names of the operator's events therefore begin with the job's resourceVersion and the number of the event.

Events are emitted before the status is written. If the operator restarts before the status write, it detects the same transition and
emits an event with the same name again. So no event is lost, and no new event is duplicated. Only a repeated event may be counted twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from finetune_api import names
from finetune_api.names import Condition as ConditionType
from finetune_api.names import Phase, Reason
from finetune_api.status import Attempt, FineTuneJobStatus

from finetune_operator.kube import AlreadyExists, KubeClient, KubeError, NotFound
from finetune_operator.objects import EVENT, Object
from finetune_operator.text import clean
from finetune_operator.views import FineTuneJobView

logger = logging.getLogger(__name__)

EventType = Literal["Normal", "Warning"]
MAX_NOTE_CHARACTERS = 1000
"""Maximum length of an event's message in characters. The API server allows 1024 bytes."""
POST_TIMEOUT_SECONDS = 5.0
"""Timeout for posting one event. The status write waits until the event is posted."""
FINISH_ACTION = "Finish"
"""Action of a job's last event. The rate limit never drops this event."""
BUCKET_TOKENS, TOKEN_REFILL_SECONDS = 25, 60.0
"""Size of a job's token bucket, and seconds until one token is added to the bucket."""
MAX_EVENT_NAMES = 16384
"""Maximum number of event names that the operator keeps to count repeated events in a series."""
MAX_TOKEN_BUCKETS = 4096
"""If there are more token buckets than this, buckets that are full again are dropped."""
BLOCKING_REASONS = frozenset({
    Reason.UNSCHEDULABLE, Reason.IMAGE_PULL_FAILED, Reason.CONFIG_MISSING, Reason.QUOTA_EXCEEDED,
    Reason.FORBIDDEN_BY_POLICY, Reason.CHILDREN_CONFLICT,
})  # fmt: skip


@dataclass(frozen=True)
class EventDraft:
    """An event that will be emitted."""

    reason: Reason
    note: str
    type: EventType = "Normal"
    action: str = "Reconcile"


def draft_events(old_status: FineTuneJobStatus, new_status: FineTuneJobStatus) -> list[EventDraft]:
    """Return the events for the change from `old_status` to `new_status`, in the order in which a run causes them: for example acceptance before training."""
    draft_functions = (
        _draft_acceptance_events, _draft_preparation_events, _draft_attempt_events, _draft_waiting_events, _draft_training_events, _draft_end_events,
    )  # fmt: skip
    return [draft for draft_function in draft_functions for draft in draft_function(old_status, new_status)]


@dataclass(frozen=True)
class ConditionState:
    """Status, reason and message of a condition. All three are empty if the condition is absent."""

    status: str = ""
    reason: str = ""
    message: str = ""


def _read_condition_state(status: FineTuneJobStatus, condition_type: ConditionType) -> ConditionState:
    condition = status.condition(condition_type)
    return ConditionState(condition.status, condition.reason, condition.message) if condition else ConditionState()


def _draft_acceptance_events(old_status: FineTuneJobStatus, new_status: FineTuneJobStatus) -> Iterator[EventDraft]:
    old_condition, new_condition = _read_condition_state(old_status, ConditionType.ACCEPTED), _read_condition_state(new_status, ConditionType.ACCEPTED)
    if new_condition.status == "True" and old_condition.status != "True":
        # The event about the start of an attempt or of a preparation also says that the job was accepted.
        has_started = (new_status.attempts and not old_status.attempts) or (new_status.preparation and not old_status.preparation)
        if not has_started:
            yield EventDraft(Reason.ACCEPTED, new_condition.message, action="Accept")
    elif new_condition.status == "False" and (old_condition.status != "False" or old_condition.reason != new_condition.reason):
        yield EventDraft(Reason(new_condition.reason), new_condition.message, "Warning", "Accept")


def _draft_preparation_events(old_status: FineTuneJobStatus, new_status: FineTuneJobStatus) -> Iterator[EventDraft]:
    old_preparation, new_preparation = old_status.preparation, new_status.preparation
    if new_preparation is None:
        return
    condition = _read_condition_state(new_status, ConditionType.PREPARED)
    if old_preparation is None:
        yield EventDraft(Reason.PREPARING, f"created the Job of preparation {new_preparation.number}", action="Prepare")
    elif new_preparation.number > old_preparation.number:
        yield EventDraft(Reason.RETRYING, f"preparation {new_preparation.number} follows: {new_preparation.message}", "Warning", "Prepare")
    if new_preparation.reason is not None and (old_preparation is None or old_preparation.reason is None) and not _is_finished(new_status):
        is_prepared = new_preparation.reason == Reason.PREPARED
        yield EventDraft(Reason(condition.reason), condition.message, "Normal" if is_prepared else "Warning", "Prepare")


def _draft_attempt_events(old_status: FineTuneJobStatus, new_status: FineTuneJobStatus) -> Iterator[EventDraft]:
    old_attempts_by_number = {attempt.number: attempt for attempt in old_status.attempts}
    for attempt in new_status.attempts:
        old_attempt = old_attempts_by_number.get(attempt.number)
        if old_attempt is None:
            yield EventDraft(Reason.ATTEMPT_STARTED, f"created the Job of attempt {attempt.number}", action="Create")
        if attempt.resumed_from_step and (old_attempt is None or old_attempt.resumed_from_step != attempt.resumed_from_step):
            note = f"attempt {attempt.number} resumed from step {attempt.resumed_from_step}"
            yield EventDraft(Reason.RESUMED_FROM_CHECKPOINT, note)
        if attempt.end_time is not None and (old_attempt is None or old_attempt.end_time is None):
            yield from _draft_failed_attempt_events(attempt)
    for adaptation in new_status.adaptations[len(old_status.adaptations) :]:
        yield EventDraft(Reason(adaptation.reason), f"changed for the next attempt: {adaptation.change}", "Warning", "Adapt")
    if (new_status.attempt or 1) > (old_status.attempt or 1) and not _is_finished(new_status) and new_status.phase is not Phase.SUSPENDED:
        yield EventDraft(Reason.RETRYING, f"attempt {new_status.attempt} follows")


def _draft_failed_attempt_events(attempt: Attempt) -> Iterator[EventDraft]:
    if attempt.reason in (Reason.SUCCEEDED, Reason.SUSPENDED, Reason.CANCELLED) or not attempt.reason:
        return
    code_part = f", exit code {attempt.exit_code}" if attempt.exit_code is not None else ""
    node_part = f" on node {attempt.node}" if attempt.node else ""
    note = f"attempt {attempt.number} ended{node_part}{code_part}: {attempt.message or attempt.reason}"
    yield EventDraft(Reason(attempt.reason), note, "Warning", "Observe")


def _draft_waiting_events(old_status: FineTuneJobStatus, new_status: FineTuneJobStatus) -> Iterator[EventDraft]:
    old_condition = _read_condition_state(old_status, ConditionType.QUOTA_RESERVED)
    new_condition = _read_condition_state(new_status, ConditionType.QUOTA_RESERVED)
    is_queued = new_condition.status == "False" and new_condition.reason == Reason.QUEUED
    if is_queued and (old_condition.status, old_condition.reason) != (new_condition.status, new_condition.reason):
        if old_condition.status == "True":
            yield EventDraft(Reason.PREEMPTED, "the queue revoked the quota; the pods save and stop", "Warning", "Queue")
        yield EventDraft(Reason.QUEUED, new_condition.message, action="Queue")
    old_condition, new_condition = _read_condition_state(old_status, ConditionType.PODS_READY), _read_condition_state(new_status, ConditionType.PODS_READY)
    if new_condition.reason != old_condition.reason and new_condition.reason in BLOCKING_REASONS:
        yield EventDraft(Reason(new_condition.reason), new_condition.message, "Warning", "Wait")
    old_condition, new_condition = _read_condition_state(old_status, ConditionType.STALLED), _read_condition_state(new_status, ConditionType.STALLED)
    if new_condition.status == "True" and old_condition.status != "True" and not _is_finished(new_status):
        yield EventDraft(Reason(new_condition.reason), new_condition.message, "Warning", "Wait")


def _draft_training_events(old_status: FineTuneJobStatus, new_status: FineTuneJobStatus) -> Iterator[EventDraft]:
    if not old_status.steps_done and new_status.steps_done and not _is_finished(new_status):
        total_steps = new_status.progress.total_steps if new_status.progress else None
        note = f"completed the first of {total_steps} steps" if total_steps else "completed the first step"
        yield EventDraft(Reason.TRAINING_STARTED, note, action="Train")
    if new_status.latest_checkpoint and not old_status.latest_checkpoint:
        yield EventDraft(Reason.FIRST_CHECKPOINT_COMMITTED, f"committed {new_status.latest_checkpoint}", action="Checkpoint")
    old_condition = _read_condition_state(old_status, ConditionType.CHECKPOINTS_HEALTHY)
    new_condition = _read_condition_state(new_status, ConditionType.CHECKPOINTS_HEALTHY)
    if new_condition.status == "False" and old_condition.status != "False":
        yield EventDraft(Reason(new_condition.reason), new_condition.message, "Warning", "Checkpoint")


def _draft_end_events(old_status: FineTuneJobStatus, new_status: FineTuneJobStatus) -> Iterator[EventDraft]:
    old_condition, new_condition = _read_condition_state(old_status, ConditionType.SUSPENDED), _read_condition_state(new_status, ConditionType.SUSPENDED)
    if new_condition.status == "True" and old_condition.status != "True":
        yield EventDraft(Reason.SUSPENDED, new_condition.message, action="Suspend")
    if new_condition.status == "False" and old_condition.status == "True" and new_condition.reason == Reason.RESUMED and not _is_finished(new_status):
        yield EventDraft(Reason.RESUMED, new_condition.message, action="Resume")
    if not _is_finished(new_status) or _is_finished(old_status):
        return
    if new_status.reason == Reason.EXISTING_RESULT_ADOPTED:
        yield EventDraft(Reason.EXISTING_RESULT_ADOPTED, _read_condition_state(new_status, ConditionType.SUCCEEDED).message, action=FINISH_ACTION)
    elif new_status.phase is Phase.SUCCEEDED:
        output_location = new_status.output.uri if new_status.output and new_status.output.uri else "storage"
        yield EventDraft(Reason.SUCCEEDED, f"the final artefact is committed: {output_location}", action=FINISH_ACTION)
    elif new_status.phase is Phase.CANCELLED:
        yield EventDraft(Reason.CANCELLED, _read_condition_state(new_status, ConditionType.SUCCEEDED).message, action=FINISH_ACTION)
    else:
        failure = new_status.failure
        failure_text = f"{failure.class_} {failure.code}: {failure.message}" if failure else "unknown"
        hint_text = f"; {failure.hint}" if failure and failure.hint else ""
        yield EventDraft(Reason.FAILED, failure_text + hint_text, "Warning", FINISH_ACTION)


def _is_finished(status: FineTuneJobStatus) -> bool:
    return status.is_true(ConditionType.FINISHED)


def hash_event_content(job: FineTuneJobView, draft: EventDraft) -> str:
    """Return a hash of the job's uid and the event's content, so that equal events of one job have equal hashes."""
    cleaned_note = clean(draft.note, MAX_NOTE_CHARACTERS)
    return hashlib.sha256("\0".join((job.uid, draft.type, draft.reason, draft.action, cleaned_note)).encode()).hexdigest()[:16]


def build_event_name(job: FineTuneJobView, draft: EventDraft, event_number: int) -> str:
    """Return the name of an event. `event_number` counts the events that are emitted for one resourceVersion of the job.

    Names sort in the order in which the events are emitted, because a later resourceVersion is a larger number.
    """
    return f"{job.name}.{job.version:016x}.{event_number:02x}.{hash_event_content(job, draft)}"


def build_event(job: FineTuneJobView, draft: EventDraft, name: str, reporting_instance: str, now: datetime) -> Object:
    """Return the Kubernetes object of one event."""
    return {
        "apiVersion": EVENT.api_version,
        "kind": EVENT.kind,
        "metadata": {
            "name": name,
            "namespace": job.namespace,
        },
        "eventTime": _format_micro_time(now),
        "reportingController": names.GROUP,
        "reportingInstance": reporting_instance[:128],
        "action": draft.action,
        "reason": draft.reason.value,
        "type": draft.type,
        "note": clean(draft.note, MAX_NOTE_CHARACTERS),
        "regarding": {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "namespace": job.namespace,
            "name": job.name,
            "uid": job.uid,
        },
    }


def _format_micro_time(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@dataclass
class TokenBucket:
    """Limits the rate of one job's events."""

    tokens: float
    refilled_at: float

    def take_token(self, now: float) -> bool:
        """Take a token. Returns False if the bucket has no token."""
        self.tokens = min(BUCKET_TOKENS, self.tokens + (now - self.refilled_at) / TOKEN_REFILL_SECONDS)
        self.refilled_at = now
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


class EventRecorder:
    """Posts events. Events beyond a job's rate limit are dropped and logged."""

    def __init__(self, kube: KubeClient, reporting_instance: str):
        self._kube = kube
        self._reporting_instance = reporting_instance
        self._token_buckets: dict[str, TokenBucket] = {}
        self._posted_hashes: dict[str, set[str]] = {}
        """Hashes of the events that were posted since the last status write of a job, by the job's uid."""
        self._names_by_hash: dict[str, str] = {}
        """Names of earlier events, by hash. A repeated event increases the count of the earlier event."""

    async def emit(self, job: FineTuneJobView, drafts: list[EventDraft]) -> None:
        """Post the events that belong to the next status write. If this write is retried, no event is posted twice. Errors are logged, not raised."""
        posted_hashes = self._posted_hashes.setdefault(job.uid, set())
        for draft in drafts:
            draft_hash = hash_event_content(job, draft)
            if draft_hash in posted_hashes:
                continue
            name = build_event_name(job, draft, len(posted_hashes))
            posted_hashes.add(draft_hash)
            if not self._take_token(job.uid) and draft.action != FINISH_ACTION:
                logger.info("dropped event %s of %s/%s: rate limit", draft.reason, job.namespace, job.name)
                continue
            try:
                async with asyncio.timeout(POST_TIMEOUT_SECONDS):
                    await self._post(build_event(job, draft, name, self._reporting_instance, self._kube.clock.now()), draft_hash)
            except (KubeError, TimeoutError) as error:
                # A terminating namespace or a missing permission must not fail the reconcile.
                logger.info("event not posted: %s", str(error) or "timeout")

    def record_status_write(self, uid: str) -> None:
        """Record that the job's status was written. From now on, an equal event counts as a repeated event."""
        self._posted_hashes.pop(uid, None)

    async def _post(self, event: Object, event_hash: str) -> None:
        """Increase the count of an earlier equal event. If there is no such event, create the event."""
        earlier_name = self._names_by_hash.get(event_hash)
        if earlier_name is not None and await self._count_in_series(earlier_name, event):
            return
        self._names_by_hash[event_hash] = event["metadata"]["name"]
        if len(self._names_by_hash) > MAX_EVENT_NAMES:
            del self._names_by_hash[next(iter(self._names_by_hash))]
        # If the event already exists, the operator emitted it before a restart.
        with contextlib.suppress(AlreadyExists):
            await self._kube.create(EVENT, event["metadata"]["namespace"], event)

    async def _count_in_series(self, name: str, event: Object) -> bool:
        """Add one to the count of an existing event. Returns False if the event has expired."""
        namespace = event["metadata"]["namespace"]
        try:
            existing_event = await self._kube.get(EVENT, namespace, name)
            count = int((existing_event.get("series") or {}).get("count", 1)) + 1
            series = {"count": count, "lastObservedTime": event["eventTime"]}
            await self._kube.patch(EVENT, namespace, name, {"series": series})
        except NotFound:
            return False
        return True

    def _take_token(self, uid: str) -> bool:
        now = asyncio.get_running_loop().time()
        is_allowed = self._token_buckets.setdefault(uid, TokenBucket(BUCKET_TOKENS, now)).take_token(now)
        if len(self._token_buckets) > MAX_TOKEN_BUCKETS:
            full_refill_seconds = BUCKET_TOKENS * TOKEN_REFILL_SECONDS
            self._token_buckets = {key: bucket for key, bucket in self._token_buckets.items() if now - bucket.refilled_at <= full_refill_seconds}
        return is_allowed
