"""An OpenAI-compatible endpoint on a free loopback port, whose answers a test chooses."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Any, dict[str, str]]
"""Status, body and headers of a response. A body that is not a text is sent as JSON."""


def make_chat_reply(content: str | None, *, input_tokens: int = 100, output_tokens: int = 10, reports_usage: bool = True) -> Reply:
    """Return a chat completion with this content."""
    body: dict[str, Any] = {
        "id": "1", "object": "chat.completion", "created": 0, "model": "judge",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}],
    }  # fmt: skip
    if reports_usage:
        body["usage"] = {"prompt_tokens": input_tokens, "completion_tokens": output_tokens, "total_tokens": input_tokens + output_tokens}
    return 200, body, {}


def make_embedding_reply(vectors: list[list[float]], *, input_tokens: int = 7) -> Reply:
    """Return an embeddings response. The vectors are in reverse order, which the protocol allows."""
    data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)]
    return 200, {"object": "list", "model": "e", "data": data[::-1], "usage": {"prompt_tokens": input_tokens, "total_tokens": input_tokens}}, {}


def make_error_reply(status: int, message: str, *, code: str | None = None, param: str | None = None) -> Reply:
    """Return an error response after which clients may repeat the request in a millisecond."""
    return status, {"error": {"message": message, "code": code, "param": param, "type": "error"}}, {"retry-after-ms": "1"}


class StubJudge(ThreadingHTTPServer):
    """Answers each request with the result of `answer(path, request body)` and records it."""

    daemon_threads = True

    def __init__(self) -> None:
        self.answer: Callable[[str, dict[str, Any]], Reply] = lambda path, body: make_error_reply(500, "no answer is set")
        self.requests: list[tuple[str, dict[str, Any], str | None]] = []
        super().__init__(("127.0.0.1", 0), _Handler)
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StubJudge

    def do_POST(self) -> None:  # noqa: N802  the name that http.server calls
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, request, self.headers.get("Authorization")))
        status, body, headers = self.server.answer(self.path, request)
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass
