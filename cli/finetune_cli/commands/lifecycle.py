"""`finetune suspend`, `finetune resume` and `finetune cancel`: suspend, resume or cancel a job that has not finished."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from finetune_cli import output
from finetune_cli.commands.shared import ContextOption, KubeconfigOption, NameArgument, NamespaceOption


def suspend(
    name: NameArgument,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Save a checkpoint of a job and release its GPUs. `finetune resume` continues from this checkpoint.

    Example: finetune suspend support-bot
    """
    _patch_spec(name, {"suspend": True}, "saving a checkpoint, then the GPUs are released", namespace, context, kubeconfig)


def resume(
    name: NameArgument,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Continue a suspended job from its newest checkpoint.

    Example: finetune resume support-bot
    """
    _patch_spec(name, {"suspend": False}, "resuming from the newest checkpoint", namespace, context, kubeconfig)


def cancel(
    name: NameArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Save a checkpoint of a job and end the job. A cancelled job cannot be resumed.

    Example: finetune cancel support-bot --yes
    """
    if not yes:
        if not sys.stdin.isatty():
            raise output.fail("a cancelled job cannot be resumed: confirm with --yes")
        typer.confirm(f"Cancel {name}? A cancelled job cannot be resumed.", abort=True, err=True)
    _patch_spec(name, {"cancel": True}, "saving a checkpoint, then the job ends", namespace, context, kubeconfig)


def _patch_spec(
    name: str, spec_changes: dict[str, bool], effect_text: str, namespace: str | None, context: str | None, kubeconfig: Path | None
) -> None:
    from finetune_cli.cluster import ClusterError, connect
    from finetune_cli.status_text import has_finished, parse_status

    cluster = connect(namespace, context, kubeconfig)
    job = cluster.get_job(name)
    status = parse_status(job)
    if has_finished(status):
        raise ClusterError(f"{name} has already ended: {status.phase}")
    old_spec = job.get("spec") or {}
    if all(bool(old_spec.get(key)) == value for key, value in spec_changes.items()):
        unchanged_text = ", ".join(f"{key} is already {str(value).lower()}" for key, value in spec_changes.items())
        output.print_notes([f"{name}: nothing to change, {unchanged_text}"])
        return
    cluster.patch_spec(name, spec_changes)
    output.write(f"{name}: {effect_text}")
