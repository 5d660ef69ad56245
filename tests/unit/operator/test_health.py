"""Health means that work gets done: what `/healthz` and `/readyz` say of a process that is alive and does nothing."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import kopf
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from finetune_operator.handlers import Connection
from finetune_operator.kube import Listing, ServerClock
from finetune_operator.metrics import Metrics
from finetune_operator.objects import FINETUNEJOB, JOB, POD, Kind
from finetune_operator.runtime import Runtime, StartError
from finetune_operator.settings import SettingsError, load, parse
from finetune_operator.watches import Watches
from finetune_operator.workqueue import Key

from tests.unit.operator.virtual import run

CONFIG = parse({"resyncSeconds": 300, "stuckSeconds": 100, "api": {"timeoutSeconds": 30}}, "test")
KEY = Key("team", "run")


def runtime() -> Runtime:
    kube: Any = SimpleNamespace(clock=ServerClock())
    return Runtime(CONFIG, kube, Metrics())


def test_a_port_that_is_taken_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        kube: Any = SimpleNamespace(clock=ServerClock())

        async def story() -> int:
            return await Runtime(parse({"http": {"host": "127.0.0.1", "port": port}}, "test"), kube, Metrics()).run()

        assert asyncio.run(story()) == 1
    assert f"http.host 127.0.0.1, http.port {port} cannot be listened on" in caplog.text
    assert [one for one in caplog.records if one.exc_info] == []


def test_a_file_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(b"log: \xff\xfe")
    with pytest.raises(SettingsError, match=r"config.yaml is not UTF-8: invalid start byte at byte 5"):
        load(file)


def test_a_store_that_went_back_ends_the_process() -> None:
    """Restored from a backup, it numbers its versions anew from there; with an empty cache the operator sees them."""
    versions = iter([20, 20, 20, 30, 31, 32, 12, 12, 12])

    async def pages(*_: Any, **__: Any) -> AsyncIterator[Listing]:
        yield Listing([], next(versions))

    async def story() -> None:
        kube: Any = SimpleNamespace(clock=ServerClock(), pages=pages)
        found = Runtime(CONFIG, kube, Metrics())
        await found._resync()
        await found._resync()
        with pytest.raises(StartError, match="went back from version 30 to 12"):
            await found._resync()

    run(story())


def test_it_is_ready_when_its_caches_are_filled() -> None:
    async def story() -> list[str]:
        found = runtime()
        said = [found._ready()]
        found._synced.set()
        said.append(found._ready())
        found._stopping = True
        return [*said, found._ready()]

    assert run(story()) == ["the caches are not filled yet", "", "the caches are not filled yet"]


def test_a_deaf_watch_is_noticed_although_lists_and_other_watches_are_answered() -> None:
    async def pages(*_: Any, **__: Any) -> AsyncIterator[Listing]:
        yield Listing([], 20)

    def begin(found: Runtime, *kinds: Kind) -> None:
        for kind in kinds:
            found._watches._count(SimpleNamespace(started=0.0), f"/clusters/one{kind.path(None)}", True, 200)

    async def story() -> list[str]:
        kube: Any = SimpleNamespace(clock=ServerClock(), pages=pages)
        found = Runtime(CONFIG, kube, Metrics())
        await asyncio.sleep(5000)
        said = [found._healthy()]  # nobody watches yet: the first lists may take long
        found._watches.start()
        for _ in range(20):  # idle: no event, but every watch is begun anew after its minute
            await asyncio.sleep(60)
            begin(found, FINETUNEJOB, JOB, POD)
        said.append(found._healthy())
        for _ in range(11):
            await asyncio.sleep(60)
            begin(found, FINETUNEJOB, JOB)
            await found._resync()
            said.append(found._healthy())
        begin(found, POD)
        return [*said, found._healthy()]

    assert run(story()) == [*[""] * 12, "the watch of /api/v1/pods was not begun for 660 s", ""]


async def test_requests_of_the_watches_are_counted_and_prove_that_they_live() -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.json_response({}, status=403 if request.path.endswith("/jobs") else 200)

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    seen: list[tuple[str, str, int]] = []
    paths = [POD.path(None), JOB.path(None)]
    watches = Watches(paths, lambda verb, plural, code, _: seen.append((verb, plural, code)))
    watches.start()
    await asyncio.sleep(0.002)
    async with TestServer(app) as server:
        root = str(server.make_url("")).rstrip("/")
        asked = ("/api/v1/pods?limit=500", "/apis/batch/v1/jobs?watch=true", "/apis/batch/v1", "/api/v1/pods?watch=true")
        async with Connection(kopf.ConnectionInfo(server=root, insecure=True), watches).aiohttp_session as session:
            for url in asked:
                await (await session.get(root + url)).read()
            await server.close()
            with pytest.raises(aiohttp.ClientError):
                await session.get(root + "/api/v1/pods?watch=true")
    assert seen == [
        ("list", "pods", 200), ("watch", "jobs", 403), ("get", "discovery", 200), ("watch", "pods", 200), ("watch", "pods", 0),
    ]  # fmt: skip
    assert watches.deaf(0.001).startswith("the watch of /apis/batch/v1/jobs"), "a watch that is refused does not live"


async def test_a_connection_of_the_same_credentials_is_the_same() -> None:
    """Or credentials that the server refused would be tried again for ever."""
    watches = Watches([], lambda *_: None)
    tokens = ("a", "a", "b")
    made = [Connection(kopf.ConnectionInfo(server="https://api", token=one, insecure=True), watches) for one in tokens]
    assert made[0] == made[1] != made[2]
    assert hash(made[0]) == hash(made[1])


def test_a_job_that_no_worker_takes_is_noticed_but_not_on_a_standby() -> None:
    async def story() -> list[str]:
        found = runtime()
        found._queue.add(KEY)
        await asyncio.sleep(101)
        said = [found._healthy()]
        found._start_working()
        said.append(found._healthy())
        await found._queue.take()
        said.append(found._healthy())
        found._queue.done(KEY)
        return [*said, found._healthy()]

    stuck = "a job has waited for 101 s"
    assert run(story()) == ["", stuck, "", ""]


def test_a_worker_that_never_comes_back_is_noticed() -> None:
    async def story() -> str:
        found = runtime()
        found._start_working()
        found._queue.add(KEY)
        await found._queue.take()
        await asyncio.sleep(102)
        return found._healthy()

    assert run(story()) == "a job has waited for 102 s"


async def test_each_of_kopfs_contexts_gets_a_session_of_its_own() -> None:
    """The watches that are still there when one is closed go on, so that the process can end."""
    one = Connection(kopf.ConnectionInfo(server="https://api", token="a", insecure=True), Watches([], lambda *_: None))
    first, second = one.aiohttp_session, one.aiohttp_session
    await first.close()
    assert (first.closed, second.closed) == (True, False)
    await second.close()
