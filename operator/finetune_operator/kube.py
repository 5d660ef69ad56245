"""Client of the Kubernetes API server. Objects are plain dicts, errors are typed, and each request has a timeout.

The asyncio part of the official client handles kubeconfig, rotating tokens, TLS and proxies. The client's generated models are not used,
because these models drop fields that a newer server sends.

Only this module retries requests: reads, writes that contain a resourceVersion, and deletes that contain a uid. A create is not retried. If the outcome of
a create is unknown, the caller reads the object by name.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlencode, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from finetune_api import names
from kubernetes.aio import config as kube_config
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.client.rest import RESTClientObject
from pydantic_core import from_json

from finetune_operator.objects import LEASE, Kind, Object
from finetune_operator.settings import ApiSettings

logger = logging.getLogger(__name__)

USER_AGENT = names.MANAGER_NAME
MAX_TRIES = 5
"""Maximum number of tries of one request, including the first try."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 5.0
MAX_MESSAGE_CHARACTERS = 2048
"""Maximum length of an error message. Longer messages are cut, because a message about a rejected Job contains the whole Job."""
PAGE_SIZE = 200
"""Objects per page of a list. A page of this size has a few megabytes. Parsing a larger page would block the event loop longer."""
CLOCK_PERIOD_SECONDS = 10.0
"""Shortest time in seconds between two comparisons of the local clock with the server's clock."""
CLOCK_TOLERANCE_SECONDS = 2.0
"""Differences between the local clock and the server's clock are ignored up to this size, because the `Date` header has whole seconds."""


class KubeError(Exception):
    """A request failed. `code` is the HTTP status, or 0 if there was no answer."""

    def __init__(self, verb: str, kind: Kind, name: str, code: int, reason: str, message: str):
        super().__init__(f"{verb} {kind.plural} {name}: {code} {reason}: {message}")
        self.verb, self.kind, self.name, self.code, self.reason, self.message = verb, kind, name, code, reason, message
        self.retry_after: float | None = None
        self.is_object_missing = False
        """Whether this is a 404 about the object itself. Another 404 may mean that its kind or its namespace does not exist."""


class NotFound(KubeError):
    """404: the object, its kind or its namespace does not exist."""


class AlreadyExists(KubeError):
    """409 on a create: an object with this name already exists."""


class Conflict(KubeError):
    """409 on a request other than a create: the object has changed since it was read, or it has another uid."""


class Invalid(KubeError):
    """400 or 422: the server does not accept the object."""


class Forbidden(KubeError):
    """403: a permission is missing, or a quota or an admission policy refuses the request. The message names the cause."""


class NamespaceTerminating(KubeError):
    """The namespace is being deleted or does not exist, so no object can be created in it."""


class ContinueTokenExpired(KubeError):
    """410: the continue token of a list is too old."""


class Unavailable(KubeError):
    """429, 5xx, or no answer to a request that may be retried."""


class OutcomeUnknown(KubeError):
    """The server did not answer a create request, so it is unknown whether the object exists."""


@dataclass(frozen=True)
class ApiResponse:
    """The object in a response, and the API server's warnings about it."""

    body: Object
    warnings: tuple[str, ...] = ()


class ObjectList(NamedTuple):
    """A list of objects, or one page of such a list."""

    items: list[Object]
    version: int
    """resourceVersion of the list."""
    is_first_page: bool = True
    """Whether this page starts a list. If a later page starts the list again, the caller must discard the earlier pages."""


@dataclass
class ServerClock:
    """The API server's clock. Deadlines are computed from times that the server sets, so they must not be compared with the local clock."""

    clock_offset: timedelta = timedelta()
    compared_at: float = field(default=float("-inf"))

    def now(self) -> datetime:
        """Return the current time of the server in UTC."""
        return datetime.now(UTC) + self.clock_offset

    def update_offset(self, date_header: str | None, loop_time: float) -> None:
        """Compare the local clock with the `Date` header of a response, at most every `CLOCK_PERIOD_SECONDS`."""
        if not date_header or loop_time - self.compared_at < CLOCK_PERIOD_SECONDS:
            return
        self.compared_at = loop_time
        try:
            difference = parsedate_to_datetime(date_header) - datetime.now(UTC)
        except (TypeError, ValueError):
            return
        is_small = abs(difference.total_seconds()) <= CLOCK_TOLERANCE_SECONDS
        self.clock_offset = timedelta() if is_small else difference


