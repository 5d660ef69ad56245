"""The commands of `finetune` and `kubectl finetune`, and the conversion of failures to messages and exit codes.

Command modules import slow libraries inside functions, so that `finetune --help` stays fast.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from finetune_cli.commands.checkpoints import checkpoints
from finetune_cli.commands.delete import delete
from finetune_cli.commands.diff import diff
from finetune_cli.commands.doctor import doctor
from finetune_cli.commands.download import download
from finetune_cli.commands.events import events
from finetune_cli.commands.explain import explain
from finetune_cli.commands.export import export
from finetune_cli.commands.get import get
from finetune_cli.commands.import_command import import_
from finetune_cli.commands.init import init
from finetune_cli.commands.lifecycle import cancel, resume, suspend
from finetune_cli.commands.logs import logs
from finetune_cli.commands.plan import plan
from finetune_cli.commands.pools import pools
from finetune_cli.commands.purge import purge
from finetune_cli.commands.ratings import ratings
from finetune_cli.commands.replay import replay
from finetune_cli.commands.report import report
from finetune_cli.commands.rerun import rerun
from finetune_cli.commands.run import run_command
from finetune_cli.commands.serve_openai import serve_openai
from finetune_cli.commands.sign import sign
from finetune_cli.commands.status import status
from finetune_cli.commands.submit import submit
from finetune_cli.commands.support_bundle import support_bundle
from finetune_cli.commands.top import top
from finetune_cli.commands.upload import upload
from finetune_cli.commands.validate import validate
from finetune_cli.commands.verify import verify
from finetune_cli.commands.wait import wait

app = typer.Typer(
    name="finetune",
    no_args_is_help=True,
    help="Fine-tune language models on Kubernetes: write, check, submit and watch jobs, and import configurations of other tools.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, Callable[..., None]] = {
    "init": init,
    "validate": validate,
    "plan": plan,
    "explain": explain,
    "import": import_,
    "diff": diff,
    "run": run_command,
    "submit": submit,
    "get": get,
    "status": status,
    "top": top,
    "logs": logs,
    "events": events,
    "wait": wait,
    "suspend": suspend,
    "resume": resume,
    "cancel": cancel,
    "delete": delete,
    "rerun": rerun,
    "pools": pools,
    "doctor": doctor,
    "checkpoints": checkpoints,
    "upload": upload,
    "download": download,
    "verify": verify,
    "export": export,
    "sign": sign,
    "replay": replay,
    "purge": purge,
    "ratings": ratings,
    "report": report,
    "serve-openai": serve_openai,
    "support-bundle": support_bundle,
}


def _print_version(is_requested: bool) -> None:
    if is_requested:
        from importlib.metadata import PackageNotFoundError, version

        try:
            installed_version = version("finetune-operator")
        except PackageNotFoundError:
            installed_version = "from a checkout"
        sys.stdout.write(f"{_get_program_name()} {installed_version}\n")
        raise typer.Exit


@app.callback()
def _handle_root_options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


TRACE_VARIABLE = "FINETUNE_TRACE"
PROGRAM_NAME = "finetune"
NO_FILE_COMPLETION = 4
"""Number that tells kubectl not to complete file names (cobra's ShellCompDirectiveNoFileComp)."""
CLICK_USAGE_ERROR = 2
"""Exit code that the option parser returns for wrong usage."""


def main(arguments: list[str] | None = None) -> None:
    """Run the program and exit. In a `finetune import` command, everything after the first `--` is the other tool's command line."""
    for stream in (sys.stdout, sys.stderr):
        # The output is always UTF-8, as in kubectl, because YAML and JSON are UTF-8 in every locale.
        getattr(stream, "reconfigure", lambda **_: None)(encoding="utf-8", errors="backslashreplace")
    words = list(sys.argv[1:] if arguments is None else arguments)
    tool_arguments: list[str] = []
    if "--" in words and "import" in words[: words.index("--")]:
        separator_index = words.index("--")
        words, tool_arguments = words[:separator_index], words[separator_index + 1 :]
    sys.exit(_flush_stdout(run(words, tool_arguments)))


def _flush_stdout(exit_code: int) -> int:
    """Flush stdout and return the exit code. This function reports a write error (full disk), because Python ignores write errors when it exits."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if exit_code == 0:
            sys.stderr.write(f"error: standard output cannot be written: {error.strerror}\n")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_code or 1
    return exit_code


def run(arguments: list[str], tool_arguments: list[str]) -> int:
    """Run one command and return its exit code. The exit code for wrong usage is 1, as in kubectl, because 2 means that the job failed."""
    from finetune_cli import output

    try:
        app(args=arguments, prog_name=_get_program_name(), obj=tool_arguments)
    except output.CommandExit as exit_:
        return exit_.code
    except Exception as error:
        return _print_failure(error)
    except SystemExit as exit_:
        return output.ERROR if exit_.code == CLICK_USAGE_ERROR else int(exit_.code or 0)
    return output.OK


def _print_failure(error: Exception) -> int:
    """Print the message of an error and return the exit code. If the error is a bug of this program and FINETUNE_TRACE is set, the traceback is printed too."""
    from finetune_api.errors import FineTuneError

    from finetune_cli import output
    from finetune_cli.mistakes import InvalidInput

    if isinstance(error, BrokenPipeError):
        sys.stderr.close()
    elif isinstance(error, InvalidInput):
        output.print_errors(error.mistakes)
    elif isinstance(error, output.CommandError | FineTuneError):
        output.print_errors([error])
    elif isinstance(error, OSError) and error.filename is not None:
        output.print_errors([f"{error.filename}: {error.strerror}"])
    else:
        _print_bug(error)
    return output.ERROR


def _print_bug(error: Exception) -> None:
    """Report a bug of this program by file and line. The exception's text is not printed, because that text may hold a secret."""
    import traceback

    from finetune_cli import output

    frame = traceback.extract_tb(error.__traceback__)[-1]
    file_name = frame.filename.replace("\\", "/").rpartition("/")[2]
    output.print_errors([f"this is a bug in {_get_program_name()}: {type(error).__name__} in {file_name}:{frame.lineno}"])
    if os.environ.get(TRACE_VARIABLE):
        traceback.print_exception(error)
    else:
        output.print_notes([f"set {TRACE_VARIABLE}=1 in the environment to see the traceback for a bug report"])


def kubectl_complete() -> None:
    """Print the completion candidates for kubectl, one per line, and then the number that tells kubectl not to complete file names."""
    import shlex

    words = sys.argv[1:]
    os.environ["_FINETUNE_COMPLETE"] = "complete_bash"
    os.environ["COMP_WORDS"], os.environ["COMP_CWORD"] = shlex.join([PROGRAM_NAME, *words]), str(len(words))
    try:
        app(args=[], prog_name=PROGRAM_NAME)
    except SystemExit:
        sys.stdout.write(f":{NO_FILE_COMPLETION}\n")


def _get_program_name() -> str:
    """Return the program's name as the user typed it.

    For the options that install shell completion, the name is always `finetune`, because kubectl has its own completion for plugins.
    """
    if any(word.startswith(("--install-completion", "--show-completion")) for word in sys.argv):
        return PROGRAM_NAME
    return "kubectl finetune" if sys.argv and sys.argv[0].rpartition("/")[2].startswith("kubectl-") else PROGRAM_NAME


if __name__ == "__main__":
    main()
