"""What the paths of the API do, without HTTP: reads and writes FineTuneJobs as the client's ServiceAccount, and files in S3."""

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
from finetune_cli.job_storage import JobStorage, StorageError, root_of
from finetune_cli.openai_server import job_objects
from finetune_cli.openai_server.config import ServerConfig
from finetune_cli.openai_server.failures import RequestFailure, bad_request, not_found
from finetune_cli.openai_server.files import ClientFile, FileStore, check_rows
from finetune_cli.openai_server.ids import (
    JOB_PREFIX,
    RESULT_PREFIX,
    has_prefix,
    job_of_result_file,
    new_id,
    result_file_of,
)
from finetune_cli.openai_server.job_requests import CREATED_BY, FILE_PARAMETERS, build_job
from finetune_cli.openai_server.keys import Account
from finetune_cli.openai_server.pages import page_of, read_page_request, refuse_unknown_parameters
from finetune_cli.openai_server.results import result_rows
from finetune_cli.status_text import has_finished, status_of

KubeObject = dict[str, Any]
Query = Mapping[str, str]
JOBS_RESOURCE = f"{PLURAL}.{GROUP}"
JOB_SELECTOR = f"{Label.CREATED_BY.value}={CREATED_BY}"
JOBS_PER_PAGE, EVENTS_PER_PAGE, CHECKPOINTS_PER_PAGE, FILES_PER_PAGE = 20, 20, 10, 10_000
"""The API's page sizes for lists without `limit`."""
PURPOSE, RESULT_PURPOSE = "fine-tune", "fine-tune-results"


@dataclass(frozen=True)
class Content:
    """The content of a file, in chunks."""

    name: str
    chunks: Iterator[bytes]


