"""Nodes and a kubelet that are played: pods run because this says so, and end as the test wants.

It does what a scheduler and kubelets do to the objects of an API server (binding, status, the end of a deletion), with
no container behind it, and serves `/progress` for the pods that it plays. What happens is a `Plan`, one a namespace,
which tests may change at any time; single pods are ended by name. It runs an event loop in a thread of its own.

    with FakeKubelet(endpoint) as kubelet:
        kubelet.plan("ns", Plan())                            # pods run and go on running
        pod = kubelet.wait_running("ns", "job")[0]
        kubelet.say("ns", "job", progress={"step": 5, "totalSteps": 10})
        kubelet.end(pod, Ending(0))
"""

from __future__ import annotations

import asyncio
import itertools
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import Enum
from typing import Any, Self

import aiohttp
from aiohttp import web
from finetune_api import names
from finetune_api.names import Label
from finetune_api.pod import ProgressReport, TerminationMessage
from finetune_api.status import Stage

from localcluster.api import Endpoint

Object = dict[str, Any]
SELECTOR = f"{Label.MANAGED_BY}={names.MANAGER}"
INDEX = "batch.kubernetes.io/job-completion-index"
LEASE_SECONDS = 40
BEAT = 5.0
"""Seconds between two signs of life of a node."""


class Start(Enum):
    """What becomes of a new pod."""

    RUN = "run"
    """It is bound to a node, runs and is ready."""
    UNREADY = "unready"
    """It runs and does not become ready."""
    HOLD = "hold"
    """Nothing happens to it."""
    UNSCHEDULABLE = "unschedulable"
    """No node fits; `Plan.words` are the scheduler's."""
    WAIT = "wait"
    """It is bound and its container waits: `Plan.reason` (`ImagePullBackOff`) and `Plan.words` say why."""


@dataclass(frozen=True)
class Ending:
    """How a container ends."""

    exit_code: int = 0
    words: TerminationMessage | str | None = None
    """The termination message: ours, or any text."""
    reason: str = ""
    """As the container runtime says it, `OOMKilled`; empty: Completed or Error."""
    pod_reason: str = ""
    """Reason on the pod itself: `Evicted`."""
    disruption: str = ""
    """Reason of a DisruptionTarget condition; empty: none."""


@dataclass(frozen=True)
class Plan:
    """What happens to the pods of a namespace."""

    start: Start = Start.RUN
    reason: str = ""
    words: str = ""
    end: Ending | None = None
    """How pods end as soon as they run; None: they go on."""
    stop: Ending | None = Ending(75)
    """How running pods end when they are deleted; None: they do not, as on a dead node."""


@dataclass(frozen=True)
class FakePod:
    """A pod as last seen."""

    namespace: str
    name: str
    uid: str
    job: str
    """Name of the FineTuneJob."""
    attempt: int
    index: int
    node: str
    phase: str
    deleting: bool
    body: Object = field(repr=False, compare=False)


def read(body: Object) -> FakePod:
    meta = body["metadata"]
    labels = meta.get("labels") or {}
    return FakePod(
        namespace=meta["namespace"], name=meta["name"], uid=meta["uid"], job=labels.get(Label.NAME, ""),
        attempt=_number(labels.get(Label.ATTEMPT)), index=_number((meta.get("annotations") or {}).get(INDEX)),
        node=(body.get("spec") or {}).get("nodeName", ""), phase=(body.get("status") or {}).get("phase", "Pending"),
        deleting=bool(meta.get("deletionTimestamp")), body=body,
    )  # fmt: skip


def _number(text: str | None) -> int:
    """Pods of anybody may carry our labels, with anything in them."""
    return int(text) if text and text.isdigit() else 0


