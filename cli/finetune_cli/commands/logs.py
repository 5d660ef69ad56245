"""`finetune logs`: the logs of all pods of a job, merged, each line behind its origin."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_cli import output
from finetune_cli.commands.options import ContextOption, KubeconfigOption, NameArgument, NamespaceOption

if TYPE_CHECKING:
    from finetune_cli.cluster import Cluster

END = ""


def logs(
    name: NameArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the pods end.")] = False,
    rank: Annotated[int | None, typer.Option(metavar="N", min=0, help="The pod that holds this rank only.")] = None,
    attempt: Annotated[int | None, typer.Option(metavar="N", min=1, help="An attempt; left out: the newest.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Pods of all attempts.")] = False,
    tail: Annotated[int | None, typer.Option(metavar="N", min=0, help="Only the newest lines of each pod.")] = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Logs of a job's pods, merged; each line says attempt and node it came from, if there are several.

    Example: finetune logs support-bot -f

    Example: finetune logs support-bot --rank 3 --attempt 1
    """
    from finetune_cli.cluster import connect

    cluster = connect(namespace, context, kubeconfig)
    job = cluster.job(name)
    pods = chosen(cluster, job, rank, attempt, every)
    many = len(pods) > 1
    for origin, line in merged(cluster, pods, follow=follow, tail=tail):
        output.write(f"{origin} {line}" if many else line)


def chosen(
    cluster: Cluster, job: dict[str, Any], rank: int | None, attempt: int | None, every: bool
) -> list[dict[str, Any]]:
    """The pods that were asked for. Raises ClusterError, which says what there is."""
    from finetune_cli.cluster import ClusterError, attempt_of, index_of

    name = job["metadata"]["name"]
    pods = cluster.pods(name)
    if not pods:
        raise ClusterError(
            f"{name} has no pods: they have not been made yet, or were removed; `finetune status {name}` tells more"
        )
    attempts = sorted({attempt_of(pod) for pod in pods})
    if attempt is not None and attempt not in attempts:
        raise ClusterError(
            f"{name} has no pods of attempt {attempt}; there are those of {', '.join(map(str, attempts))}"
        )
    if not every:
        wanted = attempt if attempt is not None else attempts[-1]
        pods = [pod for pod in pods if attempt_of(pod) == wanted]
    if rank is not None:
        index = rank // ranks_of(job)
        found = [pod for pod in pods if index_of(pod) == index]
        if not found:
            raise ClusterError(
                f"{name} has no pod that holds rank {rank}; {len(pods)} pods with {ranks_of(job)} ranks each are there"
            )
        pods = found
    return pods


def ranks_of(job: dict[str, Any]) -> int:
    """Ranks of a pod."""
    resources = (job.get("spec") or {}).get("resources") or {}
    return int(resources.get("processesPerNode") or resources.get("gpusPerNode", 1) or 1)


def merged(
    cluster: Cluster, pods: list[dict[str, Any]], *, follow: bool, tail: int | None
) -> Iterator[tuple[str, str]]:
    """(origin, line) of several pods: as they come when followed, else pod by pod."""
    from finetune_cli.cluster import ClusterError, attempt_of, index_of

    lines: queue.Queue[tuple[str, str | None]] = queue.Queue(maxsize=1000)

    def pump(pod: dict[str, Any]) -> None:
        origin = f"[{attempt_of(pod)}/{index_of(pod)}]"
        try:
            for line in _log(cluster, pod, follow, tail):
                lines.put((origin, line))
        except ClusterError as error:
            lines.put((origin, f"({error})"))
        finally:
            lines.put((origin, None))

    if not follow:
        for pod in pods:
            origin = f"[{attempt_of(pod)}/{index_of(pod)}]"
            try:
                yield from ((origin, line) for line in _log(cluster, pod, follow, tail))
            except ClusterError as error:
                yield origin, f"({error})"
        return
    for pod in pods:
        threading.Thread(target=pump, args=(pod,), daemon=True).start()
    running = len(pods)
    while running:
        origin, line = lines.get()
        if line is None:
            running -= 1
        else:
            yield origin, line


def _log(cluster: Cluster, pod: dict[str, Any], follow: bool, tail: int | None) -> Iterator[str]:
    from finetune_api.names import CONTAINER

    return cluster.log(pod["metadata"]["name"], CONTAINER, follow=follow, tail=tail)
