"""`finetune wait`: waits until a job ends, reaches a condition or a value, or is created or deleted."""

from __future__ import annotations

import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_cli import output
from finetune_cli.commands.shared import ContextOption, KubeconfigOption, NameArgument, NamespaceOption, complete_words
from finetune_cli.commands.status import exit_if_failed

if TYPE_CHECKING:
    from finetune_cli.cluster import Cluster
    from finetune_cli.wait_goals import ConditionGoal, Existence, JsonPathGoal, RunningGoal



def wait(
    name: NameArgument,
    goal_text: Annotated[
        str,
        typer.Option(
            "--for", metavar="GOAL",
            help="As in kubectl: condition=NAME[=False], jsonpath=PATH[=VALUE], create or delete. Also the name of a condition, or running.",
            autocompletion=complete_words("condition=Finished", "condition=Succeeded", "condition=PodsReady", "running", "create", "delete", "jsonpath="),
        ),
    ] = "condition=Finished",
    timeout: Annotated[
        str | None, typer.Option(metavar="TIME", help="Maximum time to wait: seconds, or for example 30s, 5m, 1h30m. Default: no limit.")
    ] = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Wait until a job has ended, has a condition or a value, is created or is deleted.

    Exit code 0: the goal is reached; 1: the time is up, or the job can no longer reach the goal; 2: the job failed.

    Example: finetune wait support-bot

    Example: finetune wait support-bot --for condition=PodsReady --timeout 10m

    Example: finetune wait support-bot --for jsonpath='{.status.phase}'=Running

    Example: finetune wait support-bot --for delete
    """
    from finetune_cli.cluster import connect
    from finetune_cli.wait_goals import Existence, parse_goal, parse_timeout

    goal, timeout_seconds = parse_goal(goal_text), parse_timeout(timeout)
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    cluster = connect(namespace, context, kubeconfig)
    if isinstance(goal, Existence):
        reached_state = _wait_for_existence(cluster, name, goal, deadline)
    else:
        reached_state = _wait_for_goal(cluster, name, goal_text, goal, deadline)
    if reached_state is None:
        expected_state = f"{goal}d" if isinstance(goal, Existence) else goal_text.removeprefix("condition=")
        raise output.fail(f"{name} is not {expected_state} after {timeout if not str(timeout).isdigit() else f'{timeout} s'}")
    output.write(f"{name}: {reached_state}")


def _wait_for_existence(cluster: Cluster, name: str, goal: Existence, deadline: float | None) -> str | None:
    """Wait until the job is created or deleted, and return `created` or `deleted`. Return None if the time is up before."""
    from finetune_cli.cluster import ClusterError
    from finetune_cli.wait_goals import Existence

    if goal is Existence.CREATE:
        return "created" if cluster.wait_until_created(name, deadline) else None
    try:
        for _ in cluster.watch_job(name, deadline):
            pass
    except ClusterError as error:
        if error.code != HTTPStatus.NOT_FOUND:
            raise
        return "deleted"
    return None


def _wait_for_goal(
    cluster: Cluster, name: str, goal_text: str, goal: ConditionGoal | RunningGoal | JsonPathGoal, deadline: float | None
) -> str | None:
    """Wait until the job reaches the goal, and return the phase of the job.

    Return None if the time is up before. Raises CommandExit if the job has ended without reaching the goal.
    """
    from finetune_cli.status_text import has_finished, has_succeeded, parse_status

    for job in cluster.watch_job(name, deadline):
        status = parse_status(job)
        has_failed = has_finished(status) and not has_succeeded(status)
        is_success = goal.is_reached(job) and (not has_failed or goal.accepts_failed_job())
        if is_success or (has_finished(status) and goal.is_reached_without_observation(status)):
            return _get_phase(job) or goal_text
        if has_finished(status) and goal.ends_with_job:
            consequence = "" if has_failed else f" and cannot become {goal_text.removeprefix('condition=')}"
            output.print_errors([f"{name} has ended ({_get_phase(job)}){consequence}"])
            exit_if_failed(job)
            raise output.CommandExit(output.ERROR)
    return None


def _get_phase(job: dict[str, Any]) -> str:
    return str((job.get("status") or {}).get("phase") or "")
