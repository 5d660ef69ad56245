"""Options that many commands share, with kubectl's spellings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from finetune_cli import output


def complete_job(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of FineTuneJobs for the shell; nothing where the cluster does not answer."""
    from finetune_cli.cluster import connect
    from finetune_cli.output import Told

    given = ctx.params
    try:
        jobs = connect(given.get("namespace"), given.get("context"), given.get("kubeconfig")).jobs(everywhere=False)
    except Told:
        return []
    return [name for name in (job["metadata"]["name"] for job in jobs) if name.startswith(incomplete)]


def job_name(value: str | None) -> str | None:
    """The name of a job, also as `get -o name` prints it. Raises ClusterError."""
    from finetune_cli.cluster import bare

    return None if value is None else bare(value)


def complete_path(incomplete: str) -> list[str]:
    """Paths of the spec for the shell."""
    from finetune_cli.paths import fields

    known = (one.path.removeprefix("spec.").replace("[]", "") for one in fields())
    return [path for path in known if path.startswith(incomplete)]


def complete_set(incomplete: str) -> list[str]:
    """`PATH=` of everything that `--set` takes."""
    return [f"{path}=" for path in complete_path(incomplete) if not path.startswith("status")]


def one_of(*words: str) -> Callable[[str], list[str]]:
    """Completion of an option that takes some words."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


def known_format(form: str | None, *allowed: str) -> None:
    """Refuse a format that a command does not have. Raises Ended."""
    if form is not None and form not in allowed:
        output.errors([f"-o {form}: one of {', '.join(allowed)}"])
        raise output.Ended(output.ERROR)


SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change a field of the spec.", autocompletion=complete_set),
]
NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of the FineTuneJob.", autocompletion=complete_job, callback=job_name)
]
NamespaceOption = Annotated[str | None, typer.Option("--namespace", "-n", help="Namespace; left out: the context's.")]
ContextOption = Annotated[str | None, typer.Option("--context", help="Context of the kubeconfig.")]
KubeconfigOption = Annotated[Path | None, typer.Option("--kubeconfig", help="Path of the kubeconfig.")]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "-o",
        "--output",
        metavar="yaml|json|wide|name",
        help="Format.",
        autocompletion=one_of("yaml", "json", "wide", "name"),
    ),
]
DataFormatOption = Annotated[
    str | None,
    typer.Option(
        "-o", "--output", metavar="yaml|json", help="The data, not the picture.", autocompletion=one_of("yaml", "json")
    ),
]
