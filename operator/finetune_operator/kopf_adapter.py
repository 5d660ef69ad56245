"""Adapts kopf to this operator: its settings, state storages, HTTP session, retries, watches and log lines.

kopf lists and watches the resources and calls the handlers in `handlers.py`, as in any operator built with kopf. Each item below works
around a behaviour of kopf 1.45, and a test fails if the item is removed:

* `EndlessBackoff`: by default, kopf stops retrying a request after some time (https://github.com/nolar/kopf/pull/788).
* `NoDiffBaseStorage`, `NoProgressStorage`: kopf's default storages copy the whole object at each event
  (https://github.com/nolar/kopf/issues/702).
* `TracedSession`: all of kopf's contexts would share one custom HTTP session (https://github.com/nolar/kopf/pull/1230), and the first
  context that ends would close this session for all other contexts.
* `inactivity_timeout` (https://github.com/nolar/kopf/pull/1268) is disabled, because it can end a watch permanently;
  `WatchMonitor` detects stalled watches instead.
* `WatchStreams`: kopf does not close a watch stream if the stream's task is cancelled while the task hands over an event. Python then closes the
  stream and the generators inside it at the same time, which sometimes fails with a traceback at the end of the process.
* `watch_stream.py` handles changes of objects before kopf reads them, because kopf needs about 0.6 ms of CPU time for each event.
* `run` waits until the CRD is served, because with `scanning.disabled` kopf reads the API server's discovery document only once, at startup.
* `IDLE_WORKER_SECONDS`: by default, kopf keeps the last event of each object for 5 seconds, which needs much memory in a burst.
* `RetryLogFilter`: kopf logs each retry of a request as an error.
* `resync.py` compares full lists with the cache, because kopf does not report objects that were deleted between two lists.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import sys
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import kopf

from finetune_operator.kube import PAGE_SIZE, KubeClient, RequestObserver
from finetune_operator.objects import FINETUNEJOB, MANAGED_BY_SELECTOR
from finetune_operator.settings import OperatorConfig
from finetune_operator.watch_stream import ChangeHandler, build_response_class

LOGIN_PERIOD = timedelta(minutes=10)
"""After this time, kopf asks for new credentials, because tokens of ServiceAccounts rotate."""
WATCH_SECONDS = 60
"""Duration of one watch request (`timeoutSeconds`). After this time, kopf sends the next watch request, which continues after the last resourceVersion."""
WATCH_TIMEOUT_SECONDS = 75
"""Client-side timeout of one watch request. The client-side timeout is longer than `WATCH_SECONDS`, so it ends only dead connections."""
TEN_YEARS_SECONDS = 10 * 365 * 86400.0
SHUTDOWN_SECONDS = 25
"""Time limit for kopf's shutdown. The pod's termination grace period is 30 seconds."""
DISCOVERY_PERIOD_SECONDS = 0.2
IDLE_WORKER_SECONDS = 0.5
"""Seconds after which kopf ends the idle task of an object. The task holds the object's last event: about 70 KB for a Job or a pod.
In a burst of 1,000 jobs, the operator needed 226 MB with kopf's default of 5 seconds, and needs 153 MB with this value."""
STALLED_WATCH_SECONDS = 4.0 * WATCH_TIMEOUT_SECONDS
"""A watch counts as stalled after this many seconds without a new request. The longest pause of `EndlessBackoff` is much shorter."""
OTHER_RESOURCE_LABEL = "discovery"
"""Value of the metric label `resource` for requests to URLs other than the watched collections."""


class EndlessBackoff:
    """An infinite sequence of pauses between retries, in seconds.

    The API server may be unavailable for an hour during an upgrade. With kopf's default, the operator would end after eight retries.
    This is a class, not a generator, because kopf iterates over the same object for each request.
    """

    def __iter__(self) -> Iterator[float]:
        """Yield 1, 1, 2, 3, 5, 8, 13, 21 and then 30 without end."""
        return itertools.chain((1, 1, 2, 3, 5, 8, 13, 21), itertools.repeat(30))


