"""Computes the planned and the spent GPU-hours and cost of a job, and checks the limit `policy.maxCost`. All functions are pure.

The price of a GPU-hour is the node pool's price at the start of the job. A pod's GPUs cost money from the time when the pod gets a node until
the pod ends.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_api.gpus import GPU_TYPES, find_gpu_type
from finetune_api.memory.plan import GPUS_PATH, POOL_PATH
from finetune_api.names import FailureClass, Reason
from finetune_api.rules import gpus_per_node, gpus_per_pod
from finetune_api.status import Failure, JobCost, RunPlan
from finetune_api.time_plan import plan_cost, plan_time

from finetune_operator.facts import Facts
from finetune_operator.plan import AttemptEnd
from finetune_operator.policies.choices import get_chosen_values
from finetune_operator.policies.timeouts import seconds_between
from finetune_operator.policies.verdict import AcceptedSpec
from finetune_operator.settings import NodePool
from finetune_operator.views import PodView

SECONDS_PER_HOUR = 3600.0
MAX_BUDGET_SECONDS = 10 * 365 * 86400.0
"""Maximum of the computed time until the budget is spent.

With a low price, the computed end could otherwise be later than the latest date that Python can represent.
"""


def compute_cost(facts: Facts, attempt_end: AttemptEnd | None) -> JobCost | None:
    """Return the cost until the end of the current attempt, or until its newest report.

    If the attempt has neither an end nor a report, return the cost in the status.
    """
    old_cost, price = facts.job.status.cost, _find_price(facts)
    if price is None:
        return old_cost
    if attempt_end is None and facts.live_report is None:
        return old_cost or (_build_job_cost(price, facts.config.currency, 0.0, 0.0) if facts.current_job is not None else None)
    end_time = attempt_end.ended_at if attempt_end is not None else facts.live_report.received_at if facts.live_report else facts.now
    gpu_seconds = _sum_gpu_seconds(facts, end_time)
    ended_gpu_seconds = gpu_seconds if attempt_end is not None else _get_ended_gpu_seconds(facts)
    return _build_job_cost(price, old_cost.currency if old_cost else facts.config.currency, gpu_seconds, ended_gpu_seconds)


def _build_job_cost(price: float, currency: str, gpu_seconds: float, ended_gpu_seconds: float) -> JobCost:
    gpu_hours = gpu_seconds / SECONDS_PER_HOUR
    amount = round(gpu_hours * price, 2)
    return JobCost(
        gpu_hours=round(gpu_hours, 4), amount=amount, currency=currency, display=f"{amount:.2f} {currency}", price_per_gpu_hour=price,
        ended_gpu_seconds=round(ended_gpu_seconds, 3),
    )  # fmt: skip


def add_planned_cost(plan: RunPlan | None, facts: Facts, device_name: str | None) -> RunPlan | None:
    """Add the planned time and cost to a plan that contains the planned work. `device_name`: the GPU's name in the trainer's report."""
    gpu_count, pool = _find_planned_gpu_count_and_pool(plan, facts)
    gpu_type = GPU_TYPES[pool.gpu_type] if pool is not None and pool.gpu_type is not None else find_gpu_type(device_name or "")
    if plan is None or plan.work is None or gpu_type is None or gpu_count == 0:
        return plan
    time, price, old_cost = plan_time(plan.work, gpu_type, gpu_count), _find_price(facts, pool), facts.job.status.cost
    server_gpu_count = (gpus_per_pod(facts.spec) - gpus_per_node(facts.spec)) * (facts.spec.resources.nodes or 1)
    cost = plan_cost(time, gpu_count + server_gpu_count, price, old_cost.currency if old_cost else facts.config.currency) if price is not None else plan.cost
    return plan.model_copy(update={"time": time, "cost": cost})


def describe_spent_budget(facts: Facts, moment: datetime) -> str:
    """Return a message if `policy.maxCost` is spent at `moment`, otherwise an empty string."""
    limit, price = facts.max_cost, _find_price(facts)
    if limit is None or price is None or _sum_gpu_seconds(facts, moment) / SECONDS_PER_HOUR * price < limit:
        return ""
    return f"policy.maxCost {limit:g} {_get_currency(facts)} is spent"


def predict_budget_end(facts: Facts) -> datetime | None:
    """Return when `policy.maxCost` will be spent. Return None if there is no limit, or if no pod causes costs now."""
    limit, price = facts.max_cost, _find_price(facts)
    pods_with_node = [pod for pod in facts.attempt_pods if pod.scheduled_at is not None and _find_pod_end(pod) is None]
    cost_per_second = len(pods_with_node) * gpus_per_pod(facts.spec) * (price or 0.0) / SECONDS_PER_HOUR
    if limit is None or price is None or cost_per_second <= 0:
        return None
    spent_amount = _sum_gpu_seconds(facts, facts.now) / SECONDS_PER_HOUR * price
    return facts.now + timedelta(seconds=min(max(0.0, (limit - spent_amount) / cost_per_second), MAX_BUDGET_SECONDS))


def describe_excessive_cost(facts: Facts) -> str:
    """Return a message if even the lower bound of the planned cost exceeds `policy.maxCost`, otherwise an empty string.

    A job that already has attempts is never refused. A job that starts from another job's checkpoint, or that can stop early, is not refused
    either, because the plan counts all steps and the job can do fewer.
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


