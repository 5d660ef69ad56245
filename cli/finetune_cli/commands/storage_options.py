"""Options of the commands that use a job's storage, and functions that open the storage."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_cli.commands.shared import complete_job

if TYPE_CHECKING:
    from finetune_cli.cluster import Cluster
    from finetune_cli.job_storage import JobStorage

TargetArgument = Annotated[
    str,
    typer.Argument(
        metavar="NAME|URI",
        help="Name of the FineTuneJob, or the s3:// or file:// URI of its folder or model in storage.",
        autocompletion=complete_job,
    ),
]
SecretOption = Annotated[
    bool,
    typer.Option("--use-secret", help="Use the credentials of the job's storage Secret instead of the AWS_ variables."),
]
SecretNameOption = Annotated[
    str | None,
    typer.Option("--secret", metavar="NAME", help="Secret of the namespace with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. Default: the AWS_ variables."),
]
EndpointOption = Annotated[
    str | None,
    typer.Option(
        "--endpoint",
        metavar="URL",
        help="Address of the S3 server as seen from this machine. Default: the job's endpoint or, for a URI, AWS_ENDPOINT_URL; without both, AWS.",
    ),
]
StorageOption = Annotated[
    str | None,
    typer.Option("--storage", metavar="URI", help="Storage root of a job that uses the operator's default storage, if its status names no URI yet."),
]


def open_storage(
    cluster: Cluster, job: dict[str, Any], use_secret: bool, endpoint: str | None, storage_uri: str | None
) -> JobStorage:
    """Open the folder of a job in storage. Raises StorageError or ClusterError."""
    from finetune_cli.job_storage import JobStorage, StorageError, decode_secret, locate_job_folder

    effective_job = job
    if storage_uri is not None:
        spec = dict(job.get("spec") or {})
        effective_job = {**job, "spec": {**spec, "storage": {**(spec.get("storage") or {}), "uri": storage_uri}}}
    uri, connection = locate_job_folder(effective_job)
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


@dataclass(frozen=True)
class StorageOptions:
    """The storage options of a command. The target of the command is the name of a job in the cluster, or a storage URI."""

    use_secret: bool = False
    endpoint: str | None = None
    storage_uri: str | None = None
    namespace: str | None = None
    context: str | None = None
    kubeconfig: Path | None = None
    secret_name: str | None = None
    """Name of the Secret that has the S3 credentials for a URI. None: the AWS_ environment variables have the credentials."""


def open_target(target: str, options: StorageOptions) -> tuple[JobStorage, dict[str, Any] | None]:
    """Open the storage of a job. `target` is the job's name or a URI inside the job's folder. The second result is the job, or None if `target` is a URI.

    Raises StorageError or ClusterError.
    """
    from finetune_cli.cluster import connect, parse_job_name
    from finetune_cli.job_storage import StorageError, to_job_folder_uri

    if "://" not in target:
        cluster = connect(options.namespace, options.context, options.kubeconfig)
        job = cluster.get_job(parse_job_name(target))
        return open_storage(cluster, job, options.use_secret, options.endpoint, options.storage_uri), job
    if options.use_secret or options.storage_uri is not None:
        raise StorageError("--use-secret and --storage need the name of a job; with a URI, remove them and set the AWS_ variables")
    return open_uri(to_job_folder_uri(target), options), None


def open_uri(uri: str, options: StorageOptions) -> JobStorage:
    """Open the storage at a URI. The credentials come from a Secret or from the AWS_ environment variables. Raises StorageError or ClusterError."""
    from finetune_api.spec.cluster import StorageRoot
    from pydantic import ValidationError

    from finetune_cli.cluster import connect
    from finetune_cli.job_storage import JobStorage, StorageError, decode_secret

    if not uri.startswith(("s3://", "file:///")) or not uri.partition("://")[2].strip("/"):
        raise StorageError(f"{uri}: write s3://bucket/folder, or file:///folder for a local folder")
    try:
        storage_root = StorageRoot(endpoint=options.endpoint, region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"))
    except ValidationError:
        raise StorageError(f"--endpoint {options.endpoint}: write scheme and host, for example https://s3.example.com") from None
    if options.secret_name is None:
        return JobStorage(uri, storage_root)
    cluster = connect(options.namespace, options.context, options.kubeconfig)
    return JobStorage(uri, storage_root, decode_secret(cluster.get_secret(options.secret_name)))