class NoDiffBaseStorage(kopf.DiffBaseStorage):
    """Stores nothing. kopf's default storage keeps the last-handled state of each object.

    To keep this state, kopf makes a deep copy of the object at each event and computes the difference, which `on.event` handlers do not use. Each Job contains
    a run configuration of several kilobytes, so the copy took half of the time of an event.
    """

    def build(self, **_: Any) -> kopf.BodyEssence:
        return kopf.BodyEssence({})

    def fetch(self, **_: Any) -> kopf.BodyEssence | None:
        return None

    def store(self, **_: Any) -> None:
        pass


class NoProgressStorage(kopf.ProgressStorage):
    """Stores nothing. kopf's default storage keeps the progress of retried handlers, but kopf never retries `on.event` handlers."""

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        pass

    def purge(self, **_: Any) -> None:
        pass

    def touch(self, **_: Any) -> None:
        pass

    def clear(self, *, essence: kopf.BodyEssence) -> kopf.BodyEssence:
        return essence


def build_kopf_settings(config: OperatorConfig) -> kopf.OperatorSettings:
    """Return settings with which kopf lists and watches Jobs and pods by label and writes nothing to the cluster."""
    kopf_settings = kopf.OperatorSettings()
    kopf_settings.persistence.diffbase_storage = NoDiffBaseStorage()
    kopf_settings.persistence.progress_storage = NoProgressStorage()
    kopf_settings.posting.enabled = False
    kopf_settings.peering.standalone = True
    kopf_settings.scanning.disabled = True
    kopf_settings.networking.request_timeout = config.api.timeout_seconds
    kopf_settings.networking.connect_timeout = 5
    kopf_settings.networking.error_backoffs = EndlessBackoff()
    kopf_settings.networking.enforce_retry_after = True
    kopf_settings.process.ultimate_exiting_timeout = SHUTDOWN_SECONDS
    kopf_settings.queueing.idle_timeout = IDLE_WORKER_SECONDS
    kopf_settings.watching.chunk_size = PAGE_SIZE
    kopf_settings.watching.server_timeout = WATCH_SECONDS
    kopf_settings.watching.client_timeout = WATCH_TIMEOUT_SECONDS
    # The inactivity timeout can cancel the watching task at any await. If the task is just handing over an event, the watch ends
    # permanently and without an error. `client_timeout` ends dead connections instead.
    kopf_settings.watching.inactivity_timeout = TEN_YEARS_SECONDS
    kopf_settings.watching.label_selectors["batch", "v1", "jobs"] = MANAGED_BY_SELECTOR
    kopf_settings.watching.label_selectors["", "v1", "pods"] = MANAGED_BY_SELECTOR
    return kopf_settings


async def run(
    registry: kopf.OperatorRegistry,
    config: OperatorConfig,
    kube: KubeClient,
    monitor: WatchMonitor,
    is_stopping: Callable[[], bool],
) -> None:
    """Wait until the API server serves the custom resource, then run kopf until the process is asked to stop.

    With `scanning.disabled`, kopf reads the discovery document only once. If the document lacks the CRD at that time, kopf never watches FineTuneJobs.
    """
    while not (is_stopping() or await kube.is_served(FINETUNEJOB)):  # noqa: ASYNC110 -- the API server sends no event about its discovery document
        await asyncio.sleep(DISCOVERY_PERIOD_SECONDS)
    if is_stopping():
        return
    monitor.start()
    namespaces = list(config.namespaces)
    async with WatchStreams():
        await kopf.operator(
            registry=registry,
            settings=build_kopf_settings(config),
            standalone=True,
            clusterwide=not namespaces,
            namespaces=namespaces,
        )


