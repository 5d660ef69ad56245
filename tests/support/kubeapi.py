"""A synchronous Kubernetes API client for tests. It waits with watches instead of polling, and returns the server's warnings."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

import urllib3
from finetune_api import names

from localcluster.api import Endpoint

Object = dict[str, Any]
Objects = list[Object]
API_PATHS = {
    names.PLURAL: f"/apis/{names.API_VERSION}",
    "jobs": "/apis/batch/v1",
    "deployments": "/apis/apps/v1",
    "leases": "/apis/coordination.k8s.io/v1",
    "networkpolicies": "/apis/networking.k8s.io/v1",
    "events": "/apis/events.k8s.io/v1",
    "customresourcedefinitions": "/apis/apiextensions.k8s.io/v1",
    "roles": "/apis/rbac.authorization.k8s.io/v1",
    "rolebindings": "/apis/rbac.authorization.k8s.io/v1",
    "clusterroles": "/apis/rbac.authorization.k8s.io/v1",
    "clusterrolebindings": "/apis/rbac.authorization.k8s.io/v1",
    "localsubjectaccessreviews": "/apis/authorization.k8s.io/v1",
    "subjectaccessreviews": "/apis/authorization.k8s.io/v1",
    "priorityclasses": "/apis/scheduling.k8s.io/v1",
}
"""URL path of the API group of each resource. A resource that is not listed belongs to the core group."""
PATCH_CONTENT_TYPES = {
    "merge": "application/merge-patch+json", "json": "application/json-patch+json",
    "apply": "application/apply-patch+yaml", "strategic": "application/strategic-merge-patch+json",
}  # fmt: skip


class ApiError(Exception):
    """The API server answered with an error status: its code, reason and message."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(f"{code} {reason}: {message}")
        self.code, self.reason, self.message = code, reason, message


@dataclass(frozen=True)
class ApiResponse:
    code: int
    body: Any
    warnings: tuple[str, ...] = ()


def resource_path(resource: str, namespace: str | None = None, name: str | None = None) -> str:
    """Return the URL path of a collection, of an object, or of an object's subresource (with `resource` such as `pods/status`)."""
    plural, _, subresource = resource.partition("/")
    parts = [API_PATHS.get(plural, "/api/v1")]
    parts += ["namespaces", namespace] if namespace else []
    parts += [plural, name or "", subresource]
    return "/".join(part for part in parts if part)


