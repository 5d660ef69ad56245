"""Looks at one job against an API server of a few lines: what is told and when, what is not tried again, what is not computed twice."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from finetune_api.names import API_VERSION, KIND, Annotation, Reason
from finetune_api.pod import RunConfig
from finetune_api.spec.common import SecretRef
from finetune_operator import events, pace
from finetune_operator import reconcile as module
from finetune_operator.cache import Cache
from finetune_operator.events import Recorder
from finetune_operator.facts import ReceivedReport
from finetune_operator.kube import (
    AlreadyExists,
    Conflict,
    Created,
    Forbidden,
    Invalid,
    Kube,
    KubeError,
    Listing,
    NamespaceTerminating,
    NotFound,
    OutcomeUnknown,
    ServerClock,
)
from finetune_operator.metrics import Metrics
from finetune_operator.objects import CORE_EVENT, EVENT, FINETUNEJOB, JOB, POD, SERVICE, Kind, Object
from finetune_operator.plan import Plan, Situation
from finetune_operator.policies.acceptance import Accepted
from finetune_operator.reconcile import Reconciler
from finetune_operator.scrape import Scraper
from finetune_operator.settings import OperatorConfig, ScrapeSettings, parse
from finetune_operator.views import JobView, read_finetunejob, read_status
from finetune_operator.workqueue import Key, WorkQueue

from tests.unit.operator.samples import CONFIG, SPEC, UID, ended, pod, report

KEY = Key("team", "run")


def condition(kind: str, truth: str, reason: str) -> Object:
    """A condition of a status."""
    return {"type": kind, "status": truth, "reason": reason, "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}


class PowerCut(BaseException):
    """The process ends here."""


@dataclass
class Server:
    """Objects by kind and name; `before` is called with verb and kind before a request has any effect, and may raise."""

    objects: dict[tuple[str, str], Object] = field(default_factory=dict)
    versions: Any = field(default_factory=lambda: itertools.count(2))
    requests: list[tuple[str, str]] = field(default_factory=list)
    clock: ServerClock = field(default_factory=ServerClock)
    before: Callable[[str, Kind], None] = lambda verb, kind: None

    def _note(self, verb: str, kind: Kind) -> None:
        self.requests.append((verb, kind.plural))
        self.before(verb, kind)

    def _put(self, kind: Kind, body: Object) -> Object:
        meta = {"uid": f"uid-{body['metadata']['name']}", "creationTimestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), **body["metadata"]}
        stored = {**body, "metadata": {**meta, "resourceVersion": str(next(self.versions))}}
        self.objects[kind.plural, meta["name"]] = stored
        return stored

    async def get(self, kind: Kind, namespace: str, name: str) -> Object:
        self._note("get", kind)
        if (kind.plural, name) not in self.objects:
            raise NotFound("get", kind, name, 404, "NotFound", "")
        return self.objects[kind.plural, name]

    async def list(self, kind: Kind, namespace: str | None = None, *, labels: str = "", fields: str = "") -> Listing:
        self._note("list", kind)
        return Listing([], 1)

    async def create(self, kind: Kind, namespace: str, body: Object) -> Created:
        self._note("create", kind)
        name = body["metadata"]["name"]
        if (kind.plural, name) in self.objects:
            raise AlreadyExists("create", kind, name, 409, "AlreadyExists", "")
        return Created(self._put(kind, {**body, "metadata": {**body["metadata"], "namespace": namespace}}))

    async def replace(self, kind: Kind, namespace: str, body: Object, *, subresource: str | None = None) -> Object:
        self._note("update", kind)
        if (kind.plural, body["metadata"]["name"]) not in self.objects:
            missing = NotFound("update", kind, body["metadata"]["name"], 404, "NotFound", "")
            missing.object_missing = True
            raise missing
        known = self.objects[kind.plural, body["metadata"]["name"]]
        if known["metadata"]["resourceVersion"] != body["metadata"]["resourceVersion"]:
            raise Conflict("update", kind, body["metadata"]["name"], 409, "Conflict", "")
        return self._put(kind, {**known, "status": body["status"]})

    async def patch(self, kind: Kind, namespace: str, name: str, body: Object) -> Object:
        self._note("patch", kind)
        known = self.objects[kind.plural, name]
        meta = {**known["metadata"], **body.get("metadata", {})}
        return self._put(kind, {**known, **body, "metadata": meta})

    async def delete(self, kind: Kind, namespace: str, name: str, *, uid: str, grace: int | None = None) -> bool:
        self._note("delete", kind)
        return self.objects.pop((kind.plural, name), None) is not None

    def count(self, verb: str, kind: Kind) -> int:
        return self.requests.count((verb, kind.plural))

    def told(self) -> dict[str, int]:
        """Reasons of events, and how often each was told."""
        found = [body for (plural, _), body in self.objects.items() if plural == EVENT.plural]
        return {body["reason"]: (body.get("series") or {}).get("count", 1) for body in found}


@pytest.fixture
def server() -> Server:
    found = Server()
    meta = {"name": "run", "namespace": "team", "uid": UID, "generation": 1}
    found._put(FINETUNEJOB, {"apiVersion": API_VERSION, "kind": KIND, "metadata": meta, "spec": SPEC})
    return found


class Process:
    """An operator that was just started: it knows what the server tells, and nothing else."""

    def __init__(self, server: Server, config: OperatorConfig = CONFIG) -> None:
        self.server, self.cache, self.queue = server, Cache(), WorkQueue()
        kube = cast("Kube", server)
        self.reconciler = Reconciler(
            kube=kube, cache=self.cache, queue=self.queue, recorder=Recorder(kube, "test"),
            scraper=Scraper(ScrapeSettings(), server.clock.now, self.queue.add), metrics=Metrics(), config=config,
        )  # fmt: skip
        self.refresh()

    def refresh(self) -> None:
        """What the watch would bring."""
        self.cache.put_finetunejob(read_finetunejob(self.server.objects[FINETUNEJOB.plural, "run"]))
        for job in list(self.cache.get(KEY).jobs.values()):
            if (JOB.plural, job.name) not in self.server.objects:
                self.cache.drop_job(job)

    async def look(self) -> None:
        await self.reconciler.reconcile(KEY)

    async def work(self) -> None:
        """One worker, until nothing is left to do at once."""
        self.queue.add(KEY)
        working = asyncio.create_task(self.reconciler.work())
        async with asyncio.timeout(10):
            while not self.server.requests or not self.queue.idle:  # noqa: ASYNC110 -- the worker tells nobody that it is through
                await asyncio.sleep(0)
        working.cancel()


async def test_an_event_is_not_lost_with_the_process_and_not_told_twice(server: Server) -> None:
    def cut(verb: str, kind: Kind) -> None:
        if (verb, kind) == ("update", FINETUNEJOB):
            raise PowerCut

    server.before = cut
    with pytest.raises(PowerCut):
        await Process(server).look()
    assert server.told() == {Reason.ACCEPTED: 1, Reason.ATTEMPT_STARTED: 1}
    server.before = lambda verb, kind: None
    after = Process(server)
    await after.look()
    assert server.told() == {Reason.ACCEPTED: 1, Reason.ATTEMPT_STARTED: 1}
    assert server.count("patch", EVENT) == 0
    await after.look()
    assert server.count("create", EVENT) == 4


async def test_conflicts_do_not_make_events_of_their_own(server: Server) -> None:
    process = Process(server)
    for _ in range(3):
        body = server.objects[FINETUNEJOB.plural, "run"]
        server._put(FINETUNEJOB, {**body, "metadata": {**body["metadata"], "labels": {"edited": "again"}}})
        with pytest.raises(Conflict):
            await process.look()
    process.refresh()
    await process.look()
    assert server.told() == {Reason.ACCEPTED: 1, Reason.ATTEMPT_STARTED: 1}
    assert server.count("create", EVENT) == 2


async def test_the_same_transition_later_is_counted(server: Server) -> None:
    server.objects[FINETUNEJOB.plural, "run"]["spec"] = {**SPEC, "suspend": True}
    process = Process(server)
    await process.look()
    for wish in (False, True):
        job = server.objects[FINETUNEJOB.plural, "run"]
        meta = {**job["metadata"], "generation": job["metadata"]["generation"] + 1}
        server._put(FINETUNEJOB, {**job, "metadata": meta, "spec": {**SPEC, "suspend": wish}})
        server.objects.pop((JOB.plural, "run-1"), None)
        process.refresh()
        for _ in range(6):
            await process.look()
            process.refresh()
    assert server.told()[Reason.SUSPENDED] == 2
    event = next(body for body in server.objects.values() if body.get("reason") == Reason.SUSPENDED)
    assert event["metadata"]["annotations"][Annotation.OBSERVED_VERSION] != "2"


@pytest.mark.parametrize("refused", ["events", "nothing"])
async def test_events_that_may_not_be_written_hold_nothing_up(server: Server, refused: str) -> None:
    def refuse(verb: str, kind: Kind) -> None:
        if kind.plural == refused:
            raise Forbidden(verb, kind, "", 403, "Forbidden", "")

    server.before = refuse
    await Process(server).look()
    assert server.objects[FINETUNEJOB.plural, "run"]["status"]["phase"] == "Starting"
    assert bool(server.told()) is (refused == "nothing")


async def test_a_job_that_the_server_no_longer_has_is_left_alone_before_any_watch_tells(server: Server) -> None:
    process = Process(server)
    del server.objects[FINETUNEJOB.plural, "run"]
    await process.work()
    assert server.count("update", FINETUNEJOB) == 1
    assert process.cache.keys() == []
    assert process.queue._next_due() is None


async def test_in_a_namespace_that_goes_nothing_is_tried_again(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    def going(verb: str, kind: Kind) -> None:
        if verb == "create":
            raise NamespaceTerminating(verb, kind, "run-1", 403, "Forbidden", "namespace team is being terminated")

    server.before = going
    process = Process(server)
    await process.work()
    assert process.queue._next_due() is None
    assert server.requests == [("create", JOB.plural)]
    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


async def test_a_spec_is_judged_once_a_generation(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = []
    accept = module.accept
    monkeypatch.setattr(module, "accept", lambda *args: judged.append(1) or accept(*args))
    process = Process(server)
    for _ in range(3):
        await process.look()
    assert len(judged) == 1


async def rush(process: Process) -> None:
    """New jobs come in one upon another, and have all been looked at."""
    others = [Key("team", f"other{number}") for number in range(pace.RUSH_COUNT)]
    for key in others:
        process.queue.hurry(key)
    for _ in others:
        process.queue.done((await process.queue.take())[0])


async def test_in_a_rush_there_is_no_status_before_the_other_jobs_are_started(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = Process(server)
    await rush(process)
    await process.work()
    assert server.requests == [("create", "jobs")]
    (made,) = process.cache.get(KEY).jobs.values()
    process.cache.put_pod(pod(version=5, created_at=made.created_at))
    await process.work()
    assert server.requests == [("create", "jobs")]
    monkeypatch.setattr(pace, "RUSH_SECONDS", -1.0)
    await process.work()
    assert server.count("update", FINETUNEJOB) == 1
    assert server.told() == {Reason.ACCEPTED: 1, Reason.ATTEMPT_STARTED: 1}


async def test_a_rush_that_does_not_end_keeps_a_status_back_for_a_while_only(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REST", 0.0)
    process = Process(server)
    await rush(process)
    await process.work()
    await process.work()
    assert server.count("update", FINETUNEJOB) == 1


async def test_a_rush_makes_no_user_wait(server: Server) -> None:
    """Who suspends or cancels a job is answered at once."""
    process = Process(server)
    await rush(process)
    await process.work()
    known = server.objects[FINETUNEJOB.plural, "run"]
    server._put(FINETUNEJOB, {**known, "metadata": {**known["metadata"], "generation": 2}, "spec": {**SPEC, "suspend": True}})
    process.refresh()
    await process.work()
    assert server.requests[1:] != []


async def begin(server: Server) -> tuple[Process, JobView]:
    """A job whose attempt has a Job; nothing of it is told twice."""
    process = Process(server)
    for _ in range(2):
        await process.look()
    (found,) = process.cache.get(KEY).jobs.values()
    return process, found


async def stuck(server: Server, scheduled: int) -> Process:
    """An old pod that got its node so many seconds ago and does not run, in the eyes of a new process."""
    _, begun = await begin(server)
    process, now = Process(server), server.clock.now()
    process.cache.put_job(begun)
    waiting = pod(version=5, phase="Pending", is_ready=False, created_at=now - timedelta(hours=1))
    process.cache.put_pod(replace(waiting, scheduled_at=now - timedelta(seconds=scheduled)))
    return process


def succeed(process: Process, begun: JobView) -> None:
    """The pod ends well, and its Job says so."""
    process.cache.put_pod(ended(pod(version=6, created_at=begun.created_at), 0))
    process.cache.put_job(replace(begun, version=10**6, completed_at=begun.created_at))


def rush_of_transitions(process: Process) -> None:
    """Other jobs change, one upon another."""
    for _ in range(pace.RUSH_COUNT):
        process.reconciler._pace._news.note(asyncio.get_running_loop().time())


async def test_pods_that_ended_are_told_with_the_end_of_their_job(server: Server) -> None:
    """A Job says a moment after its pods that it is over: one status, not two, and nobody asks what keeps the pods away."""
    process, begun = await begin(server)
    process.cache.put_pod(pod(version=5, created_at=begun.created_at))
    await process.look()
    written = server.count("update", FINETUNEJOB)
    process.cache.put_pod(ended(pod(version=6, created_at=begun.created_at), 0))
    await process.look()
    assert server.count("update", FINETUNEJOB) == written
    assert server.count("list", CORE_EVENT) == 0
    process.cache.put_job(replace(begun, version=10**6, completed_at=begun.created_at))
    await process.look()
    assert server.count("update", FINETUNEJOB) == written + 1
    assert server.objects[FINETUNEJOB.plural, "run"]["status"]["phase"] == "Succeeded"


async def test_a_job_that_does_not_say_so_in_time_is_not_waited_for(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "ENDING", 0.0)
    process, begun = await begin(server)
    process.cache.put_pod(pod(version=5, created_at=begun.created_at))
    await process.look()
    written = server.count("update", FINETUNEJOB)
    process.cache.put_pod(ended(pod(version=6, created_at=begun.created_at), 0))
    await process.look()
    assert server.count("update", FINETUNEJOB) == written + 1


async def test_looks_that_ask_nothing_of_the_server_let_others_in(server: Server) -> None:
    process = Process(server)
    keys = [Key("team", f"gone{number}") for number in range(100)]
    for key in keys:
        process.queue.add(key)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while not process.queue.idle:
            turns += 1
            await asyncio.sleep(0)

    working = asyncio.create_task(process.reconciler.work())
    await others()
    working.cancel()
    assert server.requests == []
    assert turns >= len(keys)


async def test_of_a_job_that_is_over_neither_spec_nor_turn_is_kept(server: Server) -> None:
    process, begun = await begin(server)
    succeed(process, begun)
    await process.look()
    assert process.reconciler._memories[KEY].acceptance is not module.UNREAD
    process.reconciler._reads.book(KEY, 0.0)
    await process.look()
    assert process.reconciler._memories[KEY].acceptance is module.UNREAD
    assert process.reconciler._reads._waiting == set()
    written = server.count("update", FINETUNEJOB)
    await process.look()
    assert server.count("update", FINETUNEJOB) == written


async def test_in_a_rush_of_transitions_what_lasts_a_moment_is_told_with_what_comes_next(server: Server) -> None:
    process, begun = await begin(server)
    rush_of_transitions(process)
    written = server.count("update", FINETUNEJOB)
    process.cache.put_pod(pod(version=5, created_at=begun.created_at))
    await process.look()
    assert server.count("update", FINETUNEJOB) == written
    assert 0 < (process.queue._next_due() or 0) <= pace.STEP
    succeed(process, begun)
    await process.look()
    assert server.count("update", FINETUNEJOB) == written + 1
    assert server.objects[FINETUNEJOB.plural, "run"]["status"]["phase"] == "Succeeded"
    assert server.told() == {Reason.ACCEPTED: 1, Reason.ATTEMPT_STARTED: 1, Reason.SUCCEEDED: 1}


async def test_in_a_rush_figures_of_a_job_without_a_step_wait(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    process, begun = await begin(server)
    written, now = server.count("update", FINETUNEJOB), asyncio.get_running_loop().time()
    process.cache.put_pod(pod(version=5, is_ready=False, image_id="trainer@sha256:1", created_at=begun.created_at))
    process.reconciler._memories[KEY].untold.progress_written = now - CONFIG.progress_seconds - 1
    rush_of_transitions(process)
    await process.look()
    assert server.count("update", FINETUNEJOB) == written
    monkeypatch.setattr(pace, "RUSH_SECONDS", -1.0)
    await process.look()
    assert server.count("update", FINETUNEJOB) == written + 1


@pytest.mark.parametrize("wish", ["suspend", "cancel"])
async def test_no_rush_of_transitions_keeps_a_wish_waiting(server: Server, wish: str) -> None:
    process, begun = await begin(server)
    process.cache.put_pod(pod(version=5, created_at=begun.created_at))
    await process.look()
    rush_of_transitions(process)
    known = server.objects[FINETUNEJOB.plural, "run"]
    server._put(FINETUNEJOB, {**known, "metadata": {**known["metadata"], "generation": 2}, "spec": {**SPEC, wish: True}})
    process.refresh()
    written = server.count("update", FINETUNEJOB)
    await process.look()
    assert server.count("update", FINETUNEJOB) == written + 1


async def test_jobs_take_turns_at_reading_events(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read costs the server a walk through the namespace's events: many jobs that wait must not be what keeps it busy."""
    process = await stuck(server, 60)
    loop = asyncio.get_running_loop()
    process.reconciler._reads.took(loop.time() - 0.2, loop.time())
    await process.look()
    await process.look()
    assert server.count("list", CORE_EVENT) == 0
    assert 0 < (process.queue._next_due() or 0) <= 0.2 * pace.SHARE + 0.1
    monkeypatch.setattr(process.reconciler._memories[KEY], "obstacle_due", 0.0)
    await process.look()
    assert server.count("list", CORE_EVENT) == 1
    assert process.reconciler._reads._waiting == set()


