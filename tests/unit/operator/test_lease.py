"""The Lease: one leader, no trust in other people's clocks, no write after the lead may be lost."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from finetune_operator.kube import AlreadyExists, Conflict, Created, Kube, NotFound, Unavailable
from finetune_operator.lease import Elector, LeaseLost
from finetune_operator.objects import LEASE, Kind, Object
from finetune_operator.settings import LeaderElection

from tests.unit.operator.virtual import run

SETTINGS = LeaderElection(enabled=True, lease_duration_seconds=15, renew_deadline_seconds=10, retry_period_seconds=2)


class Server:
    """A server of one Lease, with resourceVersions; `down` makes it refuse."""

    def __init__(self) -> None:
        self.lease: Object | None = None
        self.version = 0
        self.down = False

    async def get(self, kind: Kind, namespace: str, name: str) -> Object:
        self._check("get", kind, name)
        if self.lease is None:
            raise NotFound("get", kind, name, 404, "NotFound", "none")
        return _copy(self.lease)

    async def create(self, kind: Kind, namespace: str, body: Object) -> Created:
        self._check("create", kind, "l")
        if self.lease is not None:
            raise AlreadyExists("create", kind, "l", 409, "AlreadyExists", "there")
        return Created(self._store(body))

    async def replace(self, kind: Kind, namespace: str, body: Object) -> Object:
        self._check("update", kind, "l")
        if self.lease is None or body["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
            raise Conflict("update", kind, "l", 409, "Conflict", "changed")
        return self._store(body)

    def _check(self, verb: str, kind: Kind, name: str) -> None:
        assert kind is LEASE
        if self.down:
            raise Unavailable(verb, kind, name, 503, "", "down")

    def _store(self, body: Object) -> Object:
        self.version += 1
        self.lease = _copy(body)
        self.lease["metadata"]["resourceVersion"] = str(self.version)
        return _copy(self.lease)

    @property
    def holder(self) -> str:
        assert self.lease is not None
        return str(self.lease["spec"]["holderIdentity"])


def _copy(value: Object) -> Object:
    return {**value, "metadata": dict(value["metadata"]), "spec": dict(value["spec"])}


def elector(server: Server, name: str) -> Elector:
    return Elector(cast(Kube, server), SETTINGS, "operators", name)


def now() -> float:
    return asyncio.get_running_loop().time()


def test_the_first_one_leads_and_the_second_waits() -> None:
    async def story() -> None:
        server = Server()
        first, second = elector(server, "first"), elector(server, "second")
        await first.acquire()
        keeping = asyncio.create_task(first.keep())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(300):
                await second.acquire()
        assert server.holder == "first"
        first.check()
        keeping.cancel()

    run(story())


def test_a_silent_leader_is_replaced_after_the_duration() -> None:
    async def story() -> float:
        server = Server()
        await elector(server, "first").acquire()
        second = elector(server, "second")
        await second.acquire()
        assert server.holder == "second"
        assert server.lease is not None
        assert server.lease["spec"]["leaseTransitions"] == 1
        return now()

    assert 15 < run(story()) <= 15 + 2 * 2


def test_times_written_by_others_do_not_matter() -> None:
    async def story() -> float:
        server = Server()
        await elector(server, "first").acquire()
        assert server.lease is not None
        server.lease["spec"] |= {
            "renewTime": "1970-01-01T00:00:00.000000Z",
            "acquireTime": "1970-01-01T00:00:00.000000Z",
        }
        await elector(server, "second").acquire()
        return now()

    assert run(story()) > 15


def test_a_leader_that_cannot_renew_stops_before_another_may_lead() -> None:
    async def story() -> float:
        server = Server()
        first = elector(server, "first")
        await first.acquire()
        server.down = True
        with pytest.raises(LeaseLost):
            await first.keep()
        return now()

    assert 10 < run(story()) < 15


def test_a_leader_that_was_frozen_must_not_write() -> None:
    async def story() -> None:
        first = elector(Server(), "first")
        await first.acquire()
        first.check()
        await asyncio.sleep(60)
        with pytest.raises(LeaseLost):
            first.check()

    run(story())


def test_who_never_led_must_not_write() -> None:
    async def story() -> None:
        with pytest.raises(LeaseLost):
            elector(Server(), "first").check()

    run(story())


def test_a_lease_taken_by_hand_ends_the_leader() -> None:
    async def story() -> None:
        server = Server()
        first = elector(server, "first")
        await first.acquire()
        assert server.lease is not None
        server.lease["spec"]["holderIdentity"] = "somebody"
        with pytest.raises(LeaseLost, match="somebody leads now"):
            await first.keep()

    run(story())


def test_a_deleted_lease_is_made_again() -> None:
    async def story() -> None:
        server = Server()
        first = elector(server, "first")
        await first.acquire()
        server.lease = None
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30):
                await first.keep()
        assert server.holder == "first"

    run(story())


def test_a_released_lease_is_free_at_once() -> None:
    async def story() -> float:
        server = Server()
        first = elector(server, "first")
        await first.acquire()
        await first.release()
        assert not first.leading
        await elector(server, "second").acquire()
        return now()

    assert run(story()) < 1


@pytest.mark.parametrize("values", [{"leaseDurationSeconds": 5}, {"retryPeriodSeconds": 12}])
def test_times_that_cannot_work_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must exceed"):
        LeaderElection.model_validate(values)
