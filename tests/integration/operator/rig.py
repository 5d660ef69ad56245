"""Test environment of the operator's integration tests: the operator as a process, a real API server, and a fake kubelet.

The fake kubelet runs pods, writes their exit codes and finishes deletions, like a real kubelet.

FineTuneJobs, Jobs and pods have separate watches, and the order of events from different watches is undefined. For example, a test may receive a Job before
it receives a FineTuneJob status that was written earlier. A test therefore waits for each fact that it asserts. The fake kubelet repeats a request that a
busy API server does not answer in time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import yaml
from finetune_api.names import API_VERSION, KIND, ExitCode, Label
from finetune_api.pod import TerminationMessage
from finetune_operator.kube import AlreadyExists, Conflict, KubeClient, NotFound, OutcomeUnknown, Unavailable
from finetune_operator.objects import FINETUNEJOB, JOB, POD, Kind, Object
from finetune_operator.settings import ApiSettings

from localcluster import Endpoint

T = TypeVar("T")
NODE = "test-node"
CORE_NODE = Kind("v1", "Node", "nodes")
RETRY_SECONDS = 0.1
"""Pause before a failed watch or request is repeated."""
TIMEOUT_SECONDS = 120.0
"""Time after which a waiting test fails and prints all objects. Tests that pass do not wait this long."""
SPEC: Object = {
    "model": {"source": "org/tiny"},
    "dataset": {"train": "s3://data/train.jsonl"},
    "training": {"maxSteps": 100},
    "resources": {"gpusPerNode": 0},
    "storage": {"uri": "s3://models/test", "credentialsSecretRef": {"name": "s3"}},
}


class Progress:
    """An HTTP server in place of the progress servers of all pods. The server answers requests with the reports that a test has set."""

    def __init__(self) -> None:
        self.answers: dict[str, str] = {}
        answers = self.answers

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = answers.get(self.path, "").encode()
                self.send_response(200 if body else 404)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                """Log nothing, so that the output of a test contains only failures."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """URL template of this server, for the operator's setting `scrape.url`."""
        return f"http://127.0.0.1:{self._server.server_port}/{{namespace}}/{{pod}}"

    def set_report(self, pod: Object, report: Object) -> None:
        """Set the report of a pod. The uid and the attempt are taken from the pod's labels."""
        meta = pod["metadata"]
        complete_report = {"uid": meta["labels"][Label.JOB_UID], "attempt": int(meta["labels"][Label.ATTEMPT]), **report}
        self.answers[f"/{meta['namespace']}/{meta['name']}"] = json.dumps(complete_report)

    def remove_report(self, pod: Object) -> None:
        """Stop answering requests for this pod's report."""
        self.answers.pop(f"/{pod['metadata']['namespace']}/{pod['metadata']['name']}", None)

    def close(self) -> None:
        """Stop the HTTP server."""
        self._server.shutdown()
        self._server.server_close()


