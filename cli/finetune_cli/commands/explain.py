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
    from finetune_cli.suggestions import closest_name

    every = fields()
    if search is not None:
        word = search.lower()
        found = [one for one in every if word in one.path.lower() or word in one.description.lower()]
        if not found:
            raise output.fail(f"no field has {search!r} in its name or description")
        output.write("\n".join(_line(one) for one in found))
        return
    wanted = "spec" if path is None else path.replace("[]", "").removeprefix("FineTuneJob.")
    found = [one for one in every if one.path.replace("[]", "") in (wanted, f"spec.{wanted}", f"status.{wanted}")]
    if not found:
        closest = closest_name(f"spec.{wanted.removeprefix('spec.')}", [one.path for one in every])
        hint = f"did you mean {closest}?" if closest else "search with --search WORD"
        raise output.fail(f"{path} is not a field of a FineTuneJob; {hint}")
    output.write("\n\n".join(_entry(one, every) for one in found))


def _line(field: Field) -> str:
    return f"{field.path} <{field.kind}>  {field.description}"


def _entry(field: Field, every: tuple[Field, ...]) -> str:
    lines = [f"{field.path} <{field.kind}>", f"  {field.description}"]
    prefix = field.path + ("[]." if field.kind.startswith("list of") else ".")
    children = [one for one in every if one.path.startswith(prefix) and "." not in one.path[len(prefix) :]]
    if children:
        width = max(len(one.path) - len(prefix) for one in children)
        lines += ["", *(f"  {one.path[len(prefix) :]:<{width}}  <{one.kind}>  {one.description}" for one in children)]
    return "\n".join(lines)
