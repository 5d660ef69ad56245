"""The API server, as the operator sees it: plain dicts in and out, typed errors, a deadline on every call.

Built on the official client's asynchronous half for what is hard to get right (kubeconfig, tokens that rotate, TLS,
proxies), and on nothing of its generated models: a typed read of an object from a newer server loses fields.

What may be repeated is repeated here and nowhere else: reads, writes that carry a resourceVersion and deletes that carry a
uid. A create is never repeated blindly; when its outcome is unknown the caller reads by name.
"""

from __future__ import annotations

import asyncio
import json
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

from finetune_operator.objects import LEASE, Kind, Object
from finetune_operator.settings import ApiSettings

logger = logging.getLogger(__name__)

USER_AGENT = names.MANAGER
TRIES = 5
"""Tries of a request that may be repeated, the first included."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
MAX_MESSAGE = 2048
"""Characters kept of the server's words: a refused Job comes back whole in them."""
PAGE = 200
"""Objects in one page of a list: some megabytes, which hold up the event loop for as long as they take to parse."""
CLOCK_PERIOD = 10.0
"""Seconds between two looks at the server's clock."""
CLOCK_TOLERANCE = 2.0
"""Seconds by which the two clocks may differ before the server's is preferred: its header has whole seconds."""


class KubeError(Exception):
    """The API server refused, or could not be asked. `code` is the HTTP status, 0 without an answer."""

    def __init__(self, verb: str, kind: Kind, name: str, code: int, reason: str, message: str):
        super().__init__(f"{verb} {kind.plural} {name}: {code} {reason}: {message}")
        self.verb, self.kind, self.name, self.code, self.reason, self.message = verb, kind, name, code, reason, message
        self.retry_after: float | None = None
        self.object_missing = False
        """The server knows the kind and says that this very object is not there."""


class NotFound(KubeError):
    """404."""


class AlreadyExists(KubeError):
    """409 on a create: the name is taken."""


class Conflict(KubeError):
    """409 otherwise: what was read is no longer what is there, or the uid is another."""


class Invalid(KubeError):
    """400 and 422: the object is not what the server accepts."""


class Forbidden(KubeError):
    """403: no permission, a quota, or an admission policy; the message says which."""


class NamespaceGoing(KubeError):
    """The namespace is being deleted, or is gone: nothing can be created in it any more."""


class Unavailable(KubeError):
    """429, 5xx, or no answer to something that may be repeated."""


class OutcomeUnknown(KubeError):
    """A create was sent and no answer came: it may or may not have happened."""


@dataclass(frozen=True)
class Created:
    """An object that was created, and what admission warned of."""

    body: Object
    warnings: tuple[str, ...] = ()


class Listing(NamedTuple):
    """A list, or a page of it, and the version of the world it shows."""

    items: list[Object]
    version: int


@dataclass
class ServerClock:
    """Now, as the API server sees it: deadlines are computed from its times and must not suffer from ours."""

    offset: timedelta = timedelta()
    checked: float = field(default=float("-inf"))

    def now(self) -> datetime:
        """Current time, UTC."""
        return datetime.now(UTC) + self.offset

    def learn(self, header: str | None, monotonic: float) -> None:
        """Compare with the `Date` header of an answer, at most every ten seconds."""
        if not header or monotonic - self.checked < CLOCK_PERIOD:
            return
        self.checked = monotonic
        try:
            difference = parsedate_to_datetime(header) - datetime.now(UTC)
        except (TypeError, ValueError):
            return
        small = abs(difference.total_seconds()) <= CLOCK_TOLERANCE
        self.offset = timedelta() if small else difference


Watcher = Callable[[str, str, int, float], None]
"""Told about every request: verb, plural, status code (0: no answer), seconds."""


