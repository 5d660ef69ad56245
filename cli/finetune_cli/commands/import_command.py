"""`finetune import`: turns the configuration of another tool into a FineTuneJob."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune_cli import output
from finetune_cli.commands.shared import complete_set, complete_words
from finetune_cli.importers import IMPORTER_NAMES

if TYPE_CHECKING:
    from finetune_cli.importers.run_import import ImportResult


def import_(
    context: typer.Context,
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FILE...", help="Files or a folder of the other tool. Later files override earlier ones."
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="|".join(IMPORTER_NAMES),
            help="The tool that the files are for. Default: recognised by the content of the files.",
            autocompletion=complete_words(*IMPORTER_NAMES),
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the FineTuneJob. Default: the name of the first file.")
    ] = None,
    namespace: Annotated[
        str | None, typer.Option("--namespace", "-n", help="Namespace written into all manifests.")
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="URI", help="Base model; overrides the files.")] = None,
    data: Annotated[str | None, typer.Option(metavar="URI", help="Training data; overrides the files.")] = None,
    validation: Annotated[str | None, typer.Option(metavar="URI", help="Validation data; overrides the files.")] = None,
    test: Annotated[str | None, typer.Option(metavar="URI", help="Test data; overrides the files.")] = None,
    adapter: Annotated[str | None, typer.Option(metavar="URI", help="Adapter whose training continues.")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="NAME/KEY", help="ConfigMap and key with the prompts for comparing base and trained model."),
    ] = None,
    deepspeed: Annotated[
        str | None, typer.Option(metavar="NAME/KEY", help="ConfigMap and key with a DeepSpeed configuration in JSON.")
    ] = None,
    benchmarks: Annotated[
        str | None, typer.Option(metavar="URI", help="For yaml: the folder with the tasks and data of the benchmarks.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(metavar="URI", help="Storage root for results, for example s3://bucket/prefix.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs per node; 0 trains on CPU.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Number of nodes.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PATH=VALUE",
            help="Set a field of the spec; overrides the files.",
            autocompletion=complete_set,
        ),
    ] = None,
    model_map: Annotated[
        list[str] | None,
        typer.Option(metavar="THEIRS=OURS", help="For openai: the open model that replaces a model of the OpenAI API."),
    ] = None,
    allow_env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="For hydra: an environment variable that the configuration may read."),
    ] = None,
    drop_unsupported: Annotated[
        bool,
        typer.Option("--drop-unsupported", help="Leave out and list options that a FineTuneJob does not support, instead of refusing them."),
    ] = False,
    annotate: Annotated[bool, typer.Option(help="Add a comment with the origin of every value.")] = False,
    explain: Annotated[bool, typer.Option(help="Print a table of every option instead of the manifest.")] = False,
    file: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write the manifest to a file instead of stdout."),
    ] = None,
) -> None:
    """Turn the configuration of another tool into a FineTuneJob.

    The manifest goes to stdout, notes and warnings go to stderr. Write the other tool's own command line after `--`.

    Example: finetune import train.env --data s3://data/train.jsonl --storage s3://models/tuned | kubectl apply -f -

    Example: finetune import config.yaml -- --training.learning_rate 1e-4

    Example: finetune import --from hydra configs/ -- training=fsdp dataset.path=org/data
    """
    from finetune_cli.files import write_text
    from finetune_cli.importers.draft import Request
    from finetune_cli.importers.registry import IMPORTERS
    from finetune_cli.importers.render import render_manifest
    from finetune_cli.importers.run_import import run_import
    from finetune_cli.overrides import parse_overrides

    options = {
        "model": model, "data": data, "validation": validation, "test": test, "adapter": adapter, "storage": storage, "gpus": gpus, "nodes": nodes,
        "prompts": prompts, "deepspeed": deepspeed,
    }  # fmt: skip
    if file is not None and any(file.resolve() == source_file.resolve() for source_file in files or ()):
        raise output.fail(f"-o {file}: this file is one of the inputs; choose another file for the manifest")
    request = Request(
        files=tuple(files or ()),
        tool_arguments=tuple(context.obj or ()),
        source=source,
        name=name,
        namespace=namespace,
        overrides=parse_overrides(set_ or (), options),
        drop_unsupported=drop_unsupported,
        benchmarks=benchmarks,
        model_map=parse_pairs("--model-map", model_map or []),
        allowed_variables=frozenset(allow_env or ()),
        environment=dict(os.environ),
    )
    import_result = run_import(request, IMPORTERS)
    output.print_warnings(import_result.warnings)
    output.print_notes(import_result.notes)
    text = format_options_table(import_result) if explain else render_manifest(import_result, with_origins=annotate)
    if file is None:
        output.write(text)
    else:
        write_text(file, text)


def parse_pairs(option: str, pair_texts: list[str]) -> dict[str, str]:
    """Parse `NAME=VALUE` texts. Raises InvalidInput."""
    from finetune_cli.mistakes import InvalidInput, Mistake

    value_by_name: dict[str, str] = {}
    mistakes = []
    for text in pair_texts:
        name, equals_sign, value = text.partition("=")
        if not equals_sign or not name or not value:
            mistakes.append(Mistake(option, text, "the text does not have the form NAME=VALUE"))
        value_by_name[name] = value
    if mistakes:
        raise InvalidInput(mistakes)
    return value_by_name


def format_options_table(import_result: ImportResult) -> str:
    """Return a table with one line for each option: its key in the file of the other tool, the spec field, the value, and the origin of the value."""
    from io import StringIO

    from rich.console import Console
    from rich.table import Table

    from finetune_cli.importers.render import describe_origin

    option_table = Table("WRITTEN AS", "FIELD", "VALUE", "ORIGIN", box=None, pad_edge=False)
    for path, assigned in sorted(import_result.assigned_values.items()):
        origin = assigned.origin.location if assigned.key else describe_origin(assigned)
        option_table.add_row(assigned.key or "-", path, str(assigned.value), origin)
    used_keys = {assigned.key for assigned in import_result.assigned_values.values()}
    for key, reason in import_result.reasons.items():
        if key not in used_keys:
            option_table.add_row(key, "-", "-", reason)
    buffer = StringIO()
    table_width = sys.stdout.isatty() and output.stdout_console().width or 200
    Console(file=buffer, width=table_width, highlight=False).print(option_table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())
