"""Options and small functions that several commands share. If kubectl has the same option, the option has the same name as in kubectl."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune_cli import output


def complete_job(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the names of FineTuneJobs that begin with the typed text. If the cluster cannot be reached, return no names."""
    from finetune_cli.cluster import connect

    given_options = ctx.params
    try:
        jobs = connect(given_options.get("namespace"), given_options.get("context"), given_options.get("kubeconfig")).list_jobs(all_namespaces=False)
    except output.CommandError:
        return []
    return [name for name in (job["metadata"]["name"] for job in jobs) if name.startswith(incomplete)]


def parse_job_argument(value: str | None) -> str | None:
    """Return the name of a job from `NAME` or `KIND/NAME`. Raises ClusterError."""
    from finetune_cli.cluster import parse_job_name

    return None if value is None else parse_job_name(value)


def complete_path(incomplete: str) -> list[str]:
    """Return the paths of fields that begin with the typed text."""
    from finetune_cli.fields import fields

    known_paths = (field.path.removeprefix("spec.").replace("[]", "") for field in fields())
    return [path for path in known_paths if path.startswith(incomplete)]


def complete_set(incomplete: str) -> list[str]:
    """Return the values for `--set` that begin with the typed text: paths of spec fields, each followed by `=`."""
    return [f"{path}=" for path in complete_path(incomplete) if not path.startswith("status")]


def complete_words(*words: str) -> Callable[[str], list[str]]:
    """Return a completion function for an option with a fixed set of values."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


def require_format(output_format: str | None, *allowed_formats: str) -> None:
    """Raise CommandExit for an output format that the command does not support."""
    if output_format is not None and output_format not in allowed_formats:
        raise output.fail(f"-o {output_format}: unknown output format; write one of {', '.join(allowed_formats)}")


SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Set a field of the spec, for example training.epochs=2.",
        autocompletion=complete_set,
    ),
]
NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of the FineTuneJob.", autocompletion=complete_job, callback=parse_job_argument)
]
NamespaceOption = Annotated[
    str | None, typer.Option("--namespace", "-n", help="Namespace. Default: the namespace of the kubeconfig context.")
]
ContextOption = Annotated[str | None, typer.Option("--context", help="Context of the kubeconfig to use.")]
KubeconfigOption = Annotated[Path | None, typer.Option("--kubeconfig", help="Path of the kubeconfig file.")]
GpuMemoryOption = Annotated[str | None, typer.Option("--gpu-memory", metavar="SIZE", help="Memory of each GPU, such as 80Gi, instead of --gpu.")]
GpusPerNodeOption = Annotated[
    int | None,
    typer.Option("--gpus-per-node", metavar="GPUS", help="GPUs of each node. A job without resources.gpusPerNode may get several of them."),
]
ModelConfigOption = Annotated[
    Path | None,
    typer.Option("--model-config", metavar="FOLDER", help="Folder with the base model's config.json. Default: model.source, if it is a folder."),
]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "-o",
        "--output",
        metavar="yaml|json|wide|cost|name",
        help="Output format.",
        autocompletion=complete_words("yaml", "json", "wide", "cost", "name"),
    ),
]
DataFormatOption = Annotated[
    str | None,
    typer.Option(
        "-o",
        "--output",
        metavar="yaml|json",
        help="Print the data as YAML or JSON.",
        autocompletion=complete_words("yaml", "json"),
    ),
]


def write_data(value: Any, output_format: str) -> None:
    """Write a value to stdout as JSON or YAML."""
    from finetune_cli.yaml_writer import to_yaml

    output.write(json.dumps(value, indent=2) if output_format == "json" else to_yaml(value))


def format_rows(rows: list[list[str]]) -> str:
    """Format rows as aligned columns. All rows must have the same number of cells."""
    column_widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("   ".join(cell.ljust(width) for cell, width in zip(row, column_widths, strict=True)).rstrip() for row in rows)
