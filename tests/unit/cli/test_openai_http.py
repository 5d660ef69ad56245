"""The HTTP part of the OpenAI server, without a cluster: damaged bodies, lost connections, and the limit on uploads."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import logging
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from finetune_cli.cluster import Cluster
from finetune_cli.job_storage import StorageError
from finetune_cli.openai_server.app import create_app
from finetune_cli.openai_server.config import ServerConfig
from finetune_cli.openai_server.keys import Account, KeyTable
from finetune_cli.openai_server.service import FileContent, FineTuningService

KEY = "sk-1"
HEADERS = {"Authorization": f"Bearer {KEY}"}
FILE_PART = b'--a\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n{}\r\n'
PURPOSE_PART = b'--a\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
MULTIPART_HEADERS = {**HEADERS, "Content-Type": "multipart/form-data; boundary=a"}


class ServiceWithoutStorage(FineTuningService):
    """A service that has no storage: it takes the content of each file from `chunks`, which may raise an exception."""

    chunks: Iterator[bytes] = iter(())

    def check_upload(self, account: Account) -> None:
        """Permit every upload."""

    def add_file(self, account: Account, name: str, path: Path) -> dict[str, Any]:
        return {"filename": name, "bytes": path.stat().st_size}

    def read_file(self, account: Account, file_id: str) -> FileContent:
        return FileContent("a.jsonl", self.chunks)


@pytest.fixture
def service() -> ServiceWithoutStorage:
    config = {"storage": {"uri": "s3://models/jobs"}, "models": {"m": {"spec": {"model": {"source": "org/m"}}}}}
    return ServiceWithoutStorage(ServerConfig.model_validate(config), Cluster(None, "default"))


@pytest.fixture
async def server(service: ServiceWithoutStorage, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> AsyncIterator[tuple[str, int]]:
    """Start the server, and return its host and port."""
    caplog.set_level(logging.INFO)
    keys = tmp_path / "keys.yaml"
    keys.write_text(json.dumps({"keys": [{"sha256": hashlib.sha256(KEY.encode()).hexdigest(), "namespace": "team-a", "serviceAccount": "alice"}]}), "utf-8")
    runner = web.AppRunner(create_app(service, KeyTable(keys)), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield runner.addresses[0][:2]
    await runner.cleanup()


async def send_request(server: tuple[str, int], method: str, path: str, headers: dict[str, str], body: bytes | None = None) -> tuple[int, Any]:
    """Send a request, and return the response's status code and its body, parsed as JSON."""
    async with aiohttp.ClientSession() as session, session.request(method, f"http://{server[0]}:{server[1]}{path}", headers=headers, data=body) as response:
        return response.status, await response.json()


