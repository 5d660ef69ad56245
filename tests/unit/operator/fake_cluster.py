"""A minimal fake API server, and an operator process that is connected to this server."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, cast

from finetune_api.names import API_VERSION, KIND
from finetune_operator.cache import JobCache
from finetune_operator.events import EventRecorder
from finetune_operator.kube import (
    AlreadyExists,
    ApiResponse,
    Conflict,
    Invalid,
    KubeClient,
    NotFound,
    ObjectList,
    ServerClock,
)
from finetune_operator.metrics import Metrics
from finetune_operator.objects import EVENT, FINETUNEJOB, JOB, POD, Kind, Object
from finetune_operator.reconcile import Reconciler
from finetune_operator.scrape import ProgressScraper
from finetune_operator.settings import OperatorConfig, ScrapeSettings
from finetune_operator.throttle import BURST_COUNT
from finetune_operator.views import JobView, read_finetunejob
from finetune_operator.workqueue import JobKey, WorkQueue

from tests.unit.operator.samples import CONFIG, SPEC, UID, end_pod, pod

KEY = JobKey("team", "run")


@dataclass
class FakeApiServer:
    """Stores objects by kind and name. Each request first calls `before_request(verb, kind)`, which may raise an error."""

    objects: dict[tuple[str, str], Object] = field(default_factory=dict)
    new_versions: Any = field(default_factory=lambda: itertools.count(2))
    requests: list[tuple[str, str]] = field(default_factory=list)
    clock: ServerClock = field(default_factory=ServerClock)
    before_request: Callable[[str, Kind], None] = lambda verb, kind: None
    rejects_status: Callable[[Object], bool] = lambda status: False
    rejection_message: str = "status.progress.step: Invalid value"
    pruned_fields: frozenset[str] = frozenset()
    """Status fields that the simulated CRD does not have. The server removes these fields whenever a status is written."""
    warnings: tuple[str, ...] = ()
    """Warnings that the server returns in its response to each create request."""

    def _receive(self, verb: str, kind: Kind) -> None:
        self.requests.append((verb, kind.plural))
        self.before_request(verb, kind)

    def put(self, kind: Kind, body: Object) -> Object:
        """Store an object with a new resourceVersion."""
        created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        meta = {"uid": f"uid-{body['metadata']['name']}", "creationTimestamp": created, **body["metadata"]}
        stored_object = {**body, "metadata": {**meta, "resourceVersion": str(next(self.new_versions))}}
        self.objects[kind.plural, meta["name"]] = stored_object
        return stored_object

    async def get(self, kind: Kind, namespace: str, name: str) -> Object:
        self._receive("get", kind)
        if (kind.plural, name) not in self.objects:
            raise NotFound("get", kind, name, 404, "NotFound", "")
        return self.objects[kind.plural, name]

    async def list(self, kind: Kind, namespace: str | None = None, *, label_selector: str = "", field_selector: str = "") -> ObjectList:
        """If `kind` is the pod kind, return the pods with these labels. For all other kinds, return an empty list."""
        self._receive("list", kind)
        selected_labels = {term.partition("=")[0]: term.partition("=")[2] for term in label_selector.split(",")}
        pods = [body for (plural, _), body in self.objects.items() if plural == POD.plural == kind.plural]
        return ObjectList([body for body in pods if selected_labels.items() <= body["metadata"].get("labels", {}).items()], 1)

    async def create(self, kind: Kind, namespace: str, body: Object) -> ApiResponse:
        self._receive("create", kind)
        name = body["metadata"]["name"]
        if (kind.plural, name) in self.objects:
            raise AlreadyExists("create", kind, name, 409, "AlreadyExists", "")
        return ApiResponse(self.put(kind, {**body, "metadata": {**body["metadata"], "namespace": namespace}}), self.warnings)

    async def replace(self, kind: Kind, namespace: str, body: Object, *, subresource: str | None = None) -> Object:
        self._receive("update", kind)
        name = body["metadata"]["name"]
        if (kind.plural, name) not in self.objects:
            error = NotFound("update", kind, name, 404, "NotFound", "")
            error.is_object_missing = True
            raise error
        stored_object = self.objects[kind.plural, name]
        if stored_object["metadata"]["resourceVersion"] != body["metadata"]["resourceVersion"]:
            raise Conflict("update", kind, name, 409, "Conflict", "")
        if self.rejects_status(body["status"]):
            raise Invalid("update", kind, name, 422, "Invalid", self.rejection_message)
        status = {name: value for name, value in body["status"].items() if name not in self.pruned_fields}
        return self.put(kind, {**stored_object, "status": status})

    async def patch(self, kind: Kind, namespace: str, name: str, body: Object) -> Object:
        self._receive("patch", kind)
        stored_object = self.objects[kind.plural, name]
        meta = {**stored_object["metadata"], **body.get("metadata", {})}
        return self.put(kind, {**stored_object, **body, "metadata": meta})

    async def delete(self, kind: Kind, namespace: str, name: str, *, uid: str, grace_seconds: int | None = None) -> bool:
        self._receive("delete", kind)
        return self.objects.pop((kind.plural, name), None) is not None

    def count(self, verb: str, kind: Kind) -> int:
        """Return the number of requests with this verb and kind so far."""
        return self.requests.count((verb, kind.plural))

    @property
    def finetunejob(self) -> Object:
        """The stored FineTuneJob."""
        return self.objects[FINETUNEJOB.plural, "run"]

    def write_spec(self, spec: Object) -> None:
        """Replace the spec of the stored FineTuneJob, as a user does."""
        meta = self.finetunejob["metadata"]
        self.put(FINETUNEJOB, {**self.finetunejob, "metadata": {**meta, "generation": meta["generation"] + 1}, "spec": spec})

    def condition(self, condition_type: str) -> Object:
        """Return the FineTuneJob's condition of this type."""
        return next(entry for entry in self.finetunejob["status"]["conditions"] if entry["type"] == condition_type)

    def event_counts(self) -> dict[str, int]:
        """For each reason, return how often an event with this reason was emitted."""
        event_bodies = [body for (plural, _), body in self.objects.items() if plural == EVENT.plural]
        return {body["reason"]: (body.get("series") or {}).get("count", 1) for body in event_bodies}