RequestObserver = Callable[[str, str, int, float], None]
"""A function that is called after each request. Arguments: verb, plural, status code (0: no answer), duration in seconds."""


class KubeClient:
    """A client of one API server. Create it with `connect`, end it with `close`."""

    def __init__(self, configuration: Configuration, settings: ApiSettings, observer: RequestObserver | None = None):
        configuration.connection_pool_maxsize = settings.connections
        configuration.retries = None
        # The proxy variables are read only once, here. With `trust_env`, the client would read these variables and ~/.netrc for each request.
        configuration.client_session_kwargs = {"trust_env": False}
        configuration.proxy = configuration.proxy or _find_proxy(configuration.host)
        self.configuration = configuration
        self.clock = ServerClock()
        self._rest = RESTClientObject(configuration)
        self._timeout = settings.timeout_seconds
        self._observe_request = observer or (lambda verb, plural, code, seconds: None)
        self.ensure_may_write: Callable[[], None] = lambda: None
        """Function that is called before each write, except writes of Leases. The function raises an error if this replica may no longer write."""

    @classmethod
    async def connect(
        cls, settings: ApiSettings, observer: RequestObserver | None = None, *, kubeconfig: Path | None = None
    ) -> KubeClient:
        """Connect with the first of these sources that exists: `kubeconfig`, the pod's ServiceAccount, $KUBECONFIG, ~/.kube/config.

        Errors: kubernetes.aio.config.ConfigException if no source exists.
        """
        configuration = Configuration()
        try:
            if kubeconfig is not None:
                raise kube_config.ConfigException("the caller named a kubeconfig")
            kube_config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call] # untyped upstream
        except kube_config.ConfigException:
            kubeconfig_path = str(kubeconfig) if kubeconfig else None
            await kube_config.load_kube_config(config_file=kubeconfig_path, client_configuration=configuration)  # type: ignore[no-untyped-call] # untyped upstream
        return cls(configuration, settings, observer)

    async def close(self) -> None:
        """Close all connections."""
        await self._rest.close()

    async def is_served(self, kind: Kind) -> bool:
        """Whether the discovery document lists this kind. A new CRD is listed shortly after its objects can be read."""
        api_group = kind.api_version.partition("/")[0]
        groups = (await self._send_with_retries("get", kind, "", "GET", "/apis")).body.get("groups") or []
        if api_group not in [group.get("name") for group in groups]:
            return False
        try:
            resources = (await self._send_with_retries("get", kind, "", "GET", f"/apis/{kind.api_version}")).body.get(
                "resources"
            ) or []
        except NotFound:
            return False
        return kind.plural in [resource.get("name") for resource in resources]

    async def get(self, kind: Kind, namespace: str, name: str) -> Object:
        """Read one object. Errors: NotFound, Unavailable, ..."""
        return (await self._send_with_retries("get", kind, name, "GET", kind.path(namespace, name))).body

    async def list(self, kind: Kind, namespace: str | None = None, *, label_selector: str = "", field_selector: str = "") -> ObjectList:
        """Return all objects of a kind in one namespace or in the whole cluster."""
        items: list[Object] = []
        resource_version = 0
        async for page in self.list_pages(kind, namespace, label_selector=label_selector, field_selector=field_selector):
            items = page.items if page.is_first_page else items + page.items
            resource_version = page.version
        return ObjectList(items, resource_version)

    async def list_pages(
        self, kind: Kind, namespace: str | None = None, *, label_selector: str = "", field_selector: str = ""
    ) -> AsyncIterator[ObjectList]:
        """Yield all objects page by page, so that the caller need not hold them all. All pages have the same resourceVersion.

        The server compacts its history every five minutes, so a continue token can expire between two pages. If a token has expired, the list starts again,
        as one page that contains all objects, like in client-go's pager. A single page needs no token, so no token can expire again.
        """
        query = {"limit": str(PAGE_SIZE)} | ({"labelSelector": label_selector} if label_selector else {})
        query |= {"fieldSelector": field_selector} if field_selector else {}
        while True:
            try:
                page = (await self._send_with_retries("list", kind, "", "GET", kind.path(namespace), query=query)).body
            except ContinueTokenExpired:
                if "continue" not in query:
                    raise
                del query["continue"], query["limit"]
                continue
            meta = page.get("metadata") or {}
            version = str(meta.get("resourceVersion", ""))
            yield ObjectList(page.get("items") or [], int(version) if version.isdigit() else 0, "continue" not in query)
            if not meta.get("continue"):
                return
            query["continue"] = meta["continue"]

    async def create(self, kind: Kind, namespace: str, body: Object) -> ApiResponse:
        """Create an object, without retries.

        Errors: AlreadyExists, Forbidden, Invalid, NamespaceTerminating, OutcomeUnknown (then read the object by name), Unavailable.
        """
        name = body["metadata"]["name"]
        query = {"fieldManager": names.MANAGER_NAME}
        return await self._send_once("create", kind, name, "POST", kind.path(namespace), body=body, query=query)

    async def replace(self, kind: Kind, namespace: str, body: Object, *, subresource: str | None = None) -> Object:
        """Replace an object or its `subresource`. `body` contains the resourceVersion with which the object was read.

        Errors: Conflict if the object has changed since that read, NotFound, ...
        """
        name = body["metadata"]["name"]
        path = kind.path(namespace, name, subresource)
        query = {"fieldManager": names.MANAGER_NAME}
        return (await self._send_with_retries("update", kind, name, "PUT", path, body=body, query=query)).body

    async def patch(
        self, kind: Kind, namespace: str, name: str, body: Object, *, subresource: str | None = None
    ) -> Object:
        """Merge-patch an object or its `subresource`. The request is not retried, because a patch has no precondition."""
        return (await self._send_once("patch", kind, name, "PATCH", kind.path(namespace, name, subresource), body=body)).body

    async def delete(
        self, kind: Kind, namespace: str, name: str, *, uid: str, foreground: bool = True, grace_seconds: int | None = None
    ) -> bool:
        """Delete the object with this name and uid. Returns False if no such object exists.

        `grace_seconds` is the termination grace period in seconds.
        """
        body: Object = {
            "preconditions": {"uid": uid},
            "propagationPolicy": "Foreground" if foreground else "Background",
        }
        if grace_seconds is not None:
            body["gracePeriodSeconds"] = grace_seconds
        try:
            await self._send_with_retries("delete", kind, name, "DELETE", kind.path(namespace, name), body=body)
        except (NotFound, Conflict):
            return False
        return True

    async def _send_with_retries(
        self, verb: str, kind: Kind, name: str, method: str, path: str, *,
        body: Object | None = None, query: Mapping[str, str] | None = None,
    ) -> ApiResponse:  # fmt: skip
        """Send a request up to `MAX_TRIES` times, with growing pauses, while the server is unavailable."""
        pause_seconds = FIRST_PAUSE_SECONDS
        for tries_left in reversed(range(MAX_TRIES)):
            try:
                return await self._send_once(verb, kind, name, method, path, body=body, query=query)
            except (Unavailable, OutcomeUnknown) as error:
                if not tries_left:
                    raise
                wait_seconds = error.retry_after if error.retry_after is not None else pause_seconds * random.uniform(0.5, 1.5)  # noqa: S311 -- jitter
                await asyncio.sleep(min(wait_seconds, self._timeout))
                pause_seconds = min(pause_seconds * 3, LONGEST_PAUSE_SECONDS)
        raise AssertionError("unreachable: the last iteration returns or raises")

    async def _send_once(
        self, verb: str, kind: Kind, name: str, method: str, path: str, *,
        body: Object | None = None, query: Mapping[str, str] | None = None,
    ) -> ApiResponse:  # fmt: skip
        """Send one request. Errors: KubeError if the status is 400 or higher, or if there is no answer."""
        if method != "GET" and kind is not LEASE:
            self.ensure_may_write()
        url = self.configuration.host + path + (f"?{urlencode(query)}" if query else "")
        loop = asyncio.get_running_loop()
        started_at, status_code = loop.time(), 0
        try:
            async with asyncio.timeout(self._timeout):
                response = await self._rest.request(  # type: ignore[no-untyped-call] # untyped upstream
                    method, url, headers=await self._build_headers(method), body=body,
                    _request_timeout=aiohttp.ClientTimeout(total=self._timeout),
                )  # fmt: skip
                status_code = response.status
                response_body = await response.read()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise _build_error_without_answer(verb, kind, name, error) from error
        finally:
            self._observe_request(verb, kind.plural, status_code, loop.time() - started_at)
        self.clock.update_offset(response.headers.get("Date"), loop.time())
        parsed_body = _parse_json(response_body)
        if status_code >= 400:
            raise _build_error_from_status(verb, kind, name, status_code, parsed_body, response.headers)
        return ApiResponse(parsed_body, tuple(_extract_warning_text(text) for text in response.headers.getall("Warning", ())))

    async def _build_headers(self, method: str) -> dict[str, str]:
        headers = {"Accept": "application/json", "User-Agent": USER_AGENT}
        if method != "GET":
            is_patch = method == "PATCH"
            headers["Content-Type"] = "application/merge-patch+json" if is_patch else "application/json"
        bearer_token = (await self.configuration.auth_settings()).get("BearerToken")
        if bearer_token:
            headers["Authorization"] = str(bearer_token["value"])
        return headers


