"""`finetune delete`: deletes jobs, and says what stays in storage."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated, Any

import typer

from finetune_cli import output
from finetune_cli.commands.shared import ContextOption, KubeconfigOption, NamespaceOption, complete_job


def delete(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names of FineTuneJobs.", autocompletion=complete_job)],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Delete jobs with their pods. Checkpoints and models stay in storage; the command prints how to remove them.

    Asks for confirmation if a job has not finished.

    Example: finetune delete old-bot
    """
    from finetune_cli.cluster import connect, parse_job_name
    from finetune_cli.status_text import has_finished, parse_status

    cluster = connect(namespace, context, kubeconfig)
    jobs = [cluster.get_job(parse_job_name(name)) for name in names]
    unfinished_names = [job["metadata"]["name"] for job in jobs if not has_finished(parse_status(job))]
    if unfinished_names and not yes:
        question = f"{', '.join(unfinished_names)} {'has' if len(unfinished_names) == 1 else 'have'} not finished, and cannot be resumed after the deletion"
        if not sys.stdin.isatty():
            raise output.fail(f"{question}: confirm with --yes")
        typer.confirm(f"{question}. Delete?", abort=True, err=True)
    for job in jobs:
        cluster.delete_object(job)
        output.write(f"{job['metadata']['name']}: deleted")
        output.print_notes(describe_remaining_files(job))


def describe_remaining_files(job: dict[str, Any]) -> list[str]:
    """Return notes that say what stays in storage, and how to remove it."""
    from finetune_cli.job_storage import StorageError, locate_job_folder
    from finetune_cli.status_text import format_bytes, parse_status

    metadata, status = job["metadata"], parse_status(job)
    try:
        uri, connection = locate_job_folder(job)
    except StorageError:
        purge_text = f"finetune purge {metadata['name']} -n {metadata['namespace']} --uid {metadata['uid']} --storage URI"
        return [f"files that the job has stored stay in the operator's default storage; to remove them, run `{purge_text}` with the URI of this storage"]
    checkpoint_bytes = sum(checkpoint.bytes or 0 for checkpoint in status.checkpoints)
    file_texts = [f"{len(status.checkpoints)} checkpoints ({format_bytes(checkpoint_bytes)})"] if status.checkpoints else []
    file_texts += [f"the {status.output.kind or 'model'}"] if status.output and status.output.uri else []
    copy_uris = [str(copy_uri) for copy_uri in (status.output.published_uri, status.output.hub_uri) if copy_uri] if status.output else []
    storage_root_uri, *_, uid = uri.rsplit("/", 3)
    if not uri.startswith(("s3://", "file://")):
        removal_hint = f"to remove them, delete the folder {uri}"
    else:
        purge_command = ["finetune", "purge", metadata["name"], "-n", metadata["namespace"], "--uid", uid, "--storage", storage_root_uri]
        purge_command += ["--endpoint", connection.endpoint] if connection.endpoint else []
        removal_hint = f"to remove them, run `{shlex.join(purge_command)}`"
    stored_files_text = " and ".join(file_texts) or "files that the job has stored"
    notes = [f"still stored in {uri}: {stored_files_text}; {removal_hint}"]
    return [*notes, f"copies stay in {' and '.join(copy_uris)}"] if copy_uris else notes