async def test_a_read_of_events_that_fails_is_a_turn_too(server: Server) -> None:
    process = await stuck(server, 60)

    def silent(verb: str, kind: Kind) -> None:
        if kind is CORE_EVENT:
            raise KubeError(verb, kind, "", 0, "NoAnswer", "")

    server.before = silent
    with pytest.raises(KubeError):
        await process.look()
    assert process.reconciler._reads._free > 0
    assert process.reconciler._reads._waiting == set()


async def test_the_start_timeout_runs_before_the_attempt_is_written(server: Server) -> None:
    """Nothing comes after that write of itself: what is due has to be known when it is made."""
    server.objects[FINETUNEJOB.plural, "run"]["spec"] = {**SPEC, "policy": {"startTimeoutSeconds": 60}}
    process = Process(server)
    await rush(process)
    await process.work()
    (made,) = process.cache.get(KEY).jobs.values()
    process.cache.put_job(replace(made, started_at=made.created_at, version=10**6))
    process.cache.put_pod(pod(version=5, created_at=made.created_at, phase="Pending", is_ready=False, node="", unschedulable="0/3 nodes"))
    process.queue.cancel(KEY)
    await process.look()
    assert server.count("update", FINETUNEJOB) == 1
    assert 50 < (process.queue._next_due() or 0) <= 61