class Kube:
    """A connection to one API server. Create with `connect`, end with `close`."""

    def __init__(self, configuration: Configuration, settings: ApiSettings, watcher: Watcher | None = None):
        configuration.connection_pool_maxsize = settings.connections
        configuration.retries = None
        # The environment is read once, here: the client would read it, and ~/.netrc in a thread, for every request.
        configuration.client_session_kwargs = {"trust_env": False}
        configuration.proxy = configuration.proxy or _proxy(configuration.host)
        self.configuration = configuration
        self.clock = ServerClock()
        self._rest = RESTClientObject(configuration)
        self._timeout = settings.timeout_seconds
        self._watcher = watcher or (lambda verb, plural, code, seconds: None)
        self.guard: Callable[[], None] = lambda: None
        """Called before every write but the Lease's own; raises if this process may no longer write."""

    @classmethod
    async def connect(
        cls, settings: ApiSettings, watcher: Watcher | None = None, *, kubeconfig: Path | None = None
    ) -> Kube:
        """Connect as `kubeconfig` says, else as the pod's ServiceAccount, else as $KUBECONFIG or ~/.kube/config says.

        Errors: kubernetes.aio.config.ConfigException if there is neither.
        """
        configuration = Configuration()
        try:
            if kubeconfig is not None:
                raise kube_config.ConfigException("a kubeconfig was given")
            kube_config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call] # untyped upstream
        except kube_config.ConfigException:
            file = str(kubeconfig) if kubeconfig else None
            await kube_config.load_kube_config(config_file=file, client_configuration=configuration)  # type: ignore[no-untyped-call] # untyped upstream
        return cls(configuration, settings, watcher)

    async def close(self) -> None:
        """Close all connections."""
        await self._rest.close()

    async def discovered(self, kind: Kind) -> bool:
        """Whether the server's own directory names this kind of a group. A definition that is new is served some moments before."""
        group = kind.api_version.partition("/")[0]
        groups = (await self._repeat("get", kind, "", "GET", "/apis")).body.get("groups") or []
        if group not in [one.get("name") for one in groups]:
            return False
        try:
            found = (await self._repeat("get", kind, "", "GET", f"/apis/{kind.api_version}")).body.get("resources") or []
        except NotFound:
            return False
        return kind.plural in [one.get("name") for one in found]

    async def get(self, kind: Kind, namespace: str, name: str) -> Object:
        """Read one object. Errors: NotFound, Unavailable, ..."""
        return (await self._repeat("get", kind, name, "GET", kind.path(namespace, name))).body

    async def list(self, kind: Kind, namespace: str | None = None, *, labels: str = "", fields: str = "") -> Listing:
        """All objects of a kind, of one namespace or of the cluster."""
        items: list[Object] = []
        version = 0
        async for page in self.pages(kind, namespace, labels=labels, fields=fields):
            items += page.items
            version = page.version
        return Listing(items, version)

    async def pages(
        self, kind: Kind, namespace: str | None = None, *, labels: str = "", fields: str = ""
    ) -> AsyncIterator[Listing]:
        """The same in pages, for those who need not hold all of them; every page shows the same version of the world."""
        query = {"limit": str(PAGE)} | ({"labelSelector": labels} if labels else {})
        query |= {"fieldSelector": fields} if fields else {}
        while True:
            page = (await self._repeat("list", kind, "", "GET", kind.path(namespace), query=query)).body
            meta = page.get("metadata") or {}
            version = str(meta.get("resourceVersion", ""))
            yield Listing(page.get("items") or [], int(version) if version.isdigit() else 0)
            if not meta.get("continue"):
                return
            query["continue"] = meta["continue"]

    async def create(self, kind: Kind, namespace: str, body: Object) -> Created:
        """Create once.

        Errors: AlreadyExists, Forbidden, Invalid, NamespaceGoing, OutcomeUnknown (read by name then), Unavailable.
        """
        name = body["metadata"]["name"]
        query = {"fieldManager": names.MANAGER}
        return await self._once("create", kind, name, "POST", kind.path(namespace), body=body, query=query)

    async def replace(self, kind: Kind, namespace: str, body: Object, *, sub: str | None = None) -> Object:
        """Replace an object or its `sub`resource; `body` carries the resourceVersion it was read with.

        Errors: Conflict if it changed since, NotFound, ...
        """
        name = body["metadata"]["name"]
        path = kind.path(namespace, name, sub)
        query = {"fieldManager": names.MANAGER}
        return (await self._repeat("update", kind, name, "PUT", path, body=body, query=query)).body

    async def patch(self, kind: Kind, namespace: str, name: str, body: Object, *, sub: str | None = None) -> Object:
        """Merge-patch an object or its `sub`resource, once: it carries no precondition."""
        return (await self._once("patch", kind, name, "PATCH", kind.path(namespace, name, sub), body=body)).body

    async def delete(
        self, kind: Kind, namespace: str, name: str, *, uid: str, foreground: bool = True, grace: int | None = None
    ) -> bool:
        """Delete the object of that uid; True if it was there. `grace` is in seconds.

        A namesake with another uid stays untouched and counts as not there.
        """
        body: Object = {
            "preconditions": {"uid": uid},
            "propagationPolicy": "Foreground" if foreground else "Background",
        }
        if grace is not None:
            body["gracePeriodSeconds"] = grace
        try:
            await self._repeat("delete", kind, name, "DELETE", kind.path(namespace, name), body=body)
        except (NotFound, Conflict):
            return False
        return True

    async def _repeat(
        self, verb: str, kind: Kind, name: str, method: str, path: str, *,
        body: Object | None = None, query: Mapping[str, str] | None = None,
    ) -> Created:  # fmt: skip
        """Send something that may be repeated until it is answered, within the deadline."""
        pause = FIRST_PAUSE
        for left in reversed(range(TRIES)):
            try:
                return await self._once(verb, kind, name, method, path, body=body, query=query)
            except (Unavailable, OutcomeUnknown) as error:
                if not left:
                    raise
                wait = error.retry_after if error.retry_after is not None else pause * random.uniform(0.5, 1.5)  # noqa: S311 -- jitter
                await asyncio.sleep(min(wait, self._timeout))
                pause = min(pause * 3, LONGEST_PAUSE)
        raise AssertionError("unreachable: the last try returns or raises")

    async def _once(
        self, verb: str, kind: Kind, name: str, method: str, path: str, *,
        body: Object | None = None, query: Mapping[str, str] | None = None,
    ) -> Created:  # fmt: skip
        """Send one request."""
        if method != "GET" and kind is not LEASE:
            self.guard()
        url = self.configuration.host + path + (f"?{urlencode(query)}" if query else "")
        loop = asyncio.get_running_loop()
        started, code = loop.time(), 0
        try:
            async with asyncio.timeout(self._timeout):
                response = await self._rest.request(  # type: ignore[no-untyped-call] # untyped upstream
                    method, url, headers=await self._headers(method), body=body,
                    _request_timeout=aiohttp.ClientTimeout(total=self._timeout),
                )  # fmt: skip
                code = response.status
                data = await response.read()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise _no_answer(verb, kind, name, error) from error
        finally:
            self._watcher(verb, kind.plural, code, loop.time() - started)
        self.clock.learn(response.headers.get("Date"), loop.time())
        value = _json(data)
        if code >= 400:
            raise _refusal(verb, kind, name, code, value, response.headers)
        return Created(value, tuple(_warning(text) for text in response.headers.getall("Warning", ())))

    async def _headers(self, method: str) -> dict[str, str]:
        headers = {"Accept": "application/json", "User-Agent": USER_AGENT}
        if method != "GET":
            patch = method == "PATCH"
            headers["Content-Type"] = "application/merge-patch+json" if patch else "application/json"
        bearer = (await self.configuration.auth_settings()).get("BearerToken")
        if bearer:
            headers["Authorization"] = str(bearer["value"])
        return headers


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for this address (HTTPS_PROXY, NO_PROXY and their like)."""
    parts = urlsplit(url)
    if not parts.hostname or proxy_bypass(parts.hostname):
        return None
    return getproxies().get(parts.scheme)


def _json(data: bytes) -> Object:
    try:
        value = json.loads(data)
    except ValueError:
        return {"message": data[:500].decode(errors="replace")}
    return value if isinstance(value, dict) else {"message": str(value)[:500]}


def _warning(header: str) -> str:
    """Text of an RFC 7234 warning header: `299 - "text"`."""
    start, end = header.find('"'), header.rfind('"')
    return header[start + 1 : end].replace('\\"', '"') if 0 <= start < end else header


def _no_answer(verb: str, kind: Kind, name: str, error: Exception) -> KubeError:
    message = str(error) or type(error).__name__
    if isinstance(error, aiohttp.ClientConnectorError) or verb != "create":
        return Unavailable(verb, kind, name, 0, "NoAnswer", message)
    return OutcomeUnknown(verb, kind, name, 0, "NoAnswer", message)


def _refusal(verb: str, kind: Kind, name: str, code: int, status: Object, headers: Mapping[str, str]) -> KubeError:
    reason, message = str(status.get("reason") or ""), str(status.get("message") or "")[:MAX_MESSAGE]
    error: type[KubeError] = KubeError
    match code:
        case 403 | 404 if _namespace_goes(status):
            error = NamespaceGoing
        case 404:
            error = NotFound
        case 409:
            error = AlreadyExists if reason == "AlreadyExists" else Conflict
        case 400 | 422:
            error = Invalid
        case 403:
            error = Forbidden
        case 429:
            error = Unavailable
        case _ if code >= 500:
            # A 5xx on a create may come from a proxy after the server did the work.
            error = OutcomeUnknown if verb == "create" else Unavailable
    refusal = error(verb, kind, name, code, reason, message)
    refusal.object_missing = code == 404 and bool(name) and (status.get("details") or {}).get("name") == name
    retry_after = headers.get("Retry-After", "")
    refusal.retry_after = float(retry_after) if retry_after.isdigit() else None
    return refusal


def _namespace_goes(status: Object) -> bool:
    """Whether a refusal is for want of a namespace: it is being deleted, or a create found none."""
    details = status.get("details") or {}
    causes = [cause.get("reason") for cause in details.get("causes") or []]
    return "NamespaceTerminating" in causes or details.get("kind") == "namespaces"
