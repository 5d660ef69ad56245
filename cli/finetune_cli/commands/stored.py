"""`finetune checkpoints` and `purge`: what a job has in storage."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_cli import output
from finetune_cli.commands.options import (
    ContextOption,
    DataFormatOption,
    KubeconfigOption,
    NameArgument,
    NamespaceOption,
    known_format,
)

if TYPE_CHECKING:
    from finetune_cli.cluster import Cluster
    from finetune_cli.stores import Committed, Store

SecretOption = Annotated[
    bool, typer.Option("--use-secret", help="Read the job's own storage Secret instead of the AWS_ variables.")
]
EndpointOption = Annotated[
    str | None, typer.Option("--endpoint", metavar="URL", help="Storage endpoint as it is reached from here.")
]
StorageOption = Annotated[
    str | None, typer.Option("--storage", metavar="URI", help="Storage root, if the job uses the operator's.")
]


def checkpoints(
    name: NameArgument,
    verify: Annotated[bool, typer.Option("--verify", help="Read every file in storage and compare its hash.")] = False,
    download: Annotated[
        str | None, typer.Option("--download", metavar="STEP|model", help="Download a checkpoint, or the final model.")
    ] = None,
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="Where to.")] = Path(),
    use_secret: SecretOption = False,
    endpoint: EndpointOption = None,
    storage: StorageOption = None,
    form: DataFormatOption = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """List a job's checkpoints; verify or download them.

    Example: finetune checkpoints support-bot --verify

    Example: finetune checkpoints support-bot --download 400 --to ./checkpoint
    """
    from finetune_cli.cluster import connect
    from finetune_cli.commands.watching import write_data
    from finetune_cli.view import checkpoint_table, status_of

    known_format(form, "yaml", "json")
    chosen = [word for word, given in (("--verify", verify), ("--download", download), ("-o", form)) if given]
    if len(chosen) > 1:
        output.errors([f"{' and '.join(chosen)}: choose one"])
        raise output.Ended(output.ERROR)
    cluster = connect(namespace, context, kubeconfig)
    job = cluster.job(name)
    if not verify and download is None:
        found = status_of(job)
        if form is not None:
            write_data((job.get("status") or {}).get("checkpoints") or [], form)
            return
        if not found.checkpoints:
            output.notes([f"{name} has committed no checkpoint yet"])
            return
        output.write("\n".join(checkpoint_table(found)))
        return
    _in_storage(open_store(cluster, job, use_secret, endpoint, storage), verify, download, to)


def _in_storage(store: Store, verify: bool, download: str | None, to: Path) -> None:
    from finetune_cli.stores import StoreError, committed, fetch
    from finetune_cli.view import size

    found = committed(store)
    if download is not None:
        wanted = next((one for one in found if one.folder == folder_of(download)), None)
        if wanted is None:
            there = ", ".join(one.folder for one in found) or "nothing"
            raise StoreError(f"{download} is not committed below {store.uri}; there is {there}")
        count = fetch(store, wanted, to)
        output.write(f"{wanted.folder}: {size(count)} in {to}")
        return
    damaged = [one for one in found if verify and not _sound(store, one)]
    if not found:
        output.notes([f"nothing is committed below {store.uri}"])
    if damaged:
        raise output.Ended(output.ERROR)


def folder_of(word: str) -> str:
    """Folder of a step, or of the model. Raises StoreError."""
    from finetune_api.names import Storage, checkpoint_folder

    from finetune_cli.stores import StoreError

    if word == "model":
        return Storage.MODEL.value
    if not word.isdigit():
        raise StoreError(f"--download {word}: write the step of a checkpoint, or `model`")
    return f"{Storage.CHECKPOINTS}/{checkpoint_folder(int(word))}"


def _sound(store: Store, one: Committed) -> bool:
    from finetune_cli.stores import StoreError, fetch
    from finetune_cli.view import size

    try:
        output.write(f"{one.folder}: ok, {size(fetch(store, one, None))}" + (", healthy" if one.healthy else ""))
    except StoreError as error:
        output.errors([f"{one.folder}: {error}"])
        return False
    return True


def open_store(
    cluster: Cluster, job: dict[str, Any], use_secret: bool, endpoint: str | None, storage: str | None
) -> Store:
    """The job's tree in storage. Raises StoreError or ClusterError."""
    from finetune_cli.stores import Store, StoreError, credentials_of, root_of

    changed = job
    if storage is not None:
        spec = dict(job.get("spec") or {})
        changed = {**job, "spec": {**spec, "storage": {**(spec.get("storage") or {}), "uri": storage}}}
    uri, connection = root_of(changed)
    if endpoint is not None:
        connection = connection.model_copy(update={"endpoint": endpoint})
    credentials = None
    if use_secret:
        if connection.credentials_secret_ref is None:
            raise StoreError("the job names no Secret in storage.credentialsSecretRef: set the AWS_ variables instead")
        credentials = credentials_of(cluster.secret(connection.credentials_secret_ref.name))
    return Store(uri, connection, credentials)


