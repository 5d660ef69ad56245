"""`finetune init`: a first manifest, commented."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from finetune_cli import output
from finetune_cli.commands.options import one_of

METHODS = ("lora", "qlora", "dora", "full", "spectrum")
TRAINERS = ("sft", "dpo", "grpo", "kto", "orpo", "reward")
FORMATS = {
    "dpo": "preference",
    "orpo": "preference",
    "reward": "preference",
    "kto": "unpairedPreference",
    "grpo": "promptOnly",
}


def init(
    name: Annotated[str | None, typer.Argument(help="Name of the FineTuneJob.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="URI", help="Base model: org/name or s3://bucket/prefix.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="URI", help="Training data: s3://bucket/train.jsonl or org/name.")
    ] = None,
    validation: Annotated[str | None, typer.Option(metavar="URI", help="Validation data.")] = None,
    storage: Annotated[
        str | None, typer.Option(metavar="URI", help="Where results go; left out: the operator's own.")
    ] = None,
    method: Annotated[
        str, typer.Option(metavar="|".join(METHODS), help="Fine-tuning method.", autocompletion=one_of(*METHODS))
    ] = "lora",
    trainer: Annotated[
        str, typer.Option(metavar="|".join(TRAINERS), help="Objective.", autocompletion=one_of(*TRAINERS))
    ] = "sft",
    gpus: Annotated[int, typer.Option(help="GPUs; 0: CPU.")] = 1,
    file: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write to a file; it must not exist.")
    ] = None,
) -> None:
    """Write a commented manifest; what is not given is asked for, if there is somebody to ask.

    Example: finetune init support-bot --model org/name --data s3://data/train.jsonl -o job.yaml
    """
    import sys

    from finetune_cli.files import write_text

    asking = sys.stdin.isatty()
    name = _asked(name, "Name", asking, "NAME")
    model = _asked(model, "Base model (org/name or URI)", asking, "--model")
    data = _asked(data, "Training data (URI)", asking, "--data")
    wrong = [
        f"{option}: {value} is not known here; one of {', '.join(allowed)}"
        for option, value, allowed in (("--method", method, METHODS), ("--trainer", trainer, TRAINERS))
        if value not in allowed
    ]
    if wrong:
        output.errors(wrong)
        raise output.Ended(output.ERROR)
    text = manifest(name, model, data, validation, storage, method, trainer, gpus)
    _refuse_wrong(text)
    if file is None:
        output.write(text)
    elif file.exists():
        output.errors([f"{file} exists; name another file"])
        raise output.Ended(output.ERROR)
    else:
        write_text(file, text)
        output.notes([f"{file} is written; next: finetune validate {file}"])


def _asked(value: str | None, question: str, asking: bool, option: str) -> str:
    if value:
        return value
    if not asking:
        output.errors([f"{option} is missing, and there is nobody to ask"])
        raise output.Ended(output.ERROR)
    return str(typer.prompt(question, err=True))


def _refuse_wrong(text: str) -> None:
    """What was asked for must be a job that can be run; fields not supported yet are told by `validate`."""
    import dataclasses

    from finetune_api.names import Reason

    from finetune_cli.manifests import examine, parse

    _, findings = examine(next(parse(text, "manifest")))
    wrong = [dataclasses.replace(one.mistake, place="") for one in findings if one.code != Reason.NOT_SUPPORTED_YET]
    if wrong:
        output.errors(wrong)
        raise output.Ended(output.ERROR)


def manifest(
    name: str, model: str, data: str, validation: str | None, storage: str | None, method: str, trainer: str, gpus: int
) -> str:
    """The manifest with its comments; every commented-out line can be used as it stands."""
    import json

    from finetune_api.names import API_VERSION, KIND

    def quoted(value: Any) -> str:
        return json.dumps(str(value), ensure_ascii=False)

    form = FORMATS.get(trainer)
    lines = [
        f"apiVersion: {API_VERSION}",
        f"kind: {KIND}",
        "metadata:",
        f"  name: {quoted(name)}",
        "spec:",
        "  model:",
        f"    source: {quoted(model)}",
        "    # tokenSecretRef: {name: hub, key: token}   # for gated models",
        "  method:",
        f"    type: {method}   # {', '.join(METHODS)}",
    ]
    if method in ("lora", "qlora", "dora"):
        lines += ["    lora:", "      rank: 16", "      alpha: 32"]
    lines += ["  trainer:", f"    type: {trainer}   # {', '.join(TRAINERS)}"]
    if trainer == "grpo":
        lines += ["    rewards:", "      - builtin: regex", "        parameters: {pattern: '^Answer: '}"]
    lines += ["  dataset:", f"    train: {quoted(data)}"]
    lines += [f"    format: {form}"] if form else ["    # format: messages   # left out: recognised from the rows"]
    lines += (
        [f"    validation: {quoted(validation)}"]
        if validation
        else ["    # split: {validation: 0.1}   # or validation: URI"]
    )
    lines += [
        "  training:",
        "    epochs: 3",
        "    # learningRate: 2.0e-4   # left out: chosen by method and objective",
        f"    batchSizePerDevice: {8 if trainer == 'grpo' else 4}",
        "  resources:",
        f"    gpusPerNode: {gpus}",
        "    # nodes: 1",
    ]
    lines += (
        ["  storage:", f"    uri: {quoted(storage)}"]
        if storage
        else ["  # storage: {uri: 's3://bucket/prefix'}   # left out: the operator's"]
    )
    lines += ["  # suspend: true   # save, free the GPUs, resume later"]
    return "\n".join(lines) + "\n"
