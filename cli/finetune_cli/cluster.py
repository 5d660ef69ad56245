"""Sends requests to the API server, and connects with the same kubeconfig as kubectl. Kubernetes objects are plain dicts."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from finetune_api.names import API_VERSION, KIND, MANAGER_NAME, PLURAL, PROGRESS_PORT, Label

from finetune_cli.output import CommandError

FIELD_MANAGER = "finetune-cli"
JOBS_API_PATH = f"/apis/{API_VERSION}"
CORE_API_PATH = "/api/v1"
EVENTS_API_PATH = "/apis/events.k8s.io/v1"
TABLE_CONTENT_TYPE = "application/json;as=Table;v=v1;g=meta.k8s.io"
CALL_TIMEOUT_SECONDS = 30
POD_TIMEOUT_SECONDS = 5
KIND_NAMES = (KIND.lower(), PLURAL, "ftj")
NAMESPACE_NAME_PATTERN = re.compile(r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")
WATCH_SECONDS = 60

KubeObject = dict[str, Any]


class ClusterError(CommandError):
    """The API server refused a request or cannot be reached.

    `code` is the HTTP status of the response, or 0 if no response arrived or the CRD is not installed.
    """

    def __init__(self, message: str, code: int = 0):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Cluster:
    """A connection to an API server, and the namespace in which commands act."""

    client: Any
    namespace: str
    impersonated_user: str = ""
    """The user that requests impersonate (header `Impersonate-User`). The API server then checks this user's rights. Empty: no impersonation."""

    # --- FineTuneJobs

    def get_job(self, name: str) -> KubeObject:
        """Return a FineTuneJob. Raises ClusterError, with code 404 if the job does not exist."""
        return self.call_api("GET", self._make_job_path(name))

    def create_object(self, body: KubeObject, *, dry_run: bool = False) -> KubeObject:
        """Create an object. The API server refuses the object if it has unknown fields."""
        query = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict", **({"dryRun": "All"} if dry_run else {})}
        return self.call_api("POST", self._make_collection_path(body), query, body)

    def apply_object(self, body: KubeObject, *, dry_run: bool = False) -> KubeObject:
        """Create or update an object by server-side apply."""
        query = {
            "fieldManager": FIELD_MANAGER,
            "fieldValidation": "Strict",
            "force": "true",
            **({"dryRun": "All"} if dry_run else {}),
        }
        path = f"{self._make_collection_path(body)}/{quote(str(body['metadata']['name']), safe='')}"
        return self.call_api("PATCH", path, query, body, "application/apply-patch+yaml")

    def delete_object(self, body: KubeObject) -> None:
        """Delete an object if it still has the uid in `body`. Kubernetes deletes the object's dependents in the background. Raises ClusterError."""
        path = f"{self._make_collection_path(body)}/{quote(str(body['metadata']['name']), safe='')}"
        self.call_api("DELETE", path, None, {"propagationPolicy": "Background", "preconditions": {"uid": body["metadata"]["uid"]}})

    def patch_spec(self, name: str, spec: KubeObject) -> KubeObject:
        """Change fields of a FineTuneJob's spec."""
        return self.call_api(
            "PATCH",
            self._make_job_path(name),
            {"fieldManager": FIELD_MANAGER},
            {"spec": spec},
            "application/merge-patch+json",
        )

    def get_table(self, name: str | None, *, all_namespaces: bool) -> KubeObject:
        """Return one FineTuneJob, or all of them, as a Kubernetes `Table`. The API server chooses the columns, as for `kubectl get`."""
        return self.call_api(
            "GET", self._make_job_path(name) if name else self._make_jobs_path(all_namespaces), accept_type=TABLE_CONTENT_TYPE
        )

    def list_jobs(self, *, all_namespaces: bool, label_selector: str = "") -> list[KubeObject]:
        """Return the FineTuneJobs of this namespace, or of all namespaces."""
        path = self._make_jobs_path(all_namespaces)
        jobs = self.call_api("GET", path, {"labelSelector": label_selector} if label_selector else None).get("items") or []
        return [{"apiVersion": API_VERSION, "kind": KIND, **job} for job in jobs]

    def wait_until_created(self, name: str, deadline: float | None) -> bool:
        """Wait until a FineTuneJob exists. Return False if it does not exist at the deadline (in seconds of `time.monotonic`). Raises ClusterError."""
        while True:
            # Without a resource version, a watch first returns the objects that already exist.
            query = {"fieldSelector": f"metadata.name={parse_job_name(name)}"}
            for event in self._watch(f"{JOBS_API_PATH}/{self._make_namespaced_path(PLURAL)}", query, deadline):
                if event.get("type") in ("ADDED", "MODIFIED"):
                    return True
            if deadline is not None and time.monotonic() >= deadline:
                return False

    def watch_job(self, name: str, deadline: float | None = None) -> Iterator[KubeObject]:
        """Yield a FineTuneJob now and after every change, until the deadline (in seconds of `time.monotonic`). Raises ClusterError."""
        while True:
            job = self.get_job(name)
            yield job
            if deadline is not None and time.monotonic() >= deadline:
                return
            query = {"fieldSelector": f"metadata.name={name}", "resourceVersion": job["metadata"]["resourceVersion"]}
            for event in self._watch(f"{JOBS_API_PATH}/{self._make_namespaced_path(PLURAL)}", query, deadline):
                if event.get("type") in ("ADDED", "MODIFIED"):
                    yield event["object"]
                elif event.get("type") == "DELETED":
                    raise ClusterError(f"{KIND} {name} was deleted", 404)
                else:
                    break

    # --- objects of a job

    def list_pods(self, job_name: str, attempt: int | None = None) -> list[KubeObject]:
        """Return the pods of a job, sorted by attempt and completion index."""
        selector = f"{Label.JOB_NAME}={job_name}" + (f",{Label.ATTEMPT}={attempt}" if attempt is not None else "")
        pods = self.call_api("GET", f"{CORE_API_PATH}/{self._make_namespaced_path('pods')}", {"labelSelector": selector}).get("items") or []
        return sorted(
            pods, key=lambda pod: (get_attempt(pod), get_pod_index(pod), pod["metadata"].get("creationTimestamp", ""))
        )

    def list_trainer_pods(self, *, all_namespaces: bool) -> list[KubeObject]:
        """Return the pods of all jobs in this namespace or in all namespaces, sorted by job, attempt and completion index."""
        path = f"{CORE_API_PATH}/pods" if all_namespaces else f"{CORE_API_PATH}/{self._make_namespaced_path('pods')}"
        pods = self.call_api("GET", path, {"labelSelector": f"{Label.MANAGED_BY}={MANAGER_NAME}"}).get("items") or []
        return sorted(pods, key=lambda pod: (pod["metadata"]["namespace"], _get_job_name(pod), get_attempt(pod), get_pod_index(pod)))

    def watch_pods(self, selector: str, deadline: float) -> Iterator[KubeObject]:
        """Yield the pods with these labels now and after every change, until the deadline (in seconds of `time.monotonic`). Raises ClusterError."""
        path = f"{CORE_API_PATH}/{self._make_namespaced_path('pods')}"
        while True:
            pod_list = self.call_api("GET", path, {"labelSelector": selector})
            yield from pod_list.get("items") or []
            if time.monotonic() >= deadline:
                return
            query = {"labelSelector": selector, "resourceVersion": pod_list["metadata"]["resourceVersion"]}
            for event in self._watch(path, query, deadline):
                if event.get("type") not in ("ADDED", "MODIFIED"):
                    break
                yield event["object"]

    def read_from_pod(self, namespace: str, pod_name: str, path: str) -> KubeObject:
        """Send a GET request through the API server to the HTTP server of a trainer pod, and return the JSON response. Raises ClusterError."""
        proxy_path = self._make_namespaced_path("pods", f"{pod_name}:{PROGRESS_PORT}", namespace=namespace).replace("%3A", ":")
        return self.call_api("GET", f"{CORE_API_PATH}/{proxy_path}/proxy{path}", timeout_seconds=POD_TIMEOUT_SECONDS)

    def is_allowed_to(self, verb: str, resource: str) -> bool:
        """Whether the user may use a verb on a resource such as `pods/log` or `events.events.k8s.io` in the namespace. Raises ClusterError."""
        resource_path, _, group = resource.partition(".")
        plural, _, subresource = resource_path.partition("/")
        resource_attributes = {"namespace": self.namespace, "verb": verb, "group": group, "resource": plural, "subresource": subresource}
        body = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "spec": {"resourceAttributes": resource_attributes}}
        review = self.call_api("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", None, body)
        return bool((review.get("status") or {}).get("allowed"))

    def list_events(self, object_uids: set[str]) -> list[KubeObject]:
        """Return the events about the objects with these uids, oldest first."""
        events = self.call_api("GET", f"{EVENTS_API_PATH}/{self._make_namespaced_path('events')}").get("items") or []
        return sorted((event for event in events if (event.get("regarding") or {}).get("uid") in object_uids), key=get_event_time)

    def get_secret(self, name: str) -> KubeObject:
        """Return a Secret of the namespace."""
        return self.call_api("GET", f"{CORE_API_PATH}/{self._make_namespaced_path('secrets', name)}")

    def stream_log(self, pod_name: str, container: str, *, follow: bool, tail_lines: int | None) -> Iterator[str]:
        """Yield the lines of a container's log. Raises ClusterError."""
        query = {
            "container": container,
            **({"follow": "true"} if follow else {}),
            **({"tailLines": str(tail_lines)} if tail_lines is not None else {}),
        }
        response = self._send(
            "GET",
            f"{CORE_API_PATH}/{self._make_namespaced_path('pods', pod_name)}/log",
            query,
            None,
            "",
            "*/*",
            None if follow else CALL_TIMEOUT_SECONDS,
        )
        yield from _read_lines(response)

    def get_version(self) -> str:
        """Return the version of the API server."""
        return str(self.call_api("GET", "/version").get("gitVersion", ""))

    # --- requests

    def call_api(
        self, method: str, path: str, query: dict[str, str] | None = None, body: KubeObject | None = None,
        content_type: str = "application/json", accept_type: str = "application/json", timeout_seconds: float = CALL_TIMEOUT_SECONDS,
    ) -> KubeObject:  # fmt: skip
        """Send one request and return its JSON response. Raises ClusterError."""
        response = self._send(method, path, query or {}, body, content_type, accept_type, timeout_seconds)
        try:
            response_object = json.loads(response.read())
        except ValueError:
            response_object = None
        if not isinstance(response_object, dict):
            raise ClusterError(
                f"{self.client.configuration.host} does not respond like a Kubernetes API server: the address may be that of a login page or a proxy"
            )
        return response_object

    def _watch(self, path: str, query: dict[str, str], deadline: float | None) -> Iterator[KubeObject]:
        """Yield the events of one watch request. The API server ends the request at the deadline or earlier."""
        watch_seconds = _compute_watch_seconds(deadline)
        query = {**query, "watch": "true", "timeoutSeconds": str(watch_seconds)}
        response = self._send("GET", path, query, None, "", "application/json", watch_seconds + CALL_TIMEOUT_SECONDS)
        for line in _read_lines(response):
            if line.strip():
                yield json.loads(line)

    def _send(
        self,
        method: str,
        path: str,
        query: dict[str, str],
        body: KubeObject | None,
        content_type: str,
        accept_type: str,
        timeout_seconds: float | None,
    ) -> Any:
        import urllib3

        headers: dict[str, str] = {"Accept": accept_type, "User-Agent": FIELD_MANAGER}
        if body is not None:
            headers["Content-Type"] = content_type
        if self.impersonated_user:
            headers["Impersonate-User"] = self.impersonated_user
        self.client.update_params_for_auth(headers, [], ["BearerToken"], path, method, None)
        url = f"{self.client.configuration.host.rstrip('/')}{path}" + (f"?{urlencode(query)}" if query else "")
        timeout = urllib3.Timeout(connect=CALL_TIMEOUT_SECONDS, read=timeout_seconds)
        try:
            response = self.client.rest_client.pool_manager.request(
                method, url, headers=headers, body=None if body is None else json.dumps(body), preload_content=False, timeout=timeout, retries=False,
            )  # fmt: skip
        except urllib3.exceptions.HTTPError as error:
            raise ClusterError(
                f"the API server at {self.client.configuration.host} cannot be reached: {find_innermost_cause(error)}"
            ) from None
        if response.status >= 400:
            raise self._make_cluster_error(response.read(), response.status, path)
        return response

    def _make_cluster_error(self, body: bytes, status: int, path: str) -> ClusterError:
        """Return the error for a failed response.

        If the CRD is not installed, the error has code 0 instead of 404, because callers treat 404 as a deleted job.
        """
        host = self.client.configuration.host
        try:
            status_object = json.loads(body)
            message = (
                str(status_object.get("message") or status_object.get("reason") or "")
                if isinstance(status_object, dict)
                else ""
            )
        except ValueError:
            message = ""
        if status == HTTPStatus.UNAUTHORIZED:
            return ClusterError(
                f"the API server at {host} does not accept the credentials of the kubeconfig: log in again", status
            )
        if status == HTTPStatus.NOT_FOUND and not message and path.startswith(JOBS_API_PATH):
            hint = "install the operator's chart, or choose another cluster with --context"
            return ClusterError(f"the cluster at {host} has no CRD for {KIND} {API_VERSION}: {hint}")
        if not message:
            body_excerpt = " ".join(body[:200].decode(errors="replace").split())
            message = f"the API server at {host} responded with HTTP {status}: {body_excerpt[:120]}"
        return ClusterError(message, status)

    def _make_job_path(self, name: str) -> str:
        return f"{JOBS_API_PATH}/{self._make_namespaced_path(PLURAL, parse_job_name(name))}"

    def _make_jobs_path(self, all_namespaces: bool) -> str:
        return f"{JOBS_API_PATH}/{PLURAL}" if all_namespaces else f"{JOBS_API_PATH}/{self._make_namespaced_path(PLURAL)}"

    def _make_namespaced_path(self, plural_kind: str, name: str | None = None, namespace: str | None = None) -> str:
        """Return the URL path of a collection or of one object. Names are percent-encoded, so that a name like `../x` cannot refer to another collection."""
        path = f"namespaces/{quote(namespace or self.namespace, safe='')}/{plural_kind}"
        return path if name is None else f"{path}/{quote(name, safe='')}"

    def _make_collection_path(self, body: KubeObject) -> str:
        kind, version = str(body["kind"]), str(body["apiVersion"])
        namespace = (body.get("metadata") or {}).get("namespace") or self.namespace
        plural_kind = {KIND: PLURAL, "Secret": "secrets", "ConfigMap": "configmaps", "Job": "jobs"}.get(kind)
        if plural_kind is None:
            raise ClusterError(f"this command does not submit objects of kind {kind}: use kubectl apply")
        api_path = CORE_API_PATH if version == "v1" else f"/apis/{version}"
        return f"{api_path}/{self._make_namespaced_path(plural_kind, namespace=str(namespace))}"


