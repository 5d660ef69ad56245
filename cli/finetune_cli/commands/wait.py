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
    until: Annotated[
        str,
        typer.Option(
            "--for", metavar="GOAL", help="As in kubectl: condition=NAME[=False], jsonpath=PATH[=VALUE], create or delete. Or a condition, or `running`.",
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
    """Wait until a job has ended, or until it reaches a condition or a value.

    Exit code 0: the goal is reached; 1: the time is up, or the job cannot reach the goal any more; 2: the job failed.

    Example: finetune wait support-bot

    Example: finetune wait support-bot --for condition=PodsReady --timeout 10m

    Example: finetune wait support-bot --for jsonpath='{.status.phase}'=Running

    Example: finetune wait support-bot --for delete
    """
    from finetune_cli.cluster import connect
    from finetune_cli.wait_goals import Existence, parse_goal, parse_timeout

    goal, seconds = parse_goal(until), parse_timeout(timeout)
    deadline = None if seconds is None else time.monotonic() + seconds
    cluster = connect(namespace, context, kubeconfig)
    if isinstance(goal, Existence):
        result = _wait_for_existence(cluster, name, goal, deadline)
    else:
        result = _wait_for_goal(cluster, name, until, goal, deadline)
    if result is None:
        state = f"{goal}d" if isinstance(goal, Existence) else until.removeprefix("condition=")
        raise output.fail(f"{name} is not {state} after {timeout if not str(timeout).isdigit() else f'{timeout} s'}")
    output.write(f"{name}: {result}")


def _wait_for_existence(cluster: Cluster, name: str, goal: Existence, deadline: float | None) -> str | None:
    """Return `created` or `deleted`, or None if the time is up."""
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
    cluster: Cluster, name: str, until: str, goal: ConditionGoal | RunningGoal | JsonPathGoal, deadline: float | None
) -> str | None:
    """Return the phase of the job, or None if the time is up. Raises CommandExit if the job has ended without reaching the goal."""
    from finetune_cli.status_text import has_finished, has_succeeded, status_of

    for job in cluster.watch_job(name, deadline):
        status = status_of(job)
        has_failed = has_finished(status) and not has_succeeded(status)
        is_success = goal.is_reached(job) and (not has_failed or goal.accepts_failed_job())
        if is_success or (has_finished(status) and goal.is_reached_without_report(status)):
            return _phase_of(job) or until
        if has_finished(status) and goal.ends_with_job:
            output.print_errors([f"{name} has ended ({_phase_of(job)})" + ("" if has_failed else f" and cannot become {until.removeprefix('condition=')}")])
            exit_if_failed(job)
            raise output.CommandExit(output.ERROR)
    return None


def _phase_of(job: dict[str, Any]) -> str:
    return str((job.get("status") or {}).get("phase") or "")
