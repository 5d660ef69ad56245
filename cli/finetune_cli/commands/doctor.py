"""`finetune doctor`: checks everything that a job needs, from the kubeconfig to storage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_cli import output
from finetune_cli.commands.pools import OperatorNamespaceOption
from finetune_cli.commands.shared import (
    ContextOption,
    DataFormatOption,
    KubeconfigOption,
    NamespaceOption,
    check_format,
    complete_words,
    write_data,
)

if TYPE_CHECKING:
    from finetune_api.spec import FineTuneJobSpec

    from finetune_cli.doctor import CheckName, CheckResult

CHECK_FAILED = 2
"""Exit code if a check has failed. 1 means that the command was used wrongly."""
MARKS = {"ok": "✓", "failed": "✗", "unknown": "-"}
STYLES = {"ok": "green", "failed": "bold red", "unknown": "dim"}
CHECK_WORDS = ("cluster", "crd", "operator", "rights", "pools", "image", "storage")


def doctor(
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="FILE", help="Manifest of a FineTuneJob. Its image, node pool and storage are checked.")
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option("--skip", metavar="CHECK", help=f"Do not run a check: {', '.join(CHECK_WORDS)}.", autocompletion=complete_words(*CHECK_WORDS)),
    ] = None,
    timeout: Annotated[str, typer.Option(metavar="TIME", help="Time for pulling the image and checking storage in a pod, for example 30m.")] = "5m",
    operator_namespace: OperatorNamespaceOption = None,
    output_format: DataFormatOption = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Check cluster, CRD, operator, your rights, node pools, the trainer image, and storage as a pod reaches it.

    Image and storage are checked by a short Job in the namespace, which is deleted afterwards. It uses no GPU.

    Exit code 0: no check failed (a check that could not run is marked with -). 1: wrong usage. 2: a check failed.

    Example: finetune doctor

    Example: finetune doctor -f job.yaml -n team-a --timeout 30m
    """
    from finetune_cli.cluster import ClusterError, connect
    from finetune_cli.doctor import CheckName, CheckResult, CheckState, Doctor
    from finetune_cli.wait_goals import parse_timeout

    check_format(output_format, "yaml", "json")
    skipped, spec = _skipped_checks(skip or []), None if file is None else _read_spec(file)
    seconds = parse_timeout(timeout) or 0
    results: list[CheckResult] = []
    try:
        doctor_run = Doctor(connect(namespace, context, kubeconfig), operator_namespace, spec, seconds, skipped)
        for result in doctor_run.run():
            results.append(result)
            if output_format is None:
                _write_line(result)
    except ClusterError as error:  # without a usable kubeconfig, no check can run
        message, _, cure = str(error).partition("; ")
        results.append(CheckResult(CheckName.CLUSTER, CheckState.FAILED, message, cure or "name a kubeconfig with --kubeconfig or KUBECONFIG"))
        if output_format is None:
            _write_line(results[-1])
    has_failed = any(result.state is CheckState.FAILED for result in results)
    if output_format is not None:
        write_data({"ok": not has_failed, "checks": [as_data(result) for result in results]}, output_format)
    if has_failed:
        raise output.CommandExit(CHECK_FAILED)


def _skipped_checks(words: list[str]) -> frozenset[CheckName]:
    from finetune_cli.doctor import CheckName

    unknown = [word for word in words if word not in CHECK_WORDS]
    if unknown:
        raise output.fail(f"--skip {unknown[0]}: unknown check; write one of {', '.join(CHECK_WORDS)}")
    return frozenset(CheckName(word) for word in words)


def _read_spec(file: Path) -> FineTuneJobSpec:
    """Read the job of a file. Raises CommandExit with every error of the job."""
    from finetune_cli.checks import check_manifest, errors_of
    from finetune_cli.manifests import read_job

    spec, findings = check_manifest(read_job(file))
    errors = errors_of(findings)
    if spec is None or errors:
        raise output.fail(*(finding.mistake for finding in errors))
    return spec


def _write_line(result: CheckResult) -> None:
    """Write a check as one line: mark, name, what was found, and the cure."""
    from rich.text import Text

    cure = f"; {result.cure}" if result.cure and result.state != "ok" else ""
    text = " ".join(f"{result.message}{cure}".split())
    output.stdout_console().print(Text.assemble((MARKS[result.state], STYLES[result.state]), f" {result.check:<9} {text}"))


def as_data(result: CheckResult) -> dict[str, Any]:
    """Return a check for `-o json`."""
    return {"check": result.check.value, "state": result.state.value, "message": result.message, "cure": result.cure}