def _compute_watch_seconds(deadline: float | None) -> int:
    """Return the duration of the next watch request in seconds."""
    return WATCH_SECONDS if deadline is None else max(1, min(WATCH_SECONDS, int(deadline - time.monotonic())))


def connect(namespace: str | None, context: str | None, kubeconfig: Path | None) -> Cluster:
    """Connect as kubectl does: with --kubeconfig, KUBECONFIG or ~/.kube/config, or inside a pod with the pod's ServiceAccount.

    Raises ClusterError.
    """
    from kubernetes import client, config

    if namespace is not None and not NAMESPACE_NAME_PATTERN.match(namespace):
        raise ClusterError(
            f"--namespace {namespace}: this cannot be the name of a namespace; write at most 63 characters a-z, 0-9 and -"
        )
    if kubeconfig is not None and (not kubeconfig.exists() or kubeconfig.is_dir()):
        raise ClusterError(f"no cluster: --kubeconfig {kubeconfig}: there is no such file")
    configuration = client.Configuration()
    try:
        context_namespace = _load_kubeconfig(
            configuration, context, str(kubeconfig) if kubeconfig else os.environ.get("KUBECONFIG") or None
        )
    except config.ConfigException as error:
        if kubeconfig or context or not Path(POD_NAMESPACE_FILE).is_file():
            raise ClusterError(f"no cluster: {str(error).rstrip('.')}; name a kubeconfig with --kubeconfig or KUBECONFIG") from None
        config.load_incluster_config(client_configuration=configuration)
        context_namespace = Path(POD_NAMESPACE_FILE).read_text(encoding="utf-8").strip()
    configuration.retries = None
    return Cluster(client.ApiClient(configuration), namespace or context_namespace or "default")


