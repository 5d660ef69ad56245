"""A read-only store on a web server: `https://host/path`, accessed with the requests library.

A web server has no listing, so only a checkpoint or model with a known address can be read.
This module retries requests itself, so that one limit covers failed connections, busy servers and interrupted bodies. If the requests library retried,
it would also log the query of the URL, which may contain a signature. The query of the store's URI is sent with every request and never appears in a message.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn
from urllib.parse import quote, urlsplit

from finetune_api.errors import (
    ConfigError,
    CredentialsError,
    FineTuneError,
    NotFoundError,
    StorageError,
    StorageSetupError,
)
from finetune_api.pod import StoreTarget
from finetune_api.sources import redact_source

from finetune_trainer.addresses import refuse_metadata_address
from finetune_trainer.storage.base import CHUNK_BYTES, ByteCounter, CreateResult, ObjectStat
from finetune_trainer.storage.errors import local_disk_error

if TYPE_CHECKING:
    import requests

log = logging.getLogger(__name__)
URL_HINT = "write https://host/path"
WRITE_HINT = "write s3://bucket/prefix, pvc://claim/path or file:///path for a store that is written to"
MAX_TRIES = 5
TIMEOUT_SECONDS = 30.0
"""Time limit for opening a connection, and for the pause between two chunks of a response."""
FIRST_PAUSE_SECONDS = 1.0
"""Pause before the first retry. The pause doubles with each further retry."""
MAX_PAUSE_SECONDS = 60.0
"""Maximum pause before a retry, even if the server's Retry-After asks for a longer pause."""
READ_BYTES = 256 * 1024
RETRIED_STATUS_CODES = (429, 500, 502, 503, 504)
HEAD_REFUSED_STATUS_CODES = (403, 405, 501)
"""HTTP statuses with which HEAD may fail although GET succeeds, for example because a signed URL is valid only for GET."""


