"""Planned and spent costs, and `policy.maxCost`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from finetune_api.names import Reason
from finetune_api.status import CostPlan, FineTuneJobStatus, JobCost, RunPlan, WorkPlan
from finetune_operator.costs import budget_spent_at, compute_cost, plan_with_cost
from finetune_operator.decide import decide
from finetune_operator.facts import Facts
from finetune_operator.plan import ActionResult, Outcome, Situation, Termination
from finetune_operator.policies.acceptance import AcceptedSpec, FirstAttempt, RefusedSpec, accept
from finetune_operator.report import compute_status
from finetune_operator.settings import OperatorConfig, SettingsError, parse_config
from finetune_operator.views import TerminatedState, as_deleted

from tests.unit.operator.samples import at, facts, iso_time, job, pod, report, spec, status


def config_with(**pool: Any) -> OperatorConfig:
    pools = [{"name": "h100", "default": True, "gpusPerNode": 8, "pricePerGpuHour": 3.6, **pool}]
    return parse_config({"nodePools": pools, "currency": "EUR"}, "test")


CONFIG = config_with(gpuType="h100-80gb")
RUNNING = status(attempt=1, attempts=[{"number": 1, "startTime": iso_time(0)}])
WORK = WorkPlan(steps=1, tokens=1, petaflop=0.989 * 360, traffic_terabytes=0)


def gpu_spec(**policy: Any) -> Any:
    return spec(resources={"gpusPerNode": 2, "nodes": 2}, policy=policy)


def gpu_pods(**fields: Any) -> list[Any]:
    return [pod(index=index, scheduled_at=at(10 + index), running_since=at(20), **fields) for index in (0, 1)]


def ended_pods(ended: float, code: int = 74, **fields: Any) -> list[Any]:
    terminated = TerminatedState(code, "Error", "", at(ended), at(20))
    return [pod(index=index, scheduled_at=at(10), phase="Failed", is_ready=False, terminated=terminated, **fields) for index in (0, 1)]


def running(now: float, *, old: FineTuneJobStatus = RUNNING, max_cost: float | None = None, config: OperatorConfig = CONFIG, **fields: Any) -> Facts:
    """Facts about a job with 2 x 2 GPUs, each of which costs 0.001 EUR a second."""
    policy = {} if max_cost is None else {"maxCost": max_cost}
    given = {"pods": gpu_pods(), "last_report": report(), "reported_at": at(now), **fields}
    return facts(spec=gpu_spec(**policy), status=old, jobs=[job(nodes=2)], now=at(now), config=config, **given)


def test_the_cost_is_that_of_pods_on_nodes() -> None:
    found = compute_cost(running(110), None)
    assert found == JobCost(gpu_hours=round(2 * (100 + 99) / 3600, 4), amount=0.4, currency="EUR", display="0.40 EUR", price_per_gpu_hour=3.6)
    assert compute_cost(running(110, config=config_with(pricePerGpuHour=None)), None) is None
    without_report = running(110, last_report=None)
    assert compute_cost(without_report, None) == JobCost(currency="EUR", display="0.00 EUR", price_per_gpu_hour=3.6)


def test_ended_attempts_are_added_and_the_price_stays() -> None:
    ended = ended_pods(60)
    failed = facts(spec=gpu_spec(), status=RUNNING, jobs=[job(nodes=2, failed_at=at(61))], pods=ended, now=at(61), config=CONFIG)
    first = compute_status(failed, decide(failed), ActionResult())
    assert first.cost is not None and (first.cost.ended_gpu_seconds, first.cost.amount) == (200.0, 0.2)
    records = [*first.to_wire()["attempts"], {"number": 2, "startTime": iso_time(100)}]
    old = status(attempt=2, attempts=records, cost=first.cost.to_wire())
    dearer = config_with(pricePerGpuHour=36)
    again = facts(spec=gpu_spec(), status=old, jobs=[job(2, nodes=2)], pods=[pod(2, uid="pod-1-0", scheduled_at=at(110))], now=at(210), config=dearer,
                  last_report=report(), reported_at=at(210))  # fmt: skip
    assert compute_cost(again, None) == JobCost(
        gpu_hours=round(400 / 3600, 4), amount=0.4, currency="EUR", display="0.40 EUR", price_per_gpu_hour=3.6, ended_gpu_seconds=200.0
    )
    without_pods = facts(spec=gpu_spec(), status=old, jobs=[job(2, nodes=2)], now=at(210), config=dearer, last_report=report(), reported_at=at(210))
    found = compute_cost(without_pods, None)
    assert found is not None and found.amount == 0.2


def test_time_and_cost_are_planned_from_the_reported_work() -> None:
    plan = plan_with_cost(RunPlan(work=WORK), running(30), None)
    assert plan is not None and plan.time is not None and plan.cost is not None
    assert (plan.time.expected_seconds, plan.cost) == (275, CostPlan(gpu_hours=0.306, expected=1.1, lower=0.58, upper=4.8, currency="EUR"))
    named = config_with()
    assert plan_with_cost(RunPlan(work=WORK), running(30, config=named), None) == RunPlan(work=WORK), "the type of the GPUs is not known"
    assert plan_with_cost(RunPlan(work=WORK), running(30, config=named), "NVIDIA H100 80GB HBM3") == plan
    assert plan_with_cost(None, running(30), None) is None


def test_a_running_job_ends_when_the_limit_is_spent() -> None:
    assert decide(running(134, max_cost=0.5)).termination is None
    assert budget_spent_at(running(100, max_cost=0.5)) == at(135.5)
    assert decide(running(100, max_cost=0.5)).reconcile_at == at(135.5)
    assert budget_spent_at(running(100)) is None and budget_spent_at(running(100, max_cost=0.5, pods=[])) is None
    plan = decide(running(136, max_cost=0.5))
    assert plan.termination == Termination(Reason.BUDGET_EXCEEDED, "policy.maxCost 0.5 EUR is spent")

    known = compute_status(running(136, max_cost=0.5), plan, ActionResult())
    gone = ended_pods(140, 75, is_deleted=True)
    over = facts(spec=gpu_spec(maxCost=0.5), status=known, pods=gone, now=at(141), config=CONFIG)
    end = decide(over).job_end
    assert end is not None and (end.outcome, end.reason) == (Outcome.FAILED, Reason.BUDGET_EXCEEDED)
    assert end.failure is not None and end.failure.message == "policy.maxCost 0.5 EUR is spent"


def test_the_limit_may_pass_while_the_operator_does_not_run() -> None:
    ended = ended_pods(300)
    failed = running(400, max_cost=0.5, pods=ended)
    plan = decide(facts(spec=gpu_spec(maxCost=0.5), status=RUNNING, jobs=[job(nodes=2, failed_at=at(301))], pods=failed.pods, now=at(400), config=CONFIG))
    assert plan.job_end is not None and plan.job_end.reason is Reason.BUDGET_EXCEEDED


@pytest.mark.parametrize(("max_cost", "is_refused"), [(0.57, True), (0.58, False), (None, False)])
def test_a_job_whose_cost_is_surely_too_high_does_not_start(max_cost: float | None, is_refused: bool) -> None:
    planned = FineTuneJobStatus(plan=RunPlan(work=WORK, cost=CostPlan(gpu_hours=0.3, lower=0.58, expected=1.1, upper=4.8, currency="EUR")))
    policy = {} if max_cost is None else {"maxCost": max_cost}
    plan = decide(facts(spec=gpu_spec(**policy), status=planned, config=CONFIG))
    assert (plan.situation is Situation.FINISHED) is is_refused
    if is_refused:
        assert plan.job_end is not None and plan.job_end.failure is not None
        assert plan.job_end.failure.message == "the optimizer steps alone cost at least 0.58 EUR (expected: 1.1), but policy.maxCost is 0.57"


def test_a_limit_without_a_price_waits() -> None:
    refused = accept(gpu_spec(maxCost=5), config_with(pricePerGpuHour=None))
    assert isinstance(refused, RefusedSpec)
    assert (refused.reason, refused.is_final, refused.message) == (
        Reason.PRICE_UNKNOWN, False, "spec.policy.maxCost is 5, but node pool h100 has no pricePerGpuHour"
    )  # fmt: skip
    no_pool = accept(gpu_spec(maxCost=5), parse_config({}, "test"))
    assert isinstance(no_pool, RefusedSpec) and "the job uses no node pool" in no_pool.message
    without_gpus = accept(spec(policy={"maxCost": 5}), CONFIG)
    assert isinstance(without_gpus, RefusedSpec) and "policy.maxCost: maxCost has no effect" in without_gpus.message


def test_an_unknown_type_of_gpu_is_refused() -> None:
    with pytest.raises(SettingsError, match="the type h100 is not known: write one of t4-16gb"):
        config_with(gpuType="h100")


@pytest.mark.parametrize(
    "group",
    [
        {"checkpoint": {"resume": "s3://models/ft/team/old/u/checkpoints/step-00000600"}},
        {"training": {"earlyStopping": {"patience": 2}}, "dataset": {"validation": "s3://data/v.jsonl"}},
    ],
    ids=["begins at a checkpoint", "may stop early"],
)
def test_a_job_that_may_train_fewer_steps_than_planned_starts(group: dict[str, Any]) -> None:
    planned = FineTuneJobStatus(plan=RunPlan(work=WORK, cost=CostPlan(gpu_hours=0.3, lower=0.58, expected=1.1, upper=4.8, currency="EUR")))
    job_spec = spec(resources={"gpusPerNode": 2, "nodes": 2}, policy={"maxCost": 0.5}, **group)
    assert decide(facts(spec=job_spec, status=planned, config=CONFIG)).situation is not Situation.FINISHED


def test_a_limit_that_is_set_on_a_started_job_without_a_price_is_noted() -> None:
    accepted = accept(gpu_spec(maxCost=5), config_with(pricePerGpuHour=None), FirstAttempt())
    assert isinstance(accepted, AcceptedSpec)
    assert accepted.notes[-1] == "a new job would be refused: spec.policy.maxCost is 5, but node pool h100 has no pricePerGpuHour"


def test_a_pod_that_was_removed_unseen_costs_nothing_after_its_removal() -> None:
    running_pod, removed_pod = gpu_pods()
    pods = [running_pod, replace(as_deleted(removed_pod), removed_at=at(60))]
    found = compute_cost(running(110, pods=pods), None)
    assert found is not None and found.gpu_hours == round(2 * (100 + 49) / 3600, 4)
