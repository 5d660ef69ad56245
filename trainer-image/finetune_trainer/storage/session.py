"""An HTTP session of the requests library with additional CA certificates. The session does not retry, and it refuses redirects from https to http.

This is a separate module, so that only jobs that read from a web server import the requests library.
"""

from __future__ import annotations

import ssl
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
from finetune_api.errors import StorageSetupError
from finetune_api.sources import redact_source
from requests.adapters import HTTPAdapter

from finetune_trainer.addresses import refuse_metadata_address


class CaTrustingAdapter(HTTPAdapter):
    """A pool of direct or proxied connections that trusts the CA certificates of `context` and of the requests library."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        super().__init__(max_retries=0)

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, ssl_context=self._context, **options)

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        return super().proxy_manager_for(proxy, ssl_context=self._context, **options)

    def cert_verify(self, conn: Any, url: str, verify: Any, cert: Any) -> None:
        """Set the certificates that verify the server. Errors: StorageSetupError `TlsFailed` if REQUESTS_CA_BUNDLE names a file that does not exist."""
        try:
            super().cert_verify(conn, url, verify, cert)
        except OSError as error:
            raise StorageSetupError(
                "TlsFailed", f"the CA bundle {verify} cannot be read", hint="correct or remove REQUESTS_CA_BUNDLE"
            ) from error


class Session(requests.Session):
    """A session that follows redirects only to https, because a response without TLS could be modified in transit."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """Return the target of a redirect. Errors: StorageSetupError `RedirectRefused` if the target has no TLS; ConfigError `AddressForbidden`."""
        target = super().get_redirect_target(resp)
        target_parts = urlsplit(target or "")
        if target_parts.scheme not in ("", "https"):
            raise StorageSetupError(
                "RedirectRefused", f"{redact_source(resp.url)} is redirected to {target_parts.scheme}://{target_parts.hostname}, but without TLS "
                "a response can be modified in transit",
                hint="write the https address of the redirect's target",
            )  # fmt: skip
        if target:
            refuse_metadata_address(urljoin(resp.url, target), f"the redirect of {redact_source(resp.url)}")
        return target


def create_session(http_adapter: CaTrustingAdapter) -> Session:
    """Create a session for one request. The session has its own cookies, but shares the connections of `http_adapter`."""
    session = Session()
    session.mount("https://", http_adapter)
    return session
