"""A fake scheduler and kubelet with simulated nodes. The test decides how pods run and end; no container is started.

`FakeKubelet` sends the same requests to a real API server as a scheduler and kubelets (for node leases, bindings, pod status and the removal of deleted
pods). It also answers `GET /progress` in place of the pods. The `PodPlan` of a namespace defines what happens to its pods. A test may replace the plan at any
time, and may end a single pod. The event loop runs in a separate thread.

    with FakeKubelet(endpoint) as kubelet:
        kubelet.set_plan("ns", PodPlan())                        # pods start and keep running
        pod = kubelet.wait_running("ns", "job")[0]
        kubelet.set_progress("ns", "job", progress={"step": 5, "totalSteps": 10})
        kubelet.end_pod(pod, ContainerExit(0))
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
OPERATOR_POD_SELECTOR = f"{Label.MANAGED_BY}={names.MANAGER_NAME}"
COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"
LEASE_DURATION_SECONDS = 40
LEASE_RENEW_SECONDS = 5.0


class PodStart(Enum):
    """What the fake kubelet does with a new pod."""

    RUN = "run"
    """The pod is bound to a node, runs and is ready."""
    NOT_READY = "not ready"
    """The pod runs, but never becomes ready."""
    STAY_PENDING = "stay pending"
    """The pod is neither bound nor started."""
    UNSCHEDULABLE = "unschedulable"
    """No node has enough resources for the pod. `PodPlan.message` is the scheduler's message."""
    CONTAINER_WAITING = "container waiting"
    """The pod is bound, but its container does not start. The waiting state of the container has `PodPlan.reason` (such as `ImagePullBackOff`) and
    `PodPlan.message`.
    """


@dataclass(frozen=True)
class ContainerExit:
    """How a pod's container ends: exit code, termination message, and reasons in the pod's status."""

    exit_code: int = 0
    termination_message: TerminationMessage | str | None = None
    reason: str = ""
    """Reason in the container's terminated state, such as `OOMKilled`. Empty means `Completed` for exit code 0, else `Error`."""
    pod_reason: str = ""
    """`status.reason` of the pod, such as `Evicted`."""
    disruption_reason: str = ""
    """Reason of the pod's DisruptionTarget condition. Empty means that the pod does not get this condition."""


@dataclass(frozen=True)
class PodPlan:
    """What the fake kubelet does with the pods of a namespace."""

    start: PodStart = PodStart.RUN
    reason: str = ""
    message: str = ""
    when_running: ContainerExit | None = None
    """How each pod ends as soon as it runs; None if pods keep running."""
    when_deleted: ContainerExit | None = ContainerExit(75)
    """How a running pod ends when it is deleted. None if its container is never reported as ended, as on a node that has lost power."""


@dataclass(frozen=True)
class FakePod:
    """A pod in the state in which the fake kubelet last observed it."""

    namespace: str
    name: str
    uid: str
    job: str
    """Name of the FineTuneJob."""
    attempt: int
    index: int
    node: str
    phase: str
    is_deleting: bool
    body: Object = field(repr=False, compare=False)


def parse_pod(body: Object) -> FakePod:
    metadata = body["metadata"]
    labels = metadata.get("labels") or {}
    return FakePod(
        namespace=metadata["namespace"], name=metadata["name"], uid=metadata["uid"], job=labels.get(Label.JOB_NAME, ""),
        attempt=_parse_number_or_zero(labels.get(Label.ATTEMPT)), index=_parse_number_or_zero((metadata.get("annotations") or {}).get(COMPLETION_INDEX)),
        node=(body.get("spec") or {}).get("nodeName", ""), phase=(body.get("status") or {}).get("phase", "Pending"),
        is_deleting=bool(metadata.get("deletionTimestamp")), body=body,
    )  # fmt: skip


def _parse_number_or_zero(text: str | None) -> int:
    """Parse a label value. Returns 0 if the value is not a number, because other clients can create pods that have the operator's labels with any value."""
    return int(text) if text and text.isdigit() else 0


