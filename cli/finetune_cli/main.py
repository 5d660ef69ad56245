"""The entry of `finetune` and `kubectl finetune`.

Modules of commands import nothing heavy at their top, so that `finetune --help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from finetune_cli.commands.changing import cancel, rerun, resume, submit, suspend
from finetune_cli.commands.diff import diff
from finetune_cli.commands.explain import explain
from finetune_cli.commands.importing import import_
from finetune_cli.commands.init import init
from finetune_cli.commands.local import run_command
from finetune_cli.commands.logs import logs
from finetune_cli.commands.report import report
from finetune_cli.commands.stored import checkpoints, purge
from finetune_cli.commands.validate import validate
from finetune_cli.commands.watching import events, get, status, wait

app = typer.Typer(
    name="finetune",
    no_args_is_help=True,
    help="Fine-tune language models on Kubernetes: write, check, submit, watch, and import from other tools.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, Callable[..., None]] = {
    "init": init,
    "validate": validate,
    "explain": explain,
    "import": import_,
    "diff": diff,
    "run": run_command,
    "submit": submit,
    "get": get,
    "status": status,
    "logs": logs,
    "events": events,
    "wait": wait,
    "suspend": suspend,
    "resume": resume,
    "cancel": cancel,
    "rerun": rerun,
    "checkpoints": checkpoints,
    "purge": purge,
    "report": report,
}
for _name, _command in COMMANDS.items():
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
    except Exception as error:
        return _told(error)
    except SystemExit as ended:
        return output.ERROR if ended.code == USAGE else int(ended.code or 0)
    return output.OK


def _told(error: Exception) -> int:
    """Failures with a name are told in one sentence; anything else is a fault of ours and keeps its trace."""
    from finetune_api.errors import FineTuneError

    from finetune_cli import output

    if isinstance(error, BrokenPipeError):
        sys.stderr.close()
    elif isinstance(error, output.Told | FineTuneError):
        output.errors([error])
    else:
        raise error
    return output.ERROR


def _program() -> str:
    return "kubectl finetune" if sys.argv and sys.argv[0].rpartition("/")[2].startswith("kubectl-") else "finetune"


if __name__ == "__main__":
    main()
