"""The API server, as the everyday commands need it: plain objects, kubectl's configuration, complaints in one sentence."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from finetune_api.names import API_VERSION, KIND, PLURAL, Label

from finetune_cli.output import Told

FIELD_MANAGER = "finetune-cli"
JOBS = f"/apis/{API_VERSION}"
CORE = "/api/v1"
EVENTS = "/apis/events.k8s.io/v1"
TABLE = "application/json;as=Table;v=v1;g=meta.k8s.io"
CALL_SECONDS = 30
HTTP_UNAUTHORIZED, HTTP_NOT_FOUND = 401, 404
KINDS = (KIND.lower(), PLURAL, "ftj")
NAMESPACE = re.compile(r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")
WATCH_SECONDS = 60

Object = dict[str, Any]


class ClusterError(Told):
    """The API server refused, or cannot be reached. `code` is HTTP's, 0 for no answer."""

    def __init__(self, message: str, code: int = 0):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Cluster:
    """A connection and the namespace that commands act in."""

    client: Any
    namespace: str

    # --- FineTuneJobs

    def job(self, name: str) -> Object:
        """One FineTuneJob. Raises ClusterError; its code is 404 if there is none."""
        return self.call("GET", self._job(name))

    def create(self, body: Object, *, dry_run: bool = False) -> Object:
        """Create an object; the server refuses unknown fields."""
        query = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict", **({"dryRun": "All"} if dry_run else {})}
        return self.call("POST", self._collection(body), query, body)

    def apply(self, body: Object, *, dry_run: bool = False) -> Object:
        """Create or change an object by server-side apply."""
        query = {
            "fieldManager": FIELD_MANAGER,
            "fieldValidation": "Strict",
            "force": "true",
            **({"dryRun": "All"} if dry_run else {}),
        }
        path = f"{self._collection(body)}/{quote(str(body['metadata']['name']), safe='')}"
        return self.call("PATCH", path, query, body, "application/apply-patch+yaml")

    def patch_spec(self, name: str, spec: Object) -> Object:
        """Change fields of a FineTuneJob's spec."""
        return self.call(
            "PATCH", self._job(name), {"fieldManager": FIELD_MANAGER}, {"spec": spec}, "application/merge-patch+json"
        )

    def table(self, name: str | None, *, everywhere: bool) -> Object:
        """The server's own table of FineTuneJobs, with the columns that kubectl shows."""
        path = f"{JOBS}/{PLURAL}" if everywhere else self._job(name) if name else f"{JOBS}/{self._namespaced(PLURAL)}"
        return self.call("GET", path, accept=TABLE)

    def jobs(self, *, everywhere: bool) -> list[Object]:
        """All FineTuneJobs of the namespace, or of all."""
        path = f"{JOBS}/{PLURAL}" if everywhere else f"{JOBS}/{self._namespaced(PLURAL)}"
        items = self.call("GET", path).get("items") or []
        return [{"apiVersion": API_VERSION, "kind": KIND, **item} for item in items]

    def follow(self, name: str, deadline: float | None = None) -> Iterator[Object]:
        """The FineTuneJob now, and after every change until the deadline (monotonic seconds). Raises ClusterError."""
        while True:
            job = self.job(name)
            yield job
            if deadline is not None and time.monotonic() >= deadline:
                return
            seconds = (
                WATCH_SECONDS if deadline is None else max(1, min(WATCH_SECONDS, int(deadline - time.monotonic())))
            )
            query = {
                "watch": "true", "fieldSelector": f"metadata.name={name}", "resourceVersion": job["metadata"]["resourceVersion"],
                "timeoutSeconds": str(seconds),
            }  # fmt: skip
            for event in self._watch(f"{JOBS}/{self._namespaced(PLURAL)}", query, seconds + CALL_SECONDS):
                if event.get("type") in ("ADDED", "MODIFIED"):
                    yield event["object"]
                elif event.get("type") == "DELETED":
                    raise ClusterError(f"{KIND} {name} was deleted", 404)
                else:
                    break

    # --- what belongs to a job

    def pods(self, name: str, attempt: int | None = None) -> list[Object]:
        """Pods of a job, by attempt and index."""
        selector = f"{Label.NAME}={name}" + (f",{Label.ATTEMPT}={attempt}" if attempt is not None else "")
        found = self.call("GET", f"{CORE}/{self._namespaced('pods')}", {"labelSelector": selector}).get("items") or []
        return sorted(
            found, key=lambda pod: (attempt_of(pod), index_of(pod), pod["metadata"].get("creationTimestamp", ""))
        )

    def events(self, uids: set[str]) -> list[Object]:
        """Events about objects with these uids, oldest first."""
        found = self.call("GET", f"{EVENTS}/{self._namespaced('events')}").get("items") or []
        mine = [one for one in found if (one.get("regarding") or {}).get("uid") in uids]
        return sorted(mine, key=event_time)

    def secret(self, name: str) -> Object:
        """A Secret of the namespace."""
        return self.call("GET", f"{CORE}/{self._namespaced('secrets', name)}")

    def log(self, pod: str, container: str, *, follow: bool, tail: int | None) -> Iterator[str]:
        """Lines of a pod's log. Raises ClusterError."""
        query = {
            "container": container,
            **({"follow": "true"} if follow else {}),
            **({"tailLines": str(tail)} if tail is not None else {}),
        }
        response = self._send(
            "GET",
            f"{CORE}/{self._namespaced('pods', pod)}/log",
            query,
            None,
            "",
            "*/*",
            None if follow else CALL_SECONDS,
        )
        yield from _lines(response)

    def version(self) -> str:
        """Version of the API server."""
        return str(self.call("GET", "/version").get("gitVersion", ""))

    # --- requests

    def call(
        self, method: str, path: str, query: dict[str, str] | None = None, body: Object | None = None,
        content: str = "application/json", accept: str = "application/json",
    ) -> Object:  # fmt: skip
        """One request and its JSON answer. Raises ClusterError."""
        response = self._send(method, path, query or {}, body, content, accept, CALL_SECONDS)
        try:
            found = json.loads(response.read())
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ClusterError(
                f"{self.client.configuration.host} does not answer as an API server does: is it the address of a login page or of a proxy?"
            )
        return found

    def _watch(self, path: str, query: dict[str, str], seconds: float) -> Iterator[Object]:
        response = self._send("GET", path, query, None, "", "application/json", seconds)
        for line in _lines(response):
            if line.strip():
                yield json.loads(line)

    def _send(
        self,
        method: str,
        path: str,
        query: dict[str, str],
        body: Object | None,
        content: str,
        accept: str,
        seconds: float | None,
    ) -> Any:
        import urllib3

        headers: dict[str, str] = {"Accept": accept, "User-Agent": FIELD_MANAGER}
        if body is not None:
            headers["Content-Type"] = content
        self.client.update_params_for_auth(headers, [], ["BearerToken"], path, method, None)
        url = f"{self.client.configuration.host.rstrip('/')}{path}" + (f"?{urlencode(query)}" if query else "")
        timeout = urllib3.Timeout(connect=CALL_SECONDS, read=seconds)
        try:
            response = self.client.rest_client.pool_manager.request(
                method, url, headers=headers, body=None if body is None else json.dumps(body), preload_content=False, timeout=timeout, retries=False,
            )  # fmt: skip
        except urllib3.exceptions.HTTPError as error:
            raise ClusterError(
                f"the API server at {self.client.configuration.host} cannot be reached: {reason_of(error)}"
            ) from None
        if response.status >= 400:
            raise self._refused(response.read(), response.status, path)
        return response

    def _refused(self, body: bytes, status: int, path: str) -> ClusterError:
        """What the server said, and what to do about it. A kind that the server lacks is not a job that is gone: its code is 0."""
        host = self.client.configuration.host
        try:
            found = json.loads(body)
            said = str(found.get("message") or found.get("reason") or "") if isinstance(found, dict) else ""
        except ValueError:
            said = ""
        if status == HTTP_UNAUTHORIZED:
            return ClusterError(
                f"the API server at {host} does not accept the credentials of the kubeconfig: log in again", status
            )
        if status == HTTP_NOT_FOUND and not said and path.startswith(JOBS):
            hint = "install the operator's chart, or choose another cluster with --context"
            return ClusterError(f"the cluster at {host} knows no {KIND}s of {API_VERSION}: {hint}")
        if not said:
            text = " ".join(body[:200].decode(errors="replace").split())
            said = f"the API server at {host} answered HTTP {status}: {text[:120]}"
        return ClusterError(said, status)

    def _job(self, name: str) -> str:
        return f"{JOBS}/{self._namespaced(PLURAL, bare(name))}"

    def _namespaced(self, plural: str, name: str | None = None, namespace: str | None = None) -> str:
        """Path of a collection, or of an object in it; names are quoted, so that none of them is a path of its own."""
        path = f"namespaces/{quote(namespace or self.namespace, safe='')}/{plural}"
        return path if name is None else f"{path}/{quote(name, safe='')}"

    def _collection(self, body: Object) -> str:
        kind, version = str(body["kind"]), str(body["apiVersion"])
        namespace = (body.get("metadata") or {}).get("namespace") or self.namespace
        plural = {KIND: PLURAL, "Secret": "secrets", "ConfigMap": "configmaps"}.get(kind)
        if plural is None:
            raise ClusterError(f"{kind} is not submitted by this command: use kubectl apply")
        root = CORE if version == "v1" else f"/apis/{version}"
        return f"{root}/{self._namespaced(plural, namespace=str(namespace))}"


