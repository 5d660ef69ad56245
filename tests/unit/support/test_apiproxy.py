"""The API fault proxy parses requests, injects faults, and executes commands on watches."""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from localcluster.api import Endpoint
from tests.support.apiproxy import (
    ApiOperation,
    ApiProxy,
    DelayEvents,
    DisconnectWatch,
    LostResponse,
    ReplayEvents,
    Reset,
    SendEvent,
    StallWatch,
    Status,
    StatusAfterApply,
)

JOBS = "/apis/batch/v1/namespaces/ns/jobs"


class Server:
    """A server that records the names of created objects. It answers a watch with the lines from the queue `watch`."""

    def __init__(self) -> None:
        self.created: list[str] = []
        self.tokens: set[str] = set()
        self.watch: asyncio.Queue[str | None] = asyncio.Queue()
        self.watching = asyncio.Event()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.tokens.add(request.headers.get("Authorization", ""))
        if request.method == "POST":
            self.created.append((await request.json())["metadata"]["name"])
            return web.json_response({"name": self.created[-1]}, status=201)
        if "watch" not in request.query:
            return web.json_response({"items": self.created})
        reply = web.StreamResponse(headers={"Content-Type": "application/json"})
        reply.enable_chunked_encoding()
        await reply.prepare(request)
        self.watching.set()
        while (line := await self.watch.get()) is not None:
            await reply.write(line.encode() + b"\n")
        await reply.write_eof()
        return reply