async def test_a_finished_job_whose_status_was_emptied_is_read_again(server: Server) -> None:
    process, begun = await begin(server)
    succeed(process, begun)
    for _ in range(2):
        await process.look()
    server._put(FINETUNEJOB, {**server.objects[FINETUNEJOB.plural, "run"], "status": {"observedGeneration": -1}})
    process.refresh()
    await process.look()
    found = process.reconciler._memories[KEY].acceptance
    assert isinstance(found, Accepted)
    assert found.spec.model.source == SPEC["model"]["source"]


WAITING = {
    "nothing but readiness": ({}, {}, True),
    "a step is done": ({}, {"progress": {"step": 1}}, False),
    "running time ended": ({"activeSeconds": 1}, {"activeSeconds": 5}, False),
    "a queue holds it": ({}, {"conditions": [condition("QuotaReserved", "False", "Queued")]}, False),
    "it cannot be placed": ({}, {"conditions": [condition("PodsReady", "False", "Unschedulable")]}, False),
    "something is committed": ({}, {"latestCheckpoint": "step-00000010"}, False),
    "it went on from a step": ({}, {"attempts": [{"number": 1, "resumedFromStep": 7}]}, False),
    "it begins": ({}, {"attempts": [{"number": 1}], "conditions": [condition("Accepted", "True", "Accepted")]}, True),
}


