"""The HTTP server: paths, API keys, uploads and error responses. Requests to Kubernetes and S3 run in threads, because their clients block."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import tempfile
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote

from aiohttp import BodyPartReader, web
from aiohttp.http_exceptions import HttpProcessingError

from finetune_cli.cluster import ClusterError
from finetune_cli.job_storage import StorageError
from finetune_cli.openai_server.failures import (
    RequestFailure,
    bad_request,
    convert_cluster_error,
    convert_storage_error,
)
from finetune_cli.openai_server.keys import Account, KeyTable
from finetune_cli.openai_server.service import UPLOAD_PURPOSE, FineTuningService

logger = logging.getLogger(__name__)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
ACCOUNT: web.RequestKey[Account] = web.RequestKey("account", Account)
MAX_BODY_BYTES = 1 << 20
MAX_FIELD_BYTES = 1 << 10
HEALTH_PATH = "/healthz"
CLIENT_CLOSED_REQUEST = 499
"""The HTTP status that the log shows for a request whose client disconnected. The status is never sent."""
MAX_UPLOADS = 4
"""Largest number of uploads at the same time. The chart gives the pod enough disk space for this number of files."""
UPLOAD_HINT = "send multipart/form-data with the fields purpose and file"


def create_app(service: FineTuningService, key_table: KeyTable) -> web.Application:
    """Return the web application with all paths of the server."""
    handlers = Handlers(service)
    app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_answer_failures, _make_key_middleware(key_table)])
    job_path = "/v1/fine_tuning/jobs/{id}"
    app.add_routes([
        web.get(HEALTH_PATH, _get_health),
        web.post("/v1/fine_tuning/jobs", handlers.create_job),
        web.get("/v1/fine_tuning/jobs", handlers.make_handler_with_query(service.list_jobs)),
        web.get(job_path, handlers.make_handler_with_id(service.get_job)),
        web.post(f"{job_path}/cancel", handlers.make_change_handler({"cancel": True})),
        web.post(f"{job_path}/pause", handlers.make_change_handler({"suspend": True})),
        web.post(f"{job_path}/resume", handlers.make_change_handler({"suspend": False})),
        web.get(f"{job_path}/events", handlers.make_handler_with_query(service.list_events)),
        web.get(f"{job_path}/checkpoints", handlers.make_handler_with_query(service.list_checkpoints)),
        web.post("/v1/files", handlers.create_file),
        web.get("/v1/files", handlers.make_handler_with_query(service.list_files)),
        web.get("/v1/files/{id}", handlers.make_handler_with_id(service.get_file)),
        web.get("/v1/files/{id}/content", handlers.read_file, allow_head=False),
        web.delete("/v1/files/{id}", handlers.make_handler_with_id(service.delete_file)),
    ])  # fmt: skip
    return app


class Handlers:
    """The functions that handle the requests, and the limit on the number of simultaneous uploads."""

    def __init__(self, service: FineTuningService):
        self._service = service
        self._uploads = asyncio.Semaphore(MAX_UPLOADS)

    def make_handler_with_id(self, service_method: Callable[[Account, str], Any]) -> Handler:
        """Return a handler that calls a method of the service with the account and the id in the path, and sends the result as JSON."""

        async def handle(request: web.Request) -> web.Response:
            return web.json_response(await asyncio.to_thread(service_method, request[ACCOUNT], request.match_info["id"]))

        return handle

    def make_handler_with_query(self, service_method: Callable[..., Any]) -> Handler:
        """Return a handler that calls a method of the service with the account, the id in the path if there is one, and the query parameters."""

        async def handle(request: web.Request) -> web.Response:
            return web.json_response(await asyncio.to_thread(service_method, request[ACCOUNT], *request.match_info.values(), dict(request.query)))

        return handle

    def make_change_handler(self, spec_changes: dict[str, bool]) -> Handler:
        """Return a handler that sets these fields in the spec of a job. The path of the request contains the id of the job."""
        return self.make_handler_with_id(lambda account, job_id: self._service.change_job(account, job_id, spec_changes))

    async def create_job(self, request: web.Request) -> web.Response:
        try:
            body = json.loads(await request.text())
        except (ValueError, RecursionError):
            raise bad_request("the body of the request is not valid JSON", None, "invalid_json") from None
        except LookupError:
            raise bad_request(f"the charset {request.charset} is unknown: write Content-Type: application/json", None, "invalid_json") from None
        return web.json_response(await asyncio.to_thread(self._service.create_job, request[ACCOUNT], body))

    async def create_file(self, request: web.Request) -> web.Response:
        account = request[ACCOUNT]
        await asyncio.to_thread(self._service.check_upload, account)
        if not request.content_type.startswith("multipart/"):
            raise bad_request(f"this is not an upload: {UPLOAD_HINT}", None, "invalid_upload")
        if self._uploads.locked():
            message = f"this server already receives {MAX_UPLOADS} files, and cannot receive more at the same time: send the file again later"
            raise RequestFailure(HTTPStatus.TOO_MANY_REQUESTS, message, code="rate_limit_exceeded")
        async with self._uploads:
            with tempfile.TemporaryDirectory(prefix="upload-") as folder:
                path = Path(folder) / "rows.jsonl"
                name = await self._receive_upload(request, path)
                return web.json_response(await asyncio.to_thread(self._service.add_file, account, name, path))

    async def _receive_upload(self, request: web.Request, path: Path) -> str:
        """Write the uploaded file to `path`, and return its name. Raise RequestFailure for a wrong upload."""
        name, purpose = None, None
        try:
            async for part in await request.multipart():
                if not isinstance(part, BodyPartReader) or part.name not in ("purpose", "file"):
                    field_name = str(getattr(part, "name", None))
                    raise bad_request(f"the field {field_name} is not accepted: {UPLOAD_HINT}", field_name, "unknown_parameter")
                if (purpose if part.name == "purpose" else name) is not None:
                    raise bad_request(f"the field {part.name} is given more than once: send one file in each request", part.name)
                if part.name == "purpose":
                    purpose = (await part.read_chunk(MAX_FIELD_BYTES)).decode(errors="replace")
                else:
                    name = part.filename or ""
                    await self._write_part(part, path)
        except ValueError as error:
            raise bad_request(f"the multipart body is damaged: {error}", None, "invalid_upload") from None
        if name is None or not name:
            raise bad_request("the file is missing: send it in the field file, with its name", "file", "missing_required_parameter")
        if purpose != UPLOAD_PURPOSE:
            raise bad_request(f"purpose {purpose} is not accepted: this server stores only files for training; write {UPLOAD_PURPOSE}", "purpose")
        return name

    async def _write_part(self, part: BodyPartReader, path: Path) -> None:
        received_bytes = 0
        with path.open("wb") as file:
            while chunk := await part.read_chunk(1 << 18):
                received_bytes += len(chunk)
                if received_bytes > self._service.max_file_bytes:
                    limit_text = f"{self._service.max_file_bytes / (1 << 20):g} MiB"
                    raise RequestFailure(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the file is larger than {limit_text}", code="file_too_large", param="file")
                await asyncio.to_thread(file.write, chunk)

    async def read_file(self, request: web.Request) -> web.StreamResponse:
        content = await asyncio.to_thread(self._service.read_file, request[ACCOUNT], request.match_info["id"])
        # The first chunk is read before the status is sent. If S3 fails at the first chunk, the client can therefore still get an error response.
        chunk = await asyncio.to_thread(next, content.chunks, b"")
        content_disposition = f"attachment; filename*=UTF-8''{quote(content.name, safe='')}"
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream", "Content-Disposition": content_disposition})
        await response.prepare(request)
        try:
            while chunk:
                await response.write(chunk)
                chunk = await asyncio.to_thread(next, content.chunks, b"")
            await response.write_eof()
        except ConnectionError:
            _log_disconnected_client(request)
        except Exception as error:
            # The status is already sent. The connection is closed before the end of the body, so that the client notices that the content is incomplete.
            failure = convert_storage_error(error) if isinstance(error, StorageError) else _convert_bug(error)
            logger.error("the content of a file could not be read to its end: %s", failure.to_body()["error"]["message"])
            if request.transport is not None:
                request.transport.abort()
        return response


async def serve(app: web.Application, host: str, port: int, on_started: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT. Call `on_started` with the base URL for clients. Raise OSError if the server cannot listen on host and port."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        stop_event, loop = asyncio.Event(), asyncio.get_running_loop()
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signal_number, stop_event.set)
        on_started(f"http://{f'[{host}]' if ':' in host else host}:{runner.addresses[0][1]}/v1")
        await stop_event.wait()
    finally:
        await runner.cleanup()


async def _get_health(_: web.Request) -> web.Response:
    return web.Response(text="ok\n")


def _make_key_middleware(key_table: KeyTable) -> Any:
    """Return a middleware that adds to each request the account of its API key, and refuses a request without a valid key."""

    @web.middleware
    async def add_account(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path == HEALTH_PATH:
            return await handler(request)
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        account = await asyncio.to_thread(key_table.find_account, key.strip()) if scheme.lower() == "bearer" and key.strip() else None
        if account is None:
            message = "the API key is missing or not valid: send a key of this server as bearer token in the header Authorization"
            raise RequestFailure(HTTPStatus.UNAUTHORIZED, message, code="invalid_api_key")
        request[ACCOUNT] = account
        return await handler(request)

    return add_account


@web.middleware
async def _answer_failures(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn each exception into an error response of the API, and log each request, without API keys and bodies."""
    try:
        response = await handler(request)
    except RequestFailure as failure:
        response = _build_error_response(failure)
    except ClusterError as error:
        user = request[ACCOUNT].user if ACCOUNT in request else ""
        response = _build_error_response(convert_cluster_error(error, user))
    except StorageError as error:
        response = _build_error_response(convert_storage_error(error))
    except web.HTTPException as error:
        status = HTTPStatus(error.status)
        message = f"{request.method} {request.path}: {status.phrase.lower()}"
        response = _build_error_response(RequestFailure(status, message, code=status.phrase.lower().replace(" ", "_")))
    except (web.RequestPayloadError, HttpProcessingError):
        response = _answer_damaged_body(request)
    except ConnectionError:
        _log_disconnected_client(request)
        response = web.Response(status=CLIENT_CLOSED_REQUEST)
    except Exception as error:
        response = _build_error_response(_convert_bug(error))
    account_name = f"{request[ACCOUNT].namespace}/{request[ACCOUNT].service_account}" if ACCOUNT in request else "-"
    logger.info("%s %s %s %s", account_name, request.method, request.rel_url.raw_path, response.status)
    return response


