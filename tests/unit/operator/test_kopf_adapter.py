"""The operator's workarounds for the behaviour of kopf. If a test fails after an upgrade of kopf, the tested workaround may no longer be necessary."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator

import aiohttp
import kopf
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from finetune_operator.kopf_adapter import (
    EndlessBackoff,
    RetryLogFilter,
    TracedSession,
    WatchMonitor,
    WatchStreams,
    build_kopf_settings,
)
from finetune_operator.objects import JOB, POD
from kopf._cogs.aiokits import aiotoggles
from kopf._cogs.clients import watching

from tests.unit.operator.samples import CONFIG


def make_session(token: str) -> TracedSession:
    connection_info = kopf.ConnectionInfo(server="https://api", token=token, insecure=True)
    return TracedSession(connection_info, WatchMonitor([], lambda *_: None), {})


def test_backoff_never_ends_and_restarts_for_each_request() -> None:
    backoff = EndlessBackoff()
    for _ in range(2):
        assert list(itertools.islice(backoff, 1000))[:9] == [1, 1, 2, 3, 5, 8, 13, 21, 30]


def test_settings_use_the_endless_backoff_and_the_label_selector() -> None:
    kopf_settings = build_kopf_settings(CONFIG)
    assert isinstance(kopf_settings.networking.error_backoffs, EndlessBackoff)
    assert kopf_settings.watching.label_selectors["", "v1", "pods"] == "app.kubernetes.io/managed-by=finetune-operator"


def test_inactivity_timeout_is_disabled() -> None:
    """kopf's inactivity timeout could cancel the task of a watch while the task handles an event, and the watch would end without an error."""
    watching = build_kopf_settings(CONFIG).watching
    assert watching.inactivity_timeout > 365 * 86400
    assert (watching.server_timeout, watching.client_timeout) == (60, 75)


def test_idle_task_of_an_object_ends_soon_because_it_holds_the_last_event() -> None:
    """The timeout must not be zero, because the task would then end before it reads its first event."""
    assert 0 < build_kopf_settings(CONFIG).queueing.idle_timeout <= 1


def test_storages_neither_copy_nor_change_objects() -> None:
    persistence = build_kopf_settings(CONFIG).persistence
    body = kopf.Body({"metadata": {"name": "a"}, "spec": {"large": "x" * 1000}})
    patch = kopf.Patch()
    persistence.diffbase_storage.store(body=body, patch=patch, essence=kopf.BodyEssence({}))
    assert persistence.diffbase_storage.build(body=body) == {}
    assert persistence.diffbase_storage.fetch(body=body) is None
    assert persistence.progress_storage.fetch(key="handler", body=body) is None
    assert patch == {}


def test_equal_credentials_make_equal_sessions() -> None:
    """If the session objects for equal credentials were not equal, kopf would retry rejected credentials without end."""
    assert make_session("a") == make_session("a") != make_session("b")
    assert hash(make_session("a")) == hash(make_session("a"))


async def test_each_context_of_kopf_gets_its_own_session() -> None:
    """kopf may close the session of one context. The watches of the other contexts must continue until the process ends."""
    session_of_credentials = make_session("a")
    first_session, second_session = session_of_credentials.aiohttp_session, session_of_credentials.aiohttp_session
    await first_session.close()
    assert (first_session.closed, second_session.closed) == (True, False)
    await second_session.close()


async def test_requests_are_observed_and_a_rejected_watch_counts_as_stalled() -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.json_response({}, status=403 if request.path.endswith("/jobs") else 200)

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    observed_requests: list[tuple[str, str, int]] = []
    monitor = WatchMonitor(
        [POD.path(None), JOB.path(None)], lambda verb, plural, code, _: observed_requests.append((verb, plural, code))
    )
    monitor.start()
    await asyncio.sleep(0.002)
    async with TestServer(app) as server:
        root = str(server.make_url("")).rstrip("/")
        urls = ("/api/v1/pods?limit=500", "/api/v1/pods?watch=true", "/apis/batch/v1", "/apis/batch/v1/jobs?watch=true")
        async with TracedSession(kopf.ConnectionInfo(server=root, insecure=True), monitor, {}).aiohttp_session as session:
            for url in urls:
                await (await session.get(root + url)).read()
            await server.close()
            with pytest.raises(aiohttp.ClientError):
                await session.get(root + "/api/v1/pods?watch=true")
    assert observed_requests == [
        ("list", "pods", 200), ("watch", "pods", 200), ("get", "discovery", 200), ("watch", "jobs", 403), ("watch", "pods", 0),
    ]  # fmt: skip
    assert monitor.describe_stalled_watch(0.001).startswith("the watch of /apis/batch/v1/jobs")


@pytest.mark.parametrize("is_closed", [True, False])
def test_watch_streams_are_closed_one_after_another(is_closed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `WatchStreams`, about a third of the event loops report an error. If no event loop reports one, kopf or Python has fixed the problem."""

    async def continuous_watch(**_: object) -> AsyncIterator[dict[str, str]]:
        yield {"type": "ADDED"}
        await asyncio.Event().wait()

    monkeypatch.setattr(watching, "continuous_watch", continuous_watch)
    errors: list[BaseException] = []
    open_streams: list[object] = []  # kopf's tasks keep the streams alive until the event loop ends

    async def receive_one_event() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context["exception"]))
        async with WatchStreams() if is_closed else contextlib.AsyncExitStack():
            stream = watching.infinite_watch(
                settings=build_kopf_settings(CONFIG), resource=JOB, namespace=None, operator_paused=aiotoggles.ToggleSet(any)  # type: ignore[arg-type]
            )
            open_streams.append(stream)
            assert await anext(stream) == {"type": "ADDED"}

    for _ in range(100):
        asyncio.run(receive_one_event())
    assert {str(error) for error in errors} == (set() if is_closed else {"generator didn't stop after athrow()"})


@pytest.mark.parametrize(
    ("name", "message", "level"),
    [
        ("kopf._cogs.clients.watching", "Request attempt #1 failed; will retry: GET x -> 429", "WARNING"),
        ("kopf._cogs.clients.watching", "Request attempt #5/9 failed; will retry: GET x -> 429", "WARNING"),
        ("kopf._cogs.clients.watching", "Request attempt #6 failed; will retry: GET x -> 429", "ERROR"),
        (
            "kopf._core.reactor.observation",
            "Request attempt #2 failed; TCP closed; will re-authenticate: GET x",
            "WARNING",
        ),
        ("kopf._core.reactor.observation", "Request attempt #9 failed; escalating: GET x -> 403", "ERROR"),
        ("kopf._cogs.clients.watching", "Request attempt #1 failed; escalating: GET x -> 500", "ERROR"),
        ("finetune_operator.kube", "Request attempt #1 failed; will retry: GET x -> 429", "ERROR"),
    ],
)
def test_first_retries_are_logged_as_warnings(name: str, message: str, level: str) -> None:
    log_record = logging.LogRecord(name, logging.ERROR, "file", 1, message, None, None)
    assert RetryLogFilter().filter(log_record)
    assert log_record.levelname == level