async def start_request(server: tuple[str, int], head: str, body: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send the head of a request and the beginning of its body over a new connection. Return the connection's reader and writer."""
    reader, writer = await asyncio.open_connection(*server)
    writer.write(f"{head}\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n".encode() + body)
    await writer.drain()
    return reader, writer


async def wait_for_log(caplog: pytest.LogCaptureFixture, text: str) -> None:
    """Wait until the log contains a text."""
    async with asyncio.timeout(30):
        while text not in caplog.text:  # noqa: ASYNC110 -- a log has no event
            await asyncio.sleep(0)


def list_error_messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


UPLOAD_HEAD = "Content-Type: multipart/form-data; boundary=a\r\nContent-Length: 1000\r\n\r\n"


async def test_upload_is_passed_to_the_service(server: tuple[str, int]) -> None:
    response = await send_request(server, "POST", "/v1/files", MULTIPART_HEADERS, PURPOSE_PART + FILE_PART + b"--a--\r\n")
    assert response == (200, {"filename": "a.jsonl", "bytes": 2})


@pytest.mark.parametrize(
    ("path", "headers", "body", "code"),
    [
        ("/v1/fine_tuning/jobs", {"Content-Type": "application/json; charset=foo"}, b"{}", "invalid_json"),
        ("/v1/fine_tuning/jobs", {"Content-Type": "application/json", "Content-Encoding": "gzip"}, b"no gzip", "invalid_body"),
        ("/v1/files", {**MULTIPART_HEADERS, "Content-Encoding": "gzip"}, gzip.compress(PURPOSE_PART + FILE_PART)[:10] + b"\xff" * 20, "invalid_body"),
        ("/v1/files", MULTIPART_HEADERS, b"--a\r\nX-Long: " + b"x" * (65 << 10) + b"\r\n\r\n{}\r\n--a--\r\n", "invalid_body"),
    ],
)
async def test_a_damaged_body_is_answered_as_a_mistake_of_the_client(
    server: tuple[str, int], caplog: pytest.LogCaptureFixture, path: str, headers: dict[str, str], body: bytes, code: str
) -> None:
    status, response_body = await send_request(server, "POST", path, {**HEADERS, **headers}, body)
    assert (status, response_body["error"]["type"], response_body["error"]["code"], list_error_messages(caplog)) == (400, "invalid_request_error", code, [])


async def test_a_request_without_a_key_is_refused_with_an_explanation(server: tuple[str, int]) -> None:
    status, response_body = await send_request(server, "GET", "/v1/files", {})
    message = "the API key is missing or not valid: send a key of this server as bearer token in the header Authorization"
    assert (status, response_body["error"]["message"]) == (401, message)


async def test_fifth_upload_at_the_same_time_is_refused(server: tuple[str, int], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[str] = []

    class Folder(tempfile.TemporaryDirectory[str]):
        def __init__(self, prefix: str):
            super().__init__(prefix=prefix)
            folders.append(self.name)

    monkeypatch.setattr(tempfile, "TemporaryDirectory", Folder)
    writers = [(await start_request(server, "POST /v1/files HTTP/1.1", UPLOAD_HEAD.encode() + FILE_PART))[1] for _ in range(4)]
    async with asyncio.timeout(30):
        while len(folders) < 4:  # noqa: ASYNC110 -- a list has no event
            await asyncio.sleep(0)
    status, response_body = await send_request(server, "POST", "/v1/files", MULTIPART_HEADERS, PURPOSE_PART + FILE_PART + b"--a--\r\n")
    assert (status, len(folders), response_body["error"]) == (429, 4, {
        "message": "this server already receives 4 files, and cannot receive more at the same time: send the file again later",
        "type": "invalid_request_error", "param": None, "code": "rate_limit_exceeded",
    })  # fmt: skip
    writers[0].transport.abort()
    await wait_for_log(caplog, "POST /v1/files 499")
    assert (await send_request(server, "POST", "/v1/files", MULTIPART_HEADERS, PURPOSE_PART + FILE_PART + b"--a--\r\n"))[0] == 200
    for writer in writers[1:]:
        writer.transport.abort()


async def test_a_head_request_for_the_content_of_a_file_is_refused(server: tuple[str, int]) -> None:
    _, writer = connection = await start_request(server, "HEAD /v1/files/file-1/content HTTP/1.1", b"Connection: close\r\n\r\n")
    head, _, body = (await connection[0].read()).partition(b"\r\n\r\n")
    writer.close()
    assert (head.partition(b"\r\n")[0], body) == (b"HTTP/1.1 405 Method Not Allowed", b"")


async def test_a_client_that_disconnects_during_an_upload_causes_no_error_in_the_log(server: tuple[str, int], caplog: pytest.LogCaptureFixture) -> None:
    _, writer = await start_request(server, "POST /v1/files HTTP/1.1", UPLOAD_HEAD.encode() + FILE_PART)
    writer.transport.abort()
    await wait_for_log(caplog, "team-a/alice POST /v1/files 499")
    assert (list_error_messages(caplog), "the client disconnected before the end of POST /v1/files" in caplog.text) == ([], True)


async def test_a_client_that_disconnects_during_a_download_causes_no_error_in_the_log(
    server: tuple[str, int], service: ServiceWithoutStorage, caplog: pytest.LogCaptureFixture
) -> None:
    has_disconnected = threading.Event()

    def generate_content() -> Iterator[bytes]:
        yield b"first"
        assert has_disconnected.wait(30)
        while "disconnected" not in caplog.text:
            yield b"x" * (1 << 16)

    service.chunks = generate_content()
    reader, writer = await start_request(server, "GET /v1/files/file-1/content HTTP/1.1", b"\r\n")
    await reader.readuntil(b"first")
    writer.transport.abort()
    has_disconnected.set()
    await wait_for_log(caplog, "team-a/alice GET /v1/files/file-1/content")
    assert (list_error_messages(caplog), "the client disconnected before the end of GET /v1/files/file-1/content" in caplog.text) == ([], True)


@pytest.mark.parametrize("error", [StorageError("s3://models/a: SlowDown"), RuntimeError("generator")])
async def test_an_exception_after_the_status_is_sent_ends_the_connection(
    server: tuple[str, int], service: ServiceWithoutStorage, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def generate_content() -> Iterator[bytes]:
        yield b"first"
        raise error

    service.chunks = generate_content()
    reader, writer = await start_request(server, "GET /v1/files/file-1/content HTTP/1.1", b"\r\n")
    received = b""
    try:
        while chunk := await reader.read(1 << 16):
            received += chunk
    except ConnectionResetError:
        pass
    writer.close()
    assert (received.count(b"HTTP/1.1"), received.endswith(b"0\r\n\r\n")) == (1, False)
    assert "the content of a file could not be read to its end" in list_error_messages(caplog)[-1]
