"""`finetune run`: a job on this machine, without Kubernetes, by the same trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune_cli import output
from finetune_cli.commands.options import SetOption


def run_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Manifest of one FineTuneJob.")],
    local: Annotated[bool, typer.Option("--local", help="Run here; there is no other way yet.")] = False,
    folder: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the results go.")] = Path(
        "finetune-output"
    ),
    sets: SetOption = None,
    config_maps: Annotated[
        list[str] | None,
        typer.Option("--config-map", metavar="NAME=FOLDER", help="A folder that stands for a ConfigMap."),
    ] = None,
    claims: Annotated[
        list[str] | None,
        typer.Option("--claim", metavar="NAME=FOLDER", help="A folder that stands for a volume claim."),
    ] = None,
    python: Annotated[
        str | None, typer.Option(metavar="PATH", help="Python with the trainer in it; left out: this one.")
    ] = None,
) -> None:
    """Train here, with live progress; results lie as they would in S3. Running it again goes on where it stopped.

    Exit code 2 if the job failed.

    Example: finetune run job.yaml --local

    Example: finetune run job.yaml --local --set training.maxSteps=10 -o ./out
    """
    if not local:
        output.errors(["`run` trains on this machine: say so with --local; for a cluster use `finetune submit`"])
        raise output.Ended(output.ERROR)
    from finetune_cli.local import prepare, train

    prepared = prepare(file, folder, sets or [], config_maps or [], claims or [])
    raise output.Ended(train(prepared, python))