def purge(
    name: NameArgument,
    uid: Annotated[
        str | None, typer.Option(metavar="UID", help="Uid of a job that was deleted; with --storage.")
    ] = None,
    yes: Annotated[
        str | None, typer.Option("--yes-purge", metavar="NAME", help="Do not ask: the job's name once more.")
    ] = None,
    use_secret: SecretOption = False,
    endpoint: EndpointOption = None,
    storage: StorageOption = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Remove everything a finished or deleted job has in storage: checkpoints, model, metrics. Asked twice.

    Example: finetune purge old-bot

    Example: finetune purge old-bot --uid 1b2c... --storage s3://models/finetune
    """
    from finetune_cli.cluster import ClusterError, connect
    from finetune_cli.stores import StoreError
    from finetune_cli.view import finished, size, status_of

    cluster = connect(namespace, context, kubeconfig)
    if uid is not None and storage is None:
        raise StoreError("--uid needs --storage URI: nothing else tells where a deleted job wrote")
    try:
        job = cluster.job(name)
        if uid is None and not finished(status_of(job)):
            raise ClusterError(f"{name} has not ended: cancel it first")
        if uid is not None and job["metadata"]["uid"] == uid and not finished(status_of(job)):
            raise ClusterError(f"{name} has not ended: cancel it first")
    except ClusterError as error:
        if error.code != 404 or uid is None:
            raise
        job = {"spec": {}}
    if uid is not None:
        job = {**job, "metadata": {"name": name, "namespace": cluster.namespace, "uid": uid}}
    store = open_store(cluster, job, use_secret, endpoint, storage)
    objects = list(store.objects())
    if not objects:
        output.notes([f"there is nothing below {store.uri}"])
        return
    total = size(sum(one.size for one in objects))
    _confirm(name, f"{len(objects)} objects, {total}, below {store.uri}", yes)
    store.remove(_markers_first(objects))
    output.write(f"{name}: {len(objects)} objects, {total}, removed")


def _markers_first(objects: list[Any]) -> list[Any]:
    """What says that something is complete goes before what it speaks of."""
    from finetune_api.names import Storage

    return sorted(objects, key=lambda one: not one.key.endswith((Storage.COMMITTED, Storage.HEALTHY)))


def _confirm(name: str, what: str, yes: str | None) -> None:
    """Ask twice: whether, and for the name."""
    from finetune_cli.stores import StoreError

    if yes is not None:
        if yes != name:
            raise StoreError(f"--yes-purge {yes}: it is not the job's name")
        return
    if not sys.stdin.isatty():
        raise StoreError(f"{what} would be removed for good: confirm with --yes-purge {name}")
    typer.confirm(f"Remove {what}?", abort=True, err=True)
    if typer.prompt("Type the job's name", err=True) != name:
        raise StoreError("that is not the job's name; nothing was removed")
