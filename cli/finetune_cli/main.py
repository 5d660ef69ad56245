"""The entry of `finetune` and `kubectl finetune`.

Modules of commands import nothing heavy at their top, so that `finetune --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated

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


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            found = version("finetune-operator")
        except PackageNotFoundError:
            found = "from a checkout"
        sys.stdout.write(f"{_program()} {found}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    pass


for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


TRACE = "FINETUNE_TRACE"
NAME = "finetune"
NO_FILES = 4
"""What kubectl calls a completion without file names."""
USAGE = 2
"""Exit code of the option parser for wrong usage."""


def main(arguments: list[str] | None = None) -> None:
    """Console entry. Everything behind a first `--` belongs to the other tool's command line (`finetune import`)."""
    for stream in (sys.stdout, sys.stderr):
        # As kubectl: YAML and JSON are UTF-8, whatever the locale calls itself.
        getattr(stream, "reconfigure", lambda **_: None)(encoding="utf-8", errors="backslashreplace")
    words = list(sys.argv[1:] if arguments is None else arguments)
    behind: list[str] = []
    if "--" in words and "import" in words[: words.index("--")]:
        cut = words.index("--")
        words, behind = words[:cut], words[cut + 1 :]
    sys.exit(_said(run(words, behind)))


def _said(code: int) -> int:
    """The exit code, once everything is out: a full disk behind stdout is told, and not lost at the end of the process."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if code == 0:
            sys.stderr.write(f"error: standard output cannot be written: {error.strerror}\n")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code or 1
    return code


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
    """What a failure is told as. No trace reaches a user; one of ours is kept for those who ask for it."""
    from finetune_api.errors import FineTuneError

    from finetune_cli import output

    if isinstance(error, BrokenPipeError):
        sys.stderr.close()
    elif isinstance(error, output.Told | FineTuneError):
        output.errors([error])
    elif isinstance(error, OSError) and error.filename is not None:
        output.errors([f"{error.filename}: {error.strerror}"])
    else:
        _fault(error)
    return output.ERROR


def _fault(error: Exception) -> None:
    """A fault of this program: where it is, not what it held, which may be a secret."""
    import traceback

    from finetune_cli import output

    place = traceback.extract_tb(error.__traceback__)[-1]
    name = place.filename.replace("\\", "/").rpartition("/")[2]
    output.errors([f"this is a fault of {_program()}: {type(error).__name__} in {name}:{place.lineno}"])
    if os.environ.get(TRACE):
        traceback.print_exception(error)
    else:
        output.notes([f"with {TRACE}=1 in the environment the whole trace is shown, for a bug report"])


def kubectl_complete() -> None:
    """Entry of `kubectl_complete-finetune`, which kubectl asks for candidates: one a line, then what to do with them."""
    import shlex

    words = sys.argv[1:]
    os.environ["_FINETUNE_COMPLETE"] = "complete_bash"
    os.environ["COMP_WORDS"], os.environ["COMP_CWORD"] = shlex.join([NAME, *words]), str(len(words))
    try:
        app(args=[], prog_name=NAME)
    except SystemExit:
        sys.stdout.write(f":{NO_FILES}\n")


def _program() -> str:
    """The name that was typed; what installs completion is about the program of its own, since kubectl completes plugins."""
    if any(word.startswith(("--install-completion", "--show-completion")) for word in sys.argv):
        return NAME
    return "kubectl finetune" if sys.argv and sys.argv[0].rpartition("/")[2].startswith("kubectl-") else NAME


if __name__ == "__main__":
    main()