def _load_kubeconfig(configuration: Any, context: str | None, kubeconfig_path: str | None) -> str | None:
    """Load the kubeconfig into `configuration` and return the namespace of the selected context.

    Raises ConfigException or ClusterError.
    """
    from kubernetes import config

    with _capture_log_errors() as log_errors:
        try:
            config.load_kube_config(config_file=kubeconfig_path, context=context, client_configuration=configuration)
            contexts, active_context = config.list_kube_config_contexts(config_file=kubeconfig_path)
        except config.ConfigException:
            raise
        except OSError as error:
            raise ClusterError(f"{error.filename or kubeconfig_path or 'the kubeconfig'}: {error.strerror}") from None
        except Exception as error:
            # The kubernetes library does not catch the exceptions of its parsers. Their text is not printed, because it may quote credentials.
            raise ClusterError(
                f"{kubeconfig_path or '~/.kube/config'} is not a valid kubeconfig ({type(error).__name__})"
            ) from None
    if log_errors:
        raise ClusterError(f"the kubeconfig gave no credentials: {'; '.join(log_errors)}")
    context_entry = next((entry for entry in contexts if entry["name"] == context), active_context) if context else active_context
    namespace = (context_entry.get("context") or {}).get("namespace")
    return str(namespace) if namespace else None


