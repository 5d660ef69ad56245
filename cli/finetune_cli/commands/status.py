"""`finetune status`: shows phase, progress and reason of a job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_cli import output
from finetune_cli.commands.shared import (
    ContextOption,
    DataFormatOption,
    KubeconfigOption,
    NameArgument,
    NamespaceOption,
    require_format,
    write_data,
)

if TYPE_CHECKING:
    from finetune_cli.cluster import Cluster

MAX_LOSSES = 60
"""Maximum number of training losses in the sparkline of `--watch`."""


def status(
    name: NameArgument,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Update until the job ends.")] = False,
    output_format: DataFormatOption = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Show phase, reason, progress, loss, remaining time, attempts and checkpoints of a job, and a failure with its hint.

    Exit code 2 if the job failed.

    Example: finetune status support-bot --watch
    """
    from finetune_cli.cluster import connect
    from finetune_cli.status_text import describe_job

    require_format(output_format, "yaml", "json")
    if watch and output_format is not None:
        raise output.fail("--watch and -o exclude each other: choose one of them")
    cluster = connect(namespace, context, kubeconfig)
    if watch:
        exit_if_failed(follow_job(cluster, name))
        return
    job = cluster.get_job(name)
    if output_format is not None:
        write_data(job.get("status") or {}, output_format)
    else:
        output.write(describe_job(job))
    exit_if_failed(job)


def follow_job(cluster: Cluster, name: str) -> dict[str, Any]:
    """Show the status of a job until the job ends, then return the job.

    On a terminal the text is updated in place. Without a terminal, every change is printed.
    """
    from rich.live import Live
    from rich.text import Text

    from finetune_cli.status_text import describe_job, has_finished, parse_status

    losses: list[float] = []
    job: dict[str, Any] = {}
    last_text = ""
    with Live(console=output.stdout_console(), auto_refresh=False, screen=False) as live:
        for job in cluster.watch_job(name):
            status = parse_status(job)
            loss = status.metrics.train_loss if status.metrics else None
            if loss is not None and (not losses or losses[-1] != loss):
                losses = [*losses[1 - MAX_LOSSES :], loss]
            text = describe_job(job, losses)
            if output.stdout_console().is_terminal:
                live.update(Text(text), refresh=True)
            elif text != last_text:
                output.write(text + "\n")
            last_text = text
            if has_finished(status):
                break
    return job


def exit_if_failed(job: dict[str, Any]) -> None:
    """Raise CommandExit with code 2 if the job has ended without success."""
    from finetune_cli.status_text import has_finished, has_succeeded, parse_status

    status = parse_status(job)
    if has_finished(status) and not has_succeeded(status):
        raise output.CommandExit(output.JOB_FAILED)
