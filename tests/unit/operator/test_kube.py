"""The client of the Kubernetes API, tested with a small HTTP server: which requests it retries, and which error it raises for each status code."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from aiohttp import web
from finetune_operator.kube import (
    AlreadyExists,
    Conflict,
    ContinueTokenExpired,
    Forbidden,
    Invalid,
    KubeClient,
    KubeError,
    NamespaceTerminating,
    NotFound,
    OutcomeUnknown,
    ServerClock,
    Unavailable,
)
from finetune_operator.objects import FINETUNEJOB, JOB, LEASE, POD, Object
from finetune_operator.settings import ApiSettings
from kubernetes.aio.client.configuration import Configuration

JOB_BODY: Object = {"metadata": {"name": "run-1", "namespace": "team", "resourceVersion": "1"}}


@dataclass
class FakeHttpServer:
    """Sends the responses in `answers` in order, and repeats the last one. If an entry is None, the server closes the connection without a response."""

    answers: list[tuple[int, Object, dict[str, str]] | None] = field(default_factory=list)
    requests: list[tuple[str, str, Any]] = field(default_factory=list)

    def answer(self, code: int, body: Object | None = None, **headers: str) -> None:
        header_values = {name.replace("_", "-"): value for name, value in headers.items()}
        self.answers.append((code, body or {}, header_values))

    async def handle(self, request: web.Request) -> web.StreamResponse:
        text = await request.text()
        self.requests.append((request.method, request.path_qs, json.loads(text) if text else None))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer is None:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        code, body, headers = answer
        return web.json_response(body, status=code, headers=headers)


@pytest.fixture
def server() -> FakeHttpServer:
    return FakeHttpServer()


@pytest.fixture
async def kube(server: FakeHttpServer) -> AsyncIterator[KubeClient]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    configuration = Configuration()
    configuration.host = f"http://127.0.0.1:{runner.addresses[0][1]}"
    client = KubeClient(configuration, ApiSettings(timeout_seconds=5))
    yield client
    await client.close()
    await runner.cleanup()


def make_status_body(reason: str, message: str = "message") -> Object:
    return {"kind": "Status", "reason": reason, "message": message}


@pytest.mark.parametrize(
    ("code", "reason", "error"),
    [
        (404, "NotFound", NotFound), (409, "AlreadyExists", AlreadyExists), (409, "Conflict", Conflict),
        (422, "Invalid", Invalid), (403, "Forbidden", Forbidden), (405, "MethodNotAllowed", KubeError),
    ],
)  # fmt: skip
async def test_error_class_follows_status_and_reason(
    server: FakeHttpServer, kube: KubeClient, code: int, reason: str, error: type[KubeError]
) -> None:
    server.answer(code, make_status_body(reason))
    with pytest.raises(error) as caught:
        await kube.create(JOB, "team", JOB_BODY)
    assert (caught.value.code, caught.value.reason, caught.value.message) == (code, reason, "message")
    assert len(server.requests) == 1


TERMINATING_DETAILS: Object = {
    "causes": [
        {
            "reason": "NamespaceTerminating",
            "message": "namespace team is being terminated",
            "field": "metadata.namespace",
        }
    ],
}


@pytest.mark.parametrize(
    ("code", "reason", "details"),
    [
        (403, "Forbidden", {"name": "run-1", "group": "batch", "kind": "jobs", **TERMINATING_DETAILS}),
        (404, "NotFound", {"name": "team", "kind": "namespaces"}),
    ],
)
async def test_terminating_namespace_has_its_own_error(
    server: FakeHttpServer, kube: KubeClient, code: int, reason: str, details: Object
) -> None:
    server.answer(code, make_status_body(reason) | {"details": details})
    with pytest.raises(NamespaceTerminating):
        await kube.create(JOB, "team", JOB_BODY)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("body", "is_object_missing"),
    [
        (make_status_body("NotFound") | {"details": {"name": "run-1", "kind": "jobs"}}, True),
        (make_status_body("NotFound") | {"details": {}}, False),
        ({}, False),
    ],
    ids=["missing object", "missing kind", "body without details"],
)
async def test_missing_object_is_distinguished_from_missing_kind(
    server: FakeHttpServer, kube: KubeClient, body: Object, is_object_missing: bool
) -> None:
    server.answer(404, body)
    with pytest.raises(NotFound) as caught:
        await kube.replace(JOB, "team", JOB_BODY)
    assert caught.value.is_object_missing is is_object_missing


GROUPS: Object = {"groups": [{"name": "batch"}, {"name": "finetune-operator.io"}]}
RESOURCES: Object = {"resources": [{"name": "finetunejobs/status"}, {"name": "finetunejobs"}]}


@pytest.mark.parametrize(
    ("answers", "is_served"),
    [
        ([(200, {"groups": [{"name": "batch"}]})], False),
        ([(200, GROUPS), (404, {})], False),
        ([(200, GROUPS), (200, {"resources": []})], False),
        ([(200, GROUPS), (200, RESOURCES)], True),
    ],
    ids=["no group", "no version", "no kind", "all present"],
)
async def test_kind_is_served_when_discovery_names_it(
    server: FakeHttpServer, kube: KubeClient, answers: list[tuple[int, Object]], is_served: bool
) -> None:
    for code, body in answers:
        server.answer(code, body)
    assert await kube.is_served(FINETUNEJOB) is is_served
    paths = ["/apis", "/apis/finetune-operator.io/v1alpha1"]
    assert [path for _, path, _ in server.requests] == paths[: len(answers)]


async def test_reads_are_retried(server: FakeHttpServer, kube: KubeClient) -> None:
    server.answer(503)
    server.answers.append(None)
    server.answer(429, Retry_After="0")
    server.answer(200, {"found": True})
    assert await kube.get(JOB, "team", "run-1") == {"found": True}
    assert len(server.requests) == 4


@pytest.mark.parametrize("answer", [None, (500, {}, {}), (504, {}, {})])
async def test_create_is_never_retried(server: FakeHttpServer, kube: KubeClient, answer: Any) -> None:
    server.answers = [answer]
    with pytest.raises(OutcomeUnknown):
        await kube.create(JOB, "team", JOB_BODY)
    assert len(server.requests) == 1


async def test_throttled_create_raises_unavailable_and_not_outcome_unknown(server: FakeHttpServer, kube: KubeClient) -> None:
    server.answer(429, make_status_body("TooManyRequests"), Retry_After="7")
    with pytest.raises(Unavailable) as caught:
        await kube.create(JOB, "team", JOB_BODY)
    assert caught.value.retry_after == 7


async def test_delete_keeps_an_object_of_the_same_name_with_another_uid(server: FakeHttpServer, kube: KubeClient) -> None:
    server.answer(409, make_status_body("Conflict"))
    assert await kube.delete(POD, "team", "p", uid="u-1", grace_seconds=0) is False
    method, path, body = server.requests[0]
    assert (method, path) == ("DELETE", "/api/v1/namespaces/team/pods/p")
    assert body == {"preconditions": {"uid": "u-1"}, "propagationPolicy": "Foreground", "gracePeriodSeconds": 0}


async def test_list_reads_all_pages(server: FakeHttpServer, kube: KubeClient) -> None:
    server.answer(200, {"items": [{"n": 1}], "metadata": {"continue": "t", "resourceVersion": "5"}})
    server.answer(200, {"items": [{"n": 2}], "metadata": {"resourceVersion": "5"}})
    object_list = await kube.list(FINETUNEJOB, label_selector="a=b")
    assert (object_list.items, object_list.version) == ([{"n": 1}, {"n": 2}], 5)
    assert server.requests[1][1].endswith("finetunejobs?limit=200&labelSelector=a%3Db&continue=t")


async def test_list_restarts_as_one_page_when_its_continue_token_expires(server: FakeHttpServer, kube: KubeClient) -> None:
    server.answer(200, {"items": [{"n": 1}], "metadata": {"continue": "t", "resourceVersion": "5"}})
    server.answer(410, make_status_body("Expired"))
    server.answer(200, {"items": [{"n": 2}, {"n": 3}], "metadata": {"resourceVersion": "9"}})
    object_list = await kube.list(FINETUNEJOB, label_selector="a=b")
    assert (object_list.items, object_list.version) == ([{"n": 2}, {"n": 3}], 9)
    assert server.requests[2][1].endswith("finetunejobs?labelSelector=a%3Db")


async def test_list_that_expires_without_a_continue_token_fails(server: FakeHttpServer, kube: KubeClient) -> None:
    server.answer(410, make_status_body("Expired"))
    with pytest.raises(ContinueTokenExpired):
        await kube.list(FINETUNEJOB)
    assert len(server.requests) == 1


async def test_create_returns_admission_warnings(server: FakeHttpServer, kube: KubeClient) -> None:
    server.answer(201, JOB_BODY, Warning='299 - "would violate \\"restricted\\""')
    assert (await kube.create(JOB, "team", JOB_BODY)).warnings == ('would violate "restricted"',)


async def test_every_write_except_of_the_lease_checks_leadership(server: FakeHttpServer, kube: KubeClient) -> None:
    def refuse() -> None:
        raise RuntimeError("no longer")

    server.answer(200, {})
    kube.ensure_may_write = refuse
    await kube.get(JOB, "team", "run-1")
    await kube.replace(LEASE, "team", JOB_BODY)
    for write in (
        kube.replace(FINETUNEJOB, "team", JOB_BODY, subresource="status"),
        kube.delete(JOB, "team", "run-1", uid="u"),
    ):
        with pytest.raises(RuntimeError, match="no longer"):
            await write
    assert len(server.requests) == 2


async def test_each_try_of_a_request_is_observed(server: FakeHttpServer, kube: KubeClient) -> None:
    observed_requests: list[tuple[str, str, int]] = []
    observed_client = KubeClient(
        kube.configuration, ApiSettings(), lambda verb, plural, code, _: observed_requests.append((verb, plural, code))
    )
    server.answer(503)
    server.answer(200)
    await observed_client.get(JOB, "team", "x")
    await observed_client.close()
    assert observed_requests == [("get", "jobs", 503), ("get", "jobs", 200)]


async def test_long_error_message_is_cut(server: FakeHttpServer, kube: KubeClient) -> None:
    server.answer(422, make_status_body("Invalid", "x" * 100_000))
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
async def test_proxy_of_the_environment_is_used(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], proxy: str | None
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    configuration = Configuration()
    configuration.host = "https://api.example.com:6443"
    kube = KubeClient(configuration, ApiSettings())
    assert kube.configuration.proxy == proxy
    await kube.close()


def test_clock_follows_the_server_if_the_difference_is_large() -> None:
    clock = ServerClock()
    server_time = datetime.now(UTC) + timedelta(hours=2)
    clock.update_offset(server_time.strftime("%a, %d %b %Y %H:%M:%S GMT"), 100.0)
    assert abs((clock.now() - server_time).total_seconds()) < 2
    clock.update_offset(datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT"), 101.0)
    assert abs((clock.now() - server_time).total_seconds()) < 2
    clock.update_offset(datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT"), 200.0)
    assert clock.clock_offset == timedelta()