def _answer_damaged_body(request: web.Request) -> web.Response:
    message = "the body of the request is damaged: its encoding, or the header of a part, cannot be read"
    response = _build_error_response(bad_request(message, None, "invalid_body"))
    if request.content.exception() is not None:
        # Without this, aiohttp would read the rest of the request body, fail again, and log a traceback.
        request.content.feed_eof()
        response.force_close()
    return response


def _log_disconnected_client(request: web.Request) -> None:
    logger.info("the client disconnected before the end of %s %s", request.method, request.rel_url.raw_path)


def _build_error_response(failure: RequestFailure) -> web.Response:
    if failure.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        logger.error("%s: %s", failure.code, failure.to_body()["error"]["message"])
    return web.json_response(failure.to_body(), status=failure.status)


def _convert_bug(error: Exception) -> RequestFailure:
    """Log the file and line of an unexpected exception, and return a failure without details.

    The text of the exception is not logged, because it may contain a secret.
    """
    import traceback

    frame = traceback.extract_tb(error.__traceback__)[-1]
    logger.error("bug: %s in %s:%s", type(error).__name__, Path(frame.filename).name, frame.lineno)
    message = "this is a bug in the server: ask its administrator to look for the error in the server's log"
    return RequestFailure(HTTPStatus.INTERNAL_SERVER_ERROR, message, code="internal_error")