class FineTuningService:
    """The files and jobs of all API keys."""

    def __init__(self, config: ServerConfig, cluster: Cluster):
        """`cluster` has the credentials of the server. The only right that they need is `impersonate`."""
        self._config, self._cluster = config, cluster
        self._row_check = threading.Lock()
        """Only one file is checked at a time, because the check of a row can take much memory."""

    @functools.cached_property
    def _storage(self) -> JobStorage:
        return JobStorage(str(self._config.storage.uri), self._config.storage)

    @functools.cached_property
    def _files(self) -> FileStore:
        return FileStore(self._storage)

    @property
    def max_file_bytes(self) -> int:
        """Largest file that clients may upload."""
        return self._config.max_file_bytes

    # --- jobs

    def create_job(self, account: Account, body: Any) -> KubeObject:
        """Create a job from the JSON body of a request."""
        self._require(account, "create")
        manifest = build_job(
            body, self._config, new_id(JOB_PREFIX), find_file=lambda file_id: self._files.find(account.namespace, file_id),
            read_first_lines=self._files.read_first_lines, uri_of=self._files.uri,
        )  # fmt: skip
        return self._object_of(self._cluster_of(account).create_object(manifest))

    def list_jobs(self, account: Account, query: Query) -> KubeObject:
        """Return a page of the jobs of the namespace, newest first."""
        filters = {name[len("metadata[") : -1]: value for name, value in query.items() if name.startswith("metadata[") and name.endswith("]")}
        refuse_unknown_parameters(query, "limit", "after", "metadata", *(f"metadata[{key}]" for key in filters))
        if query.get("metadata", "null") != "null":
            raise bad_request("metadata takes only null: write metadata[key]=value to search for a value", "metadata")
        page = read_page_request(query, JOBS_PER_PAGE)
        objects = [self._object_of(job) for job in self._list_jobs(account)]
        objects.sort(key=lambda job: (job["created_at"], job["id"]), reverse=True)
        matching = [job for job in objects if filters.items() <= job["metadata"].items() and not ("metadata" in query and job["metadata"])]
        return page_of(matching, page)

    def get_job(self, account: Account, job_id: str) -> KubeObject:
        """Return a job."""
        return self._object_of(self._find_job(account, job_id))

    def change_job(self, account: Account, job_id: str, change: dict[str, bool]) -> KubeObject:
        """Set `cancel` or `suspend` of a job that has not ended."""
        job = self._find_job(account, job_id)
        status = status_of(job)
        if has_finished(status):
            message = f"{job_id} has already ended: its status is {job_objects.api_status(job, status)}"
            raise bad_request(message, "fine_tuning_job_id", "job_has_ended")
        return self._object_of(self._cluster_of(account).patch_spec(job_id, change))

    def list_events(self, account: Account, job_id: str, query: Query) -> KubeObject:
        """Return a page of the events of a job, newest first."""
        refuse_unknown_parameters(query, "limit", "after")
        page = read_page_request(query, EVENTS_PER_PAGE)
        job = self._find_job(account, job_id)
        events = self._cluster_of(account).list_events({job["metadata"]["uid"]})
        return page_of(job_objects.event_objects(job, events), page)

    def list_checkpoints(self, account: Account, job_id: str, query: Query) -> KubeObject:
        """Return a page of the checkpoints of a job, newest first."""
        refuse_unknown_parameters(query, "limit", "after")
        page = read_page_request(query, CHECKPOINTS_PER_PAGE)
        return page_of(job_objects.checkpoint_objects(self._find_job(account, job_id)), page)

    # --- files

    def check_upload(self, account: Account) -> None:
        """Check that the client may upload files, before it sends them."""
        self._require(account, "create")

    def add_file(self, account: Account, name: str, path: Path) -> KubeObject:
        """Store a local file that a client has sent."""
        with self._row_check:
            check_rows(path)
        return _file_object(self._files.add(account.namespace, name, path))

    def list_files(self, account: Account, query: Query) -> KubeObject:
        """Return a page of the files of the namespace, newest first. Result files are only named by their jobs."""
        refuse_unknown_parameters(query, "limit", "after", "order", "purpose")
        page, order = read_page_request(query, FILES_PER_PAGE), query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise bad_request(f"order {order} is not possible: write asc or desc", "order")
        self._require(account, "list")
        files = self._files.list_files(account.namespace) if query.get("purpose", PURPOSE) == PURPOSE else []
        return page_of([_file_object(file) for file in (files if order == "desc" else reversed(files))], page)

    def get_file(self, account: Account, file_id: str) -> KubeObject:
        """Return the properties of a file."""
        if has_prefix(file_id, RESULT_PREFIX):
            job, content = self._result_of(account, file_id)
            return _describe_file(file_id, _result_name(job), len(content), job["finished_at"] or job["created_at"], RESULT_PURPOSE)
        self._require(account, "get")
        return _file_object(self._find_file(account, file_id))

    def read_file(self, account: Account, file_id: str) -> Content:
        """Return the content of a file."""
        if has_prefix(file_id, RESULT_PREFIX):
            job, content = self._result_of(account, file_id)
            return Content(_result_name(job), iter([content]))
        self._require(account, "get")
        file = self._find_file(account, file_id)
        return Content(file.name, self._files.read_chunks(file))

    def delete_file(self, account: Account, file_id: str) -> KubeObject:
        """Delete a file that no unfinished job reads."""
        if has_prefix(file_id, RESULT_PREFIX):
            raise bad_request("a result file belongs to its job and cannot be deleted: delete the FineTuneJob instead", "file_id")
        self._require(account, "delete")
        file = self._find_file(account, file_id)
        for job in self._list_jobs(account):
            request = job_objects.request_of(job)
            if not has_finished(status_of(job)) and file_id in [request.get(parameter) for parameter in FILE_PARAMETERS]:
                raise bad_request(f"{job['metadata']['name']} still reads this file: cancel the job first, or wait until it ends", "file_id", "file_in_use")
        self._files.delete(file)
        return {"id": file_id, "object": "file", "deleted": True}

    # --- helpers

    def _cluster_of(self, account: Account) -> Cluster:
        """Return the connection that acts in the name of the client's ServiceAccount."""
        return replace(self._cluster, namespace=account.namespace, impersonated_user=account.user)

    def _require(self, account: Account, verb: str) -> None:
        """Check a right of the ServiceAccount before the server reads or writes S3 with its own keys. Files need the same rights as FineTuneJobs."""
        if not self._cluster_of(account).can_i(verb, JOBS_RESOURCE):
            message = f"{account.user} has no right to {verb} finetunejobs in the namespace {account.namespace}"
            raise RequestFailure(HTTPStatus.FORBIDDEN, message, code="forbidden")

    def _list_jobs(self, account: Account) -> list[KubeObject]:
        return self._cluster_of(account).list_jobs(all_namespaces=False, label_selector=JOB_SELECTOR)

    def _find_job(self, account: Account, job_id: str) -> KubeObject:
        if not has_prefix(job_id, JOB_PREFIX):
            raise not_found("job", job_id, "fine_tuning_job_id")
        try:
            job = self._cluster_of(account).get_job(job_id)
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

    def _object_of(self, job: KubeObject) -> KubeObject:
        result_files = [result_file_of(job["metadata"]["name"])] if self._folder_of(job) else []
        return job_objects.job_object(job, result_files)

    def _folder_of(self, job: KubeObject) -> str | None:
        """Return the job's folder relative to the storage of the server, or None for a job that stores elsewhere.

        The server reads with its own S3 credentials, so a FineTuneJob that was written with kubectl must not make it read another store or namespace.
        """
        try:
            root, _ = root_of(job)
        except StorageError:
            return None
        own = f"{str(self._config.storage.uri).rstrip('/')}/"
        folder = f"{job['metadata']['namespace']}/{job['metadata']['name']}/{job['metadata']['uid']}"
        return folder if root == own + folder else None

    def _result_of(self, account: Account, file_id: str) -> tuple[KubeObject, bytes]:
        """Return the job of a result file, and the content of the file."""
        job = self._find_job(account, job_of_result_file(file_id))
        folder, job_object = self._folder_of(job), self._object_of(job)
        if folder is None or file_id not in job_object["result_files"]:
            raise not_found("file", file_id, "file_id")
        return job_object, result_rows(self._storage, folder)


def _file_object(file: ClientFile) -> KubeObject:
    return _describe_file(file.id, file.name, file.size, file.created_at, PURPOSE)


def _describe_file(file_id: str, name: str, size: int, created_at: int, purpose: str) -> KubeObject:
    return {
        "id": file_id, "object": "file", "bytes": size, "created_at": created_at, "filename": name, "purpose": purpose, "status": "processed",
        "status_details": None, "expires_at": None,
    }  # fmt: skip


def _result_name(job: KubeObject) -> str:
    return f"{job['id']}-metrics.csv"