@dataclass
class Operator:
    """An operator process with a configuration file."""

    folder: Path
    kubeconfig: Path
    config: Object
    env: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        """Path of the operator's log file."""
        return self.folder / "operator.log"

    def start(self) -> None:
        """Start the process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(self.config))
        env = {**os.environ, "KUBECONFIG": str(self.kubeconfig), **self.env}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "finetune_operator", "--config", str(path)], env=env, stderr=log, stdout=log
            )

    def kill(self) -> None:
        """Send SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> int:
        """Send SIGTERM and return the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def port(self) -> int:
        """Port of the operator's HTTP server, read from the operator's log."""
        for line in self.log.read_text().splitlines():
            if "/metrics on port" in line:
                port = int(line.split("on port ")[1].split()[0])
        return port


class WatchedObjects:
    """The objects of one kind in one namespace, kept current by a watch. Every watch event notifies `Rig.changed`."""

    def __init__(self, rig: Rig, kind: Kind):
        self._rig, self._kind = rig, kind
        self.items: dict[str, Object] = {}
        self.history: list[tuple[str, Object]] = []
        self.errors: list[str] = []
        """Errors that interrupted the watch."""

    async def run(self, session: aiohttp.ClientSession) -> None:
        """Watch until the task is cancelled. A watch that ends or fails is restarted, because the API server refuses watches while it still fills its own
        watch cache.
        """
        while True:
            try:
                await self._watch(session)
            except (aiohttp.ClientError, ValueError) as error:
                self.errors.append(str(error))
                await asyncio.sleep(RETRY_SECONDS)

    async def _watch(self, session: aiohttp.ClientSession) -> None:
        url = f"{self._rig.endpoint.server}{self._kind.path(self._rig.namespace)}?watch=true&sendInitialEvents=true"
        url += "&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true&timeoutSeconds=600"
        async with session.get(url) as response:
            response.raise_for_status()
            async for line in response.content:
                await self._apply_event(json.loads(line))

    async def _apply_event(self, event: Object) -> None:
        type_, body = event["type"], event["object"]
        if type_ not in ("ADDED", "MODIFIED", "DELETED"):
            return
        name = body["metadata"]["name"]
        async with self._rig.changed:
            if type_ == "DELETED":
                self.items.pop(name, None)
            else:
                self.items[name] = body
            self.history.append((type_, body))
            self._rig.changed.notify_all()


class Rig:
    """The namespace of one test: its objects, its fake kubelet, and methods that change objects or wait for them."""

    def __init__(self, endpoint: Endpoint, kube: KubeClient, namespace: str, progress: Progress):
        self.endpoint, self.kube, self.namespace, self.progress = endpoint, kube, namespace, progress
        self.changed = asyncio.Condition()
        self.jobs, self.pods, self.ftjs = WatchedObjects(self, JOB), WatchedObjects(self, POD), WatchedObjects(self, FINETUNEJOB)
        self.kubelet = Kubelet(self)
        self.tasks: list[asyncio.Task[None]] = []
        """Tasks of the watches and of the fake kubelet. If one of them has ended with an error, `describe` shows this error."""

    async def create(self, name: str = "run", **groups: Any) -> Object:
        """Create a FineTuneJob from SPEC. The fields in `groups` replace the fields of the same names in SPEC, or are added to them."""
        spec = json.loads(json.dumps(SPEC))
        for group, value in groups.items():
            spec[group] = {**spec.get(group, {}), **value} if isinstance(value, dict) else value
        body = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name, "namespace": self.namespace}}
        return (await self.kube.create(FINETUNEJOB, self.namespace, {**body, "spec": spec})).body

    async def patch(self, spec: Object, name: str = "run") -> Object:
        """Change the spec of a FineTuneJob."""
        return await self.kube.patch(FINETUNEJOB, self.namespace, name, {"spec": spec})

    async def wait_until(self, expected: str, condition: Callable[[], Any]) -> Any:
        """Wait until `condition` returns a true value, and return this value. Errors: AssertionError with all objects, if this takes longer than
        TIMEOUT_SECONDS.
        """
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS), self.changed:
                while not (value := condition()):
                    await self.changed.wait()
                return value
        except TimeoutError:
            raise AssertionError(f"not within {TIMEOUT_SECONDS:.0f} s: {expected}\n{self.describe()}") from None

    async def wait_for_phase(self, phase: str, name: str = "run") -> Object:
        """Wait until a FineTuneJob is in the phase, and return its status."""
        return (await self.wait_until(f"phase {phase}", lambda: self._in_phase(name, phase)))["status"]

    def _in_phase(self, name: str, phase: str) -> Object | None:
        body = self.ftjs.items.get(name)
        return body if body and (body.get("status") or {}).get("phase") == phase else None

    async def wait_for_job(self, name: str) -> Object:
        """Wait until a Job exists, and return it."""
        return await self.wait_until(f"Job {name}", lambda: self.jobs.items.get(name))

    async def wait_for_ended_attempt(self, number: int, name: str = "run") -> Object:
        """Wait until the status shows an end time for the attempt, and return the attempt's entry in the status."""

        def find_ended_record() -> Object | None:
            records = self.status(name).get("attempts", [])
            return next((record for record in records if record["number"] == number and record.get("endTime")), None)

        return await self.wait_until(f"the end of attempt {number}", find_ended_record)

    async def wait_for_no_jobs_and_pods(self) -> None:
        """Wait until the namespace has no Jobs and no pods."""
        await self.wait_until("no Jobs and pods", lambda: not self.jobs.items and not self.pods.items)

    async def wait_for_pod(self, job: str, index: int = 0, state: str = "") -> Object:
        """Wait until a Job has a pod with this index and, if `state` is given, until the pod is in this phase."""
        return await self.wait_until(f"pod {index} of {job} {state}", lambda: self._pod(job, index, state))

    def _pod(self, job: str, index: int, state: str) -> Object | None:
        for pod in self.pods.items.values():
            labels = pod["metadata"]["labels"]
            is_of_job = labels.get("batch.kubernetes.io/job-name") == job
            if is_of_job and labels.get("batch.kubernetes.io/job-completion-index") == str(index):
                return pod if not state or pod["status"].get("phase") == state else None
        return None

    def status(self, name: str = "run") -> Object:
        """Return the FineTuneJob's status from the last watch event that was received."""
        return self.ftjs.items.get(name, {}).get("status") or {}

    def condition(self, condition_type: str, name: str = "run") -> Object:
        """Return a condition of the FineTuneJob, or an empty dict if the FineTuneJob does not have this condition."""
        return next((c for c in self.status(name).get("conditions", []) if c["type"] == condition_type), {})

    def describe(self) -> str:
        """Return all received objects as text, for the message of a failed test."""
        lines = [f"{task.get_name()} ended: {task.exception()!r}" for task in self.tasks if task.done()]
        lines += [error for store in (self.ftjs, self.jobs, self.pods) for error in store.errors]
        for ftj in self.ftjs.items.values():
            lines.append(yaml.safe_dump({ftj["metadata"]["name"]: ftj.get("status")}))
        for job in self.jobs.items.values():
            lines.append(f"Job {job['metadata']['name']}: {json.dumps(job.get('status'))}")
        for pod in self.pods.items.values():
            lines.append(f"Pod {pod['metadata']['name']}: {json.dumps(pod.get('status'))}")
        return "\n".join(lines)

    async def report_training(self, job: str, step: int = 40, total: int = 100, **report: Any) -> Object:
        """Let pod 0 of a Job report that it trains."""
        pod = await self.wait_for_pod(job, 0, "Running")
        progress = {"step": step, "totalSteps": total, "secondsRemaining": 60}
        training_report = {"stage": "training", "progress": progress, "health": {"secondsSinceStep": 1.0, "medianStepSeconds": 0.5}}
        self.progress.set_report(pod, {**training_report, **report})
        return pod


