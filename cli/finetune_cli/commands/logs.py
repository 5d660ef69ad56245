"""`finetune logs`: prints the merged logs of a job's pods."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_cli import output
from finetune_cli.commands.shared import ContextOption, KubeconfigOption, NameArgument, NamespaceOption

if TYPE_CHECKING:
    from finetune_cli.cluster import Cluster


def logs(
    name: NameArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print new lines until the pods end.")] = False,
    rank: Annotated[int | None, typer.Option(metavar="N", min=0, help="Only the pod with this rank.")] = None,
    attempt: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Number of the attempt; 0 is the preparation. Default: the newest attempt.")
    ] = None,
    all_attempts: Annotated[bool, typer.Option("--all", help="Include the pods of all attempts.")] = False,
    tail: Annotated[int | None, typer.Option(metavar="N", min=0, help="Only the last N lines of each pod.")] = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Print the merged logs of a job's pods. If there are several pods, each line begins with [attempt/pod], for example [2/0].

    Example: finetune logs support-bot -f

    Example: finetune logs support-bot --rank 3 --attempt 1
    """
    from finetune_cli.cluster import connect

    cluster = connect(namespace, context, kubeconfig)
    job = cluster.get_job(name)
    pods = select_pods(cluster, job, rank, attempt, all_attempts)
    has_several_pods = len(pods) > 1
    for line_prefix, line in merge_log_lines(cluster, pods, follow=follow, tail=tail):
        output.write(f"{line_prefix} {line}" if has_several_pods else line)


def select_pods(
    cluster: Cluster, job: dict[str, Any], rank: int | None, attempt: int | None, all_attempts: bool
) -> list[dict[str, Any]]:
    """Return the pods that the options select. Raises ClusterError if no pod matches; the message says which pods exist."""
    from finetune_cli.cluster import ClusterError, get_attempt, get_pod_index

    name = job["metadata"]["name"]
    pods = cluster.list_pods(name)
    if not pods:
        raise ClusterError(
            f"{name} has no pods: the pods are not created yet, or already deleted; `finetune status {name}` shows the reason"
        )
    attempts = sorted({get_attempt(pod) for pod in pods})
    if attempt is not None and attempt not in attempts:
        raise ClusterError(f"{name} has no pods of attempt {attempt}, only of {', '.join(map(str, attempts))}")
    if not all_attempts:
        selected_attempt = attempt if attempt is not None else attempts[-1]
        pods = [pod for pod in pods if get_attempt(pod) == selected_attempt]
    if rank is not None:
        pod_index = rank // count_ranks_per_pod(job)
        matching_pods = [pod for pod in pods if get_pod_index(pod) == pod_index]
        if not matching_pods:
            raise ClusterError(
                f"{name} has no pod with rank {rank}: the job has {len(pods)} pods with {count_ranks_per_pod(job)} ranks each"
            )
        pods = matching_pods
    return pods


def count_ranks_per_pod(job: dict[str, Any]) -> int:
    resources = (job.get("spec") or {}).get("resources") or {}
    return int(resources.get("processesPerNode") or resources.get("gpusPerNode", 1) or 1)


def merge_log_lines(
    cluster: Cluster, pods: list[dict[str, Any]], *, follow: bool, tail: int | None
) -> Iterator[tuple[str, str]]:
    """Yield (line prefix, line) for each log line of several pods.

    With `follow`, the lines have the order of their arrival. Otherwise, they are sorted by pod.
    """
    from finetune_cli.cluster import ClusterError, get_attempt, get_pod_index

    line_queue: queue.Queue[tuple[str, str | None]] = queue.Queue(maxsize=1000)

    def queue_log_lines(pod: dict[str, Any]) -> None:
        line_prefix = f"[{get_attempt(pod)}/{get_pod_index(pod)}]"
        try:
            for line in _stream_log(cluster, pod, follow, tail):
                line_queue.put((line_prefix, line))
        except ClusterError as error:
            line_queue.put((line_prefix, f"({error})"))
        finally:
            line_queue.put((line_prefix, None))

    if not follow:
        for pod in pods:
            line_prefix = f"[{get_attempt(pod)}/{get_pod_index(pod)}]"
            try:
                yield from ((line_prefix, line) for line in _stream_log(cluster, pod, follow, tail))
            except ClusterError as error:
                yield line_prefix, f"({error})"
        return
    for pod in pods:
        threading.Thread(target=queue_log_lines, args=(pod,), daemon=True).start()
    running_stream_count = len(pods)
    while running_stream_count:
        line_prefix, line = line_queue.get()
        if line is None:
            running_stream_count -= 1
        else:
            yield line_prefix, line


def _stream_log(cluster: Cluster, pod: dict[str, Any], follow: bool, tail: int | None) -> Iterator[str]:
    from finetune_api.names import TRAINER_CONTAINER

    return cluster.stream_log(pod["metadata"]["name"], TRAINER_CONTAINER, follow=follow, tail_lines=tail)
