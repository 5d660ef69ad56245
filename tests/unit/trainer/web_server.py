"""An https server on the loopback interface that serves a folder and can send faulty responses."""

from __future__ import annotations

import contextlib
import hashlib
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from self_signed import write_certificate


@dataclass(frozen=True)
class Fault:
    """A faulty response: one with another status, with additional headers, or with only the first `cut_bytes` bytes of the body."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut_bytes: int | None = None


@dataclass
class WebServer:
    """A running server."""

    folder: Path
    """The folder whose files the server serves."""
    url: str
    ca: str
    """Path of the file with the server's certificate, which clients must trust."""
    faults: list[Fault] = field(default_factory=list)
    """Faulty responses to the next requests. All later requests get the files of the folder."""
    serves_ranges: bool = True
    """Whether the server supports range requests."""
    requests: list[str] = field(default_factory=list)
    """The requests that the server has received, each as `METHOD /path?query RANGE`."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that close their connection early."""


@contextlib.contextmanager
def serve_folder(folder: Path, key_folder: Path) -> Iterator[WebServer]:
    """Serve a folder over https. The certificate and its key are written to `key_folder`."""
    chain = write_certificate(key_folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*chain)
    server = _Server(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    web = WebServer(folder, f"https://127.0.0.1:{server.server_address[1]}", str(chain[0]))
    server.RequestHandlerClass = _make_handler(web)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()


def _make_handler(web: WebServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            web.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
            fault = web.faults.pop(0) if web.faults else Fault()
            file = web.folder / unquote(self.path.partition("?")[0]).lstrip("/")
            if fault.status != 200 or not file.is_file():
                self._send(404 if fault.status == 200 else fault.status, b"", fault.headers)
                return
            data = file.read_bytes()
            tag = f'"{hashlib.sha256(data).hexdigest()[:12]}"'
            start, status, headers = 0, 200, {"ETag": tag} | fault.headers
            if web.serves_ranges and "Range" in self.headers and self.headers.get("If-Range", tag) == tag:
                start, status = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")), 206
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._send(status, data[start:], headers, fault.cut_bytes)

        def _send(self, status: int, body: bytes, headers: dict[str, str], cut_bytes: int | None = None) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[:cut_bytes])
            self.close_connection = cut_bytes is not None

        do_GET = do_HEAD = _answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
