"""How the operator uses the choices of a job's plan: from which pools a preparation may choose, which choices the operator accepts, and how attempts get
them.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from finetune_api.compatibility import read_spec
from finetune_api.names import Annotation, Origin, Phase
from finetune_api.pod import GpuPool, RunConfig, TerminationMessage
from finetune_api.status import Choice, CostPlan, FineTuneJobStatus, RunPlan, WorkPlan
from finetune_operator.decide import decide
from finetune_operator.objects import FINETUNEJOB, JOB, POD, Object
from finetune_operator.plan import ActionResult
from finetune_operator.policies.acceptance import AcceptedSpec, FirstAttempt, RefusedSpec, accept
from finetune_operator.policies.choices import accept_choices, list_pools_to_choose
from finetune_operator.report import compute_status, reduce_status
from finetune_operator.settings import OperatorConfig, parse_config
from finetune_operator.views import read_job

from tests.unit.operator import samples
from tests.unit.operator.fake_cluster import OperatorProcess, new_server
from tests.unit.operator.samples import at, end_pod, iso_time, pod, spec, status

POOL, GPUS = "resources.nodePool", "resources.gpusPerNode"
MICRO, ACCUMULATION, CHECKPOINTING = "training.batchSizePerDevice", "training.gradientAccumulationSteps", "training.gradientCheckpointing"
POOLS: list[dict[str, Any]] = [
    {"name": "l4", "default": True, "gpusPerNode": 4, "gpuType": "l4-24gb", "pricePerGpuHour": 1},
    {"name": "h100", "gpusPerNode": 8, "gpuType": "h100-80gb", "gpuMemory": "79Gi", "maxNodes": 2, "pricePerGpuHour": 5},
    {"name": "old", "gpusPerNode": 2},
    {"name": "mig", "gpusPerNode": 7, "gpuResource": "nvidia.com/mig-1g.10gb", "gpuMemory": "10Gi"},
]


def make_config(**changes: Any) -> OperatorConfig:
    return parse_config({"trainer": {"image": "r.example.com/t:1"}, "prepare": {"strategy": "auto"}, "nodePools": POOLS, "currency": "EUR", **changes}, "test")


def accept_with_choices(raw_spec: Object, config: OperatorConfig, **choices: Any) -> AcceptedSpec:
    verdict = accept(raw_spec, config, choices={path.replace("__", "."): value for path, value in choices.items()})
    assert isinstance(verdict, AcceptedSpec), verdict
    return verdict


def make_open_spec(**groups: Any) -> Object:
    """Return a spec that does not set the fields whose values the plan may choose."""
    return {name: group for name, group in spec(**groups).items() if name != "resources"} | {name: groups[name] for name in groups if name == "resources"}


def make_choices(**values: Any) -> list[Choice]:
    return [Choice(field=path.replace("__", "."), value=value, reason="because") for path, value in values.items()]


GOOD_CHOICES = {"resources__nodePool": "h100", "training__batchSizePerDevice": 16, "training__gradientAccumulationSteps": 1}


# ---- the pools ----


@pytest.mark.parametrize(
    ("groups", "changes", "expected"),
    [
        ({}, {}, [("l4", 4, True), ("h100", 8, False), ("old", 2, False)]),
        ({"resources": {"nodes": 4}}, {}, [("l4", 4, True), ("old", 2, False)]),
        ({"resources": {"gpusPerNode": 3}}, {}, [("l4", 4, True), ("h100", 8, False)]),
        ({"resources": {"nodePool": "h100"}}, {}, [("l4", 4, False), ("h100", 8, True), ("old", 2, False)]),
        ({"resources": {"gpuResource": "nvidia.com/mig-1g.10gb"}}, {}, [("mig", 7, True)]),
        ({"policy": {"maxCost": 5}}, {}, [("l4", 4, True), ("h100", 8, False)]),
        ({}, {"policy": {"maxGpus": 2}}, [("l4", 2, True), ("h100", 2, False), ("old", 2, False)]),
        ({"resources": {"nodes": 4}}, {"policy": {"maxGpus": 9}}, [("l4", 2, True), ("old", 2, False)]),
        ({}, {"policy": {"nodePools": ["l4"]}}, [("l4", 4, True)]),
        ({"resources": {"gpusPerNode": 0}}, {}, []),
    ],
)
def test_preparation_gets_the_pools_that_the_job_may_use(groups: dict[str, Any], changes: dict[str, Any], expected: list[tuple[str, int, bool]]) -> None:
    raw_spec, config = make_open_spec(**groups), make_config(**changes)
    pools = list_pools_to_choose(read_spec(raw_spec)[0], accept_with_choices(raw_spec, config), config, "team")
    assert [(pool.name, pool.gpus_per_node, pool.is_current) for pool in pools] == expected


def test_gpus_that_the_vllm_server_needs_are_not_offered_for_training() -> None:
    raw_spec = make_open_spec(trainer={"type": "grpo", "grpo": {"rewards": [{"type": "length"}], "generation": {"backend": "vllm", "gpus": 2, "image": "v:1"}}})
    config = make_config(policy={"maxGpus": 6})
    pools = list_pools_to_choose(read_spec(raw_spec)[0], accept_with_choices(make_open_spec(), config), config, "team")
    assert [(pool.name, pool.gpus_per_node) for pool in pools] == [("l4", 2), ("h100", 4)]


def test_memory_of_a_pool_is_the_smaller_of_its_gpu_memory_and_its_gpu_type() -> None:
    pools = list_pools_to_choose(read_spec(make_open_spec())[0], accept_with_choices(make_open_spec(), make_config()), make_config(), "team")
    assert [pool.memory_bytes for pool in pools] == [23034 * 2**20, 79 * 2**30, None]
    assert pools[0] == GpuPool(name="l4", memory_bytes=23034 * 2**20, gpu_type="l4-24gb", price_per_gpu_hour=1, gpus_per_node=4, is_current=True)


# ---- which choices of a preparation are accepted ----


@pytest.mark.parametrize(
    ("reported", "groups", "is_accepted"),
    [
        (GOOD_CHOICES, {}, True),
        ({"resources__gpusPerNode": 4, "training__batchSizePerDevice": 4, "training__gradientAccumulationSteps": 1, "distributed__strategy": "fsdp"}, {}, True),
        ({"training__gradientCheckpointing": "disabled"}, {}, True),
        (GOOD_CHOICES, {"training": {"batchSizePerDevice": 4}}, False),
        (GOOD_CHOICES | {"training__gradientAccumulationSteps": 2}, {}, False),
        (GOOD_CHOICES | {"training__batchSizePerDevice": "many"}, {}, False),
        (GOOD_CHOICES | {"resources__nodePool": "mig"}, {}, False),
        (GOOD_CHOICES | {"resources__nodePool": "none"}, {}, False),
        ({"resources__gpusPerNode": 0}, {}, False),
        ({"resources__gpusPerNode": 16}, {}, False),
        ({"training__learningRate": 1}, {}, False),
        ({"placement__image": "evil"}, {}, False),
        ({"training__batchSizePerDevice": 4, "training__gradientAccumulationSteps": 16}, {"training": {"effectiveBatchSize": 32}}, False),
        ({}, {}, False),
    ],
)
def test_only_values_that_a_user_could_write_are_accepted(reported: dict[str, Any], groups: dict[str, Any], is_accepted: bool) -> None:
    raw_spec, choices = make_open_spec(**groups), make_choices(**reported)
    accepted_choices = accept_choices(choices, read_spec(raw_spec)[0], accept_with_choices(raw_spec, make_config()), make_config(), "team")
    assert accepted_choices == (choices if is_accepted else None)


# ---- the resolved spec ----


def test_an_accepted_spec_has_the_chosen_values_and_the_resources_of_the_chosen_pool() -> None:
    verdict = accept_with_choices(make_open_spec(), make_config(), **GOOD_CHOICES, resources__gpusPerNode=8)
    assert verdict.pool is not None and verdict.pool.name == verdict.spec.resources.node_pool == "h100"
    assert (verdict.spec.training.batch_size_per_device, verdict.spec.resources.processes_per_node, verdict.spec.distributed.strategy) == (16, 8, "ddp")
    assert verdict.choices == {POOL: "h100", MICRO: 16, ACCUMULATION: 1, GPUS: 8}
    assert {path: verdict.defaults[path] for path in verdict.choices} == verdict.choices


def test_job_that_started_without_choices_keeps_its_defaults() -> None:
    first_attempt = FirstAttempt({MICRO: 4, ACCUMULATION: 4})
    verdict = accept(make_open_spec(), make_config(), first_attempt)
    assert isinstance(verdict, AcceptedSpec)
    assert (verdict.choices, verdict.spec.training.batch_size_per_device, verdict.pool and verdict.pool.name) == ({}, 4, "l4")


def test_a_chosen_pool_that_no_longer_exists_lets_the_job_wait() -> None:
    verdict = accept(make_open_spec(), make_config(nodePools=POOLS[:1]), FirstAttempt({}), choices={POOL: "h100"})
    assert isinstance(verdict, RefusedSpec) and (verdict.reason, verdict.is_final) == ("UnknownNodePool", False)


# ---- the status ----


def end_preparation_with_plan(plan: RunPlan | None, raw_spec: Object | None = None, **status_fields: Any) -> tuple[samples.Facts, FineTuneJobStatus]:
    """End a preparation that has reported this plan. Return the facts at its end, and the status that the operator then writes."""
    job = samples.job(0, name="run-prepare1", uid="prepare-1", completed_at=at(50))
    ended_pod = end_pod(pod(0, name="run-prepare1-0-x", uid="p", job_uid="prepare-1"), 0, TerminationMessage(exit_code=0, plan=plan))
    old_status = status(preparation={"number": 1, "startTime": iso_time(0)}, **status_fields)
    job_facts = samples.facts(spec=raw_spec or make_open_spec(), status=old_status, jobs=[job], pods=[ended_pod], now=at(60), config=make_config())
    return job_facts, compute_status(job_facts, decide(job_facts), ActionResult())


WORK = WorkPlan(steps=10, tokens=1000, petaflop=1e6, traffic_terabytes=1)


def test_choices_are_written_with_the_end_of_the_preparation() -> None:
    _, new_status = end_preparation_with_plan(RunPlan(work=WORK, choices=make_choices(**GOOD_CHOICES)))
    assert new_status.plan is not None and new_status.preparation is not None and new_status.preparation.reason == "Prepared"
    assert (new_status.plan.choices, new_status.plan.no_choices) == (make_choices(**GOOD_CHOICES), None)
    assert isinstance(new_status.plan.cost, CostPlan) and new_status.plan.cost.expected == 3900.94, "the price of the chosen pool"
    assert reduce_status(new_status, status()).plan == RunPlan(choices=make_choices(**GOOD_CHOICES))


@pytest.mark.parametrize(
    ("plan", "groups", "status_fields", "reason"),
    [
        (RunPlan(no_choices="no plan for dpo"), {}, {}, "no plan for dpo"),
        (RunPlan(choices=make_choices(training__learningRate=1)), {}, {}, "the preparation reported no usable choices"),
        (None, {}, {}, "the preparation reported no usable choices"),
    ],
)
def test_the_status_says_why_nothing_was_chosen(plan: RunPlan | None, groups: dict[str, Any], status_fields: dict[str, Any], reason: str) -> None:
    _, new_status = end_preparation_with_plan(plan, make_open_spec(**groups), **status_fields)
    assert new_status.plan is not None and (new_status.plan.choices, new_status.plan.no_choices) == (None, reason)


@pytest.mark.parametrize(
    ("groups", "reason"),
    [({"resources": {"gpusPerNode": 0}}, "the job uses no GPU"), ({"prepare": {"strategy": "never"}}, "the job is not prepared")],
)
def test_a_job_without_a_preparation_says_that_its_values_are_the_defaults(groups: dict[str, Any], reason: str) -> None:
    job_facts = samples.facts(spec=make_open_spec(**groups), now=at(60), config=make_config())
    assert compute_status(job_facts, decide(job_facts), ActionResult()).plan is None
    new_status = compute_status(job_facts, decide(job_facts), ActionResult(created_job=samples.job(1)))
    assert new_status.plan == RunPlan(no_choices=reason)


def test_later_reports_do_not_change_the_choices() -> None:
    forged_report = samples.report(plan={"choices": [{"field": POOL, "value": "l4", "reason": "forged"}], "measured": {"memoryBytes": 5}})
    old_plan = {"choices": [choice.to_wire() for choice in make_choices(**GOOD_CHOICES)]}
    old_status = status(attempt=1, attempts=[{"number": 1, "startTime": iso_time(0)}], plan=old_plan)
    job_facts = samples.facts(
        spec=make_open_spec(), status=old_status, jobs=[samples.job(1)], pods=[pod(1)], last_report=forged_report, now=at(60), config=make_config()
    )
    new_status = compute_status(job_facts, decide(job_facts), ActionResult())
    assert new_status.plan is not None and new_status.plan.choices == make_choices(**GOOD_CHOICES)
    assert new_status.plan.measured is not None and new_status.plan.measured.memory_bytes == 5
    facts_without_plan = replace(job_facts, job=replace(job_facts.job, status=old_status.model_copy(update={"plan": None})))
    unchanged_plan = compute_status(facts_without_plan, decide(facts_without_plan), ActionResult()).plan
    assert unchanged_plan is not None and unchanged_plan.choices is None


# ---- complete reconciles ----


def list_jobs(server: Any) -> dict[str, Object]:
    return {name: body for (plural, name), body in server.objects.items() if plural == JOB.plural}


def read_run_config(job: Object) -> RunConfig:
    return RunConfig.model_validate(json.loads(job["spec"]["template"]["metadata"]["annotations"][Annotation.RUN_CONFIG]))


def list_gpu_requests(server: Any) -> list[str]:
    containers = [job["spec"]["template"]["spec"]["containers"][0] for job in list_jobs(server).values()]
    return [name for container in containers for name in container["resources"].get("requests", {}) if "/" in name]


async def end_preparation(server: Any, message: TerminationMessage) -> OperatorProcess:
    """End the preparation of the job `run`. Return a restarted operator that has recorded this end in the status."""
    body = server.objects[JOB.plural, "run-prepare1"]
    is_ok = message.exit_code == 0
    end_condition = {"type": "Complete" if is_ok else "Failed", "status": "True", "lastTransitionTime": iso_time(50)}
    server.put(JOB, body | {"status": {"conditions": [end_condition], **({"completionTime": iso_time(50)} if is_ok else {})}})
    template = body["spec"]["template"]
    container = {"name": template["spec"]["containers"][0]["name"], "state": {"terminated": {
        "exitCode": message.exit_code, "message": message.to_json(), "finishedAt": iso_time(50)
    }}}  # fmt: skip
    owner = {"kind": "Job", "name": "run-prepare1", "uid": body["metadata"]["uid"], "controller": True}
    server.put(POD, {
        "metadata": {
            "name": "run-prepare1-0-x", "namespace": "team", "uid": "pod-p", "creationTimestamp": iso_time(1), "ownerReferences": [owner],
            "labels": template["metadata"]["labels"] | {"batch.kubernetes.io/job-completion-index": "0"},
        },
        "spec": {"nodeName": "node-1"}, "status": {"phase": "Succeeded" if is_ok else "Failed", "containerStatuses": [container]},
    })  # fmt: skip
    process = OperatorProcess(server, make_config())
    process.refresh()
    ended_job = read_job(server.objects[JOB.plural, "run-prepare1"])
    assert ended_job is not None
    process.cache.put_job(ended_job)
    return process


@pytest.mark.parametrize("is_restarted", [False, True])
async def test_the_first_attempt_has_the_chosen_values_even_if_the_operator_restarts(is_restarted: bool) -> None:
    server = new_server()
    server.objects[FINETUNEJOB.plural, "run"]["spec"] = make_open_spec()
    await OperatorProcess(server, make_config()).reconcile()
    assert {pool.name for pool in read_run_config(list_jobs(server)["run-prepare1"]).pools} == {"l4", "h100", "old"} and list_gpu_requests(server) == []
    reported_message = TerminationMessage(exit_code=0, plan=RunPlan(choices=make_choices(**GOOD_CHOICES)))
    process = await end_preparation(server, reported_message)
    await process.reconcile()
    process = OperatorProcess(server, make_config()) if is_restarted else process
    process.refresh()
    await process.reconcile()
    run = read_run_config(list_jobs(server)["run-1"])
    assert {path: (run.spec.value(path), run.origin(path)) for path in (POOL, MICRO, ACCUMULATION)} == {
        POOL: ("h100", Origin.PLAN), MICRO: (16, Origin.PLAN), ACCUMULATION: (1, Origin.PLAN),
    }  # fmt: skip
    assert (run.pools, run.spec.evaluation.batch_size_per_device, list_gpu_requests(server)) == ([], 4, ["nvidia.com/gpu"])
    process = OperatorProcess(server, make_config())  # the restarted operator may defer the status write
    await process.reconcile()
    new_status = server.objects[FINETUNEJOB.plural, "run"]["status"]
    assert (new_status["resolved"]["nodePool"], new_status["resolved"]["effectiveBatch"], new_status["resolved"]["defaults"][MICRO]) == ("h100", 16, 16)


async def test_job_that_fits_in_no_pool_never_requests_a_gpu() -> None:
    server = new_server()
    server.objects[FINETUNEJOB.plural, "run"]["spec"] = make_open_spec()
    await OperatorProcess(server, make_config()).reconcile()
    hint = "write method.type: qlora (5 GB at most)"
    refusal_message = TerminationMessage.model_validate({"class": "User", "code": "DoesNotFit", "message": "too large", "hint": hint, "exitCode": 64})
    process = await end_preparation(server, refusal_message)
    for _ in range(3):
        await process.reconcile()
        process.refresh()
    new_status = FineTuneJobStatus.model_validate(server.objects[FINETUNEJOB.plural, "run"]["status"])
    assert new_status.phase is Phase.FAILED and new_status.failure is not None
    assert (new_status.failure.code, new_status.failure.hint, new_status.failure.class_) == ("DoesNotFit", hint, "User")
    assert list(list_jobs(server)) == ["run-prepare1"] and list_gpu_requests(server) == []
