"""Planned and spent costs, and `policy.maxCost`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from finetune_api.names import Reason
from finetune_api.status import CostPlan, FineTuneJobStatus, JobCost, RunPlan, WorkPlan
from finetune_operator.costs import add_planned_cost, compute_cost, predict_budget_end
from finetune_operator.decide import decide
from finetune_operator.facts import Facts
from finetune_operator.plan import ActionResult, Outcome, Situation, Termination
from finetune_operator.policies.acceptance import AcceptedSpec, FirstAttempt, RefusedSpec, accept
from finetune_operator.report import compute_status
from finetune_operator.settings import OperatorConfig, SettingsError, parse_config
from finetune_operator.views import TerminatedState, mark_deleted

from tests.unit.operator.samples import at, facts, iso_time, job, pod, report, spec, status


def make_config(**pool: Any) -> OperatorConfig:
    pools = [{"name": "h100", "default": True, "gpusPerNode": 8, "pricePerGpuHour": 3.6, **pool}]
    return parse_config({"nodePools": pools, "currency": "EUR"}, "test")


CONFIG = make_config(gpuType="h100-80gb")
RUNNING_STATUS = status(attempt=1, attempts=[{"number": 1, "startTime": iso_time(0)}])
WORK = WorkPlan(steps=1, tokens=1, petaflop=0.989 * 360, traffic_terabytes=0)


def make_gpu_spec(**policy: Any) -> Any:
    return spec(resources={"gpusPerNode": 2, "nodes": 2}, policy=policy)


def make_gpu_pods(**fields: Any) -> list[Any]:
    return [pod(index=index, scheduled_at=at(10 + index), running_since=at(20), **fields) for index in (0, 1)]


def make_ended_pods(ended_seconds: float, code: int = 74, **fields: Any) -> list[Any]:
    terminated = TerminatedState(code, "Error", "", at(ended_seconds), at(20))
    return [pod(index=index, scheduled_at=at(10), phase="Failed", is_ready=False, terminated=terminated, **fields) for index in (0, 1)]


def make_running_facts(
    now: float, *, old_status: FineTuneJobStatus = RUNNING_STATUS, max_cost: float | None = None, config: OperatorConfig = CONFIG, **fields: Any
) -> Facts:
    """Return facts about a running job on two nodes, with two GPUs on each node. Each GPU costs 0.001 EUR per second."""
    policy = {} if max_cost is None else {"maxCost": max_cost}
    facts_fields = {"pods": make_gpu_pods(), "last_report": report(), "reported_at": at(now), **fields}
    return facts(spec=make_gpu_spec(**policy), status=old_status, jobs=[job(pod_count=2)], now=at(now), config=config, **facts_fields)


def test_pods_cost_money_only_while_they_have_a_node() -> None:
    cost = compute_cost(make_running_facts(110), None)
    assert cost == JobCost(gpu_hours=round(2 * (100 + 99) / 3600, 4), amount=0.4, currency="EUR", display="0.40 EUR", price_per_gpu_hour=3.6)
    assert compute_cost(make_running_facts(110, config=make_config(pricePerGpuHour=None)), None) is None
    facts_without_report = make_running_facts(110, last_report=None)
    assert compute_cost(facts_without_report, None) == JobCost(currency="EUR", display="0.00 EUR", price_per_gpu_hour=3.6)


def test_cost_includes_ended_attempts_and_keeps_the_price_of_the_start() -> None:
    ended_pods = make_ended_pods(60)
    failed_facts = facts(spec=make_gpu_spec(), status=RUNNING_STATUS, jobs=[job(pod_count=2, failed_at=at(61))], pods=ended_pods, now=at(61), config=CONFIG)
    first_status = compute_status(failed_facts, decide(failed_facts), ActionResult())
    assert first_status.cost is not None and (first_status.cost.ended_gpu_seconds, first_status.cost.amount) == (200.0, 0.2)
    attempt_records = [*first_status.to_wire()["attempts"], {"number": 2, "startTime": iso_time(100)}]
    old_status = status(attempt=2, attempts=attempt_records, cost=first_status.cost.to_wire())
    dearer_config = make_config(pricePerGpuHour=36)
    second_pods = [pod(2, uid="pod-1-0", scheduled_at=at(110))]
    repeated_facts = facts(
        spec=make_gpu_spec(), status=old_status, jobs=[job(2, pod_count=2)], pods=second_pods, now=at(210), config=dearer_config,
        last_report=report(), reported_at=at(210)
    )  # fmt: skip
    assert compute_cost(repeated_facts, None) == JobCost(
        gpu_hours=round(400 / 3600, 4), amount=0.4, currency="EUR", display="0.40 EUR", price_per_gpu_hour=3.6, ended_gpu_seconds=200.0
    )
    facts_without_pods = facts(
        spec=make_gpu_spec(), status=old_status, jobs=[job(2, pod_count=2)], now=at(210), config=dearer_config, last_report=report(), reported_at=at(210)
    )  # fmt: skip
    cost = compute_cost(facts_without_pods, None)
    assert cost is not None and cost.amount == 0.2


def test_time_and_cost_are_planned_from_the_reported_work() -> None:
    plan = add_planned_cost(RunPlan(work=WORK), make_running_facts(30), None)
    assert plan is not None and plan.time is not None and plan.cost is not None
    assert (plan.time.expected_seconds, plan.cost) == (275, CostPlan(gpu_hours=0.306, expected=1.1, lower=0.58, upper=4.8, currency="EUR"))
    typeless_config = make_config()
    assert add_planned_cost(RunPlan(work=WORK), make_running_facts(30, config=typeless_config), None) == RunPlan(work=WORK), "the GPU type is not known"
    assert add_planned_cost(RunPlan(work=WORK), make_running_facts(30, config=typeless_config), "NVIDIA H100 80GB HBM3") == plan
    assert add_planned_cost(None, make_running_facts(30), None) is None


def test_running_job_ends_when_its_maximum_cost_is_spent() -> None:
    assert decide(make_running_facts(134, max_cost=0.5)).termination is None
    assert predict_budget_end(make_running_facts(100, max_cost=0.5)) == at(135.5)
    assert decide(make_running_facts(100, max_cost=0.5)).reconcile_at == at(135.5)
    assert predict_budget_end(make_running_facts(100)) is None and predict_budget_end(make_running_facts(100, max_cost=0.5, pods=[])) is None
    plan = decide(make_running_facts(136, max_cost=0.5))
    assert plan.termination == Termination(Reason.BUDGET_EXCEEDED, "policy.maxCost 0.5 EUR is spent")

    old_status = compute_status(make_running_facts(136, max_cost=0.5), plan, ActionResult())
    deleted_pods = make_ended_pods(140, 75, is_deleted=True)
    ended_facts = facts(spec=make_gpu_spec(maxCost=0.5), status=old_status, pods=deleted_pods, now=at(141), config=CONFIG)
    end = decide(ended_facts).job_end
    assert end is not None and (end.outcome, end.reason) == (Outcome.FAILED, Reason.BUDGET_EXCEEDED)
    assert end.failure is not None and end.failure.message == "policy.maxCost 0.5 EUR is spent"


def test_job_ends_if_its_maximum_cost_was_spent_while_the_operator_was_stopped() -> None:
    ended_pods = make_ended_pods(300)
    failed_facts = make_running_facts(400, max_cost=0.5, pods=ended_pods)
    ended_job = job(pod_count=2, failed_at=at(301))
    plan = decide(facts(spec=make_gpu_spec(maxCost=0.5), status=RUNNING_STATUS, jobs=[ended_job], pods=failed_facts.pods, now=at(400), config=CONFIG))
    assert plan.job_end is not None and plan.job_end.reason is Reason.BUDGET_EXCEEDED


@pytest.mark.parametrize(("max_cost", "is_refused"), [(0.57, True), (0.58, False), (None, False)])
def test_job_does_not_start_if_even_the_lowest_planned_cost_is_too_high(max_cost: float | None, is_refused: bool) -> None:
    planned_status = FineTuneJobStatus(plan=RunPlan(work=WORK, cost=CostPlan(gpu_hours=0.3, lower=0.58, expected=1.1, upper=4.8, currency="EUR")))
    policy = {} if max_cost is None else {"maxCost": max_cost}
    plan = decide(facts(spec=make_gpu_spec(**policy), status=planned_status, config=CONFIG))
    assert (plan.situation is Situation.FINISHED) is is_refused
    if is_refused:
        assert plan.job_end is not None and plan.job_end.failure is not None
        assert plan.job_end.failure.message == "the optimizer steps alone cost at least 0.58 EUR (expected: 1.1), but policy.maxCost is 0.57"


def test_job_with_a_maximum_cost_waits_if_its_pool_has_no_price() -> None:
    refusal = accept(make_gpu_spec(maxCost=5), make_config(pricePerGpuHour=None))
    assert isinstance(refusal, RefusedSpec)
    assert (refusal.reason, refusal.is_final, refusal.message) == (
        Reason.PRICE_UNKNOWN, False, "spec.policy.maxCost is 5, but node pool h100 has no pricePerGpuHour"
    )  # fmt: skip
    refusal_without_pool = accept(make_gpu_spec(maxCost=5), parse_config({}, "test"))
    assert isinstance(refusal_without_pool, RefusedSpec) and "the job uses no node pool" in refusal_without_pool.message
    refusal_without_gpus = accept(spec(policy={"maxCost": 5}), CONFIG)
    assert isinstance(refusal_without_gpus, RefusedSpec) and "policy.maxCost: maxCost has no effect" in refusal_without_gpus.message


def test_unknown_gpu_type_of_a_pool_is_refused() -> None:
    with pytest.raises(SettingsError, match="the type h100 is not known: write one of t4-16gb"):
        make_config(gpuType="h100")


@pytest.mark.parametrize(
    "group",
    [
        {"checkpoint": {"resume": "s3://models/ft/team/old/u/checkpoints/step-00000600"}},
        {"training": {"earlyStopping": {"patience": 2}}, "dataset": {"validation": "s3://data/v.jsonl"}},
    ],
    ids=["begins at a checkpoint", "may stop early"],
)
def test_a_job_that_may_train_fewer_steps_than_planned_starts(group: dict[str, Any]) -> None:
    planned_status = FineTuneJobStatus(plan=RunPlan(work=WORK, cost=CostPlan(gpu_hours=0.3, lower=0.58, expected=1.1, upper=4.8, currency="EUR")))
    job_spec = spec(resources={"gpusPerNode": 2, "nodes": 2}, policy={"maxCost": 0.5}, **group)
    assert decide(facts(spec=job_spec, status=planned_status, config=CONFIG)).situation is not Situation.FINISHED


def test_maximum_cost_that_is_set_later_without_a_price_is_only_noted() -> None:
    acceptance = accept(make_gpu_spec(maxCost=5), make_config(pricePerGpuHour=None), FirstAttempt())
    assert isinstance(acceptance, AcceptedSpec)
    assert acceptance.notes[-1] == "a new job would be refused: spec.policy.maxCost is 5, but node pool h100 has no pricePerGpuHour"


def test_pod_that_was_removed_unnoticed_costs_nothing_after_its_removal() -> None:
    running_pod, removed_pod = make_gpu_pods()
    pods = [running_pod, replace(mark_deleted(removed_pod), removed_at=at(60))]
    cost = compute_cost(make_running_facts(110, pods=pods), None)
    assert cost is not None and cost.gpu_hours == round(2 * (100 + 49) / 3600, 4)
