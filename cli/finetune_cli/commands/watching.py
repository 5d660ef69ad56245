"""`finetune get`, `status`, `events`, `wait`, `checkpoints`: what a job is doing."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_cli import output
from finetune_cli.commands.options import (
    ContextOption,
    DataFormatOption,
    FormatOption,
    KubeconfigOption,
    NameArgument,
    NamespaceOption,
    job_name,
    known_format,
)
from finetune_cli.yaml_text import to_yaml

if TYPE_CHECKING:
    from finetune_api.status import FineTuneJobStatus

    from finetune_cli.cluster import Cluster

FORMATS = ("yaml", "json", "wide", "name")


def get(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="One job; left out: all.", callback=job_name)
    ] = None,
    everywhere: Annotated[bool, typer.Option("--all-namespaces", "-A", help="Jobs of all namespaces.")] = False,
    form: FormatOption = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """List jobs, as kubectl would.

    Example: finetune get -A -o wide

    Example: finetune get support-bot -o yaml
    """
    from finetune_cli.cluster import connect

    known_format(form, *FORMATS)
    if name is not None and everywhere:
        output.errors([f"{name} with --all-namespaces: one job lies in one namespace; name it with -n"])
        raise output.Ended(output.ERROR)
    cluster = connect(namespace, context, kubeconfig)
    if form in ("yaml", "json", "name"):
        items = [cluster.job(name)] if name else cluster.jobs(everywhere=everywhere)
        _dump(items, form, single=name is not None)
        return
    table = cluster.table(name, everywhere=everywhere)
    rows = table.get("rows") or []
    if not rows:
        output.notes([f"no FineTuneJobs in {'any namespace' if everywhere else 'namespace ' + cluster.namespace}"])
        return
    output.write(_grid(table["columnDefinitions"], rows, wide=form == "wide", namespaces=everywhere))


def _dump(items: list[dict[str, Any]], form: str, *, single: bool) -> None:
    from finetune_api.names import GROUP, PLURAL

    for item in items:
        item.get("metadata", {}).pop("managedFields", None)
    if form == "name":
        if items:
            output.write("\n".join(f"{PLURAL}.{GROUP}/{item['metadata']['name']}" for item in items))
        return
    value: Any = items[0] if single else {"apiVersion": "v1", "kind": "List", "items": items}
    write_data(value, form)


def write_data(value: Any, form: str) -> None:
    """A value as JSON or YAML."""
    output.write(json.dumps(value, indent=2) if form == "json" else to_yaml(value))


def _grid(columns: list[dict[str, Any]], rows: list[dict[str, Any]], *, wide: bool, namespaces: bool) -> str:
    shown = [i for i, column in enumerate(columns) if wide or not column.get("priority")]
    head = (["NAMESPACE"] if namespaces else []) + [str(columns[i]["name"]).upper() for i in shown]
    lines = [head]
    for row in rows:
        place = [row["object"]["metadata"].get("namespace", "")] if namespaces else []
        lines.append(place + ["-" if row["cells"][i] in (None, "") else str(row["cells"][i]) for i in shown])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def status(
    name: NameArgument,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Follow until the job ends.")] = False,
    form: DataFormatOption = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Tell the story of a job: phase, stages, progress, loss, time left, attempts, checkpoints, failure with hint.

    Exit code 2 if the job failed.

    Example: finetune status support-bot --watch
    """
    from finetune_cli.cluster import connect
    from finetune_cli.view import describe, finished, status_of

    known_format(form, "yaml", "json")
    if watch and form is not None:
        output.errors(["--watch shows a picture that changes, and -o prints data once: choose one"])
        raise output.Ended(output.ERROR)
    cluster = connect(namespace, context, kubeconfig)
    if watch:
        _end(_watched(cluster, name))
        return
    job = cluster.job(name)
    if form is not None:
        write_data(job.get("status") or {}, form)
    else:
        output.write(describe(job))
    if finished(status_of(job)):
        _end(job)


