"""The few API calls that starting a cluster needs, without a client library's start-up time."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class ApiError(Exception):
    """The API server answered with an error; `status` is the HTTP code, 0 if it could not be reached."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


@dataclass(frozen=True)
class Endpoint:
    """A running API server: `kubeconfig` is a file with administrator rights, `ca` the certificate to verify it by."""

    kubeconfig: Path
    server: str
    token: str
    ca: Path

    def request(self, method: str, path: str, body: Any = None, *, content_type: str = "application/json") -> Any:
        """One call; the answer's JSON, or its text if it is none. ApiError for an error status or no answer."""
        request = urllib.request.Request(self.server + path, method=method)
        request.add_header("Authorization", f"Bearer {self.token}")
        request.add_header("Content-Type", content_type)
        data = None if body is None else json.dumps(body).encode()
        try:
            context = ssl.create_default_context(cafile=str(self.ca))
            direct = urllib.request.build_opener(
                urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
            )
            with direct.open(request, data=data, timeout=10) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            raise ApiError(error.code, error.read().decode(errors="replace")[:500]) from None
        except OSError as error:
            raise ApiError(0, str(error)) from None
        return json.loads(text) if text.startswith(("{", "[")) else text

    def get(self, path: str) -> Any:
        """See request."""
        return self.request("GET", path)

    def apply(self, path: str, manifest: Any) -> Any:
        """Server-side apply of one object as field manager `localcluster`."""
        query = "?fieldManager=localcluster&force=true"
        return self.request("PATCH", path + query, manifest, content_type="application/apply-patch+yaml")

    def ready(self) -> bool:
        """Whether the API server says that it is ready."""
        try:
            return bool(self.get("/readyz") == "ok")
        except ApiError:
            return False

    def exists(self, path: str) -> bool:
        """Whether there is an object at `path`."""
        try:
            self.get(path)
        except ApiError:
            return False
        return True
