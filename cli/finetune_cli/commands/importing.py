"""`finetune import`: files of other tools to a FineTuneJob."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune_cli import output
from finetune_cli.commands.options import complete_set, one_of

if TYPE_CHECKING:
    from finetune_cli.importers.engine import Imported


def import_(
    context: typer.Context,
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FILE...", help="Files or a folder of the other tool, later ones win."),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="env|toml|yaml|hydra|guide|openai",
            help="Whose files they are; left out: recognised.",
            autocompletion=one_of("env", "toml", "yaml", "hydra", "guide", "openai"),
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the FineTuneJob; left out: from the first file.")] = None,
    namespace: Annotated[str | None, typer.Option("--namespace", "-n", help="Namespace of all documents.")] = None,
    model: Annotated[str | None, typer.Option(metavar="URI", help="Base model, instead of the file's.")] = None,
    data: Annotated[str | None, typer.Option(metavar="URI", help="Training data, instead of the file's.")] = None,
    validation: Annotated[
        str | None, typer.Option(metavar="URI", help="Validation data, instead of the file's.")
    ] = None,
    test: Annotated[str | None, typer.Option(metavar="URI", help="Test data, instead of the file's.")] = None,
    adapter: Annotated[str | None, typer.Option(metavar="URI", help="Adapter to continue.")] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="NAME/KEY", help="ConfigMap key with prompts to compare on.")
    ] = None,
    deepspeed: Annotated[
        str | None, typer.Option(metavar="NAME/KEY", help="ConfigMap key with a DeepSpeed JSON.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(metavar="URI", help="Where the job writes: s3://bucket/prefix.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs per node; 0: CPU.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PATH=VALUE",
            help="Any field of the spec; wins over the files.",
            autocompletion=complete_set,
        ),
    ] = None,
    model_map: Annotated[
        list[str] | None, typer.Option(metavar="THEIRS=OURS", help="openai: the open model for one of that API.")
    ] = None,
    allow_env: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="hydra: an environment variable that may be read.")
    ] = None,
    annotate: Annotated[bool, typer.Option(help="Name the origin of every value in a comment.")] = False,
    explain: Annotated[bool, typer.Option(help="Show a table of every option instead of the manifest.")] = False,
    file: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the manifest to a file.")
    ] = None,
) -> None:
    """Turn the configuration of another tool into a FineTuneJob.

    The manifest goes to stdout, notes and warnings to stderr. What stands behind -- is that tool's own command line.

    Example: finetune import train.env --data s3://data/train.jsonl --storage s3://models/tuned | kubectl apply -f -

    Example: finetune import config.yaml -- --training.learning_rate 1e-4

    Example: finetune import --from hydra configs/ -- training=fsdp dataset.path=org/data
    """
    from finetune_cli.files import write_text
    from finetune_cli.importers.engine import run
    from finetune_cli.importers.manifest import render
    from finetune_cli.importers.material import Refused, Request
    from finetune_cli.importers.registry import IMPORTERS
    from finetune_cli.setting import settings

    options = {
        "model": model, "data": data, "validation": validation, "test": test, "adapter": adapter, "storage": storage, "gpus": gpus, "nodes": nodes,
        "prompts": prompts, "deepspeed": deepspeed,
    }  # fmt: skip
    if file is not None and any(file.resolve() == one.resolve() for one in files or ()):
        output.errors([f"-o {file}: it is one of the files that are read; name another place for the manifest"])
        raise output.Ended(output.ERROR)
    try:
        request = Request(
            files=tuple(files or ()),
            words=tuple(context.obj or ()),
            source=source,
            name=name,
            namespace=namespace,
            own=settings(set_ or (), options),
            model_map=pairs("--model-map", model_map or []),
            allow_env=frozenset(allow_env or ()),
            environment=dict(os.environ),
        )
        imported = run(request, IMPORTERS)
    except Refused as refused:
        output.errors(refused.mistakes)
        raise output.Ended(output.ERROR) from None
    output.warnings(imported.warnings)
    output.notes(imported.notes)
    text = table(imported) if explain else render(imported, annotate=annotate)
    if file is None:
        output.write(text)
    else:
        write_text(file, text)


def pairs(option: str, texts: list[str]) -> dict[str, str]:
    """`a=b` texts as a mapping."""
    from finetune_cli.importers.material import Mistake, Refused

    result: dict[str, str] = {}
    mistakes = []
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key or not value:
            mistakes.append(Mistake(option, text, "it is not NAME=VALUE"))
        result[key] = value
    if mistakes:
        raise Refused(mistakes)
    return result


def table(imported: Imported) -> str:
    """Every option: source spelling, canonical path, value, origin."""
    from io import StringIO

    from rich.console import Console
    from rich.table import Table

    from finetune_cli.importers.manifest import origin_of

    grid = Table("WRITTEN AS", "FIELD", "VALUE", "ORIGIN", box=None, pad_edge=False)
    for path, assigned in sorted(imported.assigned.items()):
        origin = assigned.origin.place if assigned.key else origin_of(assigned)
        grid.add_row(assigned.key or "-", path, str(assigned.value), origin)
    buffer = StringIO()
    width = sys.stdout.isatty() and output.console().width or 200
    Console(file=buffer, width=width, highlight=False).print(grid)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())
