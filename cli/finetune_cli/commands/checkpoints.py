"""`finetune checkpoints`: lists, verifies and downloads the checkpoints and the model of a job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune_cli import output
from finetune_cli.commands.shared import (
    ContextOption,
    DataFormatOption,
    KubeconfigOption,
    NameArgument,
    NamespaceOption,
    require_format,
    write_data,
)
from finetune_cli.commands.storage_options import EndpointOption, SecretOption, StorageOption, open_storage

if TYPE_CHECKING:
    from finetune_cli.job_storage import CommittedFolder, JobStorage


def checkpoints(
    name: NameArgument,
    verify: Annotated[bool, typer.Option("--verify", help="Read every file in storage and check its sha256.")] = False,
    download: Annotated[
        str | None, typer.Option("--download", metavar="STEP|model", help="Download a checkpoint or the final model.")
    ] = None,
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="Folder for --download.")] = Path(),
    use_secret: SecretOption = False,
    endpoint: EndpointOption = None,
    storage: StorageOption = None,
    output_format: DataFormatOption = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """List, verify or download the checkpoints of a job.

    Example: finetune checkpoints support-bot --verify

    Example: finetune checkpoints support-bot --download 400 --to ./checkpoint
    """
    from finetune_cli.cluster import connect
    from finetune_cli.status_text import format_checkpoint_table, parse_status

    require_format(output_format, "yaml", "json")
    given_options = [
        option for option, is_given in (("--verify", verify), ("--download", download), ("-o", output_format)) if is_given
    ]
    if len(given_options) > 1:
        raise output.fail(f"{' and '.join(given_options)} exclude each other: choose one of them")
    cluster = connect(namespace, context, kubeconfig)
    job = cluster.get_job(name)
    if verify:
        _verify_checkpoints(open_storage(cluster, job, use_secret, endpoint, storage))
    elif download is not None:
        _download_checkpoint(open_storage(cluster, job, use_secret, endpoint, storage), download, to)
    elif output_format is not None:
        write_data((job.get("status") or {}).get("checkpoints") or [], output_format)
    else:
        status = parse_status(job)
        if status.checkpoints:
            output.write("\n".join(format_checkpoint_table(status)))
        else:
            output.print_notes([f"{name} has no committed checkpoint yet"])


def _verify_checkpoints(storage: JobStorage) -> None:
    from finetune_cli.job_storage import list_committed_folders

    committed_folders = list_committed_folders(storage)
    if not committed_folders:
        output.print_notes([f"there is no committed checkpoint or model below {storage.uri}"])
    damaged_folders = [folder for folder in committed_folders if not _verify_folder(storage, folder)]
    if damaged_folders:
        raise output.CommandExit(output.ERROR)


def _verify_folder(storage: JobStorage, committed_folder: CommittedFolder) -> bool:
    """Verify the files of a checkpoint or model, and print the result. Returns whether all files are intact."""
    from finetune_cli.job_storage import StorageError, verify_files
    from finetune_cli.status_text import format_bytes

    try:
        verified_bytes = verify_files(storage, committed_folder)
    except StorageError as error:
        output.print_errors([f"{committed_folder.folder}: {error}"])
        return False
    output.write(f"{committed_folder.folder}: ok, {format_bytes(verified_bytes)}" + (", healthy" if committed_folder.is_healthy else ""))
    return True


def _download_checkpoint(storage: JobStorage, step_or_model: str, folder_path: Path) -> None:
    from finetune_cli.commands.download import find_source_of_folder
    from finetune_cli.commands.transfer_output import show_progress
    from finetune_cli.downloads import download
    from finetune_cli.status_text import format_bytes

    folder = find_folder_to_download(step_or_model)
    source = find_source_of_folder(storage, folder)
    with show_progress("download", is_quiet=False) as progress:
        files = download(source, folder_path, progress, overwrite=True)
    output.write(f"{folder}: {format_bytes(sum(file.size for file in files))} in {folder_path}")


def find_folder_to_download(step_or_model: str) -> str:
    """Return the key of the folder in storage that belongs to a step number or to `model`. Raises StorageError for any other text."""
    from finetune_api.names import Storage, checkpoint_folder

    from finetune_cli.job_storage import StorageError

    if step_or_model == "model":
        return Storage.MODEL.value
    if not step_or_model.isdigit():
        raise StorageError(f"--download {step_or_model}: write the step of a checkpoint, or `model`")
    return f"{Storage.CHECKPOINTS}/{checkpoint_folder(int(step_or_model))}"
