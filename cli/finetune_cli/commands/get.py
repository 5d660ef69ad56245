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
    check_format,
    format_rows,
    job_name,
    write_data,
)

OUTPUT_FORMATS = ("yaml", "json", "wide", "name")


def get(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Name of one job. Default: all jobs.", callback=job_name)
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

    Example: finetune get -A -o wide

    Example: finetune get support-bot -o yaml
    """
    from finetune_cli.cluster import connect

    check_format(output_format, *OUTPUT_FORMATS)
    if name is not None and all_namespaces:
        raise output.fail(f"{name} with --all-namespaces: a single job is in one namespace; give the namespace with -n")
    cluster = connect(namespace, context, kubeconfig)
    if output_format in ("yaml", "json", "name"):
        items = [cluster.get_job(name)] if name else cluster.list_jobs(all_namespaces=all_namespaces)
        _write_objects(items, output_format, is_single=name is not None)
        return
    table = cluster.get_table(name, all_namespaces=all_namespaces)
    rows = table.get("rows") or []
    if not rows:
        output.print_notes(
            [f"there are no FineTuneJobs in {'any namespace' if all_namespaces else 'namespace ' + cluster.namespace}"]
        )
        return
    output.write(_format_table(table["columnDefinitions"], rows, is_wide=output_format == "wide", with_namespaces=all_namespaces))


def _write_objects(items: list[dict[str, Any]], output_format: str, *, is_single: bool) -> None:
    from finetune_api.names import GROUP, PLURAL

    for item in items:
        item.get("metadata", {}).pop("managedFields", None)
    if output_format == "name":
        if items:
            output.write("\n".join(f"{PLURAL}.{GROUP}/{item['metadata']['name']}" for item in items))
        return
    write_data(items[0] if is_single else {"apiVersion": "v1", "kind": "List", "items": items}, output_format)


def _format_table(columns: list[dict[str, Any]], rows: list[dict[str, Any]], *, is_wide: bool, with_namespaces: bool) -> str:
    """Format the API server's table of jobs. Columns with a priority above 0 are shown only with `-o wide`."""
    shown_column_indexes = [i for i, column in enumerate(columns) if is_wide or not column.get("priority")]
    header_cells = (["NAMESPACE"] if with_namespaces else []) + [str(columns[i]["name"]).upper() for i in shown_column_indexes]
    lines = [header_cells]
    for row in rows:
        namespace = [row["object"]["metadata"].get("namespace", "")] if with_namespaces else []
        lines.append(
            namespace + ["-" if row["cells"][i] in (None, "") else str(row["cells"][i]) for i in shown_column_indexes]
        )
    return format_rows(lines)