class FakeKubelet:
    """A scheduler and the kubelets of simulated nodes (see the module). `nodes` are the nodes' names; `resources` are the extended resources of each
    node. A node always has enough CPU, memory and disk for its pods.
    """

    def __init__(
        self, endpoint: Endpoint, *, nodes: Iterable[str] = ("node-a", "node-b"),
        resources: dict[str, str] | None = None, selector: str = OPERATOR_POD_SELECTOR,
    ) -> None:  # fmt: skip
        self._endpoint = endpoint
        self._selector = selector
        self._resources = {"nvidia.com/gpu": "8"} if resources is None else resources
        self._nodes = list(nodes)
        self._silent_nodes: set[str] = set()
        self._node_counter = itertools.count()
        self._plans: dict[str, PodPlan] = {}
        self._pods: dict[str, FakePod] = {}
        self._last_action: dict[str, str] = {}
        self._endings: dict[str, ContainerExit] = {}
        self._reports: dict[tuple[str, str], Object] = {}
        self.progress_requests: dict[tuple[str, str], int] = {}
        """Number of GET /progress requests, by namespace and name of the FineTuneJob."""
        self.errors: list[str] = []
        """Errors that occurred inside the fake kubelet."""
        self._changed = threading.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._startup_ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop_requested: asyncio.Event | None = None
        self._failure: BaseException | None = None
        self._port = 0

    # -- for tests -------------------------------------------------------------------------------------------------------

    @property
    def progress_url(self) -> str:
        """Value for the operator's setting `scrape.url`. With this value, the operator reads the pods' progress from this fake kubelet."""
        return f"http://127.0.0.1:{self._port}/{{namespace}}/{{pod}}{{path}}"

    def set_plan(self, namespace: str, plan: PodPlan) -> None:
        """Set the plan of a namespace. The plan also applies to existing pods."""
        self._run_in_loop(self._set_plan(namespace, plan))

    def list_pods(self, namespace: str, job: str | None = None, attempt: int | None = None) -> list[FakePod]:
        """Return the pods in the state in which the fake kubelet last observed them, sorted by job, attempt and index."""
        with self._changed:
            matching_pods = [
                pod for pod in self._pods.values()
                if pod.namespace == namespace and job in (None, pod.job) and attempt in (None, pod.attempt)
            ]  # fmt: skip
        return sorted(matching_pods, key=lambda pod: (pod.job, pod.attempt, pod.index))

    def wait_pods(
        self, namespace: str, job: str, until: Callable[[list[FakePod]], bool], *,
        attempt: int | None = None, timeout: float = 30.0,
    ) -> list[FakePod]:  # fmt: skip
        """Wait until `until(pods)` is true for the pods of a job, and return the pods. Errors: AssertionError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while not until(pods := self.list_pods(namespace, job, attempt)):
                seconds_left = deadline - time.monotonic()
                if seconds_left <= 0:
                    raise AssertionError(f"pods of {namespace}/{job} are not in the expected state: {pods}; {self.errors[-3:]}")
                self._changed.wait(seconds_left)
        return pods

    def wait_running(
        self, namespace: str, job: str, *, attempt: int | None = None, count: int = 1, timeout: float = 30.0
    ) -> list[FakePod]:
        """Wait until a job has exactly `count` running pods, and return these pods."""

        def select_running(pods: list[FakePod]) -> list[FakePod]:
            return [pod for pod in pods if pod.phase == "Running" and not pod.is_deleting]

        pods = self.wait_pods(
            namespace, job, lambda pods: len(select_running(pods)) == count, attempt=attempt, timeout=timeout
        )
        return select_running(pods)

    def end_pod(self, pod: FakePod, container_exit: ContainerExit) -> None:
        """End a pod's only container, so that the pod ends too."""
        self._run_in_loop(self._end_pod(pod, container_exit))

    def set_progress(self, namespace: str, job: str, **report: Any) -> None:
        """Set the response of a job's pods to GET /progress. `report` has JSON fields of `ProgressReport`; the fake kubelet adds attempt and uid of each pod
        to these fields.
        """
        with self._changed:
            self._reports[namespace, job] = {"stage": Stage.TRAINING.value, **report}

    def wait_progress_request(self, namespace: str, job: str, *, timeout: float = 20.0) -> None:
        """Wait until the operator sends the next GET /progress for a job."""
        deadline = time.monotonic() + timeout
        with self._changed:
            count_before = self.progress_requests.get((namespace, job), 0)
            while self.progress_requests.get((namespace, job), 0) == count_before:
                seconds_left = deadline - time.monotonic()
                assert seconds_left > 0, f"no GET /progress for {namespace}/{job} within {timeout:.0f} s"
                self._changed.wait(seconds_left)

    def kill_node(self, node: str) -> None:
        """Stop renewing the node's Lease and changing its pods, like a node that has lost power."""
        with self._changed:
            self._silent_nodes.add(node)

    def revive_node(self, node: str) -> None:
        """Renew the node's Lease and change its pods again."""
        with self._changed:
            self._silent_nodes.discard(node)
        self._run_in_loop(self._apply_plans())

    def recreate_node(self, node: str) -> None:
        """Create the node again after its object has been deleted."""
        self._run_in_loop(self._create_node(node))
        self.revive_node(node)

    # -- start and stop --------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._main, name="fake-kubelet", daemon=True)
        self._thread.start()
        self._startup_ended.wait()
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(self, *raised: object) -> None:
        if self._loop is not None and self._stop_requested is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._stop_requested.set)
            self._thread.join(10)

    def _main(self) -> None:
        try:
            asyncio.run(self._run_until_stopped())
        except BaseException as error:  # __enter__, which runs in the thread of the test, raises this error again
            self._failure = error
            self.errors.append(repr(error))
        finally:
            self._startup_ended.set()

    async def _run_until_stopped(self) -> None:
        self._loop, self._stop_requested = asyncio.get_running_loop(), asyncio.Event()
        context = ssl.create_default_context(cafile=str(self._endpoint.ca))
        headers = {"Authorization": f"Bearer {self._endpoint.token}"}
        connector = aiohttp.TCPConnector(ssl=context, limit=16)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout) as self._session:
            runner = web.ServerRunner(web.Server(self._answer_progress, access_log=None), shutdown_timeout=0)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self._port = runner.addresses[0][1]
            for node in self._nodes:
                await self._create_node(node)
            tasks = [asyncio.create_task(self._watch_pods()), asyncio.create_task(self._renew_leases())]
            self._startup_ended.set()
            await self._stop_requested.wait()
            for task in [*tasks, *self._tasks]:
                task.cancel()
            await runner.cleanup()

    def _run_in_loop(self, action: Any) -> None:
        assert self._loop is not None, "the fake kubelet is not started: use it in a with statement"
        asyncio.run_coroutine_threadsafe(action, self._loop).result(30)

    # -- nodes ---------------------------------------------------------------------------------------------------------

    async def _create_node(self, name: str) -> None:
        labels = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "topology.kubernetes.io/zone": "zone-a"}
        await self._send_request("POST", "/api/v1/nodes", {"metadata": {"name": name, "labels": labels}}, accepted_codes=(409,))
        resources = {"cpu": "10000", "memory": "100Ti", "ephemeral-storage": "1000Ti", "pods": "30000", **self._resources}
        ready_condition = {"type": "Ready", "status": "True", "reason": "Simulated", "lastTransitionTime": current_time()}
        await self._patch(f"/api/v1/nodes/{name}/status", {
            "status": {"capacity": resources, "allocatable": resources, "conditions": [ready_condition]}
        })  # fmt: skip
        await self._patch(f"/api/v1/nodes/{name}", {"spec": {"taints": None}})
        await self._renew_lease(name)

    async def _renew_lease(self, name: str) -> None:
        path = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
        renew_time = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        spec = {"holderIdentity": name, "leaseDurationSeconds": LEASE_DURATION_SECONDS, "renewTime": renew_time}
        lease = await self._patch(f"{path}/{name}", {"spec": spec}, accepted_codes=(404,))
        if lease is None:
            await self._send_request("POST", path, {"metadata": {"name": name}, "spec": spec}, accepted_codes=(409,))

    async def _renew_leases(self) -> None:
        while True:
            await asyncio.sleep(LEASE_RENEW_SECONDS)
            for node in self._nodes:
                if node not in self._silent_nodes:
                    await self._renew_lease(node)

    # -- pods ----------------------------------------------------------------------------------------------------------

    async def _watch_pods(self) -> None:
        path = "/api/v1/pods"
        while True:
            try:
                pod_list = await self._send_request("GET", path, query={"labelSelector": self._selector}) or {}
                uids = {item["metadata"]["uid"] for item in pod_list["items"]}
                for uid in [uid for uid in self._pods if uid not in uids]:
                    self._drop_pod(uid)
                for item in pod_list["items"]:
                    self._store_pod(item)
                version = pod_list["metadata"]["resourceVersion"]
                query = {"watch": "true", "labelSelector": self._selector, "resourceVersion": version}
                async with self._session.get(self._endpoint.server + path, params=query) as stream:
                    async for event in _parse_events(stream.content):
                        if event["type"] == "DELETED":
                            self._drop_pod(event["object"]["metadata"]["uid"])
                        elif event["type"] in ("ADDED", "MODIFIED"):
                            self._store_pod(event["object"])
                        else:
                            break
            except (aiohttp.ClientError, OSError, KeyError) as error:
                self.errors.append(repr(error))
                await asyncio.sleep(0.2)

    def _drop_pod(self, uid: str) -> None:
        with self._changed:
            self._pods.pop(uid, None)
            self._endings.pop(uid, None)
            self._last_action.pop(uid, None)
            self._changed.notify_all()

    def _store_pod(self, body: Object) -> None:
        pod = parse_pod(body)
        with self._changed:
            self._pods[pod.uid] = pod
            self._changed.notify_all()
        self._apply_plan(pod)

    async def _set_plan(self, namespace: str, plan: PodPlan) -> None:
        self._plans[namespace] = plan
        await self._apply_plans()

    async def _apply_plans(self) -> None:
        for pod in list(self._pods.values()):
            self._apply_plan(pod)

    def _apply_plan(self, pod: FakePod) -> None:
        """Start the action that the plan requires for the pod, unless this action was also the last one that was started for this pod."""
        plan = self._plans.get(pod.namespace, PodPlan())
        if pod.node in self._silent_nodes:
            return
        has_ended = pod.phase in ("Succeeded", "Failed")
        name, action = "", None
        if pod.is_deleting and (has_ended or pod.phase == "Pending"):
            name, action = "remove", self._delete_object(pod)
        elif pod.is_deleting and plan.when_deleted is not None:
            name, action = "stop", self._end_pod(pod, plan.when_deleted)
        elif not has_ended and pod.phase == "Pending" and plan.start is not PodStart.STAY_PENDING:
            name, action = plan.start.value, self._start(pod, plan)
        elif pod.phase == "Running" and plan.when_running is not None:
            name, action = "end", self._end_pod(pod, plan.when_running)
        if action is None:
            return
        if self._last_action.get(pod.uid) == name:
            action.close()
            return
        self._last_action[pod.uid] = name
        task = asyncio.create_task(self._record_errors(action))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _record_errors(self, action: Any) -> None:
        try:
            await action
        except (aiohttp.ClientError, OSError) as error:
            self.errors.append(repr(error))

    async def _start(self, pod: FakePod, plan: PodPlan) -> None:
        if plan.start is PodStart.UNSCHEDULABLE:
            message = plan.message or "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."
            condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
            await self._patch_status(pod, {"phase": "Pending", "conditions": [condition | {"lastTransitionTime": current_time()}]})
            return
        node = pod.node or await self._bind_to_node(pod)
        if node is None:
            return
        if plan.start is PodStart.CONTAINER_WAITING:
            state = {"waiting": {"reason": plan.reason or "ImagePullBackOff", "message": plan.message}}
            await self._patch_status(pod, _make_pod_status(pod, state, is_ready=False) | {"phase": "Pending"})
            return
        is_ready = plan.start is PodStart.RUN
        await self._patch_status(pod, _make_pod_status(pod, {"running": {"startedAt": current_time()}}, is_ready=is_ready))

    async def _bind_to_node(self, pod: FakePod) -> str | None:
        live_nodes = [node for node in self._nodes if node not in self._silent_nodes]
        if not live_nodes:
            return None
        node = live_nodes[next(self._node_counter) % len(live_nodes)]
        path = f"/api/v1/namespaces/{pod.namespace}/pods/{pod.name}/binding"
        target = {"apiVersion": "v1", "kind": "Node", "name": node}
        body = {"metadata": {"name": pod.name, "uid": pod.uid}, "target": target}
        binding = await self._send_request("POST", path, body, accepted_codes=(404, 409))
        return node if binding is not None else None

    async def _end_pod(self, pod: FakePod, container_exit: ContainerExit) -> None:
        """Write the terminated state of the container, unless the pod has already ended."""
        if pod.uid in self._endings:
            return
        self._endings[pod.uid] = container_exit
        termination_message = container_exit.termination_message
        message = termination_message.to_json() if isinstance(termination_message, TerminationMessage) else (termination_message or "")
        reason = container_exit.reason or ("Completed" if container_exit.exit_code == 0 else "Error")
        timestamps = {"startedAt": _read_start_time(pod), "finishedAt": current_time()}
        state = {"terminated": {"exitCode": container_exit.exit_code, "reason": reason, "message": message, **timestamps}}
        status = _make_pod_status(pod, state, is_ready=False) | {"phase": "Succeeded" if container_exit.exit_code == 0 else "Failed"}
        if container_exit.pod_reason:
            status |= {"reason": container_exit.pod_reason, "message": "The node was low on resource: memory."}
        if container_exit.disruption_reason:
            disruption_condition = {"type": "DisruptionTarget", "status": "True", "reason": container_exit.disruption_reason}
            status["conditions"].append(disruption_condition | {"message": "The pod is disrupted.", "lastTransitionTime": current_time()})
        await self._patch_status(pod, status)

    async def _delete_object(self, pod: FakePod) -> None:
        """Remove the pod object, as a kubelet does for a deleted pod whose containers have ended."""
        body = {"gracePeriodSeconds": 0, "preconditions": {"uid": pod.uid}}
        await self._send_request("DELETE", f"/api/v1/namespaces/{pod.namespace}/pods/{pod.name}", body, accepted_codes=(404, 409))

    async def _patch_status(self, pod: FakePod, status: Object) -> None:
        path = f"/api/v1/namespaces/{pod.namespace}/pods/{pod.name}/status"
        await self._patch(path, {"metadata": {"uid": pod.uid}, "status": status}, accepted_codes=(404, 409))

    # -- progress ------------------------------------------------------------------------------------------------------

    async def _answer_progress(self, request: web.BaseRequest) -> web.StreamResponse:
        namespace, name, *rest = request.path.strip("/").split("/")
        with self._changed:
            pod = next((candidate for candidate in self._pods.values() if candidate.namespace == namespace and candidate.name == name), None)
            configured_report = self._reports.get((namespace, pod.job)) if pod else None
            if pod:
                self.progress_requests[namespace, pod.job] = self.progress_requests.get((namespace, pod.job), 0) + 1
            self._changed.notify_all()
        if pod is None or pod.phase != "Running" or f"/{rest[0] if rest else ''}" != names.HttpPath.PROGRESS:
            raise web.HTTPNotFound
        uid = pod.body["metadata"]["labels"].get(Label.JOB_UID, "")
        report = ProgressReport(attempt=pod.attempt, uid=uid).to_wire() | (configured_report or {})
        return web.Response(body=json.dumps(report), content_type="application/json")

    # -- requests ------------------------------------------------------------------------------------------------------

    async def _patch(self, path: str, body: Object, accepted_codes: tuple[int, ...] = ()) -> Object | None:
        return await self._send_request("PATCH", path, body, content_type="application/merge-patch+json", accepted_codes=accepted_codes)

    async def _send_request(
        self, method: str, path: str, body: Object | None = None, *, content_type: str = "application/json",
        query: dict[str, str] | None = None, accepted_codes: tuple[int, ...] = (),
    ) -> Object | None:  # fmt: skip
        """Send a request and return the response body, or None for a status code in `accepted_codes`. Errors: OSError for any other status code of an error."""
        async with self._session.request(
            method, self._endpoint.server + path, params=query, headers={"Content-Type": content_type},
            data=None if body is None else json.dumps(body).encode(), timeout=aiohttp.ClientTimeout(total=20),
        ) as response:  # fmt: skip
            if response.status in accepted_codes:
                return None
            if response.status >= 400:
                raise OSError(f"{method} {path}: {response.status} {(await response.text())[:300]}")
            response_body: Object = await response.json()
            return response_body


