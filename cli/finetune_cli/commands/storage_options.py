"""Options of the commands that read a job's storage, and the function that opens the storage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from finetune_cli.cluster import Cluster
    from finetune_cli.job_storage import JobStorage

SecretOption = Annotated[
    bool,
    typer.Option("--use-secret", help="Use the credentials of the job's storage Secret instead of the AWS_ variables."),
]
EndpointOption = Annotated[
    str | None,
    typer.Option(
        "--endpoint",
        metavar="URL",
        help="Address of the S3 server as seen from this machine. Default: the job's endpoint.",
    ),
]
StorageOption = Annotated[
    str | None,
    typer.Option("--storage", metavar="URI", help="Storage root of a job that uses the operator's default storage."),
]


def open_storage(
    cluster: Cluster, job: dict[str, Any], use_secret: bool, endpoint: str | None, storage_uri: str | None
) -> JobStorage:
    """Open the folder of a job in storage. Raises StorageError or ClusterError."""
    from finetune_cli.job_storage import JobStorage, StorageError, decode_secret, root_of

    effective_job = job
    if storage_uri is not None:
        spec = dict(job.get("spec") or {})
        effective_job = {**job, "spec": {**spec, "storage": {**(spec.get("storage") or {}), "uri": storage_uri}}}
    uri, connection = root_of(effective_job)
    if endpoint is not None:
        connection = connection.model_copy(update={"endpoint": endpoint})
    credentials = None
    if use_secret:
        if connection.credentials_secret_ref is None:
            raise StorageError(
                "the job has no storage.credentialsSecretRef: set the AWS_ variables instead of --use-secret"
            )
        credentials = decode_secret(cluster.get_secret(connection.credentials_secret_ref.name))
    return JobStorage(uri, connection, credentials)