def build_budget_failure(message: str) -> Failure:
    """Return the failure of a job that has spent `policy.maxCost`, or of a job for which the lower bound of the planned cost exceeds this limit."""
    hint = "raise policy.maxCost, or train fewer steps; if the job has a checkpoint, a new FineTuneJob can resume from it"
    return Failure(class_=FailureClass.USER, code=Reason.BUDGET_EXCEEDED, message=message, hint=hint)


def _get_currency(facts: Facts) -> str:
    cost = facts.job.status.cost
    return cost.currency if cost is not None else facts.config.currency


def _get_pool(facts: Facts) -> NodePool | None:
    return facts.acceptance.pool if isinstance(facts.acceptance, AcceptedSpec) else None


def _find_planned_gpu_count_and_pool(plan: RunPlan | None, facts: Facts) -> tuple[int, NodePool | None]:
    """Return the number of GPUs and the pool of a plan. The plan's choices take precedence, because the accepted spec may not contain them yet."""
    chosen_values = get_chosen_values(plan)
    pool = facts.config.find_pool(str(chosen_values[POOL_PATH])) if POOL_PATH in chosen_values else None
    return int(chosen_values.get(GPUS_PATH, gpus_per_node(facts.spec))) * (facts.spec.resources.nodes or 1), pool or _get_pool(facts)


def _find_price(facts: Facts, chosen_pool: NodePool | None = None) -> float | None:
    """Return the price of a GPU-hour at the start of the job or, before the start, the pool's current price. Return None if there is no price."""
    recorded_cost, pool = facts.job.status.cost, chosen_pool or _get_pool(facts)
    if recorded_cost is not None:
        return recorded_cost.price_per_gpu_hour
    return pool.price_per_gpu_hour if pool is not None and _count_gpus(facts) else None


def _count_gpus(facts: Facts) -> int:
    return gpus_per_pod(facts.spec) * (facts.spec.resources.nodes or 1)


def _get_ended_gpu_seconds(facts: Facts) -> float:
    recorded_cost = facts.job.status.cost
    return recorded_cost.ended_gpu_seconds if recorded_cost is not None else 0.0


def _sum_gpu_seconds(facts: Facts, end_time: datetime) -> float:
    """Return the GPU-seconds of all attempts, but at least the value in `status.cost`, because pods can be removed while the operator is stopped."""
    recorded_cost = facts.job.status.cost
    current_pod_seconds = sum(seconds_between(pod.scheduled_at, min(end_time, _find_pod_end(pod) or end_time)) for pod in facts.attempt_pods)
    recorded_gpu_seconds = recorded_cost.gpu_hours * SECONDS_PER_HOUR if recorded_cost is not None else 0.0
    return max(recorded_gpu_seconds, _get_ended_gpu_seconds(facts) + current_pod_seconds * gpus_per_pod(facts.spec))


def _find_pod_end(pod: PodView) -> datetime | None:
    return (pod.terminated.finished_at if pod.terminated else None) or (pod.deletion_timestamp or pod.removed_at if pod.is_deleted else None)
