"""`finetune purge`: deletes all objects of a job in storage."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_cli import output
from finetune_cli.commands.shared import ContextOption, KubeconfigOption, NameArgument, NamespaceOption
from finetune_cli.commands.storage_options import EndpointOption, SecretOption, StorageOption, open_storage

if TYPE_CHECKING:
    from finetune_cli.cluster import Cluster
    from finetune_cli.job_storage import StoredObject



def purge(
    name: NameArgument,
    uid: Annotated[
        str | None, typer.Option(metavar="UID", help="Uid of a job that is already deleted. Requires --storage.")
    ] = None,
    yes: Annotated[
        str | None,
        typer.Option(
            "--yes-purge", metavar="NAME", help="Do not ask for confirmation. The value must be the job's name."
        ),
    ] = None,
    use_secret: SecretOption = False,
    endpoint: EndpointOption = None,
    storage: StorageOption = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Delete all objects of a finished or deleted job in storage: checkpoints, model, metrics. The command asks twice for confirmation.

    It also deletes prepared rows in the job's namespace that no job has used for `prepare.ttlDays` days.

    Example: finetune purge old-bot

    Example: finetune purge old-bot --uid 1b2c... --storage s3://models/finetune
    """
    from finetune_cli.cluster import connect
    from finetune_cli.job_storage import StorageError
    from finetune_cli.prepared_rows import find_unused_rows
    from finetune_cli.status_text import format_bytes

    cluster = connect(namespace, context, kubeconfig)
    if uid is not None and storage is None:
        raise StorageError("--uid needs --storage URI: the storage root of a deleted job is unknown")
    job = _get_finished_job(cluster, name, uid)
    job_storage = open_storage(cluster, job, use_secret, endpoint, storage)
    objects, unused_rows = list(job_storage.list_objects()), find_unused_rows(job_storage, datetime.now(UTC))
    if not objects:
        output.print_notes([f"there are no objects below {job_storage.uri}"])
    if not objects and not unused_rows.objects:
        return
    total_size = format_bytes(sum(stored_object.size for stored_object in objects))
    unused_summary = f"{len(unused_rows.objects)} objects, {format_bytes(unused_rows.bytes)}"
    object_texts = [f"{len(objects)} objects, {total_size}, below {job_storage.uri}"] if objects else []
    object_texts += [f"{unused_summary}, of unused prepared rows below {unused_rows.storage.uri}"] if unused_rows.objects else []
    _confirm_deletion(name, " and ".join(object_texts), yes)
    if objects:
        job_storage.delete_objects(_sort_markers_first(objects))
        output.write(f"{name}: {len(objects)} objects, {total_size}, deleted")
    if unused_rows.objects:
        deleted_rows = unused_rows.delete(datetime.now(UTC))
        output.write(f"unused prepared rows: {len(deleted_rows.objects)} objects, {format_bytes(deleted_rows.bytes)}, deleted")


def _get_finished_job(cluster: Cluster, name: str, uid: str | None) -> dict[str, Any]:
    """Return the job whose storage is purged.

    If `uid` is given, the result has no status and no metadata but name, namespace and this uid. If no job of this name exists, the spec is empty.

    Raises ClusterError if the job still exists and has not finished.
    """
    from finetune_cli.cluster import ClusterError
    from finetune_cli.status_text import has_finished, parse_status

    try:
        job = cluster.get_job(name)
    except ClusterError as error:
        if error.code != HTTPStatus.NOT_FOUND or uid is None:
            raise
        job = {"spec": {}}
    else:
        if uid in (None, job["metadata"]["uid"]) and not has_finished(parse_status(job)):
            raise ClusterError(f"{name} has not finished: cancel the job first")
    if uid is not None:
        job = {**job, "metadata": {"name": name, "namespace": cluster.namespace, "uid": uid}, "status": {}}
    return job


def _sort_markers_first(objects: list[StoredObject]) -> list[StoredObject]:
    """Sort the objects so that markers are deleted first.

    If the purge is interrupted, no commit marker is left in a folder whose files are already deleted.
    """
    from finetune_api.names import Storage

    return sorted(objects, key=lambda stored_object: not stored_object.key.endswith((Storage.COMMITTED, Storage.HEALTHY)))


def _confirm_deletion(name: str, objects_text: str, confirmed_name: str | None) -> None:
    """Ask for confirmation, then for the job's name. Raises Abort if the user declines, and StorageError for a wrong name or without a terminal."""
    from finetune_cli.job_storage import StorageError

    if confirmed_name is not None:
        if confirmed_name != name:
            raise StorageError(f"--yes-purge {confirmed_name}: this is not the name of the job; the name is {name}")
        return
    if not sys.stdin.isatty():
        raise StorageError(f"{objects_text} would be deleted permanently: confirm with --yes-purge {name}")
    typer.confirm(f"Delete {objects_text}?", abort=True, err=True)
    if typer.prompt("Type the name of the job", err=True) != name:
        raise StorageError("this is not the name of the job; nothing was deleted")
