"""The API client: what is repeated and what is not, and the names of refusals. Against a small HTTP server."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from finetune_operator.kube import (
    AlreadyExists,
    Conflict,
    Forbidden,
    Invalid,
    Kube,
    KubeError,
    NamespaceGoing,
    NotFound,
    OutcomeUnknown,
    Unavailable,
)
from finetune_operator.objects import FINETUNEJOB, JOB, LEASE, POD, Object
from finetune_operator.settings import ApiSettings
from kubernetes.aio.client.configuration import Configuration

JOB_BODY: Object = {"metadata": {"name": "run-1", "namespace": "team", "resourceVersion": "1"}}


@dataclass
class Server:
    """Answers in turn; the last answer stays. An answer of None drops the connection."""

    answers: list[tuple[int, Object, dict[str, str]] | None] = field(default_factory=list)
    seen: list[tuple[str, str, Any]] = field(default_factory=list)

    def say(self, code: int, body: Object | None = None, **headers: str) -> None:
        found = {name.replace("_", "-"): value for name, value in headers.items()}
        self.answers.append((code, body or {}, found))

    async def handle(self, request: web.Request) -> web.StreamResponse:
        text = await request.text()
        self.seen.append((request.method, request.path_qs, json.loads(text) if text else None))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer is None:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        code, body, headers = answer
        return web.json_response(body, status=code, headers=headers)


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
async def kube(server: Server) -> AsyncIterator[Kube]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    configuration = Configuration()
    configuration.host = f"http://127.0.0.1:{runner.addresses[0][1]}"
    found = Kube(configuration, ApiSettings(timeout_seconds=5))
    yield found
    await found.close()
    await runner.cleanup()


def status(reason: str, message: str = "words") -> Object:
    return {"kind": "Status", "reason": reason, "message": message}


@pytest.mark.parametrize(
    ("code", "reason", "error"),
    [
        (404, "NotFound", NotFound), (409, "AlreadyExists", AlreadyExists), (409, "Conflict", Conflict),
        (422, "Invalid", Invalid), (403, "Forbidden", Forbidden), (405, "MethodNotAllowed", KubeError),
    ],
)  # fmt: skip
async def test_refusals_have_names(server: Server, kube: Kube, code: int, reason: str, error: type[KubeError]) -> None:
    server.say(code, status(reason))
    with pytest.raises(error) as caught:
        await kube.create(JOB, "team", JOB_BODY)
    assert (caught.value.code, caught.value.reason, caught.value.message) == (code, reason, "words")
    assert len(server.seen) == 1


TERMINATING: Object = {
    "causes": [{"reason": "NamespaceTerminating", "message": "namespace team is being terminated", "field": "metadata.namespace"}],
}


@pytest.mark.parametrize(
    ("code", "reason", "details"),
    [
        (403, "Forbidden", {"name": "run-1", "group": "batch", "kind": "jobs", **TERMINATING}),
        (404, "NotFound", {"name": "team", "kind": "namespaces"}),
    ],
)
async def test_a_namespace_that_goes_has_an_error_of_its_own(
    server: Server, kube: Kube, code: int, reason: str, details: Object
) -> None:
    server.say(code, status(reason) | {"details": details})
    with pytest.raises(NamespaceGoing):
        await kube.create(JOB, "team", JOB_BODY)
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("body", "missing"),
    [
        (status("NotFound") | {"details": {"name": "run-1", "kind": "jobs"}}, True),
        (status("NotFound") | {"details": {}}, False),
        ({}, False),
    ],
    ids=["the object", "the kind", "no answer of the API's"],
)
async def test_an_object_that_is_not_there_is_told_from_a_kind_that_is_not(
    server: Server, kube: Kube, body: Object, missing: bool
) -> None:
    server.say(404, body)
    with pytest.raises(NotFound) as caught:
        await kube.replace(JOB, "team", JOB_BODY)
    assert caught.value.object_missing is missing


GROUPS: Object = {"groups": [{"name": "batch"}, {"name": "finetune-operator.io"}]}
RESOURCES: Object = {"resources": [{"name": "finetunejobs/status"}, {"name": "finetunejobs"}]}


@pytest.mark.parametrize(
    ("answers", "known"),
    [
        ([(200, {"groups": [{"name": "batch"}]})], False),
        ([(200, GROUPS), (404, {})], False),
        ([(200, GROUPS), (200, {"resources": []})], False),
        ([(200, GROUPS), (200, RESOURCES)], True),
    ],
    ids=["no group", "no version", "no kind", "all there"],
)
async def test_a_kind_is_known_when_the_directory_names_it(
    server: Server, kube: Kube, answers: list[tuple[int, Object]], known: bool
) -> None:
    for code, body in answers:
        server.say(code, body)
    assert await kube.discovered(FINETUNEJOB) is known
    paths = ["/apis", "/apis/finetune-operator.io/v1alpha1"]
    assert [path for _, path, _ in server.seen] == paths[: len(answers)]


async def test_reads_are_repeated(server: Server, kube: Kube) -> None:
    server.say(503)
    server.answers.append(None)
    server.say(429, Retry_After="0")
    server.say(200, {"found": True})
    assert await kube.get(JOB, "team", "run-1") == {"found": True}
    assert len(server.seen) == 4


@pytest.mark.parametrize("answer", [None, (500, {}, {}), (504, {}, {})])
async def test_a_create_is_never_repeated(server: Server, kube: Kube, answer: Any) -> None:
    server.answers = [answer]
    with pytest.raises(OutcomeUnknown):
        await kube.create(JOB, "team", JOB_BODY)
    assert len(server.seen) == 1


async def test_a_create_that_was_turned_away_is_known_not_to_have_happened(server: Server, kube: Kube) -> None:
    server.say(429, status("TooManyRequests"), Retry_After="7")
    with pytest.raises(Unavailable) as caught:
        await kube.create(JOB, "team", JOB_BODY)
    assert caught.value.retry_after == 7


async def test_a_delete_names_the_uid_and_a_namesake_is_spared(server: Server, kube: Kube) -> None:
    server.say(409, status("Conflict"))
    assert await kube.delete(POD, "team", "p", uid="u-1", grace=0) is False
    method, path, body = server.seen[0]
    assert (method, path) == ("DELETE", "/api/v1/namespaces/team/pods/p")
    assert body == {"preconditions": {"uid": "u-1"}, "propagationPolicy": "Foreground", "gracePeriodSeconds": 0}


async def test_lists_come_in_pages(server: Server, kube: Kube) -> None:
    server.say(200, {"items": [{"n": 1}], "metadata": {"continue": "t", "resourceVersion": "5"}})
    server.say(200, {"items": [{"n": 2}], "metadata": {"resourceVersion": "5"}})
    listing = await kube.list(FINETUNEJOB, labels="a=b")
    assert (listing.items, listing.version) == ([{"n": 1}, {"n": 2}], 5)
    assert server.seen[1][1].endswith("finetunejobs?limit=200&labelSelector=a%3Db&continue=t")


async def test_admission_warnings_are_kept(server: Server, kube: Kube) -> None:
    server.say(201, JOB_BODY, Warning='299 - "would violate \\"restricted\\""')
    assert (await kube.create(JOB, "team", JOB_BODY)).warnings == ('would violate "restricted"',)


async def test_the_guard_stands_before_every_write_but_the_lease_s(server: Server, kube: Kube) -> None:
    def closed() -> None:
        raise RuntimeError("no longer")

    server.say(200, {})
    kube.guard = closed
    await kube.get(JOB, "team", "run-1")
    await kube.replace(LEASE, "team", JOB_BODY)
    for write in (
        kube.replace(FINETUNEJOB, "team", JOB_BODY, sub="status"),
        kube.delete(JOB, "team", "run-1", uid="u"),
    ):
        with pytest.raises(RuntimeError, match="no longer"):
            await write
    assert len(server.seen) == 2


async def test_requests_are_counted(server: Server, kube: Kube) -> None:
    seen: list[tuple[str, str, int]] = []
    kube._watcher = lambda verb, plural, code, seconds: seen.append((verb, plural, code))
    server.say(503)
    server.say(200)
    await kube.get(JOB, "team", "x")
    assert seen == [("get", "jobs", 503), ("get", "jobs", 200)]


async def test_a_refusal_that_repeats_the_whole_object_is_cut(server: Server, kube: Kube) -> None:
    server.say(422, status("Invalid", "x" * 100_000))
    with pytest.raises(Invalid) as caught:
        await kube.create(JOB, "team", JOB_BODY)
    assert len(caught.value.message) == 2048


@pytest.mark.parametrize(
    ("environment", "proxy"),
    [
        ({"HTTPS_PROXY": "http://proxy:3128"}, "http://proxy:3128"),
        ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "other,api.example.com"}, None),
        ({}, None),
    ],
)
async def test_the_environment_s_proxy_is_used(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], proxy: str | None
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    configuration = Configuration()
    configuration.host = "https://api.example.com:6443"
    kube = Kube(configuration, ApiSettings())
    assert kube.configuration.proxy == proxy
    await kube.close()
