"""`finetune upload`: copies data, models and checkpoints to storage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune_cli import output
from finetune_cli.commands.shared import (
    ContextOption,
    DataFormatOption,
    KubeconfigOption,
    NamespaceOption,
    require_format,
    write_data,
)
from finetune_cli.commands.storage_options import EndpointOption, SecretNameOption, StorageOptions, open_uri
from finetune_cli.commands.transfer_output import show_progress, summarise_files, to_dict

if TYPE_CHECKING:
    from finetune_cli.transfers import Progress, TransferredFile


def upload(
    source: Annotated[Path, typer.Argument(metavar="FILE|FOLDER", help="Local file or folder.")],
    target: Annotated[
        str, typer.Argument(metavar="URI", help="s3:// or file:// URI. With a `/` at the end, a file keeps its name below the URI.")
    ],
    secret: SecretNameOption = None,
    endpoint: EndpointOption = None,
    output_format: DataFormatOption = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Upload data, a model or a checkpoint to storage. To continue an interrupted upload, run the command again.

    If `finetune download` has written the folder, this command compares the files with the manifest in the folder, and stores them as a checkpoint or
    model below the URI.

    Example: finetune upload train.jsonl s3://data/support/

    Example: finetune upload ./my-model s3://models/my-model

    Example: finetune upload ./support-bot-step-400 s3://models/shared
    """
    require_format(output_format, "yaml", "json")
    if not source.exists():
        raise output.fail(f"{source}: there is no such file or folder")
    with show_progress("upload", is_quiet=output_format is not None) as progress:
        options = StorageOptions(endpoint=endpoint, namespace=namespace, context=context, kubeconfig=kubeconfig, secret_name=secret)
        uri, files, note = _upload_source(source, target, options, progress)
    if output_format is not None:
        write_data(to_dict(uri, source, files), output_format)
        return
    output.write(f"{uri}: {summarise_files(files)}")
    output.print_notes([note])


def _upload_source(source: Path, target: str, options: StorageOptions, progress: Progress) -> tuple[str, list[TransferredFile], str]:
    """Upload the source. Return the URI that manifests need, the uploaded files, and a note that says which field of a manifest takes the URI."""
    from finetune_cli.job_storage import to_job_folder_uri
    from finetune_cli.uploads import LocalFile, Uploader, list_plain_files, read_committed_upload

    committed_upload = read_committed_upload(source) if source.is_dir() else None
    if committed_upload is not None:
        storage = open_uri(to_job_folder_uri(target), options)
        files = Uploader(storage, progress).upload_committed(committed_upload)
        uri = storage.make_object_uri(committed_upload.folder)
        if committed_upload.folder.startswith("model"):
            return f"{uri}/{committed_upload.incarnation}", files, f"to use the model, write `model.source: {uri}/{committed_upload.incarnation}`"
        return uri, files, f"to continue from the checkpoint, write `checkpoint.resume: {uri}`"
    if source.is_dir():
        storage = open_uri(target, options)
        files = Uploader(storage, progress).upload_files(list_plain_files(source))
        return storage.uri, files, f"write `dataset.train: {storage.uri}` for data, `model.source: {storage.uri}` for a model"
    folder, _, name = target.rpartition("/")
    if folder.endswith(("/", ":")):  # the URI is s3://bucket, without a key
        folder, name = target, ""
    storage = open_uri(folder, options)
    files = Uploader(storage, progress).upload_files([LocalFile(source, name or source.name)])
    return files[0].uri, files, f"to train on the file, write `dataset.train: {files[0].uri}`"
