"""`finetune explain`: the reference of every field, in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from finetune_cli import output
from finetune_cli.commands.options import complete_path

if TYPE_CHECKING:
    from finetune_cli.paths import Field


def explain(
    path: Annotated[
        str | None,
        typer.Argument(
            help="A field, such as training.learningRate; left out: all groups.", autocompletion=complete_path
        ),
    ] = None,
    search: Annotated[
        str | None, typer.Option("--search", "-s", metavar="WORD", help="Fields whose name or text holds the word.")
    ] = None,
) -> None:
    """Explain fields of a FineTuneJob: type, meaning, default and example.

    Example: finetune explain training

    Example: finetune explain method.lora.rank

    Example: finetune explain --search warmup
    """
    from finetune_cli.importers.convert import nearest
    from finetune_cli.paths import fields

    every = fields()
    if search is not None:
        word = search.lower()
        found = [one for one in every if word in one.path.lower() or word in one.description.lower()]
        if not found:
            output.errors([f"no field has {search!r} in its name or text"])
            raise output.Ended(output.ERROR)
        output.write("\n".join(_line(one) for one in found))
        return
    wanted = "spec" if path is None else path.replace("[]", "").removeprefix("FineTuneJob.")
    found = [one for one in every if one.path.replace("[]", "") in (wanted, f"spec.{wanted}", f"status.{wanted}")]
    if not found:
        near = nearest(f"spec.{wanted.removeprefix('spec.')}", [one.path for one in every])
        output.errors(
            [f"{path} is not a field of a FineTuneJob" + (f"; did you mean {near}?" if near else "; try --search")]
        )
        raise output.Ended(output.ERROR)
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
