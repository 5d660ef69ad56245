"""Complete reconciles: how the operator handles errors of the API server, and which actions it repeats."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from finetune_api.names import Annotation, Reason
from finetune_api.pod import RunConfig
from finetune_api.spec.common import SecretRef
from finetune_operator.kube import Conflict, Forbidden, Invalid, KubeError, NamespaceTerminating, OutcomeUnknown
from finetune_operator.objects import EVENT, FINETUNEJOB, JOB, SERVICE, Kind
from finetune_operator.settings import OperatorConfig, parse_config
from finetune_operator.workqueue import JobKey

from tests.unit.operator.fake_cluster import KEY, FakeApiServer, OperatorProcess, new_server
from tests.unit.operator.samples import SPEC


@pytest.fixture
def server() -> FakeApiServer:
    return new_server()


async def test_conflicts_cause_no_additional_events(server: FakeApiServer) -> None:
    process = OperatorProcess(server)
    for _ in range(3):
        body = server.finetunejob
        server.put(FINETUNEJOB, {**body, "metadata": {**body["metadata"], "labels": {"edited": "again"}}})
        with pytest.raises(Conflict):
            await process.reconcile()
    process.refresh()
    await process.reconcile()
    assert server.event_counts() == {Reason.ATTEMPT_STARTED: 1}
    assert server.count("create", EVENT) == 1


async def test_deleted_job_is_dropped_before_the_watch_reports_its_deletion(server: FakeApiServer) -> None:
    process = OperatorProcess(server)
    del server.objects[FINETUNEJOB.plural, "run"]
    await process.work()
    assert server.count("update", FINETUNEJOB) == 1
    assert process.cache.list_keys() == []
    assert process.queue.seconds_until_due() is None


async def test_nothing_is_retried_in_a_terminating_namespace(server: FakeApiServer, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(verb: str, kind: Kind) -> None:
        if verb == "create":
            raise NamespaceTerminating(verb, kind, "run-1", 403, "Forbidden", "namespace team is being terminated")

    server.before_request = refuse
    process = OperatorProcess(server)
    await process.work()
    assert process.queue.seconds_until_due() is None
    assert server.requests == [("create", JOB.plural)]
    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


async def test_worker_yields_to_the_event_loop_between_reconciles_without_requests(server: FakeApiServer) -> None:
    process = OperatorProcess(server)
    keys = [JobKey("team", f"gone{number}") for number in range(100)]
    for key in keys:
        process.queue.add(key)
    yield_count = 0
    worker_task = asyncio.create_task(process.reconciler.work())
    while not process.queue.is_idle:
        yield_count += 1
        await asyncio.sleep(0)
    worker_task.cancel()
    assert server.requests == []
    assert yield_count >= len(keys)


async def test_unknown_error_code_is_logged_in_one_line(server: FakeApiServer, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(verb: str, kind: Kind) -> None:
        raise KubeError(verb, kind, "run-1", 401, "Unauthorized", "Unauthorized")

    server.before_request = refuse
    process = OperatorProcess(server)
    assert await process.reconciler.reconcile_one(KEY) == "unavailable"
    assert [record for record in caplog.records if record.exc_info] == []
    assert "401 Unauthorized" in caplog.text


# Creating an attempt

POLICY_MESSAGE = "jobs.batch \"run-1\" is forbidden: ValidatingAdmissionPolicy 'gpus' with binding 'gpus' denied request: no cost centre"
WEBHOOK_MESSAGE = 'admission webhook "validate.example.com" denied the request: no cost centre'
WEBHOOK_DOWN_MESSAGE = 'Internal error occurred: failed calling webhook "validate.example.com": no endpoints available, no cost centre'


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [(Invalid, 422, POLICY_MESSAGE), (Invalid, 400, WEBHOOK_MESSAGE), (Forbidden, 403, WEBHOOK_MESSAGE), (OutcomeUnknown, 500, WEBHOOK_DOWN_MESSAGE)],
    ids=["policy 422", "webhook 400", "webhook 403", "webhook down 500"],
)
async def test_job_refused_by_admission_waits_and_quotes_the_policy(
    server: FakeApiServer, error: type[KubeError], code: int, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An admission policy may refuse a Job with any status code. The job waits and does not fail, because its spec is valid."""

    def refuse(verb: str, kind: Kind) -> None:
        if (verb, kind) == ("create", JOB):
            raise error(verb, kind, "run-1", code, "", message)

    server.before_request = refuse
    process = OperatorProcess(server)
    await process.reconcile()
    pods_ready = server.condition("PodsReady")
    assert (pods_ready["status"], pods_ready["reason"]) == ("False", Reason.FORBIDDEN_BY_POLICY)
    assert "no cost centre" in pods_ready["message"]
    assert server.condition("Accepted")["status"] == "True"
    assert process.queue.seconds_until_due() is not None
    server.before_request = lambda verb, kind: None
    await process.reconcile()
    assert (JOB.plural, "run-1") in server.objects
    assert [record for record in caplog.records if record.exc_info] == []


