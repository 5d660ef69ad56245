"""What the operator knows about a job: objects in its cache, objects that it reads from the API server, and state that it keeps in memory."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from finetune_api.names import Reason
from finetune_operator import observe
from finetune_operator.job_state import SPEC_NOT_NEEDED
from finetune_operator.objects import CORE_EVENT, FINETUNEJOB, JOB, POD, Kind
from finetune_operator.policies.acceptance import AcceptedSpec, RefusedSpec

from tests.unit.operator.fake_cluster import KEY, FakeApiServer, OperatorProcess, new_server, start_attempt
from tests.unit.operator.samples import SPEC, UID


@pytest.fixture
def server() -> FakeApiServer:
    return new_server()


async def test_spec_is_checked_once_per_generation(server: FakeApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    accept = observe.accept
    monkeypatch.setattr(observe, "accept", lambda *args, **options: calls.append(1) or accept(*args, **options))
    process = OperatorProcess(server)
    for _ in range(3):
        await process.reconcile()
    assert len(calls) == 1
    server.write_spec({**SPEC, "suspend": True})
    process.refresh()
    await process.reconcile()
    assert len(calls) == 2


async def test_spec_is_checked_again_if_a_crd_removed_a_field_of_it(server: FakeApiServer) -> None:
    """If a CRD no longer has a field, the API server removes the field from the spec, but does not change the object's generation."""
    server.put(FINETUNEJOB, {**server.finetunejob, "spec": {**SPEC, "training": {"seed": 7}}})
    process = OperatorProcess(server)
    await process.reconcile()
    server.put(FINETUNEJOB, {**server.finetunejob, "spec": SPEC})
    process.refresh()
    await process.reconcile()
    acceptance = process.reconciler._observer.states[KEY].acceptance
    assert isinstance(acceptance, RefusedSpec) and acceptance.reason is Reason.SPEC_CHANGED


async def test_resolved_spec_and_reservation_of_a_finished_job_are_released(server: FakeApiServer) -> None:
    process, job = await start_attempt(server)
    states, limiter = process.reconciler._observer.states, process.reconciler._blocking_reader._limiter
    process.finish_pod_and_job(job)
    await process.reconcile()
    assert states[KEY].acceptance is not SPEC_NOT_NEEDED
    limiter.reserve_read(KEY, 0.0)
    await process.reconcile()
    assert states[KEY].acceptance is SPEC_NOT_NEEDED
    assert KEY not in limiter
    write_count = server.count("update", FINETUNEJOB)
    await process.reconcile()
    assert server.count("update", FINETUNEJOB) == write_count


async def test_spec_of_a_finished_job_is_read_again_if_its_status_is_emptied(server: FakeApiServer) -> None:
    process, job = await start_attempt(server)
    process.finish_pod_and_job(job)
    for _ in range(2):
        await process.reconcile()
    server.put(FINETUNEJOB, {**server.finetunejob, "status": {"observedGeneration": -1}})
    process.refresh()
    await process.reconcile()
    acceptance = process.reconciler._observer.states[KEY].acceptance
    assert isinstance(acceptance, AcceptedSpec)
    assert acceptance.spec.model.source == SPEC["model"]["source"]


@pytest.mark.parametrize("kind_read", [CORE_EVENT, POD, JOB], ids=["events", "pods", "Job"])
async def test_job_deleted_during_a_live_read_is_not_written(server: FakeApiServer, kind_read: Kind) -> None:
    _, job = await start_attempt(server)
    process = OperatorProcess(server)
    long_ago = server.clock.now() - timedelta(hours=1)
    if kind_read is not JOB:
        process.cache.put_job(replace(job, version=10**6, created_at=long_ago, completed_at=long_ago if kind_read is POD else None))

    def delete_job(verb: str, kind: Kind) -> None:
        if kind is kind_read:
            process.cache.drop_finetunejob(KEY, UID)
            del server.objects[FINETUNEJOB.plural, "run"]
            server.before_request = lambda verb, kind: None

    server.before_request = delete_job
    server.requests.clear()
    await process.reconcile()
    assert [plural for _, plural in server.requests] == [kind_read.plural]
    assert process.cache.list_keys() == []


@pytest.mark.parametrize("job_known", ["at first", "later"])
async def test_rules_for_new_jobs_do_not_apply_after_the_first_attempt_has_a_job(server: FakeApiServer, job_known: str) -> None:
    """An older release of the operator created the Job, and stopped before it wrote the status."""
    _, job = await start_attempt(server)
    refused_spec = {**SPEC, "resources": {"gpusPerNode": 0, "memory": 4}}
    server.put(FINETUNEJOB, {**server.finetunejob, "spec": refused_spec, "status": {}})
    process = OperatorProcess(server)
    observer = process.reconciler._observer
    if job_known == "later":
        observer._read_facts_from_cache(KEY)
        acceptance = observer.states[KEY].acceptance
        assert isinstance(acceptance, RefusedSpec) and acceptance.is_final
    process.cache.put_job(job)
    await process.reconcile()
    assert isinstance(observer.states[KEY].acceptance, AcceptedSpec)
    process.cache.put_job(replace(job, version=10**6, failed_at=job.created_at))
    for _ in range(2):
        await process.reconcile()
    assert server.finetunejob["status"]["phase"] == "Recovering"