def connect(namespace: str | None, context: str | None, kubeconfig: Path | None) -> Cluster:
    """A connection by kubectl's rules: --kubeconfig, KUBECONFIG, ~/.kube/config, else the pod's own account. Raises ClusterError."""
    from kubernetes import client, config

    if namespace is not None and not NAMESPACE.match(namespace):
        raise ClusterError(
            f"--namespace {namespace}: it cannot be the name of a namespace; write a-z, 0-9 and -, at most 63 characters"
        )
    if kubeconfig is not None and (not kubeconfig.exists() or kubeconfig.is_dir()):
        raise ClusterError(f"no cluster: --kubeconfig {kubeconfig}: there is no such file")
    configuration = client.Configuration()
    try:
        found = _kubeconfig(
            configuration, context, str(kubeconfig) if kubeconfig else os.environ.get("KUBECONFIG") or None
        )
    except config.ConfigException as error:
        if kubeconfig or context or not Path(IN_POD).is_file():
            raise ClusterError(f"no cluster: {error}; name a kubeconfig with --kubeconfig or KUBECONFIG") from None
        config.load_incluster_config(client_configuration=configuration)
        found = Path(IN_POD).read_text(encoding="utf-8").strip()
    configuration.retries = None
    return Cluster(client.ApiClient(configuration), namespace or found or "default")