class FakeKubelet:
    """See the module. `nodes` are their names; `resources` what each has, beside plenty of CPU, memory and disk."""

    def __init__(
        self, endpoint: Endpoint, *, nodes: Iterable[str] = ("node-a", "node-b"),
        resources: dict[str, str] | None = None, selector: str = SELECTOR,
    ) -> None:  # fmt: skip
        self._endpoint = endpoint
        self._selector = selector
        self._resources = {"nvidia.com/gpu": "8"} if resources is None else resources
        self._nodes = list(nodes)
        self._dead: set[str] = set()
        self._turn = itertools.count()
        self._plans: dict[str, Plan] = {}
        self._pods: dict[str, FakePod] = {}
        self._acted: dict[str, str] = {}
        self._endings: dict[str, Ending] = {}
        self._reports: dict[tuple[str, str], Object] = {}
        self.asked: dict[tuple[str, str], int] = {}
        """How often progress was asked for, by namespace and FineTuneJob."""
        self.errors: list[str] = []
        """What went wrong inside; tests may look."""
        self._changed = threading.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready = threading.Event()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._failure: BaseException | None = None
        self._port = 0

    # -- what tests use ------------------------------------------------------------------------------------------------

    @property
    def progress_url(self) -> str:
        """For the operator's `scrape.url`."""
        return f"http://127.0.0.1:{self._port}/{{namespace}}/{{pod}}{{path}}"

    def plan(self, namespace: str, plan: Plan) -> None:
        """What happens from now on, also to pods that are already there."""
        self._run(self._set_plan(namespace, plan))

    def pods(self, namespace: str, job: str | None = None, attempt: int | None = None) -> list[FakePod]:
        """Pods as last seen, by attempt and index."""
        with self._changed:
            found = [
                pod for pod in self._pods.values()
                if pod.namespace == namespace and job in (None, pod.job) and attempt in (None, pod.attempt)
            ]  # fmt: skip
        return sorted(found, key=lambda pod: (pod.job, pod.attempt, pod.index))

    def wait_pods(
        self, namespace: str, job: str, good: Callable[[list[FakePod]], bool], *,
        attempt: int | None = None, timeout: float = 30.0,
    ) -> list[FakePod]:  # fmt: skip
        """The pods of a job as soon as they are `good` together. AssertionError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while not good(found := self.pods(namespace, job, attempt)):
                left = deadline - time.monotonic()
                if left <= 0:
                    raise AssertionError(f"pods of {namespace}/{job} are not as awaited: {found}; {self.errors[-3:]}")
                self._changed.wait(left)
        return found

    def wait_running(
        self, namespace: str, job: str, *, attempt: int | None = None, count: int = 1, timeout: float = 30.0
    ) -> list[FakePod]:
        """`count` running pods of a job."""

        def running(pods: list[FakePod]) -> list[FakePod]:
            return [pod for pod in pods if pod.phase == "Running" and not pod.deleting]

        found = self.wait_pods(
            namespace, job, lambda pods: len(running(pods)) == count, attempt=attempt, timeout=timeout
        )
        return running(found)

    def end(self, pod: FakePod, ending: Ending) -> None:
        """End a pod's container."""
        self._run(self._end(pod, ending))

    def say(self, namespace: str, job: str, **report: Any) -> None:
        """What rank 0 of a job answers to GET /progress, in wire names; attempt and uid are filled in."""
        with self._changed:
            self._reports[namespace, job] = {"stage": Stage.TRAINING.value, **report}

    def wait_asked(self, namespace: str, job: str, *, timeout: float = 20.0) -> None:
        """Until progress is asked for once more."""
        deadline = time.monotonic() + timeout
        with self._changed:
            before = self.asked.get((namespace, job), 0)
            while self.asked.get((namespace, job), 0) == before:
                left = deadline - time.monotonic()
                assert left > 0, f"nobody asked for the progress of {namespace}/{job} in {timeout:.0f} s"
                self._changed.wait(left)

    def kill_node(self, node: str) -> None:
        """The node goes silent: no sign of life, and its pods neither end nor change."""
        with self._changed:
            self._dead.add(node)

    def revive_node(self, node: str) -> None:
        """It is back."""
        with self._changed:
            self._dead.discard(node)
        self._run(self._look_again())

    def restore_node(self, node: str) -> None:
        """It is made anew, after somebody deleted it."""
        self._run(self._make_node(node))
        self.revive_node(node)

    # -- life ----------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._main, name="fake-kubelet", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(self, *raised: object) -> None:
        if self._loop is not None and self._stop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(10)

    def _main(self) -> None:
        try:
            asyncio.run(self._live())
        except BaseException as error:  # the thread that waits must hear of it
            self._failure = error
            self.errors.append(repr(error))
        finally:
            self._ready.set()

    async def _live(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        context = ssl.create_default_context(cafile=str(self._endpoint.ca))
        headers = {"Authorization": f"Bearer {self._endpoint.token}"}
        connector = aiohttp.TCPConnector(ssl=context, limit=16)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout) as self._session:
            runner = web.ServerRunner(web.Server(self._progress, access_log=None), shutdown_timeout=0)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self._port = runner.addresses[0][1]
            for node in self._nodes:
                await self._make_node(node)
            tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._beat())]
            self._ready.set()
            await self._stop.wait()
            for task in [*tasks, *self._tasks]:
                task.cancel()
            await runner.cleanup()

    def _run(self, action: Any) -> None:
        assert self._loop is not None, "the kubelet is not started: use it in a with statement"
        asyncio.run_coroutine_threadsafe(action, self._loop).result(30)

    # -- nodes ---------------------------------------------------------------------------------------------------------

    async def _make_node(self, name: str) -> None:
        labels = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "topology.kubernetes.io/zone": "zone-a"}
        await self._call("POST", "/api/v1/nodes", {"metadata": {"name": name, "labels": labels}}, fine=(409,))
        amount = {"cpu": "10000", "memory": "100Ti", "ephemeral-storage": "1000Ti", "pods": "30000", **self._resources}
        ready = {"type": "Ready", "status": "True", "reason": "Played", "lastTransitionTime": now()}
        await self._patch(f"/api/v1/nodes/{name}/status", {
            "status": {"capacity": amount, "allocatable": amount, "conditions": [ready]}
        })  # fmt: skip
        await self._patch(f"/api/v1/nodes/{name}", {"spec": {"taints": None}})
        await self._renew(name)

    async def _renew(self, name: str) -> None:
        path = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
        moment = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        spec = {"holderIdentity": name, "leaseDurationSeconds": LEASE_SECONDS, "renewTime": moment}
        answer = await self._patch(f"{path}/{name}", {"spec": spec}, fine=(404,))
        if answer is None:
            await self._call("POST", path, {"metadata": {"name": name}, "spec": spec}, fine=(409,))

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT)
            for node in self._nodes:
                if node not in self._dead:
                    await self._renew(node)

    # -- pods ----------------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        path = "/api/v1/pods"
        while True:
            try:
                listed = await self._call("GET", path, query={"labelSelector": self._selector}) or {}
                uids = {item["metadata"]["uid"] for item in listed["items"]}
                for uid in [uid for uid in self._pods if uid not in uids]:
                    self._forget(uid)
                for item in listed["items"]:
                    self._seen(item)
                version = listed["metadata"]["resourceVersion"]
                query = {"watch": "true", "labelSelector": self._selector, "resourceVersion": version}
                async with self._session.get(self._endpoint.server + path, params=query) as stream:
                    async for event in _events(stream.content):
                        if event["type"] == "DELETED":
                            self._forget(event["object"]["metadata"]["uid"])
                        elif event["type"] in ("ADDED", "MODIFIED"):
                            self._seen(event["object"])
                        else:
                            break
            except (aiohttp.ClientError, OSError, KeyError) as error:
                self.errors.append(repr(error))
                await asyncio.sleep(0.2)

    def _forget(self, uid: str) -> None:
        with self._changed:
            self._pods.pop(uid, None)
            self._endings.pop(uid, None)
            self._acted.pop(uid, None)
            self._changed.notify_all()

    def _seen(self, body: Object) -> None:
        pod = read(body)
        with self._changed:
            self._pods[pod.uid] = pod
            self._changed.notify_all()
        self._act(pod)

    async def _set_plan(self, namespace: str, plan: Plan) -> None:
        self._plans[namespace] = plan
        await self._look_again()

    async def _look_again(self) -> None:
        for pod in list(self._pods.values()):
            self._act(pod)

    def _act(self, pod: FakePod) -> None:
        """Start what the plan says for the pod as it is, once for each state it is in."""
        plan = self._plans.get(pod.namespace, Plan())
        if pod.node in self._dead:
            return
        over = pod.phase in ("Succeeded", "Failed")
        state, step = "", None
        if pod.deleting and (over or pod.phase == "Pending"):
            state, step = "remove", self._remove(pod)
        elif pod.deleting and plan.stop is not None:
            state, step = "stop", self._end(pod, plan.stop)
        elif not over and pod.phase == "Pending" and plan.start is not Start.HOLD:
            state, step = plan.start.value, self._start(pod, plan)
        elif pod.phase == "Running" and plan.end is not None:
            state, step = "end", self._end(pod, plan.end)
        if step is None:
            return
        if self._acted.get(pod.uid) == state:
            step.close()
            return
        self._acted[pod.uid] = state
        task = asyncio.create_task(self._guarded(step))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(self, step: Any) -> None:
        try:
            await step
        except (aiohttp.ClientError, OSError) as error:
            self.errors.append(repr(error))

    async def _start(self, pod: FakePod, plan: Plan) -> None:
        if plan.start is Start.UNSCHEDULABLE:
            words = plan.words or "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."
            reason = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": words}
            await self._status(pod, {"phase": "Pending", "conditions": [reason | {"lastTransitionTime": now()}]})
            return
        node = pod.node or await self._bind(pod)
        if node is None:
            return
        if plan.start is Start.WAIT:
            state = {"waiting": {"reason": plan.reason or "ImagePullBackOff", "message": plan.words}}
            await self._status(pod, _running(pod, state, ready=False) | {"phase": "Pending"})
            return
        ready = plan.start is Start.RUN
        await self._status(pod, _running(pod, {"running": {"startedAt": now()}}, ready=ready))

    async def _bind(self, pod: FakePod) -> str | None:
        alive = [node for node in self._nodes if node not in self._dead]
        if not alive:
            return None
        node = alive[next(self._turn) % len(alive)]
        path = f"/api/v1/namespaces/{pod.namespace}/pods/{pod.name}/binding"
        target = {"apiVersion": "v1", "kind": "Node", "name": node}
        body = {"metadata": {"name": pod.name, "uid": pod.uid}, "target": target}
        made = await self._call("POST", path, body, fine=(404, 409))
        return node if made is not None else None

    async def _end(self, pod: FakePod, ending: Ending) -> None:
        """Write how it ended, unless it has ended already."""
        if pod.uid in self._endings:
            return
        self._endings[pod.uid] = ending
        message = ending.words.to_json() if isinstance(ending.words, TerminationMessage) else (ending.words or "")
        reason = ending.reason or ("Completed" if ending.exit_code == 0 else "Error")
        times = {"startedAt": _started(pod), "finishedAt": now()}
        state = {"terminated": {"exitCode": ending.exit_code, "reason": reason, "message": message, **times}}
        status = _running(pod, state, ready=False) | {"phase": "Succeeded" if ending.exit_code == 0 else "Failed"}
        if ending.pod_reason:
            status |= {"reason": ending.pod_reason, "message": "The node was low on resource: memory."}
        if ending.disruption:
            taken = {"type": "DisruptionTarget", "status": "True", "reason": ending.disruption}
            status["conditions"].append(taken | {"message": "taken away", "lastTransitionTime": now()})
        await self._status(pod, status)

    async def _remove(self, pod: FakePod) -> None:
        """The end of a deletion, which is the kubelet's to say."""
        body = {"gracePeriodSeconds": 0, "preconditions": {"uid": pod.uid}}
        await self._call("DELETE", f"/api/v1/namespaces/{pod.namespace}/pods/{pod.name}", body, fine=(404, 409))

    async def _status(self, pod: FakePod, status: Object) -> None:
        path = f"/api/v1/namespaces/{pod.namespace}/pods/{pod.name}/status"
        await self._patch(path, {"metadata": {"uid": pod.uid}, "status": status}, fine=(404, 409))

    # -- progress ------------------------------------------------------------------------------------------------------

    async def _progress(self, request: web.BaseRequest) -> web.StreamResponse:
        namespace, name, *rest = request.path.strip("/").split("/")
        with self._changed:
            pod = next((p for p in self._pods.values() if p.namespace == namespace and p.name == name), None)
            said = self._reports.get((namespace, pod.job)) if pod else None
            if pod:
                self.asked[namespace, pod.job] = self.asked.get((namespace, pod.job), 0) + 1
            self._changed.notify_all()
        if pod is None or pod.phase != "Running" or f"/{rest[0] if rest else ''}" != names.Path.PROGRESS:
            raise web.HTTPNotFound
        uid = pod.body["metadata"]["labels"].get(Label.UID, "")
        report = ProgressReport(attempt=pod.attempt, uid=uid).to_wire() | (said or {})
        return web.Response(body=json.dumps(report), content_type="application/json")

    # -- requests ------------------------------------------------------------------------------------------------------

    async def _patch(self, path: str, body: Object, fine: tuple[int, ...] = ()) -> Object | None:
        return await self._call("PATCH", path, body, kind="application/merge-patch+json", fine=fine)

    async def _call(
        self, method: str, path: str, body: Object | None = None, *, kind: str = "application/json",
        query: dict[str, str] | None = None, fine: tuple[int, ...] = (),
    ) -> Object | None:  # fmt: skip
        """The answer, or None for a status code that is `fine`."""
        async with self._session.request(
            method, self._endpoint.server + path, params=query, headers={"Content-Type": kind},
            data=None if body is None else json.dumps(body).encode(), timeout=aiohttp.ClientTimeout(total=20),
        ) as answer:  # fmt: skip
            if answer.status in fine:
                return None
            if answer.status >= 400:
                raise OSError(f"{method} {path}: {answer.status} {(await answer.text())[:300]}")
            value: Object = await answer.json()
            return value