def new_server() -> FakeApiServer:
    """Return a server with one new FineTuneJob."""
    server = FakeApiServer()
    meta = {"name": "run", "namespace": "team", "uid": UID, "generation": 1}
    server.put(FINETUNEJOB, {"apiVersion": API_VERSION, "kind": KIND, "metadata": meta, "spec": SPEC})
    return server


class OperatorProcess:
    """An operator process that has just started, with only the FineTuneJob in its cache."""

    def __init__(self, server: FakeApiServer, config: OperatorConfig = CONFIG) -> None:
        self.server, self.cache, self.queue = server, JobCache(), WorkQueue()
        kube = cast("KubeClient", server)
        self.scraper = ProgressScraper(ScrapeSettings(), server.clock.now, self.queue.add)
        self.reconciler = Reconciler(
            kube=kube, cache=self.cache, queue=self.queue, recorder=EventRecorder(kube, "test"), scraper=self.scraper,
            metrics=Metrics(), config=config,
        )  # fmt: skip
        self.refresh()

    def refresh(self) -> None:
        """Update the cache as the watches do."""
        self.cache.put_finetunejob(read_finetunejob(self.server.finetunejob))
        for job in list(self.cache.get(KEY).jobs.values()):
            if (JOB.plural, job.name) not in self.server.objects:
                self.cache.drop_job(job)

    async def reconcile(self) -> None:
        """Reconcile the FineTuneJob once."""
        await self.reconciler.reconcile(KEY)

    async def work(self) -> None:
        """Run one worker until the queue is empty."""
        self.queue.add(KEY)
        worker_task = asyncio.create_task(self.reconciler.work())
        async with asyncio.timeout(10):
            while not self.server.requests or not self.queue.is_idle:  # noqa: ASYNC110 -- the worker sends no signal when the queue is empty
                await asyncio.sleep(0)
        worker_task.cancel()

    async def start_burst_of_new_jobs(self) -> None:
        """Make the operator detect a burst of new jobs: BURST_COUNT new jobs are taken from the queue."""
        other_keys = [JobKey("team", f"other{number}") for number in range(BURST_COUNT)]
        for key in other_keys:
            self.queue.add_high_priority(key)
        for _ in other_keys:
            self.queue.done((await self.queue.take())[0])

    def start_burst_of_transitions(self) -> None:
        """Start a burst of transitions: record BURST_COUNT transitions of other jobs."""
        for _ in range(BURST_COUNT):
            self.reconciler._writer._throttle._transitions.record(asyncio.get_running_loop().time())

    def start_burst_of_updates(self) -> None:
        """Make the operator detect a burst of updates: BURST_COUNT updates of other jobs' Jobs and pods are recorded."""
        for _ in range(BURST_COUNT):
            self.queue._update_burst.record(asyncio.get_running_loop().time())

    def finish_pod_and_job(self, job: JobView) -> None:
        """Mark the pod of the Job as succeeded, and the Job as completed."""
        self.cache.put_pod(end_pod(pod(version=6, created_at=job.created_at), 0))
        self.cache.put_job(replace(job, version=10**6, completed_at=job.created_at))


async def start_attempt(server: FakeApiServer) -> tuple[OperatorProcess, JobView]:
    """Reconcile until the first attempt has a Job and the status is written. Return the operator process and this Job."""
    process = OperatorProcess(server)
    for _ in range(2):
        await process.reconcile()
    (job,) = process.cache.get(KEY).jobs.values()
    return process, job