@pytest.mark.parametrize("case", WAITING)
def test_what_somebody_should_hear_of_waits_for_nothing(case: str) -> None:
    before, after, waits = WAITING[case]
    old, new = read_status(before), read_status(after)
    assert module._may_wait(Plan(Situation.ACTIVE), old, new, events.transitions(old, new)) is waits
    assert not module._may_wait(Plan(Situation.SUSPENDED), old, new, [])


@pytest.mark.parametrize(("scheduled", "asked"), [(1, 0), (60, 1)])
async def test_a_pod_is_stuck_when_it_has_a_node_and_not_when_it_is_old(
    server: Server, scheduled: int, asked: int
) -> None:
    """A pod may wait an hour for its node; that tells nothing of its volumes."""
    process = await stuck(server, scheduled)
    await process.look()
    assert server.count("list", CORE_EVENT) == asked


@pytest.mark.parametrize("read", [CORE_EVENT, POD, JOB])
async def test_a_job_that_goes_while_something_is_read_of_it(server: Server, read: Kind) -> None:
    _, begun = await begin(server)
    process = Process(server)
    long_ago = server.clock.now() - timedelta(hours=1)
    if read is not JOB:
        process.cache.put_job(replace(begun, version=10**6, created_at=long_ago, completed_at=long_ago if read is POD else None))

    def goes(verb: str, kind: Kind) -> None:
        if kind is read:
            process.cache.drop_finetunejob(KEY, UID)
            del server.objects[FINETUNEJOB.plural, "run"]
            server.before = lambda verb, kind: None

    server.before = goes
    server.requests.clear()
    await process.look()
    assert [plural for _, plural in server.requests] == [read.plural]
    assert process.cache.keys() == []