def _watched(cluster: Cluster, name: str) -> dict[str, Any]:
    """Show a job until it ends: a live picture on a terminal, a text at every change of the story elsewhere."""
    from rich.live import Live
    from rich.text import Text

    from finetune_cli.view import describe, finished, status_of

    losses: list[float] = []
    job: dict[str, Any] = {}
    last = ""
    with Live(console=output.console(), auto_refresh=False, screen=False) as live:
        for job in cluster.follow(name):
            found = status_of(job)
            loss = found.metrics.train_loss if found.metrics else None
            if loss is not None and (not losses or losses[-1] != loss):
                losses = [*losses[-59:], loss]
            text = describe(job, losses)
            if output.console().is_terminal:
                live.update(Text(text), refresh=True)
            elif text != last:
                output.write(text + "\n")
            last = text
            if finished(found):
                break
    return job


def _end(job: dict[str, Any]) -> None:
    """Leave with the exit code of a finished job."""
    from finetune_cli.view import finished, status_of, succeeded

    found = status_of(job)
    if finished(found) and not succeeded(found):
        raise output.Ended(output.JOB_FAILED)


def events(
    name: NameArgument,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Events of a job and of its pods, oldest first.

    Example: finetune events support-bot
    """
    from finetune_cli.cluster import connect

    cluster = connect(namespace, context, kubeconfig)
    job = cluster.job(name)
    uids = {job["metadata"]["uid"], *(pod["metadata"]["uid"] for pod in cluster.pods(name))}
    found = cluster.events(uids)
    if not found:
        output.notes(
            [f"no events of {name}: the cluster keeps them for a while only; `finetune status {name}` keeps the story"]
        )
        return
    output.write("\n".join(event_line(one) for one in found))


def event_line(event: dict[str, Any]) -> str:
    """One event on one line."""
    from finetune_cli.cluster import event_time

    regarding = event.get("regarding") or {}
    thing = f"{regarding.get('kind', '')}/{regarding.get('name', '')}"
    return f"{event_time(event)[:19]:<20} {event.get('type', ''):<8} {event.get('reason', ''):<26} {thing:<40} {event.get('note', '')}"


def wait(
    name: NameArgument,
    until: Annotated[
        str, typer.Option("--for", metavar="CONDITION", help="A condition of the job, or `running`.")
    ] = "Finished",
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0, help="Give up after so long; left out: never.")
    ] = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Wait until a job has ended, or until a condition holds.

    Exit code 0: it holds, and a finished job succeeded; 1: time is up; 2: the job failed.

    Example: finetune wait support-bot

    Example: finetune wait support-bot --for PodsReady --timeout 600
    """
    from finetune_api.names import Condition, Phase

    from finetune_cli.cluster import connect
    from finetune_cli.view import condition, finished, status_of

    words = {one.value.lower(): one for one in Condition}
    if until.lower() not in words and until.lower() != "running":
        output.errors([f"--for {until}: one of running, {', '.join(Condition)}"])
        raise output.Ended(output.ERROR)
    deadline = None if timeout is None else time.monotonic() + timeout
    for job in connect(namespace, context, kubeconfig).follow(name, deadline):
        found = status_of(job)
        if finished(found):
            _end(job)
            _never(name, until, found)
        running = until.lower() == "running" and found.phase in (Phase.RUNNING, Phase.EVALUATING, Phase.UPLOADING)
        if running or (until.lower() in words and condition(found, words[until.lower()])) or finished(found):
            output.write(f"{name}: {found.phase or until}")
            return
    output.errors([f"{name} is not {until} after {timeout:g} s"])
    raise output.Ended(output.ERROR)


def _never(name: str, until: str, found: FineTuneJobStatus) -> None:
    """A job that is over passed what lies on every way; what does not hold then, and was not on it, will never hold."""
    from finetune_api.names import Condition

    from finetune_cli.view import condition

    wanted = next(
        (
            one
            for one in (Condition.SUSPENDED, Condition.RECONCILING, Condition.STALLED)
            if one.lower() == until.lower()
        ),
        None,
    )
    if wanted is not None and not condition(found, wanted):
        output.errors([f"{name} has ended ({found.phase}), and will never be {wanted}"])
        raise output.Ended(output.ERROR)
