"""`finetune report`: downloads the report of a job from storage, and can open it in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune_cli import output
from finetune_cli.commands.shared import ContextOption, KubeconfigOption, NameArgument, NamespaceOption
from finetune_cli.commands.storage_options import EndpointOption, SecretOption, StorageOption, open_storage

if TYPE_CHECKING:
    from finetune_cli.job_storage import JobStorage

ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar")


def report(
    name: NameArgument,
    open_page: Annotated[bool, typer.Option("--open", help="Open the report in the browser.")] = False,
    file: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="File name of the report. Default: finetune-report-NAME.html."),
    ] = None,
    use_secret: SecretOption = False,
    endpoint: EndpointOption = None,
    storage: StorageOption = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Download the report of a job: one HTML page with curves, results, spec, data, costs and origin of the model.

    Example: finetune report support-bot --open
    """
    from finetune_cli.cluster import connect
    from finetune_cli.files import make_unwritable_file_error

    if file is not None and file.name.endswith(ARCHIVE_SUFFIXES):
        raise output.fail(
            f"-o {file}: `finetune report` downloads an HTML page; for the archive for a bug report, write `finetune support-bundle {name} -o {file}`"
        )
    cluster = connect(namespace, context, kubeconfig)
    report_html = read_report(open_storage(cluster, cluster.get_job(name), use_secret, endpoint, storage), name)
    path = file or Path(f"finetune-report-{name}.html")
    try:
        path.write_bytes(report_html)
    except OSError as error:
        raise make_unwritable_file_error(path, error) from None
    output.write(str(path))
    if open_page:
        _open_in_browser(path)


def read_report(storage: JobStorage, name: str) -> bytes:
    """Return the HTML page of a job's report. Raises StorageError, for example if there is no report yet."""
    from finetune_api.names import REPORT_KEY, Storage

    from finetune_cli.job_storage import StorageError

    if REPORT_KEY not in {stored.key for stored in storage.list_objects(Storage.REPORT)}:
        raise StorageError(
            f"{name} has no report below {storage.uri} yet: the trainer writes it at the end of each attempt; `finetune status {name}` shows the progress"
        )
    return storage.read_object(REPORT_KEY)


def _open_in_browser(path: Path) -> None:
    """Open a file in the user's browser. Raises CommandExit if this machine has no browser."""
    import webbrowser

    if not webbrowser.open(path.resolve().as_uri()):
        raise output.fail(f"no browser could be started; open {path} yourself")
