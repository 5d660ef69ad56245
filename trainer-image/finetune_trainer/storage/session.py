"""What we ask of requests: certificates on top of its own, no repeats behind our back, no way out of TLS.

A module of its own, since it is imported only where something is read from the web.
"""

from __future__ import annotations

import ssl
from typing import Any
from urllib.parse import urlsplit

import requests
from finetune_api.errors import StorageSetupError
from finetune_api.sources import redact_source
from requests.adapters import HTTPAdapter


class Adapter(HTTPAdapter):
    """Connections that are kept, to the server or through a proxy, with `context` beside requests' own certificates."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        super().__init__(max_retries=0)

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, ssl_context=self._context, **options)

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        return super().proxy_manager_for(proxy, ssl_context=self._context, **options)

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
        """Errors: StorageSetupError `TlsFailed` for a variable that names a file which is not there."""
        try:
            super().cert_verify(conn, url, verify, cert)
        except OSError as error:
            raise StorageSetupError(
                "TlsFailed", f"the CA bundle {verify} cannot be read", hint="correct or remove REQUESTS_CA_BUNDLE"
            ) from error


class Session(requests.Session):
    """Follows redirects, but never to where an answer can be changed on its way."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """Errors: StorageSetupError `RedirectRefused`."""
        target = super().get_redirect_target(resp)
        parts = urlsplit(target or "")
        if parts.scheme not in ("", "https"):
            raise StorageSetupError(
                "RedirectRefused", f"{redact_source(resp.url)} is redirected to {parts.scheme}://{parts.hostname}, and what comes from "
                "there can be changed on its way",
                hint="write the https address that it really has",
            )  # fmt: skip
        return target


def session_on(adapter: Adapter) -> Session:
    """A session for one request: its cookies are nobody else's, its connections the adapter's."""
    session = Session()
    session.mount("https://", adapter)
    return session