@pytest.mark.parametrize(
    ("is_name_taken", "reason", "message"),
    [(True, Reason.CHILDREN_CONFLICT, "Service run-1 exists"), (False, Reason.QUOTA_EXCEEDED, "create Service run-1: exceeded quota")],
    ids=["name taken", "quota"],
)  # fmt: skip
async def test_missing_service_of_a_gang_is_a_blocking_condition(
    server: FakeApiServer, is_name_taken: bool, reason: Reason, message: str
) -> None:
    """Pods cannot resolve each other's names without the Service. Nevertheless the operator records the attempt if the Service cannot be created."""

    def refuse(verb: str, kind: Kind) -> None:
        if (verb, kind) == ("create", SERVICE):
            raise Forbidden(verb, kind, "run-1", 403, "Forbidden", "exceeded quota: tight")

    server.finetunejob["spec"] = {**SPEC, "resources": {"nodes": 2, "gpusPerNode": 0}}
    if is_name_taken:
        server.put(SERVICE, {"metadata": {"name": "run-1", "namespace": "team"}})
    else:
        server.before_request = refuse
    process = OperatorProcess(server)
    for _ in range(2):
        await process.reconcile()
        pods_ready = server.condition("PodsReady")
        assert (pods_ready["status"], pods_ready["reason"]) == ("False", reason)
        assert message in pods_ready["message"]
    assert server.finetunejob["status"]["attempts"][0]["number"] == 1
    assert process.queue.seconds_until_due() is not None
    server.before_request = lambda verb, kind: None
    server.objects.pop((SERVICE.plural, "run-1"), None)
    await process.reconcile()
    assert server.condition("PodsReady")["reason"] == Reason.PODS_NOT_READY


def make_config(image: str, **storage: Any) -> OperatorConfig:
    return parse_config({"storage": storage, "trainer": {"image": image}, "retry": {"baseSeconds": 0.01}}, "test")


async def test_later_attempts_keep_the_store_and_the_defaults_of_the_first_attempt(server: FakeApiServer) -> None:
    """The operator's configuration may change between two attempts. Of the changed values, later attempts use only the new image and the new storage
    credentials.
    """
    server.finetunejob["spec"] = {name: group for name, group in SPEC.items() if name != "storage"}
    storage_fields = {"credentialsSecretRef": {"name": "old"}}
    first_operator = OperatorProcess(server, make_config("trainer:1", uri="s3://one/models", endpoint="https://a.example.com", **storage_fields))
    for _ in range(2):
        await first_operator.reconcile()
    (job,) = first_operator.cache.get(KEY).jobs.values()
    server.finetunejob["status"]["resolved"]["defaults"]["training.learningRate"] = 0.125
    other_operator = OperatorProcess(server, make_config("trainer:2", uri="s3://two/models", endpoint="https://b.example.com"))
    other_operator.cache.put_job(job)
    await other_operator.reconcile()
    resolved = server.finetunejob["status"]["resolved"]
    assert resolved["image"] == "trainer:1"
    assert resolved["defaults"]["storage.uri"] == "s3://one/models"
    other_operator.cache.put_job(replace(job, version=10**6, failed_at=job.created_at))
    for _ in range(3):
        await other_operator.reconcile()
    second_template = server.objects[JOB.plural, "run-2"]["spec"]["template"]
    run = RunConfig.model_validate_json(second_template["metadata"]["annotations"][Annotation.RUN_CONFIG])
    assert run.storage.uri.startswith("s3://one/models/team/run/")
    assert run.storage.endpoint == "https://a.example.com"
    assert run.spec.storage.credentials_secret_ref == SecretRef(name="old")
    assert run.spec.training.learning_rate == 0.125
    assert second_template["spec"]["containers"][0]["image"] == "trainer:2"
    assert server.finetunejob["status"]["resolved"]["image"] == "trainer:2"