class WebStore:
    """Objects below `https://host/path[?query]`, read-only. Thread-safe: requests share only the connection pool.

    The requests library takes proxies and `.netrc` from the environment. The store trusts the CA certificates of the system, of the
    requests library and of `ca_bundle`, because some servers are public and others internal.
    """

    def __init__(
        self, target: StoreTarget, *, max_tries: int = MAX_TRIES, connect_timeout: float = TIMEOUT_SECONDS,
        read_timeout: float = TIMEOUT_SECONDS,
    ) -> None:  # fmt: skip
        self.target = target
        self._address, self._query = split_query(target.uri)
        self.uri = self._address.rstrip("/")
        self.retries = 0
        self._max_tries, self._timeout = max(1, max_tries), (connect_timeout, read_timeout)
        self._lock = threading.Lock()
        _check_url(target.uri)
        refuse_metadata_address(self._address, self.uri)
        self._http_adapter = _create_http_adapter(target.ca_bundle)

    # ---- reading ----

    def get(self, key: str) -> bytes | None:
        buffer = io.BytesIO()
        return buffer.getvalue() if self._download(key, _Download(buffer)) is not None else None

    def download(
        self, key: str, target_file: Path, *, byte_counter: ByteCounter | None = None, check_space: ByteCounter | None = None
    ) -> str | None:
        """Download an object. The key "" names the object at the store's URI itself.

        Before the first write, `check_space` is called with the object's size in bytes (0 if the server does not report the size).
        """
        try:
            target_file.parent.mkdir(parents=True, exist_ok=True)
            with target_file.open("wb") as writer:
                digest = self._download(key, _Download(writer, byte_counter, check_space))
            if digest is None:
                target_file.unlink()
        except OSError as error:  # The error concerns the local file, because errors of the connection are FineTuneErrors.
            raise local_disk_error(error) from error
        return digest

    def stat(self, key: str) -> ObjectStat | None:
        def request_stat() -> ObjectStat | None:
            with self._request("HEAD", key) as response:
                if response.status_code not in HEAD_REFUSED_STATUS_CODES:
                    return self._read_stat(key, response)
            with self._request("GET", key) as response:
                return self._read_stat(key, response)

        return self._send_with_retries(key, request_stat)

    def list(self, key_prefix: str) -> Iterator[ObjectStat]:
        raise self._build_not_listable_error()

    def _build_not_listable_error(self) -> StorageSetupError:
        return StorageSetupError(
            "StorageNotListable", f"{self.uri} cannot be listed: a web server has no listing",
            hint=f"write the URI of one checkpoint or of the model: {self.uri}/checkpoints/step-00000100 or {self.uri}/model",
        )  # fmt: skip

    def list_folders(self) -> tuple[str, ...]:
        raise self._build_not_listable_error()

    # ---- writing: refused ----

    def put_file(self, source_file: Path, key: str, *, byte_counter: ByteCounter | None = None) -> None:
        self._refuse_writing("write", key)

    def put(self, key: str, data: bytes) -> None:
        self._refuse_writing("write", key)

    def create(self, key: str, data: bytes) -> CreateResult:
        self._refuse_writing("create", key)

    def delete(self, keys: Iterable[str]) -> None:
        self._refuse_writing("delete", next(iter(keys), ""))

    def sweep(self, key_prefix: str) -> int:
        self._refuse_writing("sweep", key_prefix)

    def close(self) -> None:
        self._http_adapter.close()

    def _refuse_writing(self, action: str, key: str) -> NoReturn:
        raise StorageSetupError(
            "StorageReadOnly", f"cannot {action} {key} below {self.uri}: a web server is read-only, because it has no conditional creation",
            hint=WRITE_HINT,
        )  # fmt: skip

    # ---- requests ----

    def _build_uri_without_query(self, key: str) -> str:
        return f"{self.uri}/{key}" if key else self.uri

    @contextlib.contextmanager
    def _request(self, method: str, key: str, headers: dict[str, str] | None = None) -> Iterator[requests.Response]:
        """Send a request and yield the response before its body is read. Requests share no cookies."""
        from finetune_trainer.storage.session import create_session

        url = (f"{self.uri}/{quote(key)}" if key else self._address) + self._query
        # `identity` means that the server must send the stored bytes without compression.
        default_headers = {"User-Agent": "finetune-trainer", "Accept-Encoding": "identity"}
        session = create_session(self._http_adapter)
        response = session.request(method, url, headers=default_headers | (headers or {}), stream=True, timeout=self._timeout)
        try:
            yield response
        finally:
            response.close()

    def _read_stat(self, key: str, response: requests.Response) -> ObjectStat | None:
        if self._is_missing(key, response):
            return None
        length = response.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise StorageError("SizeUnknown", f"{self._build_uri_without_query(key)}: the server does not report its size")
        return ObjectStat(key, int(length), _read_strong_etag(response))

    def _download(self, key: str, download: _Download) -> str | None:
        """Download an object; returns its sha256, or None if it does not exist."""
        return self._send_with_retries(key, lambda: self._try_download(key, download), lambda: download.max_received_bytes)

    def _try_download(self, key: str, download: _Download) -> str | None:
        with self._request("GET", key, download.build_range_headers()) as response:
            if response.status_code == 416 and download.received_bytes:
                download.restart()
                raise _RetryableError(StorageError("DownloadBroken", f"{self._build_uri_without_query(key)} answers 416"))
            if self._is_missing(key, response):
                return None
            download.start_response(response)
            try:
                for chunk in response.raw.stream(READ_BYTES, decode_content=False):
                    download.write(chunk)
            except _get_stream_error_types() as error:
                raise self._build_interrupted_error(key, download, error) from error
        return download.digest.hexdigest()

    def _build_interrupted_error(self, key: str, download: _Download, error: Exception) -> _RetryableError:
        cause = _find_innermost_cause(error)
        if isinstance(cause, ssl.SSLError | TimeoutError | ConnectionError):
            return _RetryableError(self._build_unreachable_error(cause))
        problem = (
            f"ended after {download.received_bytes} of {download.total_bytes} bytes"
            if download.total_bytes
            else f"was interrupted ({type(cause).__name__})"
        )
        return _RetryableError(StorageError("DownloadBroken", f"{self._build_uri_without_query(key)} {problem}"))

    def _is_missing(self, key: str, response: requests.Response) -> bool:
        """Whether the response says that the object does not exist.

        Errors: `_RetryableError` if the server is busy, a FineTuneError if it refuses the request.
        """
        status = response.status_code
        message = f"{self._build_uri_without_query(key)} answers {status}"
        if status in RETRIED_STATUS_CODES:
            raise _RetryableError(StorageError("DownloadFailed", message), _read_retry_after_seconds(response))
        if status in (401, 403):
            raise CredentialsError(
                "PermissionDenied", message, hint="allow reading the file, or copy it to S3; some servers also respond like this if the file does not exist"
            )  # fmt: skip
        if status >= 500:
            raise StorageError("DownloadFailed", message)
        if status >= 300 and status != 404:
            raise NotFoundError("ObjectNotFound", message)
        return status == 404

    def _send_with_retries(self, key: str, send_request: Callable[[], Any], count_received_bytes: Callable[[], int] = lambda: 0) -> Any:
        """Send a request, and retry while the server is busy or the connection breaks.

        `count_received_bytes` returns the number of received bytes. After every `CHUNK_BYTES` that were received, the count of tries starts again at 1.
        """
        try_count, reached_bytes = 0, 0
        while True:
            try:
                return self._translate_errors(key, send_request)
            except _RetryableError as failure:
                try_count = 1 if count_received_bytes() - reached_bytes >= CHUNK_BYTES else try_count + 1
                reached_bytes = max(reached_bytes, count_received_bytes())
                if try_count >= self._max_tries:
                    raise failure.error from failure
                pause_seconds = min(max(failure.pause_seconds, FIRST_PAUSE_SECONDS * 2 ** (try_count - 1)), MAX_PAUSE_SECONDS)
                log.warning("retry in %.0f s: %s", pause_seconds, failure.error.message)
            with self._lock:
                self.retries += 1
            time.sleep(pause_seconds)

    def _translate_errors(self, key: str, send_request: Callable[[], Any]) -> Any:
        """Convert exceptions of the requests library to FineTuneErrors.

        `from None` hides the texts of these exceptions, because the texts contain the URL with its query.
        """
        from requests import exceptions as requests_errors
        from urllib3.exceptions import LocationParseError

        try:
            return send_request()
        except (requests_errors.ConnectionError, requests_errors.Timeout) as error:
            cause = _find_innermost_cause(error)
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise self._build_unreachable_error(cause) from None
            raise _RetryableError(self._build_unreachable_error(cause)) from None
        except requests_errors.TooManyRedirects:
            raise StorageError("DownloadFailed", f"{self._build_uri_without_query(key)} is redirected endlessly") from None
        except (requests_errors.RequestException, LocationParseError, UnicodeError) as error:
            raise ConfigError(
                "SourceInvalid", f"{self._build_uri_without_query(key)} is not a valid URL ({type(error).__name__})", hint=URL_HINT
            ) from None  # fmt: skip

    def _build_unreachable_error(self, cause: BaseException) -> StorageError:
        is_untrusted_certificate = isinstance(cause, ssl.SSLCertVerificationError)
        return StorageError(
            "EndpointUnreachable", f"{urlsplit(self.uri).netloc} could not be reached ({type(cause).__name__})",
            hint="the server's certificate is for another name, or this pod does not trust its CA: write the CA's certificate in caBundleRef"
            if is_untrusted_certificate else "check the address, the network policy and the proxy",
        )  # fmt: skip


