"""The operations of the API without the HTTP part.

Each operation reads and writes FineTuneJobs with the rights of the client's ServiceAccount, and files in S3.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

from finetune_api.names import GROUP, PLURAL, Label

from finetune_cli.cluster import Cluster, ClusterError
from finetune_cli.job_storage import JobStorage, StorageError, locate_job_folder
from finetune_cli.openai_server import job_objects
from finetune_cli.openai_server.config import ServerConfig
from finetune_cli.openai_server.failures import RequestFailure, bad_request, not_found
from finetune_cli.openai_server.files import ClientFile, FileStore, check_jsonl
from finetune_cli.openai_server.ids import (
    JOB_PREFIX,
    RESULT_PREFIX,
    has_prefix,
    new_id,
    to_job_id,
    to_result_file_id,
)
from finetune_cli.openai_server.job_requests import CREATED_BY, FILE_PARAMETERS, build_job
from finetune_cli.openai_server.keys import Account
from finetune_cli.openai_server.pages import build_page, read_page_request, refuse_unknown_parameters
from finetune_cli.openai_server.results import build_metrics_csv
from finetune_cli.status_text import has_finished, parse_status

KubeObject = dict[str, Any]
Query = Mapping[str, str]
JOBS_RESOURCE = f"{PLURAL}.{GROUP}"
JOB_SELECTOR = f"{Label.CREATED_BY.value}={CREATED_BY}"
JOBS_PER_PAGE, EVENTS_PER_PAGE, CHECKPOINTS_PER_PAGE, FILES_PER_PAGE = 20, 20, 10, 10_000
"""The number of objects on a page if the client gives no `limit`, as in the OpenAI API."""
UPLOAD_PURPOSE, RESULT_PURPOSE = "fine-tune", "fine-tune-results"


@dataclass(frozen=True)
class FileContent:
    """The name of a file, and its content in chunks."""

    name: str
    chunks: Iterator[bytes]


class FineTuningService:
    """The operations on jobs and files that clients may request. Each operation has the rights of the client's ServiceAccount."""

    def __init__(self, config: ServerConfig, cluster: Cluster):
        """`cluster`: the connection with the credentials of the server itself. These credentials need only the right `impersonate`."""
        self._config, self._cluster = config, cluster
        self._row_check_lock = threading.Lock()
        """This lock makes sure that only one file is checked at a time, because the check of one row can need much memory."""

    @functools.cached_property
    def _storage(self) -> JobStorage:
        return JobStorage(str(self._config.storage.uri), self._config.storage)

    @functools.cached_property
    def _files(self) -> FileStore:
        return FileStore(self._storage)

    @property
    def max_file_bytes(self) -> int:
        """Largest size of a file that clients may upload, in bytes."""
        return self._config.max_file_bytes

    # --- jobs

    def create_job(self, account: Account, body: Any) -> KubeObject:
        """Create a job from the JSON body of a request, and return the API's object for it."""
        self._require_right(account, "create")
        manifest = build_job(
            body, self._config, new_id(JOB_PREFIX), find_file=lambda file_id: self._files.find(account.namespace, file_id),
            read_first_lines=self._files.read_first_lines, make_file_uri=self._files.make_uri,
        )  # fmt: skip
        return self._to_api_job(self._connect_as(account).create_object(manifest))

    def list_jobs(self, account: Account, query: Query) -> KubeObject:
        """Return a page of the jobs in the client's namespace, newest first."""
        metadata_filters = {name[len("metadata[") : -1]: value for name, value in query.items() if name.startswith("metadata[") and name.endswith("]")}
        refuse_unknown_parameters(query, "limit", "after", "metadata", *(f"metadata[{key}]" for key in metadata_filters))
        if query.get("metadata", "null") != "null":
            raise bad_request("metadata must be null: write metadata[key]=value to search for a value", "metadata")
        page_request = read_page_request(query, JOBS_PER_PAGE)
        api_jobs = [self._to_api_job(job) for job in self._list_jobs(account)]
        api_jobs.sort(key=lambda job: (job["created_at"], job["id"]), reverse=True)
        matching_jobs = [job for job in api_jobs if metadata_filters.items() <= job["metadata"].items() and not ("metadata" in query and job["metadata"])]
        return build_page(matching_jobs, page_request)

    def get_job(self, account: Account, job_id: str) -> KubeObject:
        """Return the API's object for a job."""
        return self._to_api_job(self._find_job(account, job_id))

    def change_job(self, account: Account, job_id: str, spec_changes: dict[str, bool]) -> KubeObject:
        """Set `cancel` or `suspend` in the spec of a job that has not ended, and return the API's object for the job."""
        job = self._find_job(account, job_id)
        status = parse_status(job)
        if has_finished(status):
            message = f"{job_id} has already ended: its status is {job_objects.get_api_status(job, status)}"
            raise bad_request(message, "fine_tuning_job_id", "job_has_ended")
        return self._to_api_job(self._connect_as(account).patch_spec(job_id, spec_changes))

    def list_events(self, account: Account, job_id: str, query: Query) -> KubeObject:
        """Return a page of the events of a job, newest first."""
        refuse_unknown_parameters(query, "limit", "after")
        page_request = read_page_request(query, EVENTS_PER_PAGE)
        job = self._find_job(account, job_id)
        events = self._connect_as(account).list_events({job["metadata"]["uid"]})
        return build_page(job_objects.build_api_events(job, events), page_request)

    def list_checkpoints(self, account: Account, job_id: str, query: Query) -> KubeObject:
        """Return a page of the checkpoints of a job, newest first."""
        refuse_unknown_parameters(query, "limit", "after")
        page_request = read_page_request(query, CHECKPOINTS_PER_PAGE)
        return build_page(job_objects.build_api_checkpoints(self._find_job(account, job_id)), page_request)

    # --- files

    def check_upload(self, account: Account) -> None:
        """Check that the client may upload files. The server calls this function before it reads the uploaded file."""
        self._require_right(account, "create")

    def add_file(self, account: Account, name: str, path: Path) -> KubeObject:
        """Check and store a file that a client has uploaded; `path` is the local copy. Return the `file` object of the OpenAI API."""
        with self._row_check_lock:
            check_jsonl(path)
        return _to_api_file(self._files.add(account.namespace, name, path))

    def list_files(self, account: Account, query: Query) -> KubeObject:
        """Return a page of the uploaded files in the client's namespace.

        The page does not contain result files. A client finds the id of a result file in the object of its job.
        """
        refuse_unknown_parameters(query, "limit", "after", "order", "purpose")
        page_request, order = read_page_request(query, FILES_PER_PAGE), query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise bad_request(f"order {order} is not accepted: write asc or desc", "order")
        self._require_right(account, "list")
        files = self._files.list_files(account.namespace) if query.get("purpose", UPLOAD_PURPOSE) == UPLOAD_PURPOSE else []
        return build_page([_to_api_file(file) for file in (files if order == "desc" else reversed(files))], page_request)

    def get_file(self, account: Account, file_id: str) -> KubeObject:
        """Return the API's object for a file."""
        if has_prefix(file_id, RESULT_PREFIX):
            job, content = self._read_result(account, file_id)
            return _build_api_file(file_id, _name_result_file(job), len(content), job["finished_at"] or job["created_at"], RESULT_PURPOSE)
        self._require_right(account, "get")
        return _to_api_file(self._find_file(account, file_id))

    def read_file(self, account: Account, file_id: str) -> FileContent:
        """Return the content of a file."""
        if has_prefix(file_id, RESULT_PREFIX):
            job, content = self._read_result(account, file_id)
            return FileContent(_name_result_file(job), iter([content]))
        self._require_right(account, "get")
        file = self._find_file(account, file_id)
        return FileContent(file.name, self._files.read_chunks(file))

    def delete_file(self, account: Account, file_id: str) -> KubeObject:
        """Delete a file. Raise RequestFailure for a result file, and for a file that an unfinished job reads."""
        if has_prefix(file_id, RESULT_PREFIX):
            raise bad_request("a result file belongs to its job and cannot be deleted: delete the FineTuneJob instead", "file_id")
        self._require_right(account, "delete")
        file = self._find_file(account, file_id)
        for job in self._list_jobs(account):
            request = job_objects.read_request(job)
            if not has_finished(parse_status(job)) and file_id in [request.get(parameter) for parameter in FILE_PARAMETERS]:
                raise bad_request(f"{job['metadata']['name']} still reads this file: cancel the job first, or wait until it ends", "file_id", "file_in_use")
        self._files.delete(file)
        return {"id": file_id, "object": "file", "deleted": True}

    # --- helpers

    def _connect_as(self, account: Account) -> Cluster:
        """Return a connection to the cluster that impersonates the client's ServiceAccount."""
        return replace(self._cluster, namespace=account.namespace, impersonated_user=account.user)

    def _require_right(self, account: Account, verb: str) -> None:
        """Raise RequestFailure if the ServiceAccount may not use a verb on FineTuneJobs.

        Files need the same rights as FineTuneJobs. The server must check these rights itself, because S3 only sees the
        credentials of the server.
        """
        if not self._connect_as(account).is_allowed_to(verb, JOBS_RESOURCE):
            message = f"{account.user} has no right to {verb} finetunejobs in the namespace {account.namespace}"
            raise RequestFailure(HTTPStatus.FORBIDDEN, message, code="forbidden")

    def _list_jobs(self, account: Account) -> list[KubeObject]:
        return self._connect_as(account).list_jobs(all_namespaces=False, label_selector=JOB_SELECTOR)

    def _find_job(self, account: Account, job_id: str) -> KubeObject:
        if not has_prefix(job_id, JOB_PREFIX):
            raise not_found("job", job_id, "fine_tuning_job_id")
        try:
            job = self._connect_as(account).get_job(job_id)
        except ClusterError as error:
            if error.code == HTTPStatus.NOT_FOUND:
                raise not_found("job", job_id, "fine_tuning_job_id") from None
            raise
        if (job["metadata"].get("labels") or {}).get(Label.CREATED_BY.value) != CREATED_BY:
            raise not_found("job", job_id, "fine_tuning_job_id")
        return job

    def _find_file(self, account: Account, file_id: str) -> ClientFile:
        file = self._files.find(account.namespace, file_id)
        if file is None:
            raise not_found("file", file_id, "file_id")
        return file

    def _to_api_job(self, finetunejob: KubeObject) -> KubeObject:
        result_files = [to_result_file_id(finetunejob["metadata"]["name"])] if self._find_job_folder(finetunejob) else []
        return job_objects.build_api_job(finetunejob, result_files)

    def _find_job_folder(self, job: KubeObject) -> str | None:
        """Return the job's folder relative to the storage of the server, or None if the job stores its results in another storage.

        The server reads this folder with its own S3 credentials. Therefore, a FineTuneJob that a user wrote with kubectl must not make the server
        read from another storage or namespace.
        """
        try:
            job_folder_uri, _ = locate_job_folder(job)
        except StorageError:
            return None
        storage_prefix = f"{str(self._config.storage.uri).rstrip('/')}/"
        folder = f"{job['metadata']['namespace']}/{job['metadata']['name']}/{job['metadata']['uid']}"
        return folder if job_folder_uri == storage_prefix + folder else None

    def _read_result(self, account: Account, file_id: str) -> tuple[KubeObject, bytes]:
        """Return the API's object for the job of a result file, and the content of the file."""
        job = self._find_job(account, to_job_id(file_id))
        folder, job_object = self._find_job_folder(job), self._to_api_job(job)
        if folder is None or file_id not in job_object["result_files"]:
            raise not_found("file", file_id, "file_id")
        return job_object, build_metrics_csv(self._storage, folder)


def _to_api_file(file: ClientFile) -> KubeObject:
    return _build_api_file(file.id, file.name, file.size, file.created_at, UPLOAD_PURPOSE)


def _build_api_file(file_id: str, name: str, size: int, created_at: int, purpose: str) -> KubeObject:
    return {
        "id": file_id, "object": "file", "bytes": size, "created_at": created_at, "filename": name, "purpose": purpose, "status": "processed",
        "status_details": None, "expires_at": None,
    }  # fmt: skip


def _name_result_file(job: KubeObject) -> str:
    return f"{job['id']}-metrics.csv"
