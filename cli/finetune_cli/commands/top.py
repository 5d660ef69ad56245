"""`finetune top`: shows GPUs, memory and throughput of the running jobs."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_cli import output
from finetune_cli.commands.shared import (
    ContextOption,
    DataFormatOption,
    KubeconfigOption,
    NamespaceOption,
    complete_job,
    format_rows,
    parse_job_argument,
    require_format,
    write_data,
)

if TYPE_CHECKING:
    from finetune_api.pod import PodUsage

    from finetune_cli.cluster import Cluster, ClusterError

COLUMN_NAMES = ["NAME", "PHASE", "PROGRESS", "TOKENS/S", "ETA", "POD", "NODE", "GPUS", "GPU%", "GPU MEMORY", "MEMORY"]
PARALLEL_REQUESTS = 8
FORBIDDEN_NOTE = "GPUs and memory are unknown: you may not get pods/proxy in this namespace"
BLOCKED_NOTE = (
    "the API server cannot reach the pod: if a NetworkPolicy blocks it, add the addresses of the API server to isolation.metricsFrom in the chart's values"
)
"""This note is added to the error message if the API server could not forward a request to a pod, or if the request timed out.

A NetworkPolicy can be the cause, because it drops packets without an answer.
"""
OLD_IMAGE_NOTE = "GPUs and memory of some pods are unknown: their trainer image is older than 0.2.0"


@dataclass(frozen=True)
class PodRow:
    """A running pod, its job, and the usage that the pod reports. If the usage cannot be read from the pod, `usage` is None, and `problem` says why."""

    job: dict[str, Any]
    pod: dict[str, Any]
    usage: PodUsage | None
    problem: str = ""


def top(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Name of one job. Default: all running jobs.", callback=parse_job_argument, autocompletion=complete_job)
    ] = None,
    all_namespaces: Annotated[bool, typer.Option("--all-namespaces", "-A", help="Show jobs of all namespaces.")] = False,
    output_format: DataFormatOption = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Show throughput, GPUs and memory of each pod of the running jobs, from the reports of the pods.

    GPU% is the mean utilisation of the pod's GPUs. GPU MEMORY is the memory use of the fullest GPU of the pod. `-o json` shows every GPU.

    Example: finetune top

    Example: finetune top support-bot -o json
    """
    from finetune_cli.cluster import connect

    require_format(output_format, "yaml", "json")
    if name is not None and all_namespaces:
        raise output.fail(f"{name} with --all-namespaces: a single job is in one namespace; give the namespace with -n")
    cluster = connect(namespace, context, kubeconfig)
    jobs = [cluster.get_job(name)] if name is not None else cluster.list_jobs(all_namespaces=all_namespaces)
    rows = _read_rows(cluster, jobs, all_namespaces)
    output.print_notes(sorted({row.problem for row in rows if row.problem}))
    if output_format is not None:
        write_data([to_dict(row) for row in rows], output_format)
    elif not rows:
        output.print_notes([f"{name} has no running pods" if name else "there are no jobs with running pods"])
    else:
        header_cells = ["NAMESPACE", *COLUMN_NAMES] if all_namespaces else COLUMN_NAMES
        output.write(format_rows([header_cells, *(_format_cells(row, all_namespaces) for row in rows)]))


def _read_rows(cluster: Cluster, jobs: list[dict[str, Any]], all_namespaces: bool) -> list[PodRow]:
    """Return the running pods of each job with their usage. If pods of several attempts of a job are running, those of the older attempts are left out."""
    from concurrent.futures import ThreadPoolExecutor

    from finetune_api.names import Label

    from finetune_cli.cluster import get_attempt
    from finetune_cli.status_text import has_finished, parse_status

    jobs_by_uid = {job["metadata"]["uid"]: job for job in jobs if not has_finished(parse_status(job))}
    running_pods = [
        pod
        for pod in (cluster.list_trainer_pods(all_namespaces=all_namespaces) if jobs_by_uid else [])
        if (pod.get("status") or {}).get("phase") == "Running" and (pod["metadata"].get("labels") or {}).get(Label.JOB_UID) in jobs_by_uid
    ]
    jobs_and_pods = [(jobs_by_uid[pod["metadata"]["labels"][Label.JOB_UID]], pod) for pod in running_pods]
    current_jobs_and_pods = [
        (job, pod) for job, pod in jobs_and_pods
        if get_attempt(pod) == max(get_attempt(other_pod) for other_job, other_pod in jobs_and_pods if other_job is job)
    ]
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        return list(pool.map(lambda pair: _read_row(cluster, *pair), current_jobs_and_pods))


def _read_row(cluster: Cluster, job: dict[str, Any], pod: dict[str, Any]) -> PodRow:
    from finetune_api.names import HttpPath
    from finetune_api.pod import PodUsage

    from finetune_cli.cluster import ClusterError

    try:
        usage_report = cluster.read_from_pod(pod["metadata"]["namespace"], pod["metadata"]["name"], HttpPath.USAGE)
    except ClusterError as error:
        return PodRow(job, pod, None, _explain_error(error, pod["metadata"]["name"]))
    return PodRow(job, pod, PodUsage.model_validate(usage_report))


def _explain_error(error: ClusterError, pod_name: str) -> str:
    note_by_status: dict[int, str] = {HTTPStatus.FORBIDDEN: FORBIDDEN_NOTE, HTTPStatus.NOT_FOUND: OLD_IMAGE_NOTE}
    is_unreachable = not error.code or error.code >= HTTPStatus.INTERNAL_SERVER_ERROR
    return note_by_status.get(error.code) or f"{pod_name}: {error}" + (f"; {BLOCKED_NOTE}" if is_unreachable else "")


def _format_cells(row: PodRow, with_namespace: bool) -> list[str]:
    from finetune_cli.status_text import format_bytes, parse_status

    status, metadata = parse_status(row.job), row.job["metadata"]
    progress = status.progress
    gpus = row.usage.gpus if row.usage else []
    utilization_percents = [gpu.utilization_percent for gpu in gpus if gpu.utilization_percent is not None]
    fullest_gpu = max((gpu for gpu in gpus if gpu.memory_used_bytes is not None), key=lambda gpu: gpu.memory_used_bytes or 0, default=None)
    tokens_per_second = progress.tokens_per_second if progress else None
    return [
        *([metadata["namespace"]] if with_namespace else []),
        metadata["name"], str(status.phase or "-"), (progress.display if progress else None) or "-",
        f"{tokens_per_second:,.0f}" if tokens_per_second is not None else "-",
        (progress.eta if progress else None) or "-", row.pod["metadata"]["name"], (row.pod.get("spec") or {}).get("nodeName") or "-",
        str(len(gpus)) if row.usage else "-", f"{sum(utilization_percents) / len(utilization_percents):.0f}" if utilization_percents else "-",
        f"{format_bytes(fullest_gpu.memory_used_bytes)} of {format_bytes(fullest_gpu.memory_total_bytes)}" if fullest_gpu else "-",
        f"{format_bytes(row.usage.memory_used_bytes)} of {format_bytes(row.usage.memory_total_bytes)}" if row.usage else "-",
    ]  # fmt: skip


def to_dict(row: PodRow) -> dict[str, Any]:
    """Return a row as a dict, for `-o json` and `-o yaml`. The usage is null if it could not be read from the pod."""
    metadata, status = row.job["metadata"], row.job.get("status") or {}
    return {
        "namespace": metadata["namespace"], "job": metadata["name"], "phase": status.get("phase"), "progress": status.get("progress"),
        "pod": row.pod["metadata"]["name"], "node": (row.pod.get("spec") or {}).get("nodeName"), "usage": row.usage.to_wire() if row.usage else None,
    }  # fmt: skip