async def test_an_event_without_an_answer_does_not_hold_its_status_up_for_long(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "PATIENCE", 0.01)

    async def silence(kind: Kind, namespace: str, body: Object) -> Created:
        if kind is EVENT:
            await asyncio.Event().wait()
        return await Server.create(server, kind, namespace, body)

    monkeypatch.setattr(server, "create", silence)
    await Process(server).look()
    assert server.objects[FINETUNEJOB.plural, "run"]["status"]["phase"] == "Starting"
    assert server.told() == {}


def configured(image: str, **storage: Any) -> OperatorConfig:
    return parse({"storage": storage, "trainer": {"image": image}, "retry": {"baseSeconds": 0.01}}, "test")


async def test_a_job_keeps_the_store_and_the_defaults_it_began_with(server: Server) -> None:
    """The operator's configuration and version may change between two attempts; image and access to the store are the new ones."""
    body = server.objects[FINETUNEJOB.plural, "run"]
    body["spec"] = {name: group for name, group in SPEC.items() if name != "storage"}
    secret = {"credentialsSecretRef": {"name": "old"}}
    first = Process(server, configured("trainer:1", uri="s3://one/models", endpoint="https://a.example.com", **secret))
    for _ in range(2):
        await first.look()
    (begun,) = first.cache.get(KEY).jobs.values()
    status = server.objects[FINETUNEJOB.plural, "run"]["status"]
    status["resolved"]["defaults"]["training.learningRate"] = 0.125
    other = Process(server, configured("trainer:2", uri="s3://two/models", endpoint="https://b.example.com"))
    other.cache.put_job(begun)
    await other.look()
    status = server.objects[FINETUNEJOB.plural, "run"]["status"]
    assert status["resolved"]["image"] == "trainer:1"
    assert status["resolved"]["defaults"]["storage.uri"] == "s3://one/models"
    other.cache.put_job(replace(begun, version=10**6, failed_at=begun.created_at))
    for _ in range(3):
        await other.look()
    second = server.objects[JOB.plural, "run-2"]["spec"]["template"]
    run = RunConfig.model_validate_json(second["metadata"]["annotations"][Annotation.RUN_CONFIG])
    assert run.storage.uri.startswith("s3://one/models/team/run/")
    assert run.storage.endpoint == "https://a.example.com"
    assert run.spec.storage.credentials_secret_ref == SecretRef(name="old")
    assert run.spec.training.learning_rate == 0.125
    assert second["spec"]["containers"][0]["image"] == "trainer:2"
    assert server.objects[FINETUNEJOB.plural, "run"]["status"]["resolved"]["image"] == "trainer:2"


