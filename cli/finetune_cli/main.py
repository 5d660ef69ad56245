"""The entry of `finetune` and `kubectl finetune`.

Modules of commands import nothing heavy at their top, so that `finetune --help` answers at once.
"""

from __future__ import annotations

import sys

import typer

from finetune_cli.commands.importing import import_

app = typer.Typer(
    name="finetune",
    no_args_is_help=True,
    help="Fine-tune language models on Kubernetes: write, check, submit, watch, and import from other tools.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("import")(import_)


def main(arguments: list[str] | None = None) -> None:
    """Console entry. Everything behind a first `--` belongs to the other tool's command line (`finetune import`)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    behind: list[str] = []
    if "--" in words and "import" in words[: words.index("--")]:
        cut = words.index("--")
        words, behind = words[:cut], words[cut + 1 :]
    app(args=words, prog_name=_program(), obj=behind)


def _program() -> str:
    return "kubectl finetune" if sys.argv and sys.argv[0].rpartition("/")[2].startswith("kubectl-") else "finetune"


if __name__ == "__main__":
    main()
