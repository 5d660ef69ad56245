"""`finetune init`: writes a first manifest with comments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from finetune_cli import output
from finetune_cli.commands.shared import complete_words

METHOD_TYPES = ("lora", "qlora", "dora", "full", "spectrum")
TRAINER_TYPES = ("sft", "dpo", "grpo", "kto", "orpo", "reward")
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
        str | None, typer.Option(metavar="URI", help="Storage root for results. Default: the operator's storage.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(metavar="|".join(METHOD_TYPES), help="Fine-tuning method.", autocompletion=complete_words(*METHOD_TYPES)),
    ] = "lora",
    trainer: Annotated[
        str,
        typer.Option(metavar="|".join(TRAINER_TYPES), help="Training objective.", autocompletion=complete_words(*TRAINER_TYPES)),
    ] = "sft",
    gpus: Annotated[int, typer.Option(help="GPUs; 0 trains on CPU.")] = 1,
    file: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write to a new file instead of stdout.")
    ] = None,
) -> None:
    """Write a manifest with comments. On a terminal, the command asks for missing values.

    Example: finetune init support-bot --model org/name --data s3://data/train.jsonl -o job.yaml
    """
    import sys

    from finetune_cli.files import write_text

    is_interactive = sys.stdin.isatty()
    name = _value_or_prompt(name, "Name", is_interactive, "NAME")
    model = _value_or_prompt(model, "Base model (org/name or URI)", is_interactive, "--model")
    data = _value_or_prompt(data, "Training data (URI)", is_interactive, "--data")
    errors = [
        f"{option}: unknown value {value}; write one of {', '.join(allowed)}"
        for option, value, allowed in (("--method", method, METHOD_TYPES), ("--trainer", trainer, TRAINER_TYPES))
        if value not in allowed
    ]
    if errors:
        raise output.fail(*errors)
    text = manifest_text(name, model, data, validation, storage, method, trainer, gpus)
    _check_manifest_text(text, {"model": model, "data": data, "validation": validation, "storage": storage, "gpus": gpus})
    if file is None:
        output.write(text)
    elif file.exists():
        raise output.fail(f"{file} already exists; choose another file")
    else:
        write_text(file, text)
        output.print_notes([f"wrote {file}; next: finetune validate {file}"])


def _value_or_prompt(value: str | None, question: str, is_interactive: bool, option: str) -> str:
    if value:
        return value
    if not is_interactive:
        raise output.fail(f"{option} is missing; `finetune init` asks for missing values only on a terminal")
    return str(typer.prompt(question, err=True))


def _check_manifest_text(text: str, options: dict[str, Any]) -> None:
    """Print the errors of a manifest and raise Exit. Only `validate` reports fields that are not supported yet."""
    import dataclasses

    from finetune_api.names import Reason

    from finetune_cli.checks import check_manifest, errors_of
    from finetune_cli.manifests import parse_manifests
    from finetune_cli.overrides import name_option, parse_overrides

    overrides = parse_overrides((), options)
    findings = errors_of(check_manifest(next(parse_manifests(text, "manifest")))[1])
    mistakes = [
        name_option(dataclasses.replace(finding.mistake, location=""), overrides)
        for finding in findings
        if finding.code != Reason.NOT_SUPPORTED_YET
    ]
    if mistakes:
        raise output.fail(*mistakes)


def manifest_text(
    name: str, model: str, data: str, validation: str | None, storage: str | None, method: str, trainer: str, gpus: int
) -> str:
    """Return the manifest with comments. Every commented-out line is valid once uncommented."""
    import json

    from finetune_api.names import API_VERSION, KIND

    def quoted(value: Any) -> str:
        return json.dumps(str(value), ensure_ascii=False)

    dataset_format = FORMATS.get(trainer)
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
        f"    type: {method}   # {', '.join(METHOD_TYPES)}",
    ]
    if method in ("lora", "qlora", "dora"):
        lines += ["    lora:", "      rank: 16", "      alpha: 32"]
    lines += ["  trainer:", f"    type: {trainer}   # {', '.join(TRAINER_TYPES)}"]
    if trainer == "grpo":
        lines += ["    rewards:", "      - builtin: regex", "        parameters: {pattern: '^Answer: '}"]
    lines += ["  dataset:", f"    train: {quoted(data)}"]
    lines += (
        [f"    format: {dataset_format}"]
        if dataset_format
        else ["    # format: messages   # default: detected from the rows"]
    )
    lines += (
        [f"    validation: {quoted(validation)}"]
        if validation
        else ["    # split: {validation: 0.1}   # or validation: URI"]
    )
    lines += [
        "  training:",
        "    epochs: 3",
        "    # learningRate: 2.0e-4   # default: depends on method and objective",
        f"    batchSizePerDevice: {8 if trainer == 'grpo' else 4}",
        "  resources:",
        f"    gpusPerNode: {gpus}",
        "    # nodes: 1",
    ]
    lines += (
        ["  storage:", f"    uri: {quoted(storage)}"]
        if storage
        else ["  # storage: {uri: 's3://bucket/prefix'}   # default: the operator's storage"]
    )
    lines += ["  # suspend: true   # save a checkpoint, release the GPUs, resume later"]
    return "\n".join(lines) + "\n"
