"""Leader election: there is at most one leader, even if the clocks differ. A leader stops writing before its Lease can expire."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from finetune_operator.kube import AlreadyExists, ApiResponse, Conflict, KubeClient, NotFound, Unavailable
from finetune_operator.lease import LeaderElector, LeaderTasks, LeaseLost
from finetune_operator.objects import LEASE, Kind, Object
from finetune_operator.settings import LeaderElection

from tests.unit.operator.virtual import run

SETTINGS = LeaderElection(enabled=True, lease_duration_seconds=15, renew_deadline_seconds=10, retry_period_seconds=2)


class FakeLeaseServer:
    """An API server that stores one Lease. While `is_down` is true, each request fails. The server delays its responses to writes by `answer_delay_seconds`."""

    def __init__(self) -> None:
        self.lease: Object | None = None
        self.version = 0
        self.is_down = False
        self.answer_delay_seconds = 0.0
        self.conflict_count = 0
        """The number of next updates of the Lease that fail with a conflict, as if another client had changed the Lease."""

    async def get(self, kind: Kind, namespace: str, name: str) -> Object:
        self._check("get", kind, name)
        if self.lease is None:
            raise NotFound("get", kind, name, 404, "NotFound", "none")
        return _copy(self.lease)

    async def create(self, kind: Kind, namespace: str, body: Object) -> ApiResponse:
        self._check("create", kind, "l")
        if self.lease is not None:
            raise AlreadyExists("create", kind, "l", 409, "AlreadyExists", "there")
        return ApiResponse(await self._store(body))

    async def replace(self, kind: Kind, namespace: str, body: Object) -> Object:
        self._check("update", kind, "l")
        if self.conflict_count:
            self.conflict_count -= 1
            raise Conflict("update", kind, "l", 409, "Conflict", "changed")
        if self.lease is None or body["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
            raise Conflict("update", kind, "l", 409, "Conflict", "changed")
        return await self._store(body)

    def _check(self, verb: str, kind: Kind, name: str) -> None:
        assert kind is LEASE
        if self.is_down:
            raise Unavailable(verb, kind, name, 503, "", "down")

    async def _store(self, body: Object) -> Object:
        self.version += 1
        self.lease = _copy(body)
        self.lease["metadata"]["resourceVersion"] = str(self.version)
        await asyncio.sleep(self.answer_delay_seconds)
        return _copy(self.lease)

    @property
    def holder(self) -> str:
        assert self.lease is not None
        return str(self.lease["spec"]["holderIdentity"])


def _copy(value: Object) -> Object:
    """Return a copy of the object in which all strings are new objects, as in an object that is read from a response."""
    return cast(Object, json.loads(json.dumps(value)))


def make_elector(server: FakeLeaseServer, name: str, settings: LeaderElection = SETTINGS) -> LeaderElector:
    return LeaderElector(cast(KubeClient, server), settings, "operators", name)


def get_loop_seconds() -> float:
    return asyncio.get_running_loop().time()


def test_second_replica_waits_while_the_first_renews() -> None:
    async def scenario() -> None:
        server = FakeLeaseServer()
        first_elector, second_elector = make_elector(server, "first"), make_elector(server, "second")
        await first_elector.acquire()
        renew_task = asyncio.create_task(first_elector.renew_until_lost())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(300):
                await second_elector.acquire()
        assert server.holder == "first"
        first_elector.ensure_leading()
        renew_task.cancel()

    run(scenario())


def test_leader_that_does_not_renew_is_replaced_after_the_lease_duration() -> None:
    async def scenario() -> float:
        server = FakeLeaseServer()
        await make_elector(server, "first").acquire()
        second_elector = make_elector(server, "second")
        await second_elector.acquire()
        assert server.holder == "second"
        assert server.lease is not None
        assert server.lease["spec"]["leaseTransitions"] == 1
        return get_loop_seconds()

    assert 15 < run(scenario()) <= 15 + 2 * 2


def test_replica_ignores_the_times_in_the_lease() -> None:
    async def scenario() -> float:
        server = FakeLeaseServer()
        await make_elector(server, "first").acquire()
        assert server.lease is not None
        server.lease["spec"] |= {
            "renewTime": "1970-01-01T00:00:00.000000Z",
            "acquireTime": "1970-01-01T00:00:00.000000Z",
        }
        await make_elector(server, "second").acquire()
        return get_loop_seconds()

    assert run(scenario()) > 15


def test_leader_that_cannot_renew_stops_before_another_replica_leads() -> None:
    async def scenario() -> float:
        server = FakeLeaseServer()
        first_elector = make_elector(server, "first")
        await first_elector.acquire()
        server.is_down = True
        with pytest.raises(LeaseLost):
            await first_elector.renew_until_lost()
        return get_loop_seconds()

    assert 10 < run(scenario()) < 15


def test_replica_that_never_led_must_not_write() -> None:
    async def scenario() -> None:
        with pytest.raises(LeaseLost):
            make_elector(FakeLeaseServer(), "first").ensure_leading()

    run(scenario())


def test_lease_taken_by_another_holder_ends_the_leader() -> None:
    async def scenario() -> None:
        server = FakeLeaseServer()
        first_elector = make_elector(server, "first")
        await first_elector.acquire()
        assert server.lease is not None
        server.lease["spec"]["holderIdentity"] = "another"
        with pytest.raises(LeaseLost, match="another is the leader now"):
            await first_elector.renew_until_lost()

    run(scenario())


def test_deleted_lease_is_created_again() -> None:
    async def scenario() -> None:
        server = FakeLeaseServer()
        first_elector = make_elector(server, "first")
        await first_elector.acquire()
        server.lease = None
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30):
                await first_elector.renew_until_lost()
        assert server.holder == "first"

    run(scenario())


def test_released_lease_can_be_acquired_at_once() -> None:
    async def scenario() -> float:
        server = FakeLeaseServer()
        first_elector = make_elector(server, "first")
        await first_elector.acquire()
        await first_elector.release()
        assert not first_elector.is_leader
        await make_elector(server, "second").acquire()
        return get_loop_seconds()

    assert run(scenario()) < 1


def test_renewal_time_is_the_start_of_the_request() -> None:
    """The API server stores the renewed Lease before its response arrives, so the other replicas count the Lease's duration from an earlier time."""

    async def scenario() -> None:
        server = FakeLeaseServer()
        server.answer_delay_seconds = 6
        first_elector = make_elector(server, "first")
        await first_elector.acquire()
        assert get_loop_seconds() == 6
        await asyncio.sleep(3.5)
        first_elector.ensure_leading()
        await asyncio.sleep(1)  # 10.5 s after the start of the request and 4.5 s after its response
        with pytest.raises(LeaseLost):
            first_elector.ensure_leading()

    run(scenario())


