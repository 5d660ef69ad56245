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
    complete_words,
    require_format,
    write_data,
)

if TYPE_CHECKING:
    from finetune_api.spec import FineTuneJobSpec

    from finetune_cli.doctor import CheckName, CheckResult

CHECK_FAILED_EXIT_CODE = 2
"""Exit code if a check has failed. Exit code 1 means wrong usage."""
MARK_BY_STATE = {"ok": "✓", "failed": "✗", "unknown": "-"}
STYLE_BY_STATE = {"ok": "green", "failed": "bold red", "unknown": "dim"}
CHECK_NAMES = ("cluster", "crd", "operator", "rights", "pools", "image", "storage")


def doctor(
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="FILE", help="Manifest of a FineTuneJob. Its image, node pool and storage are checked.")
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option("--skip", metavar="CHECK", help=f"Do not run a check: {', '.join(CHECK_NAMES)}.", autocompletion=complete_words(*CHECK_NAMES)),
    ] = None,
    timeout: Annotated[str, typer.Option(metavar="TIME", help="Time for pulling the image and checking storage in a pod, for example 30m.")] = "5m",
    operator_namespace: OperatorNamespaceOption = None,
    output_format: DataFormatOption = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Check cluster, CRD, operator, your rights, node pools, the trainer image, and storage as a pod reaches it.

    A short Job in the namespace checks image and storage. The command deletes this Job afterwards. The Job uses no GPU.

    Exit code 0: no check failed (a check that could not run is marked with -). 1: wrong usage. 2: a check failed.

    Example: finetune doctor

    Example: finetune doctor -f job.yaml -n team-a --timeout 30m
    """
    from finetune_cli.cluster import ClusterError, connect
    from finetune_cli.doctor import CheckName, CheckResult, CheckState, Doctor
    from finetune_cli.wait_goals import parse_timeout

    require_format(output_format, "yaml", "json")
    skipped_checks, spec = _parse_skipped_checks(skip or []), None if file is None else _read_spec(file)
    timeout_seconds = parse_timeout(timeout) or 0
    results: list[CheckResult] = []
    try:
        checker = Doctor(connect(namespace, context, kubeconfig), operator_namespace, spec, timeout_seconds, skipped_checks)
        for result in checker.run():
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
        write_data({"ok": not has_failed, "checks": [to_dict(result) for result in results]}, output_format)
    if has_failed:
        raise output.CommandExit(CHECK_FAILED_EXIT_CODE)


def _parse_skipped_checks(check_names: list[str]) -> frozenset[CheckName]:
    from finetune_cli.doctor import CheckName

    unknown_names = [check_name for check_name in check_names if check_name not in CHECK_NAMES]
    if unknown_names:
        raise output.fail(f"--skip {unknown_names[0]}: unknown check; write one of {', '.join(CHECK_NAMES)}")
    return frozenset(CheckName(check_name) for check_name in check_names)


def _read_spec(file: Path) -> FineTuneJobSpec:
    """Return the spec of the job in a file. Raises CommandExit after printing every error of the job."""
    from finetune_cli.checks import check_manifest, select_errors
    from finetune_cli.manifests import read_job

    spec, findings = check_manifest(read_job(file))
    errors = select_errors(findings)
    if spec is None or errors:
        raise output.fail(*(finding.mistake for finding in errors))
    return spec


def _write_line(result: CheckResult) -> None:
    """Print the result of a check as one line: mark, name, what was found, and what to do."""
    from rich.text import Text

    cure_suffix = f"; {result.cure}" if result.cure and result.state != "ok" else ""
    text = " ".join(f"{result.message}{cure_suffix}".split())
    output.stdout_console().print(Text.assemble((MARK_BY_STATE[result.state], STYLE_BY_STATE[result.state]), f" {result.check:<9} {text}"))


def to_dict(result: CheckResult) -> dict[str, Any]:
    """Return the result of a check as a dict, for `-o json` and `-o yaml`."""
    return {"check": result.check.value, "state": result.state.value, "message": result.message, "cure": result.cure}
