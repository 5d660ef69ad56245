"""A real https server on loopback over a folder, which fails as a test tells it to."""

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

from self_signed import certificate


@dataclass(frozen=True)
class Fault:
    """What is answered instead: a status with headers, or only `cut` bytes of the right body."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None


@dataclass
class Web:
    """The server's address, the file with the certificate to trust, and what was asked."""

    folder: Path
    url: str
    ca: str
    faults: list[Fault] = field(default_factory=list)
    """Answers to the next requests, in their order; then the folder's files."""
    ranges: bool = True
    asked: list[str] = field(default_factory=list)
    """`METHOD /path?query RANGE` of each request."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client may go away in the middle: that is no news."""


@contextlib.contextmanager
def serving(folder: Path, keys: Path) -> Iterator[Web]:
    """Serve a folder; certificate and key lie in `keys`."""
    chain = certificate(keys)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*chain)
    server = _Server(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    web = Web(folder, f"https://127.0.0.1:{server.server_address[1]}", str(chain[0]))
    server.RequestHandlerClass = _handler(web)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()


def _handler(web: Web) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            web.asked.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
            fault = web.faults.pop(0) if web.faults else Fault()
            place = web.folder / unquote(self.path.partition("?")[0]).lstrip("/")
            if fault.status != 200 or not place.is_file():
                self._send(404 if fault.status == 200 else fault.status, b"", fault.headers)
                return
            data = place.read_bytes()
            tag = f'"{hashlib.sha256(data).hexdigest()[:12]}"'
            start, status, headers = 0, 200, {"ETag": tag} | fault.headers
            if web.ranges and "Range" in self.headers and self.headers.get("If-Range", tag) == tag:
                start, status = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")), 206
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._send(status, data[start:], headers, fault.cut)

        def _send(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[:cut])
            self.close_connection = cut is not None

        do_GET = do_HEAD = _answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
