"""`finetune get`: lists jobs with the columns of `kubectl get`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from finetune_cli import output
from finetune_cli.commands.shared import (
    ContextOption,
    FormatOption,
    KubeconfigOption,
    NamespaceOption,
    format_rows,
    parse_job_argument,
    require_format,
    write_data,
)

OUTPUT_FORMATS = ("yaml", "json", "wide", "cost", "name")
COST_COLUMNS = ["NAME", "STATUS", "GPU-HOURS", "EXPECTED GPU-HOURS", "COST", "EXPECTED COST", "MAX COST", "CURRENCY"]


def get(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Name of one job. Default: all jobs.", callback=parse_job_argument)
    ] = None,
    all_namespaces: Annotated[
        bool, typer.Option("--all-namespaces", "-A", help="List jobs of all namespaces.")
    ] = False,
    output_format: FormatOption = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """List jobs with the columns of kubectl get.

    `-o cost` shows for each job its GPU-hours and cost so far, the GPU-hours and cost that its plan expects for the optimizer steps, and `policy.maxCost`.

    Example: finetune get -A -o wide

    Example: finetune get -o cost

    Example: finetune get support-bot -o yaml
    """
    from finetune_cli.cluster import connect

    require_format(output_format, *OUTPUT_FORMATS)
    if name is not None and all_namespaces:
        raise output.fail(f"{name} with --all-namespaces: a single job is in one namespace; give the namespace with -n")
    cluster = connect(namespace, context, kubeconfig)
    if output_format in ("yaml", "json", "name"):
        jobs = [cluster.get_job(name)] if name else cluster.list_jobs(all_namespaces=all_namespaces)
        _write_objects(jobs, output_format, is_single=name is not None)
        return
    if output_format == "cost":
        _write_costs([cluster.get_job(name)] if name else cluster.list_jobs(all_namespaces=all_namespaces), cluster.namespace, all_namespaces=all_namespaces)
        return
    table = cluster.get_table(name, all_namespaces=all_namespaces)
    rows = table.get("rows") or []
    if not rows:
        _print_no_jobs(cluster.namespace, all_namespaces=all_namespaces)
        return
    output.write(_format_table(table["columnDefinitions"], rows, is_wide=output_format == "wide", with_namespaces=all_namespaces))


def _write_objects(jobs: list[dict[str, Any]], output_format: str, *, is_single: bool) -> None:
    from finetune_api.names import GROUP, PLURAL

    for job in jobs:
        job.get("metadata", {}).pop("managedFields", None)
    if output_format == "name":
        if jobs:
            output.write("\n".join(f"{PLURAL}.{GROUP}/{job['metadata']['name']}" for job in jobs))
        return
    write_data(jobs[0] if is_single else {"apiVersion": "v1", "kind": "List", "items": jobs}, output_format)


def _print_no_jobs(namespace: str, *, all_namespaces: bool) -> None:
    output.print_notes([f"there are no FineTuneJobs in {'any namespace' if all_namespaces else 'namespace ' + namespace}"])


def _write_costs(jobs: list[dict[str, Any]], namespace: str, *, all_namespaces: bool) -> None:
    if not jobs:
        _print_no_jobs(namespace, all_namespaces=all_namespaces)
        return
    header_cells = ["NAMESPACE", *COST_COLUMNS] if all_namespaces else COST_COLUMNS
    output.write(format_rows([header_cells, *(_format_cost_cells(job, with_namespace=all_namespaces) for job in jobs)]))
    if any((job.get("status") or {}).get("cost") is None for job in jobs):
        output.print_notes(["a job without a cost uses no GPU, has not started, or its node pool has no pricePerGpuHour in the chart's values"])


def _format_cost_cells(job: dict[str, Any], *, with_namespace: bool) -> list[str]:
    from finetune_cli.status_text import parse_status

    def format_amount(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    status, metadata = parse_status(job), job["metadata"]
    spent_cost, planned_cost = status.cost, status.plan.cost if status.plan else None
    return [
        *([metadata["namespace"]] if with_namespace else []),
        metadata["name"], str(status.phase or "-"),
        format_amount(spent_cost.gpu_hours if spent_cost else None), format_amount(planned_cost.gpu_hours if planned_cost else None),
        format_amount(spent_cost.amount if spent_cost else None), format_amount(planned_cost.expected if planned_cost else None),
        format_amount((job["spec"].get("policy") or {}).get("maxCost")),
        (spent_cost and spent_cost.currency) or (planned_cost and planned_cost.currency) or "-",
    ]  # fmt: skip


def _format_table(columns: list[dict[str, Any]], rows: list[dict[str, Any]], *, is_wide: bool, with_namespaces: bool) -> str:
    """Format the API server's table of jobs. A column with a priority above 0 is left out, except with `-o wide`."""
    shown_column_indexes = [i for i, column in enumerate(columns) if is_wide or not column.get("priority")]
    header_cells = (["NAMESPACE"] if with_namespaces else []) + [str(columns[i]["name"]).upper() for i in shown_column_indexes]
    cell_rows = [header_cells]
    for row in rows:
        namespace_cells = [row["object"]["metadata"].get("namespace", "")] if with_namespaces else []
        cell_rows.append(
            namespace_cells + ["-" if row["cells"][i] in (None, "") else str(row["cells"][i]) for i in shown_column_indexes]
        )
    return format_rows(cell_rows)
