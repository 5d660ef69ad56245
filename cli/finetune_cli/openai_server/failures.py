"""The failure of a request, with its HTTP status and the error object of the OpenAI API."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any

from finetune_cli.cluster import ClusterError
from finetune_cli.job_storage import ConnectionLost, StorageError
from finetune_cli.redaction import redact_text


class RequestFailure(Exception):
    """The server refuses a request or cannot complete it.

    `param`: the name of the wrong parameter, or None. `code`: a fixed word that programs can compare.
    """

    def __init__(self, status: HTTPStatus, message: str, *, code: str, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def to_body(self) -> dict[str, Any]:
        """Return the body of the error response in the form of the OpenAI API."""
        error_type = "server_error" if self.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
        return {"error": {"message": redact_text(self.message), "type": error_type, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None, code: str = "invalid_value") -> RequestFailure:
    """Return the failure of a request that is wrong, with status 400. `param`: the wrong parameter, or None for the whole request."""
    return RequestFailure(HTTPStatus.BAD_REQUEST, message, code=code, param=param)


def not_found(object_type: str, object_id: str, param: str) -> RequestFailure:
    """Return the failure of a request for a job or file that does not exist in the namespace of the API key. `object_type`: `job` or `file`."""
    return RequestFailure(HTTPStatus.NOT_FOUND, f"there is no {object_type} with the id {object_id}", code="not_found", param=param)


def convert_cluster_error(error: ClusterError, user: str) -> RequestFailure:
    """Return the failure for an error of the Kubernetes API. `user`: the ServiceAccount that the server impersonated in the request."""
    if error.code == HTTPStatus.FORBIDDEN and "impersonate" in str(error):
        message = f"this server may not act as {user}: its administrator must grant it the verb `impersonate` on this ServiceAccount"
        return RequestFailure(HTTPStatus.INTERNAL_SERVER_ERROR, message, code="impersonation_forbidden")
    if error.code == HTTPStatus.UNAUTHORIZED:
        message = "the cluster does not accept this server's credentials: its administrator must renew them"
        return RequestFailure(HTTPStatus.INTERNAL_SERVER_ERROR, message, code="server_credentials")
    if error.code in (HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY):
        return bad_request(_remove_object_name(str(error)), None, "invalid_job")
    code_by_status = {HTTPStatus.FORBIDDEN: "forbidden", HTTPStatus.CONFLICT: "conflict", HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_exceeded"}
    for status, code in code_by_status.items():
        if error.code == status:
            return RequestFailure(status, str(error), code=code)
    return RequestFailure(HTTPStatus.SERVICE_UNAVAILABLE, f"the cluster did not answer: {error}", code="cluster_unavailable")


def _remove_object_name(message: str) -> str:
    """Return a message of Kubernetes without `FineTuneJob.… "name" is invalid: ` at its start, because clients do not know this object."""
    return re.sub(r'^\S+ "[^"]*" is invalid: ', "", message)


def convert_storage_error(error: StorageError) -> RequestFailure:
    """Return the failure for an error of the S3 storage."""
    if isinstance(error, ConnectionLost):
        return RequestFailure(HTTPStatus.SERVICE_UNAVAILABLE, f"the storage of this server cannot be reached: {error}", code="storage_unavailable")
    return RequestFailure(HTTPStatus.INTERNAL_SERVER_ERROR, f"the storage of this server refused the request: {error}", code="storage_refused")
