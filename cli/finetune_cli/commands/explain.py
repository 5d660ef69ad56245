"""`finetune explain`: prints the reference of a field."""

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
    """Explain a field of a FineTuneJob: its type, meaning, default and an example.

    Example: finetune explain training

    Example: finetune explain method.lora.rank

    Example: finetune explain --search warmup
    """
    from finetune_cli.fields import fields
    from finetune_cli.suggestions import suggest_field

    all_fields = fields()
    if search is not None:
        matching_fields = _find_fields_containing(search, all_fields)
        if not matching_fields:
            raise output.fail(f"no field has {search!r} in its name or description")
        output.write("\n".join(_format_line(field) for field in matching_fields))
        return
    field_path = "spec" if path is None else path.replace("[]", "").removeprefix("FineTuneJob.")
    matching_fields = [
        field
        for field in all_fields
        if field.path.replace("[]", "") in (field_path, f"spec.{field_path}", f"status.{field_path}")
    ]
    if not matching_fields:
        suggestion = suggest_field(f"spec.{field_path.removeprefix('spec.')}", [field.path for field in all_fields])
        mentioning_fields = [] if suggestion else _find_fields_containing(field_path, all_fields)
        hint = f"did you mean {suggestion}?" if suggestion else "search the descriptions with --search WORD"
        hint = f"these fields mention the word: {', '.join(field.path for field in mentioning_fields)}" if mentioning_fields else hint
        raise output.fail(f"{path} is not a field of a FineTuneJob; {hint}")
    output.write("\n\n".join(_format_entry(field, all_fields) for field in matching_fields))


def _find_fields_containing(word: str, all_fields: tuple[Field, ...]) -> list[Field]:
    """Return the fields whose path or description contains a word. The search ignores upper and lower case."""
    return [
        field for field in all_fields if word.lower() in field.path.lower() or word.lower() in field.description.lower()
    ]


def _format_line(field: Field) -> str:
    return f"{field.path} <{field.type_text}>  {_describe_field(field)}"


def _format_entry(field: Field, all_fields: tuple[Field, ...]) -> str:
    lines = [f"{field.path} <{field.type_text}>", f"  {_describe_field(field)}"]
    prefix = field.path + ("[]." if field.type_text.startswith("list of") else ".")
    inner_fields = [inner_field for inner_field in all_fields if inner_field.path.startswith(prefix) and "." not in inner_field.path[len(prefix) :]]
    if inner_fields:
        name_width = max(len(inner_field.path) - len(prefix) for inner_field in inner_fields)
        lines += [
            "",
            *(f"  {inner_field.path[len(prefix) :]:<{name_width}}  <{inner_field.type_text}>  {_describe_field(inner_field)}" for inner_field in inner_fields),
        ]
    return "\n".join(lines)


def _describe_field(field: Field) -> str:
    """Return the description of a field. If this release does not support the field or some of its values, the description begins with a mark that says so."""
    from finetune_api.support import UNSUPPORTED_FIELDS, to_wire_path

    for unsupported_field in UNSUPPORTED_FIELDS:
        path = f"spec.{to_wire_path(unsupported_field.path)}"
        if field.path == path or field.path.startswith((f"{path}.", f"{path}[")):
            support_mark = (
                "[not supported yet]" if unsupported_field.refuses_every_value else f"[some values are not supported yet: {unsupported_field.hint}]"
            )
            return f"{support_mark} {field.description}"
    return field.description