class _RetryableError(Exception):
    """A failure that a retry may fix. `error`: the error that is raised after the last try. `pause_seconds`: the server's Retry-After in seconds."""

    def __init__(self, error: FineTuneError, pause_seconds: float = 0) -> None:
        super().__init__(str(error))
        self.error, self.pause_seconds = error, pause_seconds


class _Download:
    """A download that continues after an interruption if the server's ETag shows that the object is still the same."""

    def __init__(self, file: IO[bytes], byte_counter: ByteCounter | None = None, check_space: ByteCounter | None = None) -> None:
        self._file, self._byte_counter, self._check_space = file, byte_counter, check_space
        self.max_received_bytes = 0
        """The largest number of bytes received so far, including bytes before a restart."""
        self.restart()

    def restart(self) -> None:
        """Empty the file and download the object from its first byte."""
        self._file.seek(0)
        self._file.truncate()
        self.digest = hashlib.sha256()
        self.received_bytes = self.total_bytes = 0
        self._etag = ""

    def build_range_headers(self) -> dict[str, str]:
        """Return headers that request only the missing bytes, on condition that the object has not changed."""
        return {"Range": f"bytes={self.received_bytes}-", "If-Range": f'"{self._etag}"'} if self.received_bytes and self._etag else {}

    def start_response(self, response: requests.Response) -> None:
        """Prepare for the body of a response. The body holds the missing bytes or the whole object."""
        if response.status_code == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {self.received_bytes}-"):
            self.restart()
            raise _RetryableError(
                StorageError(
                    "DownloadBroken", f"{redact_source(response.url)} responds with another byte range than requested"
                )
            )
        if response.status_code != 206:
            self.restart()
        self._etag = _read_strong_etag(response)
        length = response.headers.get("Content-Length", "")
        self.total_bytes = self.received_bytes + int(length) if length.isdecimal() else 0
        if self._check_space and not self.received_bytes:
            self._check_space(self.total_bytes)

    def write(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self.digest.update(chunk)
        self.received_bytes += len(chunk)
        self.max_received_bytes = max(self.max_received_bytes, self.received_bytes)
        if self._byte_counter:
            self._byte_counter(len(chunk))


def split_query(uri: str) -> tuple[str, str]:
    """Split a URI into address and query. The query includes its question mark, and is empty unless the URI begins with https://."""
    if not uri.startswith("https://"):
        return uri, ""
    address, question_mark, query = uri.partition("#")[0].partition("?")
    return address, question_mark + query


def _check_url(uri: str) -> None:
    """Check a URL. Errors: ConfigError `SourceInvalid` if the URL is invalid or contains a password."""
    try:
        url_parts = urlsplit(uri)
        is_valid, has_credentials = bool(url_parts.hostname) and url_parts.port != 0, bool(url_parts.username or url_parts.password)
    except ValueError:
        is_valid, has_credentials = False, False
    if not is_valid:
        raise ConfigError("SourceInvalid", f"{redact_source(uri)} is not a valid URL", hint=URL_HINT)
    if has_credentials:
        raise ConfigError(
            "SourceInvalid", f"{redact_source(uri)} contains a user or password; everyone who can read the job could see them",
            hint="remove user and password from the URL",
        )  # fmt: skip


def _create_http_adapter(ca_bundle: str | None) -> Any:
    """Create a connection pool. Errors: StorageSetupError `TlsFailed` if the CA bundle cannot be read."""
    from finetune_trainer.storage.session import CaTrustingAdapter

    logging.getLogger("urllib3.connectionpool").addFilter(_remove_queries)
    context = ssl.create_default_context()
    try:
        if ca_bundle:
            context.load_verify_locations(ca_bundle)
    except OSError as error:  # SSLError is an OSError.
        raise StorageSetupError(
            "TlsFailed", f"the CA bundle {ca_bundle} cannot be read", hint="check caBundleRef, or --ca-bundle"
        ) from error

    return CaTrustingAdapter(context)


def _remove_queries(record: logging.LogRecord) -> bool:
    """Remove the query from each URL in a log record of urllib3. Returns True, so that the record is logged."""
    record.msg, record.args = re.sub(r"\?\S*", "", record.getMessage()), ()
    return True


def _get_stream_error_types() -> tuple[type[Exception], ...]:
    from urllib3 import exceptions as urllib3_errors

    return urllib3_errors.ProtocolError, urllib3_errors.TimeoutError, urllib3_errors.SSLError


def _find_innermost_cause(error: BaseException) -> BaseException:
    """Return the innermost exception of a chain in which each exception wraps the next."""
    for _ in range(8):
        causes = (getattr(error, "reason", None), error.__cause__, *error.args)
        inner_cause = next((cause for cause in causes if isinstance(cause, BaseException)), None)
        if inner_cause is None:
            break
        error = inner_cause
    return error


def _read_strong_etag(response: requests.Response) -> str:
    """Return the ETag if it is strong (identifies the exact bytes), else an empty string."""
    tag = str(response.headers.get("ETag", ""))
    return tag[1:-1] if len(tag) > 2 and tag[0] == tag[-1] == '"' else ""


def _read_retry_after_seconds(response: requests.Response) -> float:
    """Return how many seconds the Retry-After header asks the client to wait, or 0 if the header is missing or invalid."""
    from urllib3 import exceptions as urllib3_errors
    from urllib3.util.retry import Retry

    try:
        return float(Retry().get_retry_after(response.raw) or 0)
    except urllib3_errors.InvalidHeader:
        return 0
