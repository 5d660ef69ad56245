"""Cost, `policy.maxCost` and goodput of jobs on a real API server."""

from __future__ import annotations

from typing import Any

import pytest
from finetune_api.names import ExitCode, Reason
from finetune_api.pod import TerminationMessage

from tests.integration.operator.rig import Rig


@pytest.fixture(scope="session")
def config(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with a pool whose GPUs cost 1 EUR per second."""
    pools = [{"name": "h100", "default": True, "gpusPerNode": 8, "gpuType": "h100-80gb", "pricePerGpuHour": 3600}]
    return {**config, "nodePools": pools, "currency": "EUR"}


async def test_a_job_that_reaches_its_cost_limit_saves_a_checkpoint_and_fails(world: Rig) -> None:
    await world.create(resources={"gpusPerNode": 2}, policy={"maxCost": 4})
    await world.report_training("run-1", step=40, timeUse={"steps": 0.5})
    status = await world.wait_for_phase("Failed")
    assert status["failure"]["code"] == "BudgetExceeded"
    assert status["failure"]["message"] == "policy.maxCost 4 EUR is spent"
    attempt = status["attempts"][0]
    assert (attempt["reason"], attempt["exitCode"], len(status["attempts"])) == (Reason.BUDGET_EXCEEDED, ExitCode.PREEMPTED_SAVED, 1)
    cost = status["cost"]
    assert cost["amount"] >= 4 and cost["display"] == f"{cost['amount']:.2f} EUR"
    assert cost["gpuHours"] * 3600 == pytest.approx(cost["amount"], abs=0.4)


async def test_the_cost_limit_of_a_running_job_can_be_lowered(world: Rig) -> None:
    await world.create(resources={"gpusPerNode": 1}, policy={"maxCost": 100_000})
    await world.report_training("run-1")
    await world.wait_until("the cost", lambda: world.status().get("cost"))
    await world.patch({"policy": {"maxCost": 1}})
    status = await world.wait_for_phase("Failed")
    assert status["failure"]["code"] == "BudgetExceeded"


async def test_a_prepared_job_that_is_surely_too_expensive_starts_no_attempt(world: Rig) -> None:
    await world.create(resources={"gpusPerNode": 1}, policy={"maxCost": 500}, prepare={"strategy": "always"})
    work = {"steps": 100, "tokens": 1000, "petaflop": 0.989 * 620, "trafficTerabytes": 0}
    message = TerminationMessage.model_validate({"plan": {"work": work}, "data": {"tokens": 1000}})
    await world.kubelet.end(await world.wait_for_pod("run-prepare1", 0, "Running"), 0, message)
    status = await world.wait_for_phase("Failed")
    assert status["failure"]["code"] == "BudgetExceeded"
    assert status["failure"]["message"] == "the optimizer steps alone cost at least 1000 EUR (expected: 1723), but policy.maxCost is 500"
    assert status["plan"]["time"] == {"expectedSeconds": 1723, "lowerSeconds": 1000, "upperSeconds": 5167, "calibrated": False}
    assert "attempts" not in status or status["attempts"] == []


async def test_the_goodput_times_of_two_attempts_sum_to_the_total_time(world: Rig) -> None:
    await world.create(resources={"gpusPerNode": 1})
    await world.report_training("run-1", step=40, timeUse={"starting": 0.1, "steps": 0.2})
    await world.wait_until("the first report", lambda: world.status().get("goodput"))
    await world.kubelet.end(await world.wait_for_pod("run-1", 0, "Running"), ExitCode.SIGKILL)
    await world.report_training("run-2", step=35, resumedFromStep=30, timeUse={"starting": 0.1})

    def read_goodput_of_two_attempts() -> Any:
        goodput = world.status().get("goodput") or {}
        return goodput if len(goodput.get("attempts", [])) == 2 else None

    goodput = await world.wait_until("the time of the second attempt", read_goodput_of_two_attempts)
    assert sum(goodput["parts"].values()) == pytest.approx(goodput["wallSeconds"], abs=0.02)
    assert sum(attempt["wallSeconds"] for attempt in goodput["attempts"]) == pytest.approx(goodput["wallSeconds"], abs=0.02)
    assert min(goodput["parts"].values()) > 0


async def test_a_job_with_a_cost_limit_waits_if_its_pool_has_no_price(world: Rig) -> None:
    await world.create(resources={"gpusPerNode": 1, "gpuResource": "example.com/gpu"}, policy={"maxCost": 1})
    accepted_condition = await world.wait_until("the condition", lambda: world.condition("Accepted"))
    assert (accepted_condition["status"], accepted_condition["reason"]) == ("False", "PriceUnknown")