@contextlib.contextmanager
def _capture_log_errors() -> Iterator[list[str]]:
    """Yield a list to which each logged error is added. If a credential plugin fails, the kubernetes library raises no exception, but logs an error."""
    error_messages: list[str] = []

    class ErrorCollector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            error_messages.append(record.getMessage())

    error_collector, root_logger = ErrorCollector(logging.ERROR), logging.getLogger()
    root_logger.addHandler(error_collector)
    try:
        yield error_messages
    finally:
        root_logger.removeHandler(error_collector)


POD_NAMESPACE_FILE = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"


def find_innermost_cause(error: Exception) -> str:
    """Return the innermost cause of a network error. The text of a network error lists the nested errors, with the innermost cause last."""
    error_text = str(error)
    return error_text.rpartition(": ")[2].strip("()<> '\"") or type(error).__name__


def _read_lines(response: Any) -> Iterator[str]:
    import urllib3

    partial_line = b""
    try:
        for chunk in response.stream(amt=None, decode_content=True):
            *complete_lines, partial_line = (partial_line + chunk).split(b"\n")
            for line in complete_lines:
                yield line.decode(errors="replace")
    except urllib3.exceptions.HTTPError:
        return
    finally:
        response.release_conn()
    if partial_line:
        yield partial_line.decode(errors="replace")