class Kubelet:
    """A fake kubelet for the pods of one namespace. With `starts_new_pods`, each new pod runs and is ready at once."""

    def __init__(self, rig: Rig):
        self._rig = rig
        self.starts_new_pods = True
        self.ends_deleted_pods = True
        """Whether the fake kubelet ends deleted pods. With False, it behaves like the kubelet of a lost node."""
        self.stop_code = int(ExitCode.PREEMPTED_SAVED)
        self.stop_message = TerminationMessage(code="Stopped", message="saved on request", step=0)
        self._handled: set[tuple[str, str]] = set()

    async def run(self) -> None:
        """Run and stop pods until cancelled."""
        while True:
            async with self._rig.changed:
                pending_steps = await self._list_pending_steps()
                while not pending_steps:
                    await self._rig.changed.wait()
                    pending_steps = await self._list_pending_steps()
            for step, pod in pending_steps:
                with contextlib.suppress(NotFound):
                    await step(pod)

    async def _list_pending_steps(self) -> list[tuple[Callable[[Object], Awaitable[None]], Object]]:
        pending_steps: list[tuple[Callable[[Object], Awaitable[None]], Object]] = []
        for pod in list(self._rig.pods.items.values()):
            uid = pod["metadata"]["uid"]
            is_deleted = "deletionTimestamp" in pod["metadata"]
            if is_deleted and self.ends_deleted_pods and self._is_first(uid, "stop"):
                pending_steps.append((self._stop, pod))
            elif not is_deleted and self.starts_new_pods and self._is_first(uid, "run"):
                pending_steps.append((self.start, pod))
        return pending_steps

    def _is_first(self, uid: str, action: str) -> bool:
        if (uid, action) in self._handled:
            return False
        self._handled.add((uid, action))
        return True

    async def start(self, pod: Object, *, ready: bool = True) -> None:
        """Bind the pod to the node and set its status to running."""
        name = pod["metadata"]["name"]
        self._handled.add((pod["metadata"]["uid"], "run"))
        binding = {
            "apiVersion": "v1", "kind": "Binding", "metadata": {"name": name},
            "target": {"apiVersion": "v1", "kind": "Node", "name": NODE},
        }  # fmt: skip
        kind = Kind("v1", "Binding", f"pods/{name}/binding")
        with contextlib.suppress(Conflict, AlreadyExists):  # the API server raises these errors if the pod is already bound
            await _repeat_until_answered(lambda: self._rig.kube.create(kind, self._rig.namespace, binding))
        bound_pod = await _repeat_until_answered(lambda: self._rig.kube.get(POD, self._rig.namespace, name))
        await self.write(pod, {
            "phase": "Running", "podIP": "127.0.0.1", "startTime": _now(), "conditions": _make_conditions(bound_pod, is_ready=ready),
            "containerStatuses": [_container_status({"running": {"startedAt": _now()}}, ready)],
        })  # fmt: skip

    async def end(
        self, pod: Object, code: int, message: TerminationMessage | None = None, *, reason: str = "", raw: str = ""
    ) -> None:
        """End the pod's container with this exit code and termination message."""
        message_text = raw or (message.to_json() if message else "")
        terminated = {"exitCode": code, "reason": reason or ("Completed" if code == 0 else "Error"), "message": message_text}
        state = ((pod.get("status") or {}).get("containerStatuses") or [{}])[0].get("state") or {}
        terminated |= {"finishedAt": _now(), "startedAt": (state.get("running") or {}).get("startedAt") or _now()}
        await self.write(pod, {
            "phase": "Succeeded" if code == 0 else "Failed",
            "containerStatuses": [_container_status({"terminated": terminated}, False)],
            "conditions": _make_conditions(pod, is_ready=False),
        })  # fmt: skip

    async def succeed(self, pod: Object, step: int = 100) -> None:
        """End the pod successfully, with a termination message that names the final artefact."""
        output = {"uri": f"s3://models/test/model/{pod['metadata']['uid'][:8]}", "sha256": "ab" * 32, "kind": "adapter"}
        message = TerminationMessage.model_validate({"output": output, "step": step, "metrics": {"trainLoss": 0.5}})
        await self.end(pod, 0, message)

    async def write(self, pod: Object, status: Object) -> None:
        """Write the status of a pod."""
        name, body = pod["metadata"]["name"], {"status": status}
        await _repeat_until_answered(lambda: self._rig.kube.patch(POD, self._rig.namespace, name, body, subresource="status"))

    async def _stop(self, pod: Object) -> None:
        """Stop a deleted pod: end its container, then remove the pod object."""
        if pod["status"].get("phase") not in ("Succeeded", "Failed"):
            await self.end(pod, self.stop_code, self.stop_message)
        await self.remove(pod)

    async def remove(self, pod: Object) -> None:
        """Remove a deleted pod's object."""
        meta = pod["metadata"]
        await self._rig.kube.delete(POD, self._rig.namespace, meta["name"], uid=meta["uid"], grace_seconds=0)


