"""`finetune run --local`: runs a job on this machine with the same trainer, without Kubernetes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune_cli import output
from finetune_cli.commands.shared import SetOption


def run_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Manifest of one FineTuneJob.")],
    local: Annotated[bool, typer.Option("--local", help="Run on this machine. Required.")] = False,
    folder: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder for the results.")] = Path(
        "finetune-output"
    ),
    sets: SetOption = None,
    config_maps: Annotated[
        list[str] | None,
        typer.Option("--config-map", metavar="NAME=FOLDER", help="A local folder that replaces a ConfigMap."),
    ] = None,
    claims: Annotated[
        list[str] | None,
        typer.Option("--claim", metavar="NAME=FOLDER", help="A local folder that replaces a volume claim."),
    ] = None,
    python: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Python interpreter with the trainer installed. Default: the interpreter that runs finetune.",
        ),
    ] = None,
) -> None:
    """Train a job on this machine and show the progress.

    The folder of results has the same layout as the results of a cluster job in S3. Run the command again to resume.

    Exit code 2 if the job failed.

    Example: finetune run job.yaml --local

    Example: finetune run job.yaml --local --set training.maxSteps=10 -o ./out
    """
    if not local:
        raise output.fail(
            "`finetune run` needs --local and trains on this machine; to run in a cluster, use `finetune submit`"
        )
    from finetune_cli.local_run import prepare_run, run_trainer

    run = prepare_run(file, folder, sets or [], config_maps or [], claims or [])
    raise output.CommandExit(run_trainer(run, python))
