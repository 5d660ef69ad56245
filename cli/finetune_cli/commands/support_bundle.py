"""`finetune support-bundle`: writes an archive for a bug report, without secrets."""

from __future__ import annotations

import io
import json
import platform
import re
import tarfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_cli import output
from finetune_cli.commands.shared import ContextOption, KubeconfigOption, NameArgument, NamespaceOption
from finetune_cli.yaml_writer import to_yaml

if TYPE_CHECKING:
    from finetune_cli.cluster import Cluster

LOG_LINE_COUNT = 2000
"""Number of log lines that the archive contains from the end of each pod's log."""
SECRET_NAME_PATTERN = re.compile(r"(token|secret(?!keyref|ref|name)|passw|api_?key|credential(?!ssecretref))", re.IGNORECASE)
SECRET_TEXT_PATTERN = re.compile(
    r"\b(hf_[A-Za-z0-9]{6,}|sk-[A-Za-z0-9_-]{8,}|AKIA[0-9A-Z]{12,}|eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_.-]+)|(?<=://)[^/@\s]+:[^/@\s]+(?=@)"
    r"|(?<=X-Amz-Signature=)[0-9a-f]+|(?i:(?<=bearer )[A-Za-z0-9._-]{8,})"
)
REDACTED_VALUE = "REDACTED"


def support_bundle(
    name: NameArgument,
    file: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="File name of the archive. Default: finetune-support-NAME.tar.gz."
        ),
    ] = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    kubeconfig: KubeconfigOption = None,
) -> None:
    """Write an archive for a bug report: the job, its pods and events, and the last lines of the logs, with secrets redacted.

    Example: finetune support-bundle support-bot
    """
    from finetune_cli.cluster import connect
    from finetune_cli.files import make_unwritable_file_error

    cluster = connect(namespace, context, kubeconfig)
    job = cluster.get_job(name)
    path = file or Path(f"finetune-support-{name}.tar.gz")
    text_by_file_name = collect_files(cluster, job)
    try:
        _write_archive(path, name, text_by_file_name)
    except OSError as error:
        raise make_unwritable_file_error(path, error) from None
    output.write(f"{path}: {len(text_by_file_name)} files; look for remaining secrets before you send the archive to others")


def _write_archive(path: Path, name: str, text_by_file_name: dict[str, str]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for file_name, text in text_by_file_name.items():
            archive_entry = tarfile.TarInfo(f"finetune-support-{name}/{file_name}")
            content = text.encode()
            archive_entry.size, archive_entry.mtime = len(content), int(time.time())
            archive.addfile(archive_entry, io.BytesIO(content))


def collect_files(cluster: Cluster, job: dict[str, Any]) -> dict[str, str]:
    """Return the redacted text files of the archive by name.

    If pods, events or versions cannot be read, `errors.txt` contains the error. If a log cannot be read, the file of this log contains the error.
    """
    from finetune_api.names import TRAINER_CONTAINER

    from finetune_cli.cluster import ClusterError
    from finetune_cli.status_text import describe_job, format_event_line

    name = job["metadata"]["name"]
    job["metadata"].pop("managedFields", None)
    text_by_file_name = {"job.yaml": to_yaml(redact_value(job)), "status.txt": describe_job(job)}
    pods: list[dict[str, Any]] = []
    try:
        pods = cluster.list_pods(name)
        for pod in pods:
            pod["metadata"].pop("managedFields", None)
        text_by_file_name["pods.yaml"] = to_yaml(redact_value(pods))
        object_uids = {job["metadata"]["uid"], *(pod["metadata"]["uid"] for pod in pods)}
        text_by_file_name["events.txt"] = "\n".join(map(format_event_line, cluster.list_events(object_uids)))
        text_by_file_name["versions.json"] = json.dumps(
            {"kubernetes": cluster.get_version(), "python": platform.python_version()}, indent=1
        )
    except ClusterError as error:
        text_by_file_name["errors.txt"] = str(error)
    for pod in pods:
        pod_name = pod["metadata"]["name"]
        try:
            text_by_file_name[f"logs/{pod_name}.txt"] = "\n".join(cluster.stream_log(pod_name, TRAINER_CONTAINER, follow=False, tail_lines=LOG_LINE_COUNT))
        except ClusterError as error:
            text_by_file_name[f"logs/{pod_name}.txt"] = f"({error})"
    return {file_name: redact_for_others(text) for file_name, text in text_by_file_name.items()}


def redact_for_others(text: str) -> str:
    """Redact secrets in a text. This command redacts more text than other commands do, because the user sends the archive to other people."""
    from finetune_cli.redaction import redact_text

    return redact_text(SECRET_TEXT_PATTERN.sub(REDACTED_VALUE, text), REDACTED_VALUE)


def redact_value(value: Any, field_name: str = "") -> Any:
    """Return a copy without secrets. The value of a field or variable is redacted if its name suggests a secret (`MY_TOKEN`, `password`)."""
    if isinstance(value, dict):
        if "name" in value and "value" in value and len(value) == 2:
            return {
                "name": value["name"],
                "value": REDACTED_VALUE if SECRET_NAME_PATTERN.search(str(value["name"])) else redact_value(value["value"]),
            }
        return {name: redact_value(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [redact_value(item, field_name) for item in value]
    if isinstance(value, str):
        if SECRET_NAME_PATTERN.search(field_name) and not field_name.endswith(("Ref", "Name")):
            return REDACTED_VALUE
        return _redact_json(value) if value.startswith(("{", "[")) else redact_for_others(value)
    return value


def _redact_json(text: str) -> str:
    """Redact the JSON in a string. Annotations of `kubectl apply` and of the operator contain the spec as JSON, with its environment variables."""
    try:
        return json.dumps(redact_value(json.loads(text)), ensure_ascii=False)
    except (ValueError, RecursionError):
        return redact_for_others(text)