def _kubeconfig(configuration: Any, context: str | None, path: str | None) -> str | None:
    """Read the kubeconfig into a configuration; the namespace of its context. Raises ConfigException, ClusterError."""
    from kubernetes import config

    with _heard() as heard:
        try:
            config.load_kube_config(config_file=path, context=context, client_configuration=configuration)
            contexts, active = config.list_kube_config_contexts(config_file=path)
        except config.ConfigException:
            raise
        except OSError as error:
            raise ClusterError(f"{error.filename or path or 'the kubeconfig'}: {error.strerror}") from None
        except Exception as error:
            # The library lets through whatever its parsers raise, with a piece of the file in the text: not to be shown.
            where = path or "~/.kube/config"
            raise ClusterError(f"{where} is not a kubeconfig that can be read ({type(error).__name__})") from None
    if heard:
        raise ClusterError(f"no credentials from the kubeconfig: {'; '.join(heard)}")
    chosen = next((one for one in contexts if one["name"] == context), active) if context else active
    found = (chosen.get("context") or {}).get("namespace")
    return str(found) if found else None


@contextlib.contextmanager
def _heard() -> Iterator[list[str]]:
    """What the library only logs: a credential plugin that failed."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    listener, root = Listener(logging.ERROR), logging.getLogger()
    root.addHandler(listener)
    try:
        yield lines
    finally:
        root.removeHandler(listener)


IN_POD = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"


def reason_of(error: Exception) -> str:
    """The last words of a chain of network errors."""
    text = str(error)
    return text.rpartition(": ")[2].strip("()<> '\"") or type(error).__name__


def _lines(response: Any) -> Iterator[str]:
    import urllib3

    rest = b""
    try:
        for part in response.stream(amt=None, decode_content=True):
            *whole, rest = (rest + part).split(b"\n")
            for line in whole:
                yield line.decode(errors="replace")
    except urllib3.exceptions.HTTPError:
        return
    finally:
        response.release_conn()
    if rest:
        yield rest.decode(errors="replace")


def bare(name: str) -> str:
    """The name of a job, also written as `finetunejobs.finetune-operator.io/NAME`, as `get -o name` prints it. Raises ClusterError."""
    kind, slash, rest = name.rpartition("/")
    if not rest or (slash and kind.lower().partition(".")[0] not in KINDS):
        raise ClusterError(f"{name!r} is not the name of a {KIND}; write NAME, or {KIND.lower()}/NAME")
    return rest


def attempt_of(thing: Object) -> int:
    """Attempt that a pod belongs to; 0 if it does not say."""
    return int((thing["metadata"].get("labels") or {}).get(Label.ATTEMPT, 0))


def index_of(pod: Object) -> int:
    """Index of a pod among those of its attempt."""
    labels, annotations = pod["metadata"].get("labels") or {}, pod["metadata"].get("annotations") or {}
    key = "batch.kubernetes.io/job-completion-index"
    return int(labels.get(key) or annotations.get(key) or 0)


def event_time(event: Object) -> str:
    """When an event was last seen, as text that sorts."""
    series = event.get("series") or {}
    times = (
        series.get("lastObservedTime"),
        event.get("eventTime"),
        event.get("deprecatedLastTimestamp"),
        event["metadata"].get("creationTimestamp"),
    )
    return next((str(one) for one in times if one), "")