def _find_proxy(url: str) -> str | None:
    """Return the proxy for this URL according to HTTPS_PROXY, NO_PROXY and similar environment variables."""
    url_parts = urlsplit(url)
    if not url_parts.hostname or proxy_bypass(url_parts.hostname):
        return None
    return getproxies().get(url_parts.scheme)


def _parse_json(response_body: bytes) -> Object:
    try:
        parsed_body = from_json(response_body)
    except ValueError:
        return {"message": response_body[:500].decode(errors="replace")}
    return parsed_body if isinstance(parsed_body, dict) else {"message": str(parsed_body)[:500]}


def _extract_warning_text(header: str) -> str:
    """Return the text of a warning header, which has the form `299 - "text"` (RFC 7234)."""
    start, end = header.find('"'), header.rfind('"')
    return header[start + 1 : end].replace('\\"', '"') if 0 <= start < end else header


def _build_error_without_answer(verb: str, kind: Kind, name: str, error: Exception) -> KubeError:
    message = str(error) or type(error).__name__
    if isinstance(error, aiohttp.ClientConnectorError) or verb != "create":
        return Unavailable(verb, kind, name, 0, "NoAnswer", message)
    return OutcomeUnknown(verb, kind, name, 0, "NoAnswer", message)


def _build_error_from_status(
    verb: str, kind: Kind, name: str, code: int, status: Object, headers: Mapping[str, str]
) -> KubeError:
    reason, message = str(status.get("reason") or ""), str(status.get("message") or "")[:MAX_MESSAGE_CHARACTERS]
    error_class: type[KubeError] = KubeError
    match code:
        case 403 | 404 if _is_namespace_terminating(status):
            error_class = NamespaceTerminating
        case 404:
            error_class = NotFound
        case 409:
            error_class = AlreadyExists if reason == "AlreadyExists" else Conflict
        case 400 | 422:
            error_class = Invalid
        case 403:
            error_class = Forbidden
        case 410:
            error_class = ContinueTokenExpired
        case 429:
            error_class = Unavailable
        case _ if code >= 500:
            # A proxy may answer with a 5xx although the server has created the object.
            error_class = OutcomeUnknown if verb == "create" else Unavailable
    kube_error = error_class(verb, kind, name, code, reason, message)
    kube_error.is_object_missing = code == 404 and bool(name) and (status.get("details") or {}).get("name") == name
    retry_after = headers.get("Retry-After", "")
    kube_error.retry_after = float(retry_after) if retry_after.isdigit() else None
    return kube_error


def _is_namespace_terminating(status: Object) -> bool:
    """Whether the request failed because its namespace is being deleted or does not exist."""
    details = status.get("details") or {}
    causes = [cause.get("reason") for cause in details.get("causes") or []]
    return "NamespaceTerminating" in causes or details.get("kind") == "namespaces"