class WatchStreams:
    """Closes kopf's watch streams at the end of an `async with` block.

    A watch stream is the async generator `infinite_watch`, which contains the async generator `streaming_block`. When the event loop ends, it
    closes all open async generators concurrently (`shutdown_asyncgens`). If the inner generator is closed first, the outer one fails with
    "generator didn't stop after athrow()". This class closes only the outer generator, which then closes the inner one.
    """

    GENERATOR_NAME = "infinite_watch"

    def __init__(self) -> None:
        self._streams: weakref.WeakSet[AsyncGenerator[Any, Any]] = weakref.WeakSet()

    async def __aenter__(self) -> None:
        self._hooks = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(firstiter=self._on_first_iteration)

    async def __aexit__(self, *_: object) -> None:
        sys.set_asyncgen_hooks(firstiter=self._hooks.firstiter)
        for stream in list(self._streams):
            await stream.aclose()

    def _on_first_iteration(self, generator: AsyncGenerator[Any, Any]) -> None:
        """Record the generator if it is a watch stream, then call the event loop's own hook. Python calls this hook for each new async generator."""
        if getattr(generator, "__name__", "") == self.GENERATOR_NAME:
            self._streams.add(generator)
        if self._hooks.firstiter is not None:
            self._hooks.firstiter(generator)


async def login(kube: KubeClient, monitor: WatchMonitor, handlers: Mapping[str, ChangeHandler]) -> TracedSession:
    """Return credentials for kopf, from the operator's own API client. `handlers`: as in `watch_stream.WatchResponse`."""
    configuration = kube.configuration
    bearer_token = (await configuration.auth_settings()).get("BearerToken")
    scheme, _, token = str(bearer_token["value"]).rpartition(" ") if bearer_token else ("", "", "")
    connection_info = kopf.ConnectionInfo(
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
    return TracedSession(connection_info, monitor, handlers)


class TracedSession(kopf.AiohttpSession):
    """Credentials that create a new HTTP session for each of kopf's contexts. `monitor` traces the requests of each session.

    `handlers` handle the changes in kopf's watches. When a context ends, kopf closes its session. With `kopf.AiohttpSession`, all contexts would share
    one session: after the end of the first context, the other watches would wait for new credentials forever, and the process would not exit.

    Two objects of this class are equal if their credentials are equal. Without this rule, kopf would retry credentials that the server has rejected.
    """

    _source: tuple[kopf.ConnectionInfo, WatchMonitor, Mapping[str, ChangeHandler]]

    def __init__(self, connection_info: kopf.ConnectionInfo, monitor: WatchMonitor, handlers: Mapping[str, ChangeHandler]) -> None:
        object.__setattr__(self, "_source", (connection_info, monitor, handlers))  # the base class is a frozen dataclass
        super().__init__(
            server=connection_info.server, expiration=connection_info.expiration, aiohttp_session=cast("aiohttp.ClientSession", None)
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TracedSession) and other._source[0] == self._source[0]

    def __hash__(self) -> int:
        return hash(self.server)

    @property
    def aiohttp_session(self) -> aiohttp.ClientSession:
        """Create a session with the arguments that kopf itself uses for a `ConnectionInfo`."""
        connection_info, monitor, handlers = self._source
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=connection_info.as_ssl_context()),
            headers=connection_info.as_http_headers(),
            trust_env=connection_info.trust_env,
            trace_configs=[monitor.build_trace_config()],
            response_class=build_response_class(handlers),
        )

    @aiohttp_session.setter
    def aiohttp_session(self, _: aiohttp.ClientSession) -> None:
        """Ignore the assigned value. This setter exists because the constructor of the base class assigns a session."""


