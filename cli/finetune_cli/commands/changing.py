"""`finetune submit`, `suspend`, `resume`, `cancel`, `rerun`: what changes something in the cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_cli import output
from finetune_cli.commands.options import ContextOption, KubeconfigOption, NameArgument, NamespaceOption, SetOption
from finetune_cli.yaml_text import to_yaml

if TYPE_CHECKING:
    from finetune_cli.cluster import Cluster
    from finetune_cli.manifests import Manifest


def submit(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Manifests, with the Secrets and ConfigMaps beside them.")
    ],
    wait: Annotated[
        bool, typer.Option("--wait", help="Follow the jobs until all have ended; exit code 2 if one failed.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Let the server check everything and keep nothing.")
    ] = False,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Check manifests here, then create their jobs; Secrets and ConfigMaps beside them are applied first.

    Example: finetune submit job.yaml --wait
    """
    from finetune_cli.cluster import connect

    manifests = _checked(files)
    cluster = connect(namespace, context, kubeconfig)
    jobs = [one for one in manifests if one.is_job]
    for one in (*(one for one in manifests if not one.is_job), *jobs):
        _place(cluster, one, dry_run)
    if wait and not dry_run:
        from finetune_cli.commands.watching import _end, _watched

        ended = [_watched(_in_namespace(cluster, one), one.name) for one in jobs]
        for job in ended:
            _end(job)


def _checked(files: list[Path]) -> list[Manifest]:
    from finetune_cli.files import shown
    from finetune_cli.manifests import advice, examine, read_all, serious

    manifests, unreadable = read_all(files)
    wrong: list[Any] = list(unreadable)
    for one in manifests:
        if one.is_job:
            findings = examine(one)[1]
            output.warnings(advice(findings))
            wrong += [finding.mistake for finding in serious(findings)]
        elif one.value.get("kind") not in ("Secret", "ConfigMap"):
            wrong.append(
                f"{one.place('kind')}: kind: {one.value.get('kind') or 'missing'} is not submitted by this command; use kubectl apply"
            )
    if not any(one.is_job for one in manifests) and not wrong:
        wrong.append(f"{', '.join(map(shown, files))}: there is no FineTuneJob in it")
    if wrong:
        output.errors(wrong)
        raise output.Ended(output.ERROR)
    return manifests


def _in_namespace(cluster: Cluster, manifest: Manifest) -> Cluster:
    import dataclasses

    found = (manifest.value.get("metadata") or {}).get("namespace")
    return dataclasses.replace(cluster, namespace=str(found)) if found else cluster


def _place(cluster: Cluster, manifest: Manifest, dry_run: bool) -> None:
    from finetune_cli.cluster import ClusterError

    target = _in_namespace(cluster, manifest)
    kind, name = manifest.value["kind"], manifest.name
    try:
        if manifest.is_job:
            target.create(manifest.value, dry_run=dry_run)
        else:
            target.apply(manifest.value, dry_run=dry_run)
    except ClusterError as error:
        hint = (
            "; `finetune rerun` makes a new one from it, or choose another name"
            if error.code == 409 and manifest.is_job
            else ""
        )
        raise ClusterError(f"{kind} {name}: {error}{hint}", error.code) from None
    output.write(
        f"{kind.lower()} {name} {'would be ' if dry_run else ''}{'created' if manifest.is_job else 'applied'} in {target.namespace}"
    )


