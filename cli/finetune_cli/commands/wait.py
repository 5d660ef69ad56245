"""`finetune wait`: waits until a job ends or one of its conditions is true."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from finetune_cli import output
from finetune_cli.commands.shared import ContextOption, KubeconfigOption, NameArgument, NamespaceOption
from finetune_cli.commands.status import exit_if_failed

if TYPE_CHECKING:
    from finetune_api.status import FineTuneJobStatus


def wait(
    name: NameArgument,
    until: Annotated[
        str, typer.Option("--for", metavar="CONDITION", help="A condition of the job, or `running`.")
    ] = "Finished",
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0, help="Maximum time to wait. Default: no limit.")
    ] = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Wait until a job has ended, or until a condition is true.

    Exit code 0: the condition is true, or the job succeeded; 1: the time is up, or the condition cannot become true; 2: the job failed.

    Example: finetune wait support-bot

    Example: finetune wait support-bot --for PodsReady --timeout 600
    """
    from finetune_api.names import Condition, Phase

    from finetune_cli.cluster import connect
    from finetune_cli.status_text import condition_status, has_finished, status_of

    conditions = {condition_type.value.lower(): condition_type for condition_type in Condition}
    if until.lower() not in conditions and until.lower() != "running":
        raise output.fail(f"--for {until}: unknown condition; write one of running, {', '.join(Condition)}")
    condition_type = conditions.get(until.lower())
    deadline = None if timeout is None else time.monotonic() + timeout
    for job in connect(namespace, context, kubeconfig).watch_job(name, deadline):
        status = status_of(job)
        if has_finished(status):
            exit_if_failed(job)
            _fail_if_unreachable(name, condition_type, status)
        is_running = condition_type is None and status.phase in (Phase.RUNNING, Phase.EVALUATING, Phase.UPLOADING)
        if is_running or (condition_type is not None and condition_status(status, condition_type)) or has_finished(status):
            output.write(f"{name}: {status.phase or until}")
            return
    raise output.fail(f"{name} is not {until} after {timeout:g} s")


def _fail_if_unreachable(name: str, condition_type: str | None, status: FineTuneJobStatus) -> None:
    """Raise Exit if the job has finished without reaching an optional condition such as Suspended.

    Every successful job reaches all other conditions.
    """
    from finetune_api.names import Condition

    from finetune_cli.status_text import condition_status

    optional = (Condition.SUSPENDED, Condition.RECONCILING, Condition.STALLED)
    if condition_type in optional and not condition_status(status, Condition(condition_type)):
        raise output.fail(f"{name} has ended ({status.phase}) and cannot become {condition_type}")
