"""`finetune import`: files of other tools to a FineTuneJob."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_cli import output

if TYPE_CHECKING:
    from finetune_cli.importers.engine import Imported
    from finetune_cli.importers.material import Assigned

OWN = {
    "model": "model.source", "data": "dataset.train", "validation": "dataset.validation", "test": "dataset.test",
    "adapter": "method.adapter.source", "storage": "storage.uri", "gpus": "resources.gpusPerNode", "nodes": "resources.nodes",
}  # fmt: skip


def import_(
    context: typer.Context,
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FILE...", help="Files or a folder of the other tool, later ones win."),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="env|toml|yaml|hydra|guide|openai", help="Whose files they are; left out: recognised."
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
        typer.Option("--set", metavar="PATH=VALUE", help="Any field of the spec; wins over the files."),
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
    from finetune_cli.importers.engine import run
    from finetune_cli.importers.manifest import render
    from finetune_cli.importers.material import Refused, Request

    own_files, words = divide(list(files or []), context)
    given = {
        "model": model,
        "data": data,
        "validation": validation,
        "test": test,
        "adapter": adapter,
        "storage": storage,
        "gpus": gpus,
        "nodes": nodes,
    }
    from finetune_cli.importers.registry import IMPORTERS

    try:
        own = own_values(
            {key: value for key, value in given.items() if value is not None}, prompts, deepspeed, set_ or []
        )
        request = Request(
            tuple(own_files), tuple(words), source, name, namespace, own, pairs("--model-map", model_map or []), frozenset(allow_env or []), dict(os.environ)
        )  # fmt: skip
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
        file.write_text(text, encoding="utf-8")


def divide(files: list[Path], context: typer.Context) -> tuple[list[Path], list[str]]:
    """Our files, and the other tool's words, which `main` has cut off at `--`."""
    return files, list(context.obj or [])


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


def _source(key: str, value: Any) -> Any:
    """A path of this machine as a source; everything else as it is."""
    is_path = key in ("model", "data", "validation", "test", "adapter") and str(value).startswith((".", "/", "~"))
    return f"file://{value}" if is_path else value


def own_values(
    given: dict[str, Any], prompts: str | None, deepspeed: str | None, sets: list[str]
) -> dict[str, Assigned]:
    """Fields set by our own options, by spec path. Raises Refused."""
    from finetune_cli.importers.convert import nearest
    from finetune_cli.importers.material import Assigned, Mistake, Origin, Refused
    from finetune_cli.importers.yaml_tree import parse_value
    from finetune_cli.paths import group_paths, leaf_paths, text_paths

    mistakes: list[Mistake] = []
    result = {
        OWN[key]: Assigned(_source(key, value), Origin(f"option --{key}"), f"--{key}") for key, value in given.items()
    }
    for option, text, path in (
        ("--prompts", prompts, "evaluation.comparison.promptsRef"),
        ("--deepspeed", deepspeed, "distributed.deepspeed.configRef"),
    ):
        if text is None:
            continue
        name, slash, key = text.removeprefix("configmap://").partition("/")
        if not slash or not re.match(r"^[-._a-zA-Z0-9]+$", key):
            mistakes.append(Mistake(option, text, "it is not the name and key of a ConfigMap", "write NAME/KEY"))
        result[f"{path}.name"] = Assigned(name, Origin(f"option {option}"), option)
        result[f"{path}.key"] = Assigned(key, Origin(f"option {option}"), option)
    known, groups = leaf_paths(), group_paths()
    for text in sets:
        path, equals, value = text.partition("=")
        path = path.removeprefix("spec.")
        if equals and value == "null" and path in groups:
            result[path] = Assigned(None, Origin("option --set"), f"--set {path}")
        elif path not in known:
            near = nearest(path, known)
            mistakes.append(
                Mistake(
                    "--set", path, "unknown field", f"did you mean {near}?" if near else "`finetune explain` lists all"
                )
            )
        elif not equals:
            mistakes.append(Mistake("--set", path, "it has no value", f"write --set {path}=VALUE"))
        else:
            found = value if path in text_paths() and value != "null" else parse_value(value)
            result[path] = Assigned(found, Origin("option --set"), f"--set {path}")
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
