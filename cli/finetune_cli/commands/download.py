"""`finetune download`: copies models, checkpoints, results and data from storage to this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_cli import output
from finetune_cli.commands.shared import (
    ContextOption,
    DataFormatOption,
    KubeconfigOption,
    NamespaceOption,
    complete_job,
    require_format,
    write_data,
)
from finetune_cli.commands.storage_options import (
    EndpointOption,
    SecretNameOption,
    SecretOption,
    StorageOption,
    StorageOptions,
    open_target,
    open_uri,
)
from finetune_cli.commands.transfer_output import describe_checks, show_progress, summarise_files, to_dict

if TYPE_CHECKING:
    from finetune_cli.downloads import Source
    from finetune_cli.job_storage import JobStorage

RESULT_FOLDERS = ("merged", "metrics", "evaluation", "report", "serving", "lineage", "run")
"""Folders of a job that can be downloaded, in addition to the model and the checkpoints."""


def download(
    target: Annotated[
        str,
        typer.Argument(metavar="NAME|URI", help="Name of the FineTuneJob, or the s3:// or file:// URI of a file or folder.", autocompletion=complete_job),
    ],
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="model|latest|STEP|FOLDER",
            help=f"Part of the job: the final model (default), the newest checkpoint, the checkpoint of a step, or {', '.join(RESULT_FOLDERS)}.",
        ),
    ] = None,
    to: Annotated[Path | None, typer.Option("--to", metavar="FOLDER", help="Local folder. Default: a folder named after the job and the part.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace local files with other content.")] = False,
    use_secret: SecretOption = False,
    secret: SecretNameOption = None,
    endpoint: EndpointOption = None,
    storage: StorageOption = None,
    output_format: DataFormatOption = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Download a model, a checkpoint, results or data, and check the content. To continue an interrupted download, run the command again.

    Files of models and checkpoints are compared with the sha256 in their manifest, other files with the MD5 of the store.

    Example: finetune download support-bot --to ./model

    Example: finetune download support-bot latest

    Example: finetune download s3://data/train.jsonl --to ./data
    """
    from finetune_cli.downloads import download as download_files

    require_format(output_format, "yaml", "json")
    options = StorageOptions(use_secret, endpoint, storage, namespace, context, kubeconfig, secret)
    if "://" in target:
        if what is not None or use_secret or storage is not None:
            raise output.fail("with a URI, remove the part of the job, --use-secret and --storage; use --secret to name a Secret")
        source, folder_name = _find_source_of_uri(target, options)
    else:
        if secret is not None:
            raise output.fail("--secret is for a URI; with the name of a job, write --use-secret for the job's own Secret")
        source, folder_name = _find_source_of_job(target, what or "model", options)
    folder = to or Path(folder_name)
    with show_progress("download", is_quiet=output_format is not None) as progress:
        files = download_files(source, folder, progress, overwrite=overwrite)
    if output_format is not None:
        write_data(to_dict(source.storage.uri, folder, files), output_format)
    else:
        output.write(f"{folder}: {summarise_files(files)}, checked: {describe_checks(files)}")


def _find_source_of_job(target: str, part_name: str, options: StorageOptions) -> tuple[Source, str]:
    """Return the files to download from the part `part_name` of a job, and the name of the local folder."""
    storage, job = open_target(target, options)
    assert job is not None  # the target is not a URI here, so it is the name of a job
    folder = _find_folder_of_part(job, part_name)
    return find_source_of_folder(storage, folder), f"{job['metadata']['name']}-{folder.rpartition('/')[2]}"


def _find_folder_of_part(job: dict[str, Any], part_name: str) -> str:
    """Return the key of the folder in storage that holds the part `part_name` of a job.

    Raises CommandExit for an unknown part, or for `latest` without a checkpoint.
    """
    from finetune_api.names import Storage, checkpoint_folder

    if part_name in (Storage.MODEL.value, *RESULT_FOLDERS):
        return part_name
    step = (job.get("status") or {}).get("latestCheckpointStep") if part_name == "latest" else part_name
    if step is None:
        raise output.fail(f"{job['metadata']['name']} has no committed checkpoint yet")
    if not str(step).isdigit():
        raise output.fail(f"{part_name}: unknown part of a job; write the step of a checkpoint, or one of model, latest, {', '.join(RESULT_FOLDERS)}")
    return f"{Storage.CHECKPOINTS}/{checkpoint_folder(int(step))}"


def find_source_of_folder(storage: JobStorage, folder: str) -> Source:
    """Return the files of a committed folder or a result folder. If `folder` is neither, raises StorageError, whose message lists the committed folders."""
    from finetune_cli.downloads import make_committed_source, make_plain_source
    from finetune_cli.job_storage import StorageError, find_committed_folder, list_committed_folders

    committed_folder = find_committed_folder(storage, folder)
    if committed_folder is not None:
        return make_committed_source(storage, committed_folder)
    if folder in RESULT_FOLDERS and folder != "merged":
        return make_plain_source(storage, folder)
    available_text = ", ".join(available_folder.folder for available_folder in list_committed_folders(storage)) or "nothing"
    raise StorageError(f"{folder} is not committed below {storage.uri}; available: {available_text}")


def _find_source_of_uri(uri: str, options: StorageOptions) -> tuple[Source, str]:
    """Return the files at a URI, and the name of the local folder.

    The URI of a checkpoint or model may point to the folder with the commit marker, or to the folder of an incarnation inside it.
    """
    from finetune_api.names import parse_attempt_of_uri

    from finetune_cli.downloads import make_committed_source, make_plain_source
    from finetune_cli.job_storage import find_committed_folder

    trimmed_uri = uri.rstrip("/")
    outer_uri = trimmed_uri.rpartition("/")[0] if parse_attempt_of_uri(trimmed_uri) is not None else trimmed_uri
    parent_uri, _, name = outer_uri.rpartition("/")
    if parent_uri.endswith(("/", ":")):  # the URI is s3://bucket, without a key
        return make_plain_source(open_uri(outer_uri, options), ""), name
    storage = open_uri(parent_uri, options)
    committed_folder = find_committed_folder(storage, name)
    if committed_folder is not None and (outer_uri == trimmed_uri or committed_folder.path == trimmed_uri.rpartition("/")[2]):
        return make_committed_source(storage, committed_folder), name
    source = make_plain_source(storage, trimmed_uri.removeprefix(f"{parent_uri}/"))
    return source, "." if [file.path for file in source.files] == [name] else name
