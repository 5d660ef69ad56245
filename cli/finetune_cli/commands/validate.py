"""`finetune validate`: everything that can be known about a manifest without a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune_cli import output

if TYPE_CHECKING:
    from finetune_cli.manifests import Manifest


def validate(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Manifests; a file may hold several documents.")
    ],
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse documents that are no FineTuneJob, and warnings too.")
    ] = False,
    local: Annotated[bool, typer.Option("--local", help="Check for `run --local`, not for a cluster.")] = False,
) -> None:
    """Check manifests offline: schema, names, and every rule of the API and the operator, all errors at once.

    Exit code 0: they can be submitted; 1: they cannot.

    Example: finetune validate job.yaml

    Example: finetune validate --strict jobs/*.yaml
    """
    from finetune_api.rules import ExecutionTarget

    from finetune_cli.files import shown
    from finetune_cli.manifests import read_all

    manifests, unreadable = read_all(files)
    wrong = list(map(str, unreadable))
    for manifest in manifests:
        wrong += _check(manifest, ExecutionTarget.LOCAL if local else ExecutionTarget.CLUSTER, strict)
    jobs = [one for one in manifests if one.is_job]
    if not jobs and not wrong:
        wrong.append(f"{', '.join(map(shown, files))}: there is no FineTuneJob in it")
    wrong += _twice(jobs)
    if wrong:
        output.errors(dict.fromkeys(wrong))
        raise output.Ended(output.ERROR)
    output.write("\n".join(f"{one.file}: {one.name}: ok" for one in jobs))


def _check(manifest: Manifest, where: object, strict: bool) -> list[str]:
    from finetune_api.rules import ExecutionTarget

    from finetune_cli.manifests import advice, examine, serious

    if not manifest.is_job:
        kind = manifest.value.get("kind")
        if strict and kind not in ("Secret", "ConfigMap"):
            return [f"{manifest.place('kind')}: kind: {kind or 'missing'} is not a FineTuneJob"]
        if kind is None:
            return [f"{manifest.file}: kind: it is missing; write kind: FineTuneJob"]
        return []
    _, findings = examine(manifest, ExecutionTarget(str(where)))
    if not strict:
        output.warnings(advice(findings))
        findings = serious(findings)
    return [f"{one.mistake} [{one.code}]" for one in findings]


def _twice(jobs: list[Manifest]) -> list[str]:
    seen: dict[tuple[str, str], Manifest] = {}
    wrong = []
    for one in jobs:
        metadata = one.value.get("metadata")
        key = (str(metadata.get("namespace", "")) if isinstance(metadata, dict) else "", one.name)
        if one.name and key in seen:
            wrong.append(
                f"{one.place('metadata.name')}: metadata.name: {one.name} stands twice, first at {seen[key].place('metadata.name')}"
            )
        seen.setdefault(key, one)
    return wrong