def condition(server: Server, kind: str) -> Object:
    found = server.objects[FINETUNEJOB.plural, "run"]["status"]["conditions"]
    return next(one for one in found if one["type"] == kind)


POLICY = "jobs.batch \"run-1\" is forbidden: ValidatingAdmissionPolicy 'gpus' with binding 'gpus' denied request: no cost centre"
WEBHOOK = 'admission webhook "validate.example.com" denied the request: no cost centre'
DOWN = 'Internal error occurred: failed calling webhook "validate.example.com": no endpoints available, no cost centre'


@pytest.mark.parametrize(
    ("error", "code", "words"), [(Invalid, 422, POLICY), (Invalid, 400, WEBHOOK), (Forbidden, 403, WEBHOOK), (OutcomeUnknown, 500, DOWN)],
)  # fmt: skip
async def test_admission_that_refuses_the_job_is_quoted_and_waited_for(
    server: Server, error: type[KubeError], code: int, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A policy answers with any code; others may mend it, and the spec is not to blame."""

    def refuse(verb: str, kind: Kind) -> None:
        if (verb, kind) == ("create", JOB):
            raise error(verb, kind, "run-1", code, "", words)

    server.before = refuse
    process = Process(server)
    await process.look()
    told = condition(server, "PodsReady")
    assert (told["status"], told["reason"]) == ("False", Reason.FORBIDDEN_BY_POLICY)
    assert "no cost centre" in told["message"]
    assert condition(server, "Accepted")["status"] == "True"
    assert process.queue._next_due() is not None
    server.before = lambda verb, kind: None
    await process.look()
    assert (JOB.plural, "run-1") in server.objects
    assert [one for one in caplog.records if one.exc_info] == []


async def test_what_the_api_server_itself_refuses_is_final(server: Server) -> None:
    def refuse(verb: str, kind: Kind) -> None:
        if (verb, kind) == ("create", JOB):
            raise Invalid(verb, kind, "run-1", 422, "Invalid", "spec.template.spec.priority: Invalid value")

    server.before = refuse
    await Process(server).work()
    assert server.objects[FINETUNEJOB.plural, "run"]["status"]["phase"] == "Failed"


async def test_an_answer_that_nobody_foresaw_is_one_line_in_the_log(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(verb: str, kind: Kind) -> None:
        raise KubeError(verb, kind, "run-1", 401, "Unauthorized", "Unauthorized")

    server.before = refuse
    process = Process(server)
    assert await process.reconciler._look(KEY) == "unavailable"
    assert [one for one in caplog.records if one.exc_info] == []
    assert "401 Unauthorized" in caplog.text


@pytest.mark.parametrize(
    ("taken", "reason", "words"),
    [(True, Reason.CHILDREN_CONFLICT, "Service run-1 exists"), (False, Reason.QUOTA_EXCEEDED, "create Service run-1: exceeded quota")],
)  # fmt: skip
async def test_a_gang_without_its_service_says_so(server: Server, taken: bool, reason: Reason, words: str) -> None:
    """Its pods do not find each other; the attempt is recorded all the same."""

    def refuse(verb: str, kind: Kind) -> None:
        if (verb, kind) == ("create", SERVICE):
            raise Forbidden(verb, kind, "run-1", 403, "Forbidden", "exceeded quota: tight")

    server.objects[FINETUNEJOB.plural, "run"]["spec"] = {**SPEC, "resources": {"nodes": 2, "gpusPerNode": 0}}
    if taken:
        server._put(SERVICE, {"metadata": {"name": "run-1", "namespace": "team"}})
    else:
        server.before = refuse
    process = Process(server)
    for _ in range(2):
        await process.look()
        told = condition(server, "PodsReady")
        assert (told["status"], told["reason"]) == ("False", reason)
        assert words in told["message"]
    assert server.objects[FINETUNEJOB.plural, "run"]["status"]["attempts"][0]["number"] == 1
    assert process.queue._next_due() is not None
    server.before = lambda verb, kind: None
    server.objects.pop((SERVICE.plural, "run-1"), None)
    await process.look()
    assert condition(server, "PodsReady")["reason"] == Reason.PODS_NOT_READY


async def test_the_next_progress_is_due_a_period_after_the_last_was_heard(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a period after it was written: what came late once would be late for ever."""
    process, begun = await begin(server)
    process.cache.put_pod(pod(version=5, created_at=begun.created_at))
    said = ReceivedReport(report(progress={"step": 7, "totalSteps": 9}), server.clock.now() - timedelta(seconds=4), "pod-1-0")
    monkeypatch.setattr(process.reconciler._scraper, "heard", lambda *_: said)
    await process.look()
    assert server.objects[FINETUNEJOB.plural, "run"]["status"]["progress"]["step"] == 7
    passed = asyncio.get_running_loop().time() - process.reconciler._memories[KEY].untold.progress_written
    assert 4 <= passed < 8