async def _repeat_until_answered(request: Callable[[], Awaitable[T]]) -> T:
    """Repeat a request until the API server answers, so that a slow server does not fail the test."""
    while True:
        try:
            return await request()
        except (Unavailable, OutcomeUnknown):
            await asyncio.sleep(RETRY_SECONDS)


def _container_status(state: Object, ready: bool) -> Object:
    return {
        "name": "trainer", "image": "trainer", "imageID": "sha256:1", "ready": ready, "restartCount": 0, "state": state,
    }  # fmt: skip


def _make_conditions(pod: Object, *, is_ready: bool) -> list[Object]:
    """Return the conditions of a pod that is bound to a node. As with a real kubelet, `lastTransitionTime` of a condition stays the same until the
    condition's status changes.
    """
    old_times = {(old["type"], old["status"]): old.get("lastTransitionTime") for old in (pod.get("status") or {}).get("conditions") or []}
    statuses = {"PodScheduled": "True", "Ready": "True" if is_ready else "False"}
    return [{"type": k, "status": v, "lastTransitionTime": old_times.get((k, v)) or _now()} for k, v in statuses.items()]


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@contextlib.asynccontextmanager
async def open_rig(endpoint: Endpoint, namespace: str, progress: Progress) -> AsyncIterator[Rig]:
    """Create a namespace, and run its watches and its fake kubelet until the end of the context."""
    kube = await KubeClient.connect(ApiSettings(), kubeconfig=endpoint.kubeconfig)
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}
    await kube.create(Kind("v1", "Namespace", "namespaces"), "", body)
    world = Rig(endpoint, kube, namespace, progress)
    context = ssl.create_default_context(cafile=str(endpoint.ca))
    headers = {"Authorization": f"Bearer {endpoint.token}"}
    connector = aiohttp.TCPConnector(ssl=context)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        connector=connector, headers=headers, timeout=timeout, read_bufsize=2**21
    ) as session:
        stores = {"jobs": world.jobs, "pods": world.pods, "ftjs": world.ftjs}
        tasks = [asyncio.create_task(store.run(session), name=f"the watch of {name}") for name, store in stores.items()]
        world.tasks = tasks = [*tasks, asyncio.create_task(world.kubelet.run(), name="the kubelet")]
        try:
            yield world
        finally:
            for body in list(world.ftjs.items.values()):
                meta = body["metadata"]
                await kube.delete(FINETUNEJOB, namespace, meta["name"], uid=meta["uid"], foreground=False)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await kube.close()