def suspend(
    name: NameArgument,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Save a job's state and free its GPUs; `resume` goes on from there.

    Example: finetune suspend support-bot
    """
    _change(name, {"suspend": True}, "it saves its state, then its GPUs are free", namespace, context, kubeconfig)


def resume(
    name: NameArgument,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Let a suspended job go on from its newest checkpoint.

    Example: finetune resume support-bot
    """
    _change(name, {"suspend": False}, "it goes on from its newest checkpoint", namespace, context, kubeconfig)


def cancel(
    name: NameArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Save a job's state and stop it for good; that cannot be taken back.

    Example: finetune cancel support-bot --yes
    """
    import sys

    if not yes:
        if not sys.stdin.isatty():
            output.errors(["cancelling cannot be taken back: confirm with --yes"])
            raise output.Ended(output.ERROR)
        typer.confirm(f"Cancel {name} for good?", abort=True, err=True)
    _change(name, {"cancel": True}, "it saves its state, then it is over", namespace, context, kubeconfig)


def _change(
    name: str, spec: dict[str, Any], said: str, namespace: str | None, context: str | None, kubeconfig: Path | None
) -> None:
    from finetune_cli.cluster import ClusterError, connect
    from finetune_cli.view import finished, status_of

    cluster = connect(namespace, context, kubeconfig)
    job = cluster.job(name)
    found = status_of(job)
    if finished(found):
        raise ClusterError(f"{name} has ended already: {found.phase}")
    before = job.get("spec") or {}
    if all(bool(before.get(key)) == value for key, value in spec.items()):
        output.notes(
            [
                f"{name}: nothing to change, {', '.join(f'{key} is {str(value).lower()}' for key, value in spec.items())} already"
            ]
        )
        return
    cluster.patch_spec(name, spec)
    output.write(f"{name}: {said}")


def rerun(
    name: NameArgument,
    from_checkpoint: Annotated[
        int | None,
        typer.Option("--from-checkpoint", metavar="STEP", min=0, help="Start from a checkpoint of the old job."),
    ] = None,
    sets: SetOption = None,
    new_name: Annotated[
        str | None, typer.Option("--name", help="Name of the new job; left out: the old one's with a number.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the new manifest, create nothing.")] = False,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Make a new job from an old one; the old one stays, and the new one names it in its annotations.

    Example: finetune rerun support-bot --from-checkpoint 400 --set training.learningRate=1e-4
    """
    from finetune_cli.cluster import connect
    from finetune_cli.importers.material import Refused
    from finetune_cli.manifests import advice, examine, parse, serious
    from finetune_cli.setting import settings

    cluster = connect(namespace, context, kubeconfig)
    old = cluster.job(name)
    try:
        changes = {path: one.value for path, one in settings(sets or ()).items()}
    except Refused as refused:
        output.errors(refused.mistakes)
        raise output.Ended(output.ERROR) from None
    if from_checkpoint is not None:
        changes["checkpoint.resume"] = _checkpoint(old, from_checkpoint)
    taken = {job["metadata"]["name"] for job in cluster.jobs(everywhere=False)}
    body = again(old, new_name or free_name(name, taken), changes, from_checkpoint)
    text = to_yaml(body)
    _, findings = examine(next(parse(text, "new job")))
    output.warnings(advice(findings))
    if serious(findings):
        output.errors(finding.mistake for finding in serious(findings))
        raise output.Ended(output.ERROR)
    if dry_run:
        output.write(text)
        return
    cluster.create(body)
    output.write(f"{body['metadata']['name']} created in {cluster.namespace}, from {name}")


def _checkpoint(job: dict[str, Any], step: int) -> str:
    from finetune_cli.cluster import ClusterError
    from finetune_cli.view import status_of

    known = status_of(job).checkpoints
    found = next((one.uri for one in known if one.step == step), None)
    if found is None:
        steps = ", ".join(str(one.step) for one in sorted(known, key=lambda one: one.step)) or "none"
        raise ClusterError(
            f"{job['metadata']['name']} shows no checkpoint of step {step}: {steps}; an older one is named with --set checkpoint.resume=URI"
        )
    return found


def free_name(name: str, taken: set[str]) -> str:
    """`bot` -> `bot-2`, `bot-2` -> `bot-3`: the first name that is free, cut to what a name may be long."""
    import re

    from finetune_api.names import MAX_NAME_LENGTH

    found = re.match(r"^(.*?)-(\d+)$", name)
    base, number = (found.group(1), int(found.group(2)) + 1) if found else (name, 2)
    while f"{base[: MAX_NAME_LENGTH - len(str(number)) - 1]}-{number}" in taken:
        number += 1
    return f"{base[: MAX_NAME_LENGTH - len(str(number)) - 1]}-{number}"


def again(old: dict[str, Any], name: str, changes: dict[str, Any], step: int | None) -> dict[str, Any]:
    """The new object: the old spec with changes, neither suspended nor cancelled, its lineage in annotations."""
    import copy

    from finetune_api.names import API_VERSION, KIND, Annotation

    from finetune_cli.paths import put

    spec = copy.deepcopy(old.get("spec") or {})
    spec.pop("suspend", None)
    spec.pop("cancel", None)
    for path, value in changes.items():
        put(spec, path, value)
    metadata = old["metadata"]
    lineage = {Annotation.RERUN_OF.value: f"{metadata['name']}/{metadata['uid']}"}
    if step is not None:
        lineage[Annotation.FROM_STEP.value] = str(step)
    body = {"name": name, "namespace": metadata.get("namespace"), "annotations": lineage}
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": body, "spec": spec}