async def _parse_events(stream: aiohttp.StreamReader) -> Any:
    incomplete_line = b""
    async for chunk in stream.iter_any():
        *lines, incomplete_line = (incomplete_line + chunk).split(b"\n")
        for line in lines:
            yield json.loads(line)


def _make_pod_status(pod: FakePod, container_state: Object, *, is_ready: bool) -> Object:
    """Return the status of a running pod. `container_state` is the `state` of its container status: waiting, running or terminated.

    A condition whose status does not change keeps its lastTransitionTime, as with a real kubelet.
    """
    container = (pod.body["spec"].get("containers") or [{}])[0]
    ready_status = "True" if is_ready else "False"
    conditions = {"PodScheduled": "True", "Initialized": "True", "ContainersReady": ready_status, "Ready": ready_status}
    old_conditions = (pod.body.get("status") or {}).get("conditions") or []
    old_times = {
        (condition["type"], condition["status"]): condition["lastTransitionTime"]
        for condition in old_conditions
        if condition.get("lastTransitionTime")
    }
    status = {
        "name": container.get("name", names.TRAINER_CONTAINER), "image": container.get("image", ""), "restartCount": 0,
        "imageID": "simulated@sha256:" + "0" * 64, "ready": is_ready, "started": "running" in container_state, "state": container_state,
    }  # fmt: skip
    return {
        "phase": "Running", "startTime": pod.body["metadata"]["creationTimestamp"], "hostIP": "127.0.0.1",
        "podIP": "127.0.0.1", "podIPs": [{"ip": "127.0.0.1"}], "containerStatuses": [status],
        "conditions": [
            {"type": condition_type, "status": condition_status, "lastTransitionTime": old_times.get((condition_type, condition_status)) or current_time()}
            for condition_type, condition_status in conditions.items()
        ],
    }  # fmt: skip