class WatchMonitor:
    """Counts kopf's requests and detects stalled watches of the given collections (URL paths).

    The API server ends each watch request after `WATCH_SECONDS`, and kopf then sends the next request. If kopf sends no new request, the
    watch is stalled and its events are lost. Without this class, a stalled watch could remain unnoticed: the periodic full lists still deliver the
    changes, but later.
    """

    def __init__(self, collection_paths: Iterable[str], observer: RequestObserver):
        self._observe_request = observer
        self._collection_paths = tuple(collection_paths)
        self._last_started_at: dict[str, float] = {}
        """Event loop time of the last successful watch request, by path."""

    def start(self) -> None:
        """Start to detect stalled watches. Call this just before kopf starts to watch."""
        self._last_started_at = dict.fromkeys(self._collection_paths, asyncio.get_running_loop().time())

    def describe_stalled_watch(self, limit_seconds: float) -> str:
        """Return a message that names a watch whose last request began more than `limit_seconds` ago, or an empty string if no watch is stalled."""
        now = asyncio.get_running_loop().time()
        path, started_at = min(self._last_started_at.items(), key=lambda item: item[1], default=("", now))
        age_seconds = now - started_at
        return f"the watch of {path} is stalled: no request for {age_seconds:.0f} s" if age_seconds > limit_seconds else ""

    def record_request(self, path: str, status: int, seconds: float, *, is_watch: bool) -> None:
        """Record one request. `status` is the HTTP status, or 0 without an answer. `seconds` is the time until the response's headers arrived."""
        # The API server's URL may contain a path prefix (as with Rancher), so only the end of the path is compared.
        collection_path = next((known_path for known_path in self._collection_paths if path.endswith(known_path)), "")
        verb = "get" if not collection_path else "watch" if is_watch else "list"
        self._observe_request(verb, collection_path.rpartition("/")[2] or OTHER_RESOURCE_LABEL, status, seconds)
        if is_watch and status == 200 and collection_path in self._last_started_at:
            self._last_started_at[collection_path] = asyncio.get_running_loop().time()

    def build_trace_config(self) -> aiohttp.TraceConfig:
        """Return tracing hooks for an aiohttp session. The hooks call `record_request` for each request."""
        config = aiohttp.TraceConfig()
        config.on_request_start.append(self._on_start)
        config.on_request_end.append(self._on_end)
        config.on_request_exception.append(self._on_exception)
        return config

    async def _on_start(
        self, _: aiohttp.ClientSession, trace_context: SimpleNamespace, __: aiohttp.TraceRequestStartParams
    ) -> None:
        trace_context.started = asyncio.get_running_loop().time()

    async def _on_end(
        self, _: aiohttp.ClientSession, trace_context: SimpleNamespace, params: aiohttp.TraceRequestEndParams
    ) -> None:
        self._record_ended_request(trace_context, params, params.response.status)

    async def _on_exception(
        self, _: aiohttp.ClientSession, trace_context: SimpleNamespace, params: aiohttp.TraceRequestExceptionParams
    ) -> None:
        self._record_ended_request(trace_context, params, 0)

    def _record_ended_request(
        self,
        trace_context: SimpleNamespace,
        params: aiohttp.TraceRequestEndParams | aiohttp.TraceRequestExceptionParams,
        status: int,
    ) -> None:
        seconds = asyncio.get_running_loop().time() - trace_context.started
        self.record_request(params.url.path, status, seconds, is_watch=params.url.query.get("watch") == "true")


class RetryLogFilter(logging.Filter):
    """Lowers the log level of kopf's messages about the first retries of a request.

    kopf logs each retry as an error. But retries are common, for example after a throttled request (429) or during shutdown.
    """

    LOWERED_RETRY_COUNT = 5
    _RETRY_PATTERN = re.compile(
        r"Request attempt #(\d+)(?:/\d+)? failed; (?:will retry|(?:TCP|SSL) closed; will re-authenticate)"
    )

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep every record, but lower its level to WARNING if it is about one of the first retries."""
        match = self._RETRY_PATTERN.match(record.getMessage()) if record.name.startswith("kopf") else None
        if match is not None and int(match.group(1)) <= self.LOWERED_RETRY_COUNT:
            record.levelno, record.levelname = logging.WARNING, logging.getLevelName(logging.WARNING)
        return True


def configure_logging() -> None:
    """Adjust the levels of kopf's log messages. Call this after the handlers of the root logger are set."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(RetryLogFilter())
    # kopf logs each event of each object at INFO. The reconciler logs its own actions, so kopf's lines are not needed.
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)
