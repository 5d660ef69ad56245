"""The GPU-hours and the cost of a job, planned and spent, and the limit `policy.maxCost`. All functions are pure.

The price is that of the node pool when the job started. A pod's GPUs cost money from the time when the pod gets a node to its end.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_api.gpus import GPU_TYPES, gpu_of_device
from finetune_api.memory.plan import GPUS_PATH, POOL_PATH
from finetune_api.names import FailureClass, Reason
from finetune_api.rules import gpus_per_node, gpus_per_pod
from finetune_api.status import Failure, JobCost, RunPlan
from finetune_api.time_plan import plan_cost, plan_time

from finetune_operator.facts import Facts
from finetune_operator.plan import AttemptEnd
from finetune_operator.policies.choices import chosen_values
from finetune_operator.policies.timeouts import seconds_between
from finetune_operator.policies.verdict import AcceptedSpec
from finetune_operator.settings import NodePool
from finetune_operator.views import PodView

SECONDS_PER_HOUR = 3600.0
MAX_BUDGET_SECONDS = 10 * 365 * 86400.0
"""Longest computed time, so that a low price does not lead to a date that cannot be represented."""


def compute_cost(facts: Facts, attempt_end: AttemptEnd | None) -> JobCost | None:
    """Return the cost until the newest report or the end of the current attempt. Without either, return the cost in the status."""
    old, price = facts.job.status.cost, _price(facts)
    if price is None:
        return old
    if attempt_end is None and facts.live_report is None:
        return old or (_job_cost(price, facts.config.currency, 0.0, 0.0) if facts.current_job is not None else None)
    until = attempt_end.time if attempt_end is not None else facts.live_report.time if facts.live_report else facts.now
    seconds = _gpu_seconds(facts, until)
    return _job_cost(price, old.currency if old else facts.config.currency, seconds, seconds if attempt_end is not None else _ended_gpu_seconds(facts))


def _job_cost(price: float, currency: str, gpu_seconds: float, ended_gpu_seconds: float) -> JobCost:
    gpu_hours = gpu_seconds / SECONDS_PER_HOUR
    amount = round(gpu_hours * price, 2)
    return JobCost(
        gpu_hours=round(gpu_hours, 4), amount=amount, currency=currency, display=f"{amount:.2f} {currency}", price_per_gpu_hour=price,
        ended_gpu_seconds=round(ended_gpu_seconds, 3),
    )  # fmt: skip


def plan_with_cost(plan: RunPlan | None, facts: Facts, device: str | None) -> RunPlan | None:
    """Add the planned time and cost to a plan with the planned work. `device`: the name of the GPU that the trainer reported."""
    gpus, pool = _planned_gpus(plan, facts)
    gpu = GPU_TYPES[pool.gpu_type] if pool is not None and pool.gpu_type is not None else gpu_of_device(device or "")
    if plan is None or plan.work is None or gpu is None or gpus == 0:
        return plan
    time, price, old = plan_time(plan.work, gpu, gpus), _price(facts, pool), facts.job.status.cost
    server_gpus = (gpus_per_pod(facts.spec) - gpus_per_node(facts.spec)) * (facts.spec.resources.nodes or 1)
    cost = plan_cost(time, gpus + server_gpus, price, old.currency if old else facts.config.currency) if price is not None else plan.cost
    return plan.model_copy(update={"time": time, "cost": cost})


def budget_message(facts: Facts, moment: datetime) -> str:
    """Return a message if `policy.maxCost` is spent at this moment, otherwise an empty string."""
    limit, price = facts.max_cost, _price(facts)
    if limit is None or price is None or _gpu_seconds(facts, moment) / SECONDS_PER_HOUR * price < limit:
        return ""
    return f"policy.maxCost {limit:g} {_currency(facts)} is spent"


def budget_spent_at(facts: Facts) -> datetime | None:
    """Return when `policy.maxCost` will be spent, or None if there is no limit or no pod costs anything now."""
    limit, price = facts.max_cost, _price(facts)
    pods_with_node = [pod for pod in facts.attempt_pods if pod.scheduled_at is not None and _end_of(pod) is None]
    rate = len(pods_with_node) * gpus_per_pod(facts.spec) * (price or 0.0) / SECONDS_PER_HOUR
    if limit is None or price is None or rate <= 0:
        return None
    spent = _gpu_seconds(facts, facts.now) / SECONDS_PER_HOUR * price
    return facts.now + timedelta(seconds=min(max(0.0, (limit - spent) / rate), MAX_BUDGET_SECONDS))


def too_expensive_message(facts: Facts) -> str:
    """Return a message if the lower bound of the planned cost is above `policy.maxCost`, otherwise an empty string. Only a job without attempts is refused.

    The plan counts all steps. A job that begins at a checkpoint of another job, or that may stop early, can cost less, so it is not refused.
    """
    plan, limit = facts.job.status.plan, facts.max_cost
    if facts.spec.checkpoint.resume not in (None, "auto", "never") or facts.spec.training.early_stopping is not None:
        return ""
    cost = plan.cost if plan is not None else None
    if limit is None or cost is None or facts.job.status.attempts or cost.lower <= limit:
        return ""
    return (
        f"the optimizer steps alone cost at least {cost.lower:g} {cost.currency} (expected: {cost.expected:g}), "
        f"but policy.maxCost is {limit:g}"
    )


def budget_failure(message: str) -> Failure:
    """Return the failure of a job that has spent `policy.maxCost`, or whose planned cost is above it even at the lower bound."""
    hint = "raise policy.maxCost, or train fewer steps; if the job has a checkpoint, a new FineTuneJob can resume from it"
    return Failure(class_=FailureClass.USER, code=Reason.BUDGET_EXCEEDED, message=message, hint=hint)


def _currency(facts: Facts) -> str:
    cost = facts.job.status.cost
    return cost.currency if cost is not None else facts.config.currency


def _pool(facts: Facts) -> NodePool | None:
    return facts.acceptance.pool if isinstance(facts.acceptance, AcceptedSpec) else None


def _planned_gpus(plan: RunPlan | None, facts: Facts) -> tuple[int, NodePool | None]:
    """Return the number of GPUs and the pool of a plan. New choices may not be in the accepted spec yet."""
    chosen = chosen_values(plan)
    pool = facts.config.find_pool(str(chosen[POOL_PATH])) if POOL_PATH in chosen else None
    return int(chosen.get(GPUS_PATH, gpus_per_node(facts.spec))) * (facts.spec.resources.nodes or 1), pool or _pool(facts)


def _price(facts: Facts, chosen_pool: NodePool | None = None) -> float | None:
    """The price of a GPU-hour when the job started. Before that: the current price of the pool."""
    recorded, pool = facts.job.status.cost, chosen_pool or _pool(facts)
    if recorded is not None:
        return recorded.price_per_gpu_hour
    return pool.price_per_gpu_hour if pool is not None and _gpus(facts) else None


def _gpus(facts: Facts) -> int:
    return gpus_per_pod(facts.spec) * (facts.spec.resources.nodes or 1)


def _ended_gpu_seconds(facts: Facts) -> float:
    recorded = facts.job.status.cost
    return recorded.ended_gpu_seconds if recorded is not None else 0.0


def _gpu_seconds(facts: Facts, until: datetime) -> float:
    """GPU-seconds of all attempts. At least the recorded value, because pods can be removed while the operator does not run."""
    recorded = facts.job.status.cost
    current = sum(seconds_between(pod.scheduled_at, min(until, _end_of(pod) or until)) for pod in facts.attempt_pods)
    known = recorded.gpu_hours * SECONDS_PER_HOUR if recorded is not None else 0.0
    return max(known, _ended_gpu_seconds(facts) + current * gpus_per_pod(facts.spec))


def _end_of(pod: PodView) -> datetime | None:
    return (pod.terminated.finished_at if pod.terminated else None) or (pod.deletion_timestamp or pod.removed_at if pod.is_deleted else None)
