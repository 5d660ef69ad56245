"""Options that many commands share, with kubectl's spellings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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


def complete_path(incomplete: str) -> list[str]:
    """Paths of the spec for the shell."""
    from finetune_cli.paths import fields

    known = (one.path.removeprefix("spec.").replace("[]", "") for one in fields())
    return [path for path in known if path.startswith(incomplete)]


NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of the FineTuneJob.", autocompletion=complete_job)
]
NamespaceOption = Annotated[str | None, typer.Option("--namespace", "-n", help="Namespace; left out: the context's.")]
ContextOption = Annotated[str | None, typer.Option("--context", help="Context of the kubeconfig.")]
KubeconfigOption = Annotated[Path | None, typer.Option("--kubeconfig", help="Path of the kubeconfig.")]
FormatOption = Annotated[str | None, typer.Option("-o", "--output", metavar="yaml|json|wide|name", help="Format.")]
