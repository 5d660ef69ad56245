"""`finetune validate`: checks manifests without a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune_cli import output

if TYPE_CHECKING:
    from finetune_cli.manifests import Manifest


def validate(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Manifests. A file may contain several manifests.")
    ],
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse manifests with warnings, and objects of other kinds.")
    ] = False,
    local: Annotated[
        bool, typer.Option("--local", help="Apply the rules of `finetune run --local` instead of those of a cluster.")
    ] = False,
) -> None:
    """Check manifests without a cluster, against the schema and every rule of the operator. Reports all errors at once.

    Exit code 0: the manifests can be submitted; 1: a manifest has errors.

    Example: finetune validate job.yaml

    Example: finetune validate --strict jobs/*.yaml
    """
    from finetune_api.rules import ExecutionTarget

    from finetune_cli.files import display_name
    from finetune_cli.manifests import read_all_manifests

    manifests, read_mistakes = read_all_manifests(files)
    errors = list(map(str, read_mistakes))
    for manifest in manifests:
        errors += _check_manifest_messages(manifest, ExecutionTarget.LOCAL if local else ExecutionTarget.CLUSTER, strict)
    jobs = [manifest for manifest in manifests if manifest.is_job]
    if not jobs and not errors:
        errors.append(f"{', '.join(map(display_name, files))}: there is no FineTuneJob in the input")
    errors += _duplicate_names(jobs)
    if errors:
        raise output.fail(*dict.fromkeys(errors))
    output.write("\n".join(f"{job.file}: {job.name}: ok" for job in jobs))


def _check_manifest_messages(manifest: Manifest, target: object, strict: bool) -> list[str]:
    from finetune_api.rules import ExecutionTarget

    from finetune_cli.checks import check_manifest, errors_of, warnings_of

    if not manifest.is_job:
        kind = manifest.value.get("kind")
        if strict and kind not in ("Secret", "ConfigMap"):
            return [f"{manifest.location('kind')}: kind: {kind or 'missing'} is not a FineTuneJob"]
        if kind is None:
            return [f"{manifest.file}: kind: this required field is missing; write kind: FineTuneJob"]
        return []
    _, findings = check_manifest(manifest, ExecutionTarget(str(target)))
    if not strict:
        output.print_warnings(warnings_of(findings))
        findings = errors_of(findings)
    return [f"{finding.mistake} [{finding.code}]" for finding in findings]


def _duplicate_names(jobs: list[Manifest]) -> list[str]:
    seen: dict[tuple[str, str], Manifest] = {}
    errors = []
    for job in jobs:
        metadata = job.value.get("metadata")
        key = (str(metadata.get("namespace", "")) if isinstance(metadata, dict) else "", job.name)
        if job.name and key in seen:
            errors.append(
                f"{job.location('metadata.name')}: metadata.name: {job.name} is used twice, first in {seen[key].location('metadata.name')}"
            )
        seen.setdefault(key, job)
    return errors
