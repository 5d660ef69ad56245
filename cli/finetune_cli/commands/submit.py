"""`finetune submit`: checks manifests and creates their jobs."""

from __future__ import annotations

import dataclasses
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_cli import output
from finetune_cli.commands.shared import ContextOption, KubeconfigOption, NamespaceOption

if TYPE_CHECKING:
    from finetune_cli.cluster import Cluster
    from finetune_cli.manifests import Manifest



def submit(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", help="Manifests of FineTuneJobs, and of the Secrets and ConfigMaps that they use."
        ),
    ],
    wait: Annotated[
        bool, typer.Option("--wait", help="Show the jobs until all have ended. Exit code 2 if a job failed.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Let the API server check the objects without storing them.")
    ] = False,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Check manifests offline, then create their jobs. Secrets and ConfigMaps in the files are applied first.

    Example: finetune submit job.yaml --wait
    """
    from finetune_cli.cluster import connect

    manifests = _read_valid_manifests(files)
    cluster = connect(namespace, context, kubeconfig)
    jobs = [manifest for manifest in manifests if manifest.is_job]
    for manifest in (*(manifest for manifest in manifests if not manifest.is_job), *jobs):
        _submit_manifest(cluster, manifest, dry_run)
    if wait and not dry_run:
        from finetune_cli.commands.status import exit_if_failed, follow_job

        ended_jobs = [follow_job(_select_namespace(cluster, job), job.name) for job in jobs]
        for ended_job in ended_jobs:
            exit_if_failed(ended_job)


def _read_valid_manifests(files: list[Path]) -> list[Manifest]:
    """Read and check all files. If there are errors, print every error of every file and raise CommandExit."""
    from finetune_cli.checks import check_manifest, select_errors, select_warnings
    from finetune_cli.files import display_name
    from finetune_cli.manifests import read_all_manifests

    manifests, read_mistakes = read_all_manifests(files)
    errors: list[Any] = list(read_mistakes)
    for manifest in manifests:
        kind = manifest.value.get("kind")
        if manifest.is_job:
            findings = check_manifest(manifest)[1]
            output.print_warnings(select_warnings(findings))
            errors += [finding.mistake for finding in select_errors(findings)]
        elif kind not in ("Secret", "ConfigMap"):
            errors.append(
                f"{manifest.location('kind')}: kind: this command does not submit kind {kind or '(missing)'}; use kubectl apply"
            )
    if not any(manifest.is_job for manifest in manifests) and not errors:
        errors.append(f"{', '.join(map(display_name, files))}: there is no FineTuneJob in the input")
    if errors:
        raise output.fail(*errors)
    return manifests


def _select_namespace(cluster: Cluster, manifest: Manifest) -> Cluster:
    """Return a connection to the manifest's namespace, or `cluster` itself if the manifest names no namespace."""
    namespace = (manifest.value.get("metadata") or {}).get("namespace")
    return dataclasses.replace(cluster, namespace=str(namespace)) if namespace else cluster


def _submit_manifest(cluster: Cluster, manifest: Manifest, dry_run: bool) -> None:
    from finetune_cli.cluster import ClusterError

    target_cluster = _select_namespace(cluster, manifest)
    kind, name = manifest.value["kind"], manifest.name
    try:
        if manifest.is_job:
            target_cluster.create_object(manifest.value, dry_run=dry_run)
        else:
            target_cluster.apply_object(manifest.value, dry_run=dry_run)
    except ClusterError as error:
        is_name_taken = error.code == HTTPStatus.CONFLICT and manifest.is_job
        hint = (
            f"; use another name, or create a new job from the existing one with `finetune rerun {name}`"
            if is_name_taken
            else ""
        )
        raise ClusterError(f"{kind} {name}: {error}{hint}", error.code) from None
    outcome_text = f"{'would be ' if dry_run else ''}{'created' if manifest.is_job else 'applied'}"
    output.write(f"{kind.lower()} {name} {outcome_text} in namespace {target_cluster.namespace}")