async def _events(stream: aiohttp.StreamReader) -> Any:
    rest = b""
    async for chunk in stream.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield json.loads(line)


def _running(pod: FakePod, state: Object, *, ready: bool) -> Object:
    """Pod status with one container in that state."""
    container = (pod.body["spec"].get("containers") or [{}])[0]
    word = "True" if ready else "False"
    kinds = {"PodScheduled": "True", "Initialized": "True", "ContainersReady": word, "Ready": word}
    status = {
        "name": container.get("name", names.CONTAINER), "image": container.get("image", ""), "restartCount": 0,
        "imageID": "played@sha256:" + "0" * 64, "ready": ready, "started": "running" in state, "state": state,
    }  # fmt: skip
    return {
        "phase": "Running", "startTime": pod.body["metadata"]["creationTimestamp"], "hostIP": "127.0.0.1",
        "podIP": "127.0.0.1", "podIPs": [{"ip": "127.0.0.1"}], "containerStatuses": [status],
        "conditions": [{"type": k, "status": v, "lastTransitionTime": now()} for k, v in kinds.items()],
    }  # fmt: skip


def _started(pod: FakePod) -> str:
    container = ((pod.body.get("status") or {}).get("containerStatuses") or [{}])[0]
    return str(((container.get("state") or {}).get("running") or {}).get("startedAt") or now())


def now() -> str:
    """Kubernetes' time format."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def success(uri: str = "s3://bucket/model", step: int = 10, **words: Any) -> Ending:
    """A pod that trained to the end and left its artefact's address."""
    output = {"uri": uri, "sha256": "0" * 64, "kind": "adapter"}
    return Ending(0, TerminationMessage.model_validate({"output": output, "step": step, **words}))


def failure(exit_code: int, *, step: int | None = None, committed: int | None = None, **words: Any) -> Ending:
    """A pod that failed and said why. `committed` is the step of its newest checkpoint."""
    said = {"exitCode": exit_code, "step": step, "committedStep": committed, **words}
    kept = {key: value for key, value in said.items() if value is not None}
    return Ending(exit_code, TerminationMessage.model_validate(kept))


__all__ = ["Ending", "FakeKubelet", "FakePod", "Plan", "Start", "failure", "now", "read", "replace", "success"]