def create_certificate(folder: Path) -> tuple[Path, Path]:
    """Create a private key and a self-signed certificate for 127.0.0.1. Returns the paths of both files."""
    key, cert = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-keyout", str(key), "-out", str(cert), "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    return key, cert


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return create_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def other_certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return create_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
async def server(certificate: tuple[Path, Path]) -> AsyncIterator[tuple[Server, ApiProxy]]:
    key, cert = certificate
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    server = Server()
    runner = web.ServerRunner(web.Server(server.handle, handler_cancellation=True), shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    endpoint = Endpoint(Path("/nowhere"), f"https://127.0.0.1:{runner.addresses[0][1]}", "secret", cert)
    with ApiProxy(endpoint) as proxy:
        yield server, proxy
    await runner.cleanup()


@pytest.fixture
async def session(server: tuple[Server, ApiProxy]) -> AsyncIterator[aiohttp.ClientSession]:
    _, proxy = server
    async with aiohttp.ClientSession(proxy.url, headers={"Authorization": "Bearer secret"}) as session:
        yield session


async def create(session: aiohttp.ClientSession, name: str) -> tuple[int, Any]:
    async with session.post(JOBS, json={"metadata": {"name": name}}) as answer:
        return answer.status, await answer.json()


@pytest.mark.parametrize(
    ("method", "path", "operation"),
    [
        ("GET", JOBS, ("list", "jobs", "ns", "")),
        ("GET", f"{JOBS}/a", ("get", "jobs", "ns", "a")),
        ("GET", f"{JOBS}?watch=true", ("watch", "jobs", "ns", "")),
        ("POST", JOBS, ("create", "jobs", "ns", "")),
        ("PUT", f"{JOBS}/a/status", ("update", "jobs/status", "ns", "a")),
        ("PATCH", "/apis/x.io/v1/namespaces/ns/things/a/status", ("patch", "things/status", "ns", "a")),
        ("DELETE", "/api/v1/namespaces/ns/pods/p", ("delete", "pods", "ns", "p")),
        ("DELETE", "/api/v1/namespaces/ns/pods", ("deletecollection", "pods", "ns", "")),
        ("GET", "/api/v1/pods", ("list", "pods", "", "")),
        ("GET", "/api/v1/namespaces", ("list", "namespaces", "", "")),
        ("GET", "/api/v1/namespaces/ns", ("get", "namespaces", "", "ns")),
        ("GET", "/apis/batch/v1", ("list", "", "", "")),
        ("GET", "/version", ("get", "/version", "", "")),
    ],
)
async def test_request_is_parsed_into_verb_and_resource(
    server: tuple[Server, ApiProxy], session: aiohttp.ClientSession, method: str, path: str, operation: tuple[str, ...]
) -> None:
    operations: list[ApiOperation] = []
    _, proxy = server

    def record(request: ApiOperation) -> bool:
        operations.append(request)
        return True

    proxy.add_rule(Status(418), record)
    async with session.request(method, path) as answer:
        assert answer.status == 418
    assert operations == [ApiOperation(*operation)]


async def test_requests_are_forwarded_with_credentials_and_logged(
    server: tuple[Server, ApiProxy], session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    api, proxy = server
    assert await create(session, "a") == (201, {"name": "a"})
    async with session.get(JOBS) as answer:
        assert await answer.json() == {"items": ["a"]}
    assert api.tokens == {"Bearer secret"}
    assert [e.operation for e in proxy.exchanges] == ["create jobs", "list jobs"]
    assert proxy.list_writes() == ("create jobs",)
    assert proxy.list_writes("other") == ()
    config = json.loads(proxy.kubeconfig(tmp_path / "config", token="another").read_text())
    assert config["clusters"][0]["cluster"] == {"server": proxy.url}
    assert config["users"][0]["user"] == {"token": "another"}


async def test_injected_error_is_a_kubernetes_status_with_its_reason(
    server: tuple[Server, ApiProxy], session: aiohttp.ClientSession
) -> None:
    api, proxy = server
    with proxy.fault(Status(429, retry_after=3), verb="create", resource="jobs", max_hits=1):
        async with session.post(JOBS, json={"metadata": {"name": "a"}}) as answer:
            assert answer.status == 429
            assert answer.headers["Retry-After"] == "3"
            assert (await answer.json())["reason"] == "TooManyRequests"
        assert (await create(session, "b"))[0] == 201
    assert api.created == ["b"]


@pytest.mark.parametrize(("fault", "created"), [(Reset(), []), (LostResponse(), ["a"])])
async def test_reset_prevents_the_create_and_lost_response_does_not(
    server: tuple[Server, ApiProxy], session: aiohttp.ClientSession, fault: Any, created: list[str]
) -> None:
    api, proxy = server
    with proxy.fault(fault, verb="create"), pytest.raises(aiohttp.ClientError):
        await create(session, "a")
    assert api.created == created


async def test_status_after_apply_executes_the_request(server: tuple[Server, ApiProxy], session: aiohttp.ClientSession) -> None:
    api, proxy = server
    with proxy.fault(StatusAfterApply(504), verb="create"):
        assert (await create(session, "a"))[0] == 504
    assert api.created == ["a"]


async def read_line(answer: aiohttp.ClientResponse) -> str:
    return (await asyncio.wait_for(answer.content.readline(), 10)).decode().strip()


async def test_watch_forwards_events_and_executes_commands(server: tuple[Server, ApiProxy], session: aiohttp.ClientSession) -> None:
    api, proxy = server
    async with session.get(f"{JOBS}?watch=true") as answer:
        for line in ("one", "two"):
            api.watch.put_nowait(line)
            assert await read_line(answer) == line
        assert proxy.command_watches("pods", DisconnectWatch()) == 0
        assert proxy.command_watches("jobs", ReplayEvents(2)) == 1
        assert [await read_line(answer), await read_line(answer)] == ["one", "two"]
        proxy.command_watches("jobs", SendEvent.error(410))
        event = json.loads(await read_line(answer))
        assert (event["type"], event["object"]["code"], event["object"]["reason"]) == ("ERROR", 410, "Expired")
        proxy.command_watches("jobs", DisconnectWatch())
        with pytest.raises(aiohttp.ClientPayloadError):
            await asyncio.wait_for(answer.content.read(), 10)


async def test_stalled_watch_stays_open_without_events(
    server: tuple[Server, ApiProxy], session: aiohttp.ClientSession
) -> None:
    api, proxy = server
    async with session.get(f"{JOBS}?watch=true") as answer:
        api.watch.put_nowait("one")
        assert await read_line(answer) == "one"
        proxy.command_watches("jobs", StallWatch())
        api.watch.put_nowait("two")
        reading = asyncio.ensure_future(answer.content.readline())
        assert (await create(session, "meanwhile"))[0] == 201
        assert not reading.done()
        proxy.command_watches("jobs", SendEvent.error(410))
        assert json.loads(await asyncio.wait_for(reading, 10))["type"] == "ERROR"


async def test_delayed_events_keep_their_order_and_do_not_delay_other_requests(
    server: tuple[Server, ApiProxy], session: aiohttp.ClientSession
) -> None:
    api, proxy = server
    proxy.fault(DelayEvents(0.2), verb="watch")
    loop = asyncio.get_running_loop()
    async with session.get(f"{JOBS}?watch=true") as answer:
        for line in ("one", "two"):
            api.watch.put_nowait(line)
        sent = loop.time()
        assert (await create(session, "meanwhile"))[0] == 201
        assert [await read_line(answer), await read_line(answer)] == ["one", "two"]
        assert loop.time() - sent >= 0.15


async def test_watch_that_the_server_ends_is_complete_for_the_client(
    server: tuple[Server, ApiProxy], session: aiohttp.ClientSession
) -> None:
    api, _ = server
    async with session.get(f"{JOBS}?watch=true") as answer:
        api.watch.put_nowait("one")
        api.watch.put_nowait(None)
        assert await asyncio.wait_for(answer.content.read(), 10) == b"one\n"


async def test_unknown_server_certificate_is_rejected(
    server: tuple[Server, ApiProxy], other_certificate: tuple[Path, Path]
) -> None:
    _, proxy = server
    with ApiProxy(Endpoint(Path("/nowhere"), proxy.upstream, "t", other_certificate[1])) as other_proxy:
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            await asyncio.to_thread(urllib.request.urlopen, other_proxy.url + JOBS, timeout=5)
        assert [e.server_status for e in other_proxy.exchanges] == [0]