def _read_start_time(pod: FakePod) -> str:
    container = ((pod.body.get("status") or {}).get("containerStatuses") or [{}])[0]
    return str(((container.get("state") or {}).get("running") or {}).get("startedAt") or current_time())


def current_time() -> str:
    """Return the current time in the Kubernetes format, such as `2026-01-31T12:00:00Z`."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def success_exit(uri: str = "s3://bucket/model", step: int = 10, **fields: Any) -> ContainerExit:
    """Return the exit of a container that has finished training: exit code 0, and a termination message with the artefact's URI."""
    output = {"uri": uri, "sha256": "0" * 64, "kind": "adapter"}
    return ContainerExit(0, TerminationMessage.model_validate({"output": output, "step": step, **fields}))


def failure_exit(exit_code: int, *, step: int | None = None, committed_step: int | None = None, **fields: Any) -> ContainerExit:
    """Return the exit of a container that has failed. `committed_step` is the step of the newest committed checkpoint. `fields` are further fields of
    the termination message.
    """
    message_fields = {"exitCode": exit_code, "step": step, "committedStep": committed_step, **fields}
    fields_with_value = {key: value for key, value in message_fields.items() if value is not None}
    return ContainerExit(exit_code, TerminationMessage.model_validate(fields_with_value))


__all__ = ["ContainerExit", "FakeKubelet", "FakePod", "PodPlan", "PodStart", "failure_exit", "current_time", "parse_pod", "replace", "success_exit"]
