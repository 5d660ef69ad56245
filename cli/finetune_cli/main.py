"""The entry of `finetune` and `kubectl finetune`.

Modules of commands import nothing heavy at their top, so that `finetune --help` answers at once.
"""

from __future__ import annotations

import sys

import typer

from finetune_cli.commands.diff import diff
from finetune_cli.commands.explain import explain
from finetune_cli.commands.importing import import_
from finetune_cli.commands.init import init
from finetune_cli.commands.validate import validate

app = typer.Typer(
    name="finetune",
    no_args_is_help=True,
    help="Fine-tune language models on Kubernetes: write, check, submit, watch, and import from other tools.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _command in {
    "init": init,
    "validate": validate,
    "explain": explain,
    "import": import_,
    "diff": diff,
}.items():
    app.command(_name)(_command)


USAGE = 2
"""Exit code of the option parser for wrong usage."""


def main(arguments: list[str] | None = None) -> None:
    """Console entry. Everything behind a first `--` belongs to the other tool's command line (`finetune import`)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    behind: list[str] = []
    if "--" in words and "import" in words[: words.index("--")]:
        cut = words.index("--")
        words, behind = words[:cut], words[cut + 1 :]
    sys.exit(run(words, behind))


def run(words: list[str], behind: list[str]) -> int:
    """Run one command; its exit code. Wrong usage is 1, as kubectl's: 2 is kept for jobs that failed."""
    from finetune_cli import output

    try:
        app(args=words, prog_name=_program(), obj=behind)
    except output.Ended as ended:
        return ended.code
    except BrokenPipeError:
        sys.stderr.close()
        return output.ERROR
    except SystemExit as ended:
        return output.ERROR if ended.code == USAGE else int(ended.code or 0)
    return output.OK


def _program() -> str:
    return "kubectl finetune" if sys.argv and sys.argv[0].rpartition("/")[2].startswith("kubectl-") else "finetune"


if __name__ == "__main__":
    main()