@pytest.mark.parametrize(("first_name", "second_name"), [("a", "b"), ("b", "a")])
def test_lease_of_another_holder_is_never_released(first_name: str, second_name: str) -> None:
    async def scenario() -> tuple[str, int]:
        server = FakeLeaseServer()
        first_elector, second_elector = make_elector(server, first_name), make_elector(server, second_name)
        await first_elector.acquire()
        await second_elector.acquire()  # the Lease has expired, because the first replica was paused
        await first_elector.release()
        assert server.lease is not None
        return server.holder, server.lease["spec"]["leaseTransitions"]

    assert run(scenario()) == (second_name, 1)


def test_replica_does_not_lead_while_the_server_is_down() -> None:
    async def scenario() -> float:
        server = FakeLeaseServer()
        server.is_down = True
        first_elector = make_elector(server, "first")
        acquire_task = asyncio.create_task(first_elector.acquire())
        await asyncio.sleep(31)
        assert not acquire_task.done()
        server.is_down = False
        await acquire_task
        first_elector.ensure_leading()
        return get_loop_seconds()

    assert 31 < run(scenario()) <= 31 + 2


def test_conflicting_renewal_is_retried() -> None:
    async def scenario() -> None:
        server = FakeLeaseServer()
        first_elector = make_elector(server, "first")
        await first_elector.acquire()
        server.conflict_count = 2
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30):
                await first_elector.renew_until_lost()
        assert server.conflict_count == 0
        first_elector.ensure_leading()

    run(scenario())


def test_lease_is_renewed_during_a_long_first_resync() -> None:
    """The first resync takes 11 s, which is longer than the renew deadline of 10 s."""

    async def scenario() -> list[str]:
        server = FakeLeaseServer()
        first_elector = make_elector(server, "first")
        events: list[str] = []

        async def resync() -> None:
            first_elector.ensure_leading()
            events.append(f"resync from {get_loop_seconds():.0f} s")
            await asyncio.sleep(11)

        def start_work() -> None:
            first_elector.ensure_leading()
            events.append(f"work from {get_loop_seconds():.0f} s")

        tasks = [asyncio.create_task(coroutine) for coroutine in LeaderTasks(first_elector, resync, start_work).create_coroutines().values()]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(60):
                await asyncio.gather(*tasks)
        return events

    assert run(scenario()) == ["resync from 0 s", "work from 11 s"]


