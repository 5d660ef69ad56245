"""`finetune explain`: the reference of every field."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from finetune_cli import output
from finetune_cli.commands.shared import complete_path

if TYPE_CHECKING:
    from finetune_cli.fields import Field


def explain(
    path: Annotated[
        str | None,
        typer.Argument(
            help="A field, such as training.learningRate. Default: all groups.", autocompletion=complete_path
        ),
    ] = None,
    search: Annotated[
        str | None,
        typer.Option(
            "--search", "-s", metavar="WORD", help="List the fields whose name or description contains this word."
        ),
    ] = None,
) -> None:
    """Explain a field of a FineTuneJob: type, meaning, default and example.

    Example: finetune explain training

    Example: finetune explain method.lora.rank

    Example: finetune explain --search warmup
    """
    from finetune_cli.fields import fields
    from finetune_cli.suggestions import suggest_field

    every = fields()
    if search is not None:
        found = _containing(search, every)
        if not found:
            raise output.fail(f"no field has {search!r} in its name or description")
        output.write("\n".join(_line(one) for one in found))
        return
    wanted = "spec" if path is None else path.replace("[]", "").removeprefix("FineTuneJob.")
    found = [one for one in every if one.path.replace("[]", "") in (wanted, f"spec.{wanted}", f"status.{wanted}")]
    if not found:
        suggestion = suggest_field(f"spec.{wanted.removeprefix('spec.')}", [one.path for one in every])
        mentions = [] if suggestion else _containing(wanted, every)
        hint = f"did you mean {suggestion}?" if suggestion else "search the descriptions with --search WORD"
        hint = f"these fields mention it: {', '.join(one.path for one in mentions)}" if mentions else hint
        raise output.fail(f"{path} is not a field of a FineTuneJob; {hint}")
    output.write("\n\n".join(_entry(one, every) for one in found))


def _containing(word: str, every: tuple[Field, ...]) -> list[Field]:
    """Return the fields whose name or description contains a word, in any letter case."""
    return [one for one in every if word.lower() in one.path.lower() or word.lower() in one.description.lower()]


def _line(field: Field) -> str:
    return f"{field.path} <{field.kind}>  {_description(field)}"


def _entry(field: Field, every: tuple[Field, ...]) -> str:
    lines = [f"{field.path} <{field.kind}>", f"  {_description(field)}"]
    prefix = field.path + ("[]." if field.kind.startswith("list of") else ".")
    children = [one for one in every if one.path.startswith(prefix) and "." not in one.path[len(prefix) :]]
    if children:
        width = max(len(one.path) - len(prefix) for one in children)
        lines += ["", *(f"  {one.path[len(prefix) :]:<{width}}  <{one.kind}>  {_description(one)}" for one in children)]
    return "\n".join(lines)


def _description(field: Field) -> str:
    """Return the description of a field, preceded by a mark if this version does not support it."""
    from finetune_api.support import UNSUPPORTED_FIELDS, wire_path

    for row in UNSUPPORTED_FIELDS:
        path = f"spec.{wire_path(row.path)}"
        if field.path == path or field.path.startswith((f"{path}.", f"{path}[")):
            mark = (
                "[not supported yet]" if row.refuses_every_value else f"[some values are not supported yet: {row.hint}]"
            )
            return f"{mark} {field.description}"
    return field.description
