"""The seam to kopf: it watches, we remember and queue. Nothing else happens in a handler.

Only `on.login`, `on.startup` and `on.event` are used: no finalizers, no annotations, no state of kopf's on any object.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import aiohttp
import kopf
from finetune_api.names import GROUP, MANAGER, PLURAL, VERSION, Label

from finetune_operator.cache import Cache, Seen
from finetune_operator.kube import PAGE, Kube
from finetune_operator.objects import Object
from finetune_operator.settings import OperatorConfig
from finetune_operator.stateless import NoDiffBase, NoProgress
from finetune_operator.views import read_finetunejob, read_job, read_pod
from finetune_operator.watches import Watches
from finetune_operator.workqueue import Key, WorkQueue

SELECTOR = f"{Label.MANAGED_BY}={MANAGER}"
"""Children are watched by this label: the pods of the rest of the cluster never travel."""
LOGIN_PERIOD = timedelta(minutes=10)
"""kopf asks for credentials again after this: tokens rotate."""
DELETED = "DELETED"
WATCH_SECONDS = 60
"""How long one watch lasts before it is begun again where it stopped."""
SILENCE_SECONDS = 75
"""A watch that the server did not end by then is dead: the connection is left."""
NEVER = 10 * 365 * 86400.0


class EndlessBackoff:
    """Pauses between tries of a watch, in seconds: for ever, since an API server may be upgraded for an hour.

    A class, because kopf would share and exhaust a generator.
    """

    def __iter__(self) -> Iterator[float]:
        """1, 1, 2, 3, 5, ... 30, 30, ..."""
        return itertools.chain((1, 1, 2, 3, 5, 8, 13, 21), itertools.repeat(30))


def settings(config: OperatorConfig) -> kopf.OperatorSettings:
    """kopf's settings: watching with selectors, and nothing written by itself."""
    result = kopf.OperatorSettings()
    result.persistence.diffbase_storage = NoDiffBase()
    result.persistence.progress_storage = NoProgress()
    result.posting.enabled = False
    result.peering.standalone = True
    result.scanning.disabled = True
    result.networking.request_timeout = config.api.timeout_seconds
    result.networking.connect_timeout = 5
    result.networking.error_backoffs = EndlessBackoff()
    result.networking.enforce_retry_after = True
    result.process.ultimate_exiting_timeout = 25
    result.watching.chunk_size = PAGE
    result.watching.server_timeout = WATCH_SECONDS
    result.watching.client_timeout = SILENCE_SECONDS
    # kopf's own guard against silence cancels whatever the watching task does at that moment; if that is not the reading, the
    # watch ends for good and nobody is told.
    result.watching.inactivity_timeout = NEVER
    result.watching.label_selectors["batch", "v1", "jobs"] = SELECTOR
    result.watching.label_selectors["", "v1", "pods"] = SELECTOR
    return result


def register(kube: Kube, cache: Cache, queue: WorkQueue, watches: Watches) -> kopf.OperatorRegistry:
    """Handlers that fill the cache and the queue; `watches` sees every request that kopf makes."""
    registry = kopf.OperatorRegistry()

    def look(seen: Seen | None) -> None:
        if seen is None or not seen.news:
            return
        if seen.new:
            queue.hurry(seen.key)
        else:
            queue.add(seen.key)

    @kopf.on.login(registry=registry)
    async def login(**_: Any) -> kopf.AiohttpSession:
        return Connection(await credentials(kube), watches)

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)
    async def finetunejob(type: str | None, body: kopf.Body, **_: Any) -> None:
        look(take_finetunejob(cache, type, dict(body)))

    @kopf.on.event("batch", "v1", "jobs", registry=registry)
    async def job(type: str | None, body: kopf.Body, **_: Any) -> None:
        look(take_job(cache, type, dict(body)))

    @kopf.on.event("", "v1", "pods", registry=registry)
    async def pod(type: str | None, body: kopf.Body, **_: Any) -> None:
        look(take_pod(cache, type, dict(body)))

    return registry


def take_finetunejob(cache: Cache, type_: str | None, body: Object) -> Seen:
    """Remember a FineTuneJob from an event or a list."""
    meta = body["metadata"]
    key = Key(meta["namespace"], meta["name"])
    if type_ == DELETED:
        cache.drop_finetunejob(key, meta["uid"])
        return Seen(key, news=True)
    if cache.knows(key, meta["uid"], str(meta.get("resourceVersion", ""))):
        return Seen(key, news=False)
    return cache.put_finetunejob(read_finetunejob(body))


def take_job(cache: Cache, type_: str | None, body: Object) -> Seen | None:
    """Remember a Job; None if it is not one of ours."""
    view = read_job(body)
    if view is None:
        return None
    return Seen(cache.drop_job(view), news=True) if type_ == DELETED else cache.put_job(view)


def take_pod(cache: Cache, type_: str | None, body: Object) -> Seen | None:
    """Remember a pod; None if it is not one of ours."""
    view = read_pod(body)
    if view is None:
        return None
    return Seen(cache.drop_pod(view), news=True) if type_ == DELETED else cache.put_pod(view)


class Connection(kopf.AiohttpSession):
    """kopf's sessions, made here so that their requests can be seen.

    As of plain credentials each of kopf's contexts gets a session of its own, and closes it: with a common one the watches that
    are still there when the first context is closed would wait for other credentials for ever, and the process would not end.
    Two are the same if they were made of the same credentials.
    """

    _made_of: tuple[kopf.ConnectionInfo, Watches]

    def __init__(self, info: kopf.ConnectionInfo, watches: Watches) -> None:
        object.__setattr__(self, "_made_of", (info, watches))  # the base class is frozen
        super().__init__(server=info.server, expiration=info.expiration, aiohttp_session=cast("aiohttp.ClientSession", None))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Connection) and other._made_of[0] == self._made_of[0]

    def __hash__(self) -> int:
        return hash(self.server)

    @property
    def aiohttp_session(self) -> aiohttp.ClientSession:
        """A new session, as kopf itself would make it."""
        info, watches = self._made_of
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=info.as_ssl_context()),
            headers=info.as_http_headers(),
            trust_env=info.trust_env,
            trace_configs=[watches.trace()],
        )

    @aiohttp_session.setter
    def aiohttp_session(self, _: aiohttp.ClientSession) -> None:
        """What the base class is given: none is kept."""


async def credentials(kube: Kube) -> kopf.ConnectionInfo:
    """What kopf needs to connect as we do."""
    configuration = kube.configuration
    bearer = (await configuration.auth_settings()).get("BearerToken")
    scheme, _, token = str(bearer["value"]).rpartition(" ") if bearer else ("", "", "")
    return kopf.ConnectionInfo(
        server=configuration.host,
        ca_path=configuration.ssl_ca_cert,
        ca_data=configuration.ca_cert_data,
        insecure=not configuration.verify_ssl,
        certificate_path=configuration.cert_file,
        private_key_path=configuration.key_file,
        scheme=scheme or None,
        token=token or None,
        expiration=datetime.now(UTC) + LOGIN_PERIOD if token else None,
    )
