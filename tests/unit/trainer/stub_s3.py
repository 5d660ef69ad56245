"""A server that answers requests with an S3 error, in the format of a real store."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextlib.contextmanager
def serve_error(status: int, code: str, *, failing_method: str | None = None, message: str = "no") -> Iterator[str]:
    """Serve an S3 error for the HTTP method `failing_method` (default: all methods), and an empty listing for other methods. Yields the URL."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            is_refused = failing_method is None or self.command == failing_method
            body = (
                f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
                if is_refused
                else "<ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>"
            ).encode()
            self.send_response(status if is_refused else 200)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
