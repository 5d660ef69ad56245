"""An S3 server that misbehaves on request: a proxy in front of a real one.

Rules say which requests suffer what: refused with a status, delayed, slowed, cut off, changed by a byte, done and not
answered, or reset. Signatures stay valid, since the Host header travels unchanged.
"""

from __future__ import annotations

import http.client
import random
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

CHUNK = 64 * 1024


class Do(Enum):
    """What happens to a request."""

    REFUSE = "answer with status and code, and do nothing"
    RESET = "close the connection without an answer"
    LOSE_ANSWER = "do it, and close the connection without an answer"
    TRUNCATE = "answer with half of the body"
    FLIP = "answer with one byte of the body changed"
    DELAY = "wait, then do it"


@dataclass
class Rule:
    """Requests that `match` (method, path) suffer `do`, with a probability, at most so often."""

    do: Do
    match: Callable[[str, str], bool] = lambda method, path: True
    probability: float = 1.0
    times: int | None = None
    status: int = 503
    code: str = "SlowDown"
    seconds: float = 0.0


@dataclass
class FaultProxy:
    """Serves `url` in front of `upstream`. `rules` may be changed at any time; `seen` counts what happened."""

    upstream: str
    rules: list[Rule] = field(default_factory=list)
    seed: int = 0
    upload_bytes_per_second: float | None = None
    down: bool = False
    before: Callable[[str, str], None] = lambda method, path: None
    """Called before a request is passed on."""
    seen: dict[str, int] = field(default_factory=dict)

    def __enter__(self) -> FaultProxy:
        self._random = random.Random(self.seed)
        self._lock = threading.Lock()
        self._http = _Server(("127.0.0.1", 0), self)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def fate(self, method: str, path: str) -> Rule | None:
        """The first rule that strikes."""
        with self._lock:
            for rule in self.rules:
                if rule.times == 0 or not rule.match(method, path) or self._random.random() >= rule.probability:
                    continue
                if rule.times is not None:
                    rule.times -= 1
                self.count(rule.do.name)
                return rule
        return None

    def count(self, what: str) -> None:
        self.seen[what] = self.seen.get(what, 0) + 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], proxy: FaultProxy) -> None:
        self.proxy = proxy
        super().__init__(address, _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients go away all the time here."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        proxy = self.server.proxy
        body = self._body(proxy)
        if body is None or proxy.down:
            self._reset()
            return
        rule = proxy.fate(self.command, self.path)
        if rule is not None and rule.do is Do.RESET:
            self._reset()
            return
        if rule is not None and rule.do is Do.REFUSE:
            text = f"<Error><Code>{rule.code}</Code><Message>asked for by a test</Message></Error>".encode()
            self._answer(rule.status, [("Content-Type", "application/xml")], text)
            return
        if rule is not None and rule.do is Do.DELAY:
            time.sleep(rule.seconds)
        status, headers, data = self._forward(proxy.upstream, body)
        if rule is not None and rule.do is Do.LOSE_ANSWER:
            self._reset()
            return
        if rule is not None and rule.do is Do.FLIP and data:
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        if rule is not None and rule.do is Do.TRUNCATE:
            self._answer(status, headers, data, send=len(data) // 2)
            self._reset()
            return
        self._answer(status, headers, data)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    def _body(self, proxy: FaultProxy) -> bytes | None:
        """The request's body, no faster than the proxy's bandwidth."""
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        left = int(self.headers.get("Content-Length") or 0)
        parts: list[bytes] = []
        while left:
            if proxy.down:
                return None
            part = self.rfile.read(min(left, CHUNK))
            if not part:
                return None
            parts.append(part)
            left -= len(part)
            if proxy.upload_bytes_per_second:
                time.sleep(len(part) / proxy.upload_bytes_per_second)
        return b"".join(parts)

    def handle_expect_100(self) -> bool:
        """Answered in `_body`, after the rules had their say."""
        return True

    def _forward(self, upstream: str, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        line = http.client.HTTPConnection(urlsplit(upstream).netloc, timeout=60)
        try:
            headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection", "expect")}
            self.server.proxy.before(self.command, self.path)
            line.request(self.command, self.path, body=body, headers=headers)
            answer = line.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            line.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, *, send: int | None = None) -> None:
        self.server.proxy.count(f"{self.command} {status}")
        self.send_response_only(status)
        length = None
        for name, value in headers:
            if name.lower() == "content-length":
                length = value
            elif name.lower() not in ("transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if send is None else data[:send])

    def _reset(self) -> None:
        """Close hard: the client sees a reset, not an end."""
        self.close_connection = True
        try:
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it is gone already

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""