@dataclass
class KubeApi:
    """A Kubernetes API client with one connection pool. Each method raises ApiError if the API server answers with an error."""

    endpoint: Endpoint
    token: str | None = None
    """Token of the user; None means the administrator's token."""
    pool: urllib3.PoolManager = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.pool = urllib3.PoolManager(ca_certs=str(self.endpoint.ca), maxsize=32, retries=False)

    def request(self, method: str, path: str, body: Any = None, *, patch_type: str = "merge", **query: str) -> ApiResponse:
        """Send one request."""
        content_type = PATCH_CONTENT_TYPES[patch_type] if method == "PATCH" else "application/json"
        response = self.pool.request(
            method, self._url(path, query), body=None if body is None else json.dumps(body).encode(), timeout=30,
            headers={"Authorization": f"Bearer {self.token or self.endpoint.token}", "Content-Type": content_type},
        )  # fmt: skip
        response_body = json.loads(response.data) if response.data[:1] in (b"{", b"[") else response.data.decode(errors="replace")
        if response.status >= 400:
            status = response_body if isinstance(response_body, dict) else {}
            raise ApiError(response.status, status.get("reason", ""), status.get("message", str(response_body)[:300]))
        return ApiResponse(response.status, response_body, tuple(response.headers.getlist("Warning")))

    def get(self, resource: str, namespace: str | None, name: str) -> Object:
        return dict(self.request("GET", resource_path(resource, namespace, name)).body)

    def find(self, resource: str, namespace: str | None, name: str) -> Object | None:
        """Return the object, or None if the object does not exist."""
        try:
            return self.get(resource, namespace, name)
        except ApiError as error:
            if error.code == 404:
                return None
            raise

    def list(self, resource: str, namespace: str | None = None, *, labels: str = "", fields: str = "") -> Objects:
        query = ({"labelSelector": labels} if labels else {}) | ({"fieldSelector": fields} if fields else {})
        return list(self.request("GET", resource_path(resource, namespace), **query).body["items"])

    def create(self, resource: str, namespace: str | None, body: Object, **query: str) -> Object:
        return dict(self.request("POST", resource_path(resource, namespace), body, **query).body)

    def patch(self, resource: str, namespace: str | None, name: str, body: Any, *, patch_type: str = "merge") -> Object:
        query = {"fieldManager": "test", "force": "true"} if patch_type == "apply" else {}
        return dict(self.request("PATCH", resource_path(resource, namespace, name), body, patch_type=patch_type, **query).body)

    def delete(self, resource: str, namespace: str | None, name: str, **options: Any) -> bool:
        """Delete an object. `options` are fields of DeleteOptions. Returns whether the object existed."""
        try:
            self.request("DELETE", resource_path(resource, namespace, name), options or None)
        except ApiError as error:
            if error.code == 404:
                return False
            raise
        return True

    def list_events(self, namespace: str, name: str) -> Objects:
        """Return the events about an object, oldest first."""
        events = self.list("events", namespace, fields=f"regarding.name={name}")
        return sorted(events, key=lambda event: (event.get("eventTime") or event.get("deprecatedFirstTimestamp") or ""))

    def wait(
        self, resource: str, namespace: str | None, name: str, until: Callable[[Object], bool], *,
        timeout: float = 30.0, description: str = "",
    ) -> Object:  # fmt: skip
        """Wait until `until(object)` is true, and return the object. Errors: AssertionError with the last status, after `timeout` seconds."""
        last_object: Object | None = None
        for last_object in self._follow_object(resource, namespace, name, time.monotonic() + timeout):
            if last_object is not None and until(last_object):
                return last_object
        status = dict((last_object or {}).get("status") or {})
        status.pop("resolved", None)
        shown_status = json.dumps(status if last_object else None, indent=1)[:4000]
        raise AssertionError(f"{resource} {namespace}/{name} was not {description or 'in the expected state'} within {timeout:.0f} s: {shown_status}")

    def wait_gone(self, resource: str, namespace: str | None, name: str, *, timeout: float = 30.0) -> None:
        """Wait until the object does not exist. Errors: AssertionError after `timeout` seconds."""
        for current_object in self._follow_object(resource, namespace, name, time.monotonic() + timeout):
            if current_object is None:
                return
        raise AssertionError(f"{resource} {namespace}/{name} still exists after {timeout:.0f} s")

    def wait_list(
        self, resource: str, namespace: str | None, until: Callable[[Objects], bool], *,
        labels: str = "", timeout: float = 30.0,
    ) -> Objects:  # fmt: skip
        """Wait until `until(objects)` is true for the objects of a collection, and return them. Errors: AssertionError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            response = self.request("GET", resource_path(resource, namespace), **({"labelSelector": labels} if labels else {}))
            items = list(response.body["items"])
            if until(items):
                return items
            query = {"resourceVersion": response.body["metadata"]["resourceVersion"], "timeoutSeconds": "5"}
            if labels:
                query["labelSelector"] = labels
            for _ in self._watch(resource_path(resource, namespace), query, deadline):
                break
            if time.monotonic() > deadline:
                object_names = [item["metadata"]["name"] for item in items]
                raise AssertionError(f"{resource} in {namespace} were not in the expected state within {timeout:.0f} s: {object_names}")

    def _follow_object(self, resource: str, namespace: str | None, name: str, deadline: float) -> Iterator[Object | None]:
        """Yield the object now and after each change, until the deadline. Yields None while the object does not exist."""
        path, fields = resource_path(resource, namespace), f"metadata.name={name}"
        while time.monotonic() < deadline:
            collection = self.request("GET", path, fieldSelector=fields).body
            yield next(iter(collection["items"]), None)
            query = {"fieldSelector": fields, "resourceVersion": collection["metadata"]["resourceVersion"]}
            for event in self._watch(path, query, deadline):
                if event["type"] == "ERROR":
                    break
                yield None if event["type"] == "DELETED" else event["object"]

    def _watch(self, path: str, query: dict[str, str], deadline: float) -> Iterator[Object]:
        seconds_left = max(1, min(int(deadline - time.monotonic()) + 1, 60))
        url = self._url(path, {"watch": "true", "timeoutSeconds": str(seconds_left)} | query)
        headers = {"Authorization": f"Bearer {self.token or self.endpoint.token}"}
        response = self.pool.request("GET", url, headers=headers, preload_content=False, timeout=seconds_left + 10)
        incomplete_line = b""
        try:
            if response.status >= 400:
                return
            for chunk in response.stream(65536):
                *lines, incomplete_line = (incomplete_line + chunk).split(b"\n")
                yield from (json.loads(line) for line in lines)
        finally:
            with contextlib.suppress(Exception):  # closing may fail in the middle of a stream; the connection is not used again
                response.close()

    def _url(self, path: str, query: dict[str, str]) -> str:
        return self.endpoint.server + path + (f"?{urlencode(query)}" if query else "")


def find_condition(body: Object, condition_type: str) -> Object:
    """Return the object's condition of this type, or an empty dict if the object has no such condition."""
    conditions = (body.get("status") or {}).get("conditions") or []
    return next((dict(condition) for condition in conditions if condition["type"] == condition_type), {})


def condition_is_true(body: Object, condition_type: str) -> bool:
    """Whether the object has a condition of this type with the status True."""
    return find_condition(body, condition_type).get("status") == "True"