class Heartbeat:
    """Keeps the node Ready by sending heartbeats in place of a kubelet, so that the node controller evicts no pods."""

    def __init__(self, endpoint: Endpoint):
        self._endpoint = endpoint
        self._end = threading.Event()
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}}
        endpoint.request("POST", "/api/v1/nodes", node)
        self._send_heartbeat()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._end.wait(5):
            with contextlib.suppress(Exception):  # a busy server may refuse a heartbeat; the next one still comes in time
                self._send_heartbeat()

    def _send_heartbeat(self) -> None:
        now = _now()
        ready_condition = {"type": "Ready", "status": "True", "reason": "KubeletReady", "lastHeartbeatTime": now}
        status = {"status": {"conditions": [{**ready_condition, "lastTransitionTime": now}]}}
        content_type = "application/strategic-merge-patch+json"
        self._endpoint.request("PATCH", f"/api/v1/nodes/{NODE}/status", status, content_type=content_type)

    def close(self) -> None:
        """Stop sending heartbeats."""
        self._end.set()
        self._thread.join()


def install_crd(endpoint: Endpoint, crd: Path) -> None:
    """Install the CRD and wait until the API server serves it."""
    endpoint.apply(
        "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/finetunejobs.finetune-operator.io",
        yaml.safe_load(crd.read_text()),
    )
    for _ in _pauses():
        with contextlib.suppress(Exception):
            endpoint.get(f"/apis/{API_VERSION}/finetunejobs")
            return


def _pauses() -> Iterator[None]:
    pause = threading.Event()
    for _ in range(100):
        yield
        pause.wait(0.1)
    raise AssertionError("the CRD is not served after 10 s")