def parse_job_name(name: str) -> str:
    """Return the name of a job from `NAME` or `KIND/NAME` (as printed by `get -o name`). Raises ClusterError."""
    kind, slash, job_name = name.rpartition("/")
    if not job_name or (slash and kind.lower().partition(".")[0] not in KIND_NAMES):
        raise ClusterError(f"{name!r} is not the name of a {KIND}; write NAME, or {KIND.lower()}/NAME")
    return job_name


def _get_job_name(pod: KubeObject) -> str:
    return str((pod["metadata"].get("labels") or {}).get(Label.JOB_NAME, ""))


def get_attempt(pod: KubeObject) -> int:
    """Return the attempt number from the label of a pod, or 0 if the pod does not have this label."""
    return int((pod["metadata"].get("labels") or {}).get(Label.ATTEMPT, 0))


def get_pod_index(pod: KubeObject) -> int:
    """Return the completion index of a pod within its attempt."""
    labels, annotations = pod["metadata"].get("labels") or {}, pod["metadata"].get("annotations") or {}
    index_key = "batch.kubernetes.io/job-completion-index"
    return int(labels.get(index_key) or annotations.get(index_key) or 0)


def get_event_time(event: KubeObject) -> str:
    """Return the time of the last occurrence of an event, as a text that sorts by time."""
    series = event.get("series") or {}
    times = (
        series.get("lastObservedTime"),
        event.get("eventTime"),
        event.get("deprecatedLastTimestamp"),
        event["metadata"].get("creationTimestamp"),
    )
    return next((str(time) for time in times if time), "")
