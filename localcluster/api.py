"""A minimal Kubernetes API client for starting a cluster. This module imports faster than the official client library."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class ApiError(Exception):
    """A request to the API server failed. `status` is the HTTP status code; 0 if the server did not answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


@dataclass(frozen=True)
class Endpoint:
    """A running API server. `kubeconfig` has administrator rights; clients verify the server with the certificate `ca`."""

    kubeconfig: Path
    server: str
    token: str
    ca: Path

    def request(self, method: str, path: str, body: Any = None, *, content_type: str = "application/json") -> Any:
        """Send one request. Returns the parsed JSON of the response, or its text if it is not JSON. Errors: ApiError."""
        request = urllib.request.Request(self.server + path, method=method)
        request.add_header("Authorization", f"Bearer {self.token}")
        request.add_header("Content-Type", content_type)
        encoded_body = None if body is None else json.dumps(body).encode()
        try:
            ssl_context = ssl.create_default_context(cafile=str(self.ca))
            opener = urllib.request.build_opener(
                urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=ssl_context)
            )
            with opener.open(request, data=encoded_body, timeout=10) as response:
                response_text = response.read().decode()
        except urllib.error.HTTPError as error:
            raise ApiError(error.code, error.read().decode(errors="replace")[:500]) from None
        except OSError as error:
            raise ApiError(0, str(error)) from None
        return json.loads(response_text) if response_text.startswith(("{", "[")) else response_text

    def get(self, path: str) -> Any:
        return self.request("GET", path)

    def apply(self, path: str, manifest: Any) -> Any:
        """Apply one object (server-side apply) as field manager `localcluster`."""
        query = "?fieldManager=localcluster&force=true"
        return self.request("PATCH", path + query, manifest, content_type="application/apply-patch+yaml")

    def is_ready(self) -> bool:
        """Whether `/readyz` succeeds."""
        try:
            return bool(self.get("/readyz") == "ok")
        except ApiError:
            return False

    def exists(self, path: str) -> bool:
        """Whether a GET request for this URL path succeeds."""
        try:
            self.get(path)
        except ApiError:
            return False
        return True
