"""`finetune init`: writes a first manifest with comments."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_cli import output
from finetune_cli.commands.shared import complete_words

if TYPE_CHECKING:
    from finetune_cli.mistakes import Mistake

METHOD_TYPES = ("lora", "qlora", "dora", "full", "spectrum")
TRAINER_TYPES = ("sft", "dpo", "grpo", "kto", "orpo", "reward")
FORMAT_OF_TRAINER = {
    "dpo": "preference",
    "orpo": "preference",
    "reward": "preference",
    "kto": "unpairedPreference",
    "grpo": "promptOnly",
}
QUESTION_BY_VALUE_NAME = {
    "name": "Name", "model": "Base model (org/name or URI)", "data": "Training data (URI)", "validation": "Validation data (URI)",
    "storage": "Storage root (s3://bucket/folder)", "method": f"Method ({', '.join(METHOD_TYPES)})", "trainer": f"Objective ({', '.join(TRAINER_TYPES)})",
    "gpus": "GPUs", "file": "Another file",
}  # fmt: skip
"""The question that the command asks for each option."""

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
    """Write a manifest with comments. On a terminal, the command asks for missing values, and asks again for wrong values.

    Example: finetune init support-bot --model org/name --data s3://data/train.jsonl -o job.yaml
    """
    import sys

    from finetune_cli.files import write_text

    is_interactive = sys.stdin.isatty()
    given_values = {
        "name": name, "model": model, "data": data, "validation": validation, "storage": storage, "method": method, "trainer": trainer, "gpus": gpus,
    }  # fmt: skip
    text = _ask_for_valid_manifest(given_values, is_interactive)
    while file is not None and file.exists():
        if not is_interactive:
            raise output.fail(f"{file} already exists; choose another file")
        output.print_errors([f"{file} already exists"])
        file = Path(_ask_for_value("file"))
    if file is None:
        output.write(text)
    else:
        write_text(file, text)
        output.print_notes([f"wrote {file}; next: finetune validate {file}"])


def _ask_for_valid_manifest(values: dict[str, Any], is_interactive: bool) -> str:
    """Return the text of a valid manifest. On a terminal, ask for missing and invalid values. Without a terminal, raise CommandExit for them."""
    for value_name in ("name", "model", "data"):
        if not values[value_name]:
            if not is_interactive:
                missing_argument = "NAME" if value_name == "name" else _make_option_name(value_name)
                raise output.fail(f"{missing_argument} is missing; `finetune init` asks for missing values only on a terminal")
            values[value_name] = _ask_for_value(value_name)
    while True:
        text = build_manifest_text(**values)
        mistakes = _find_unknown_words(values) or _find_mistakes(text, values)
        if not mistakes:
            return text
        wrong_keys = {mistake.key for mistake in mistakes}
        names_of_wrong_values = [value_name for value_name in QUESTION_BY_VALUE_NAME if _make_option_name(value_name) in wrong_keys]
        if not is_interactive or not names_of_wrong_values:
            raise output.fail(*mistakes)
        output.print_errors(mistakes)
        for value_name in names_of_wrong_values:
            values[value_name] = _ask_for_value(value_name)


def _make_option_name(value_name: str) -> str:
    """Return the name of the option or field that messages use for this value."""
    return "metadata.name" if value_name == "name" else f"--{value_name}"


def _ask_for_value(value_name: str) -> Any:
    """Ask on stderr until the user gives a value or, for `gpus`, a number.

    The question is not on stdout, because stdout is for the manifest. Raises Abort at the end of the input.
    """
    import sys

    while True:
        sys.stderr.write(f"{QUESTION_BY_VALUE_NAME[value_name]}: ")
        sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            raise typer.Abort
        answer = line.strip()
        if answer and (value_name != "gpus" or answer.lstrip("-").isdigit()):
            return int(answer) if value_name == "gpus" else answer
        output.print_errors([f"{answer or 'nothing'}: write {'a number' if value_name == 'gpus' else 'a value'}, or end with Ctrl-C"])


def _find_unknown_words(values: dict[str, Any]) -> list[Mistake]:
    """Return a mistake for each option whose value is not one of the allowed words for this option."""
    from finetune_cli.mistakes import Mistake

    return [
        Mistake("", _make_option_name(key), f"unknown value {values[key]}", f"write one of {', '.join(allowed_words)}")
        for key, allowed_words in (("method", METHOD_TYPES), ("trainer", TRAINER_TYPES))
        if values[key] not in allowed_words
    ]


def _find_mistakes(manifest_text: str, values: dict[str, Any]) -> list[Mistake]:
    """Return the errors of the manifest.

    Each error names the option that set the invalid value. `finetune validate` reports the errors about unsupported fields.
    """
    import dataclasses

    from finetune_api.names import Reason

    from finetune_cli.checks import check_manifest, select_errors
    from finetune_cli.manifests import parse_manifests
    from finetune_cli.overrides import attribute_to_option, parse_overrides

    overrides = parse_overrides((), {key: values[key] for key in ("model", "data", "validation", "storage", "gpus")})
    findings = select_errors(check_manifest(next(parse_manifests(manifest_text, "manifest")))[1])
    return [
        attribute_to_option(dataclasses.replace(finding.mistake, location=""), overrides) for finding in findings if finding.code != Reason.NOT_SUPPORTED_YET
    ]


def build_manifest_text(
    name: str, model: str, data: str, validation: str | None, storage: str | None, method: str, trainer: str, gpus: int
) -> str:
    """Return the text of the manifest with comments. The manifest stays valid if the user removes the `#` from any commented-out line."""
    import json

    from finetune_api.names import API_VERSION, KIND

    def quote_value(value: Any) -> str:
        return json.dumps(str(value), ensure_ascii=False)

    dataset_format = FORMAT_OF_TRAINER.get(trainer)
    lines = [
        f"apiVersion: {API_VERSION}",
        f"kind: {KIND}",
        "metadata:",
        f"  name: {quote_value(name)}",
        "spec:",
        "  model:",
        f"    source: {quote_value(model)}",
        "    # tokenSecretRef: {name: hub, key: token}   # for gated models",
        "  method:",
        f"    type: {method}   # {', '.join(METHOD_TYPES)}",
    ]
    if method in ("lora", "qlora", "dora"):
        lines += ["    lora:", "      rank: 16", "      alpha: 32"]
    lines += ["  trainer:", f"    type: {trainer}   # {', '.join(TRAINER_TYPES)}"]
    if trainer == "grpo":
        lines += ["    rewards:", "      - builtin: regex", "        parameters: {pattern: '^Answer: '}"]
    lines += ["  dataset:", f"    train: {quote_value(data)}"]
    lines += (
        [f"    format: {dataset_format}"]
        if dataset_format
        else ["    # format: messages   # default: detected from the rows"]
    )
    lines += (
        [f"    validation: {quote_value(validation)}"]
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
        ["  storage:", f"    uri: {quote_value(storage)}"]
        if storage
        else ["  # storage: {uri: 's3://bucket/prefix'}   # default: the operator's storage"]
    )
    lines += ["  # suspend: true   # save a checkpoint, release the GPUs, resume later"]
    return "\n".join(lines) + "\n"