def test_resync_ends_when_the_lease_is_lost() -> None:
    async def scenario() -> float:
        server = FakeLeaseServer()
        first_elector = make_elector(server, "first")
        coroutines = LeaderTasks(first_elector, lambda: asyncio.sleep(1000), lambda: None).create_coroutines()
        tasks = [asyncio.create_task(coroutine) for coroutine in coroutines.values()]
        await asyncio.sleep(1)
        server.is_down = True
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        (error,) = (task.exception() for task in done)
        assert isinstance(error, LeaseLost)
        for task in tasks:
            task.cancel()
        return get_loop_seconds()

    assert 10 < run(scenario()) < 15


def test_without_leader_election_work_starts_at_once() -> None:
    async def scenario() -> list[str]:
        events: list[str] = []

        async def resync() -> None:
            events.append("resync")

        tasks = [
            asyncio.create_task(coroutine) for coroutine in LeaderTasks(None, resync, lambda: events.append("work")).create_coroutines().values()
        ]
        await asyncio.sleep(1)
        assert not any(task.done() for task in tasks)
        for task in tasks:
            task.cancel()
        return events

    assert run(scenario()) == ["work"]


@pytest.mark.parametrize("durations", [{"leaseDurationSeconds": 5}, {"retryPeriodSeconds": 12}])
def test_contradictory_durations_are_refused(durations: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must exceed"):
        LeaderElection.model_validate(durations)


def make_lease(holder: str | None, **fields: Any) -> Object:
    return {"metadata": {"name": "l", "resourceVersion": "0"}, "spec": {"holderIdentity": holder, **fields}}


@pytest.mark.parametrize(("duration_seconds", "written_seconds"), [(15.0, 15), (15.6, 16), (0.4, 1)])
def test_written_lease_has_the_fields_that_client_go_expects(duration_seconds: float, written_seconds: int) -> None:
    settings = LeaderElection(lease_duration_seconds=duration_seconds, renew_deadline_seconds=0.3, retry_period_seconds=0.1)

    async def scenario() -> None:
        server, start = FakeLeaseServer(), datetime.now(UTC)
        await make_elector(server, "first", settings).acquire()
        for transitions in (0, 1):
            assert server.lease is not None
            assert (server.lease["metadata"]["name"], server.lease["metadata"]["namespace"]) == ("finetune-operator", "operators")
            fields = server.lease["spec"]
            assert set(fields) == {"holderIdentity", "leaseDurationSeconds", "acquireTime", "renewTime", "leaseTransitions"}
            assert (fields["leaseDurationSeconds"], fields["leaseTransitions"]) == (written_seconds, transitions)
            for name in ("acquireTime", "renewTime"):
                assert timedelta(0) <= datetime.fromisoformat(fields[name]) - start < timedelta(minutes=10)
            await make_elector(server, "second", settings).acquire()

    run(scenario())


@pytest.mark.parametrize(
    ("lease", "transitions"),
    [
        (make_lease("", leaseTransitions=5), 6), (make_lease(None), 1), (make_lease("first", leaseTransitions=5), 5),
        ({**make_lease(None), "spec": {}}, 1),
    ],
)  # fmt: skip
def test_lease_without_another_holder_is_acquired_at_once(lease: Object, transitions: int) -> None:
    async def scenario() -> None:
        server = FakeLeaseServer()
        server.lease = lease
        await make_elector(server, "first").acquire()
        assert get_loop_seconds() == 0
        assert (server.holder, server.lease["spec"]["leaseTransitions"]) == ("first", transitions)

    run(scenario())


def test_renewal_keeps_the_time_of_acquisition_and_other_fields() -> None:
    async def scenario() -> None:
        server = FakeLeaseServer()
        server.lease = make_lease("first", acquireTime="2026-01-01T00:00:00Z", renewTime="2026-01-01T00:00:00Z", strategy="x")
        await make_elector(server, "first").acquire()
        fields = server.lease["spec"]
        assert (fields["acquireTime"], fields["strategy"]) == ("2026-01-01T00:00:00Z", "x")
        assert fields["renewTime"] > "2026-01-01T00:00:01Z"

    run(scenario())


def test_lease_expires_when_it_has_been_unchanged_for_longer_than_its_duration() -> None:
    settings = LeaderElection(lease_duration_seconds=15, renew_deadline_seconds=10, retry_period_seconds=5)

    async def scenario() -> float:
        server = FakeLeaseServer()
        server.lease = make_lease("first")
        await make_elector(server, "second", settings).acquire()
        return get_loop_seconds()

    assert run(scenario()) == 20


def test_leader_may_write_until_the_renew_deadline() -> None:
    async def scenario() -> None:
        first_elector = make_elector(FakeLeaseServer(), "first")
        await first_elector.acquire()
        await asyncio.sleep(10)
        first_elector.ensure_leading()
        await asyncio.sleep(0.125)
        with pytest.raises(LeaseLost, match="the Lease was not renewed in time"):
            first_elector.ensure_leading()

    run(scenario())


def test_request_without_answer_ends_at_the_renew_deadline(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    async def scenario() -> float:
        server = FakeLeaseServer()
        server.answer_delay_seconds = 11
        acquire_task = asyncio.create_task(make_elector(server, "first").acquire())
        await asyncio.sleep(10.5)
        server.answer_delay_seconds = 0
        await acquire_task
        return get_loop_seconds()

    assert run(scenario()) == 12
    assert "the Lease cannot be written: no answer in time" in caplog.messages


def test_every_change_of_the_lease_counts_as_a_renewal() -> None:
    async def scenario() -> float:
        server = FakeLeaseServer()
        server.lease = make_lease("b", renewTime="2026-01-02T00:00:00Z")
        acquire_task = asyncio.create_task(make_elector(server, "second").acquire())
        await asyncio.sleep(11)
        server.lease = make_lease("a", renewTime="2026-01-01T00:00:00Z")
        await acquire_task
        return get_loop_seconds()

    assert run(scenario()) == 28  # the other replica observes the change of the Lease after 12 s


def test_conflict_does_not_make_a_replica_the_leader() -> None:
    async def scenario() -> float:
        server = FakeLeaseServer()
        server.lease, server.conflict_count = make_lease(""), 1
        await make_elector(server, "first").acquire()
        assert server.holder == "first"
        return get_loop_seconds()

    assert run(scenario()) == 2


@pytest.mark.parametrize("is_down", [True, False])
def test_release_leaves_a_lease_without_holder_if_the_server_can_be_reached(is_down: bool) -> None:
    async def scenario() -> None:
        server = FakeLeaseServer()
        first_elector = make_elector(server, "first")
        await first_elector.acquire()
        server.is_down = is_down
        await first_elector.release()
        assert server.lease is not None and not first_elector.is_leader
        fields = server.lease["spec"]
        assert (fields["holderIdentity"], fields["leaseDurationSeconds"]) == (("first", 15) if is_down else ("", 1))
        with pytest.raises(LeaseLost):
            first_elector.ensure_leading()

    run(scenario())


def test_replica_that_does_not_lead_releases_nothing() -> None:
    async def scenario() -> None:
        server = FakeLeaseServer()
        server.lease = make_lease("first")  # an earlier process with the same identity holds the Lease
        await make_elector(server, "first").release()
        assert server.holder == "first"

    run(scenario())


def test_lease_that_another_replica_creates_first_is_not_held() -> None:
    class RacingServer(FakeLeaseServer):
        async def create(self, kind: Kind, namespace: str, body: Object) -> ApiResponse:
            self.lease = make_lease("second", renewTime="x")
            return await super().create(kind, namespace, body)

    async def scenario() -> float:
        server = RacingServer()
        await make_elector(server, "first").acquire()
        return get_loop_seconds()

    assert 15 < run(scenario()) <= 20


@pytest.mark.parametrize(("lease_namespace", "namespace"), [(None, "operators"), ("leases", "leases")])
def test_namespace_of_the_lease_is_the_configured_or_the_operators_own(lease_namespace: str | None, namespace: str) -> None:
    async def scenario() -> None:
        server = FakeLeaseServer()
        await make_elector(server, "first", SETTINGS.model_copy(update={"lease_namespace": lease_namespace})).acquire()
        assert server.lease is not None and server.lease["metadata"]["namespace"] == namespace

    run(scenario())
