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
    check_format,
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
    form: DataFormatOption = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """List, verify or download the checkpoints of a job.

    Example: finetune checkpoints support-bot --verify

    Example: finetune checkpoints support-bot --download 400 --to ./checkpoint
    """
    from finetune_cli.cluster import connect
    from finetune_cli.status_text import checkpoint_table, status_of

    check_format(form, "yaml", "json")
    options = [option for option, given in (("--verify", verify), ("--download", download), ("-o", form)) if given]
    if len(options) > 1:
        raise output.fail(f"{' and '.join(options)} exclude each other: choose one of them")
    cluster = connect(namespace, context, kubeconfig)
    job = cluster.job(name)
    if verify:
        _verify(open_storage(cluster, job, use_secret, endpoint, storage))
    elif download is not None:
        _download(open_storage(cluster, job, use_secret, endpoint, storage), download, to)
    elif form is not None:
        write_data((job.get("status") or {}).get("checkpoints") or [], form)
    else:
        found = status_of(job)
        if found.checkpoints:
            output.write("\n".join(checkpoint_table(found)))
        else:
            output.notes([f"{name} has no committed checkpoint yet"])


def _verify(storage: JobStorage) -> None:
    from finetune_cli.job_storage import list_committed

    found = list_committed(storage)
    if not found:
        output.notes([f"there is no committed checkpoint or model below {storage.uri}"])
    damaged = [one for one in found if not _is_intact(storage, one)]
    if damaged:
        raise output.Exit(output.ERROR)


def _is_intact(storage: JobStorage, one: CommittedFolder) -> bool:
    from finetune_cli.job_storage import StorageError, verify_and_download
    from finetune_cli.status_text import format_bytes

    try:
        count = verify_and_download(storage, one, None)
    except StorageError as error:
        output.errors([f"{one.folder}: {error}"])
        return False
    output.write(f"{one.folder}: ok, {format_bytes(count)}" + (", healthy" if one.healthy else ""))
    return True


def _download(storage: JobStorage, word: str, to: Path) -> None:
    from finetune_cli.job_storage import StorageError, list_committed, verify_and_download
    from finetune_cli.status_text import format_bytes

    folder, found = folder_of(word), list_committed(storage)
    wanted = next((one for one in found if one.folder == folder), None)
    if wanted is None:
        available = ", ".join(one.folder for one in found) or "nothing"
        raise StorageError(f"{word} is not committed below {storage.uri}; available: {available}")
    count = verify_and_download(storage, wanted, to)
    output.write(f"{wanted.folder}: {format_bytes(count)} in {to}")


def folder_of(word: str) -> str:
    """Return the folder of a step or of the model. Raises StorageError."""
    from finetune_api.names import Storage, checkpoint_folder

    from finetune_cli.job_storage import StorageError

    if word == "model":
        return Storage.MODEL.value
    if not word.isdigit():
        raise StorageError(f"--download {word}: write the step of a checkpoint, or `model`")
    return f"{Storage.CHECKPOINTS}/{checkpoint_folder(int(word))}"
