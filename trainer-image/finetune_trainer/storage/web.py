"""A web server as a root that can be read: `https://host/path`, through requests.

It holds what somebody put there: objects at known addresses. There is no listing and no conditional creation, so a step or a
model that is named can be read and checked, and nothing else. Repeats are counted here and not by the library's own adapter:
one budget covers the connection, the answer and a body that breaks off, and the adapter would log whole addresses, whose query
may be a signature. The query of the root goes with every request and is in no message.
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

from finetune_trainer.storage.base import CHUNK_BYTES, Counter, Created, Stat
from finetune_trainer.storage.errors import of_local_disk

if TYPE_CHECKING:
    import requests

log = logging.getLogger(__name__)
READ = "write https://host/path"
WRITE = "write s3://bucket/prefix, pvc://claim/path or file:///path where something is to be written"
ATTEMPTS = 5
TIMEOUT_SECONDS = 30.0
"""To connect, and between two pieces of an answer."""
PAUSE_SECONDS = 1.0
"""Before the second try; it doubles with each one more."""
LONGEST_PAUSE_SECONDS = 60.0
"""The most that a server's Retry-After is waited for."""
PIECE_BYTES = 256 * 1024
"""What is read at once."""
BUSY = (429, 500, 502, 503, 504)
NO_HEAD = (403, 405, 501)
"""Answers to a HEAD where a GET may be allowed: an address that is signed is signed for one method."""


class WebStore:
    """Objects below `https://host/path[?query]`, to be read. Thread-safe: only the pool of connections is shared.

    Proxies and `.netrc` are taken from the environment as requests does it. Certificates: the system's, requests' own, and
    those of `ca_bundle` on top, since one root may be public and another one the house's.
    """

    def __init__(
        self, target: StoreTarget, *, attempts: int = ATTEMPTS, connect_timeout: float = TIMEOUT_SECONDS,
        read_timeout: float = TIMEOUT_SECONDS,
    ) -> None:  # fmt: skip
        self.target = target
        self._address, self._query = apart(target.uri)
        self.uri = self._address.rstrip("/")
        self.retries = 0
        self._attempts, self._timeout = max(1, attempts), (connect_timeout, read_timeout)
        self._lock = threading.Lock()
        _demand_readable(target.uri)
        self._adapter = _adapter(target.ca_bundle)

    # ---- reading ----

    def get(self, key: str) -> bytes | None:
        into = io.BytesIO()
        return into.getvalue() if self._bring(key, _Coming(into)) is not None else None

    def download(
        self, key: str, target: Path, *, count: Counter | None = None, room: Counter | None = None
    ) -> str | None:
        """`room` is told the size in bytes, where the server says it, before anything is written; the key "" is the root itself."""
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as writer:
                digest = self._bring(key, _Coming(writer, count, room))
            if digest is None:
                target.unlink()
        except OSError as error:  # whatever the connection says has a name by now
            raise of_local_disk(error) from error
        return digest

    def stat(self, key: str) -> Stat | None:
        def look() -> Stat | None:
            with self._ask("HEAD", key) as answer:
                if answer.status_code not in NO_HEAD:
                    return self._stat(key, answer)
            with self._ask("GET", key) as answer:
                return self._stat(key, answer)

        return self._patiently(key, look)

    def list(self, prefix: str) -> Iterator[Stat]:
        raise StorageSetupError(
            "StorageNotListable", f"{self.uri} cannot be listed: a web server does not tell what it holds",
            hint=f"name one checkpoint or the model: {self.uri}/checkpoints/step-00000100 or {self.uri}/model",
        )  # fmt: skip

    # ---- writing: refused ----

    def put_file(self, source: Path, key: str, *, count: Counter | None = None) -> None:
        self._refuse_writing("write", key)

    def put(self, key: str, data: bytes) -> None:
        self._refuse_writing("write", key)

    def create(self, key: str, data: bytes) -> Created:
        self._refuse_writing("create", key)

    def delete(self, keys: Iterable[str]) -> None:
        self._refuse_writing("delete", next(iter(keys), ""))

    def sweep(self, prefix: str) -> int:
        self._refuse_writing("sweep", prefix)

    def close(self) -> None:
        self._adapter.close()

    def _refuse_writing(self, what: str, key: str) -> NoReturn:
        raise StorageSetupError(
            "StorageReadOnly", f"cannot {what} {key} below {self.uri}: a web server has no conditional creation, so it is only read",
            hint=WRITE,
        )  # fmt: skip

    # ---- asking ----

    def _shown(self, key: str) -> str:
        return f"{self.uri}/{key}" if key else self.uri

    @contextlib.contextmanager
    def _ask(self, method: str, key: str, headers: dict[str, str] | None = None) -> Iterator[requests.Response]:
        """An answer whose body has not been read. Cookies are this request's own."""
        from finetune_trainer.storage.session import session_on

        url = (f"{self.uri}/{quote(key)}" if key else self._address) + self._query
        # The bytes that lie there, not packed for the way.
        own = {"User-Agent": "finetune-trainer", "Accept-Encoding": "identity"}
        session = session_on(self._adapter)
        answer = session.request(method, url, headers=own | (headers or {}), stream=True, timeout=self._timeout)
        try:
            yield answer
        finally:
            answer.close()

    def _stat(self, key: str, answer: requests.Response) -> Stat | None:
        if self._is_missing(key, answer):
            return None
        length = answer.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise StorageError("SizeUnknown", f"{self._shown(key)}: the server does not say how large it is")
        return Stat(key, int(length), _mark(answer))

    def _bring(self, key: str, coming: _Coming) -> str | None:
        """Read an object to where it is to go; returns its sha256, or None if there is none."""
        return self._patiently(key, lambda: self._bring_once(key, coming), lambda: coming.furthest)

    def _bring_once(self, key: str, coming: _Coming) -> str | None:
        with self._ask("GET", key, coming.rest()) as answer:
            if answer.status_code == 416 and coming.size:
                coming.begin()
                raise _Again(StorageError("DownloadBroken", f"{self._shown(key)} answers 416"))
            if self._is_missing(key, answer):
                return None
            coming.expect(answer)
            try:
                for chunk in answer.raw.stream(PIECE_BYTES, decode_content=False):
                    coming.take(chunk)
            except _broken() as error:
                raise self._broken_off(key, coming, error) from error
        return coming.digest.hexdigest()

    def _broken_off(self, key: str, coming: _Coming, error: Exception) -> _Again:
        cause = _innermost(error)
        if isinstance(cause, ssl.SSLError | TimeoutError | ConnectionError):
            return _Again(self._unreachable(cause))
        how = (
            f"ended after {coming.size} of {coming.total} bytes"
            if coming.total
            else f"broke off ({type(cause).__name__})"
        )
        return _Again(StorageError("DownloadBroken", f"{self._shown(key)} {how}"))

    def _is_missing(self, key: str, answer: requests.Response) -> bool:
        """True: there is no such object. Errors: `_Again` for a busy server; a named one for each other refusal."""
        status = answer.status_code
        said = f"{self._shown(key)} answers {status}"
        if status in BUSY:
            raise _Again(StorageError("DownloadFailed", said), _retry_after(answer))
        if status in (401, 403):
            raise CredentialsError(
                "PermissionDenied", said, hint="a server may say so of what is not there, too; let it be read there, or put it into S3"
            )  # fmt: skip
        if status >= 500:
            raise StorageError("DownloadFailed", said)
        if status >= 300 and status != 404:
            raise NotFoundError("ObjectNotFound", said)
        return status == 404

    def _patiently(self, key: str, ask: Callable[[], Any], progress: Callable[[], int] = lambda: 0) -> Any:
        """Ask again while the server is busy or the line breaks; what has come a good piece further begins to count anew."""
        tries, reached = 0, 0
        while True:
            try:
                return self._named(key, ask)
            except _Again as again:
                tries = 1 if progress() - reached >= CHUNK_BYTES else tries + 1
                reached = max(reached, progress())
                if tries >= self._attempts:
                    raise again.error from again
                pause = min(max(again.pause, PAUSE_SECONDS * 2 ** (tries - 1)), LONGEST_PAUSE_SECONDS)
                log.warning("asked again in %.0f s: %s", pause, again.error.message)
            with self._lock:
                self.retries += 1
            time.sleep(pause)

    def _named(self, key: str, ask: Callable[[], Any]) -> Any:
        """What requests raises, as `_Again` or by its name; `from None`, since its own text repeats the whole address."""
        from requests import exceptions as web
        from urllib3.exceptions import LocationParseError

        try:
            return ask()
        except (web.ConnectionError, web.Timeout) as error:
            cause = _innermost(error)
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise self._unreachable(cause) from None
            raise _Again(self._unreachable(cause)) from None
        except web.TooManyRedirects:
            raise StorageError("DownloadFailed", f"{self._shown(key)} is redirected without end") from None
        except (web.RequestException, LocationParseError, UnicodeError) as error:
            raise ConfigError(
                "SourceInvalid", f"{self._shown(key)} is no URL that can be asked for ({type(error).__name__})", hint=READ
            ) from None  # fmt: skip

    def _unreachable(self, cause: BaseException) -> StorageError:
        untrusted = isinstance(cause, ssl.SSLCertVerificationError)
        return StorageError(
            "EndpointUnreachable", f"{urlsplit(self.uri).netloc} could not be reached ({type(cause).__name__})",
            hint="its certificate is not signed by anybody this pod trusts, or is for another name: name the signer's in caBundleRef"
            if untrusted else "check the address, the network policy and the proxy",
        )  # fmt: skip


class _Again(Exception):
    """What may go away by itself: `error` is what to say if it does not, `pause` the seconds that the server asks for."""

    def __init__(self, error: FineTuneError, pause: float = 0) -> None:
        super().__init__(str(error))
        self.error, self.pause = error, pause


class _Coming:
    """An object on its way. After a break the rest is asked for, where the server says that it still has the same bytes."""

    def __init__(self, into: IO[bytes], count: Counter | None = None, room: Counter | None = None) -> None:
        self._into, self._count, self._room = into, count, room
        self.furthest = 0
        self.begin()

    def begin(self) -> None:
        """Nothing has come yet."""
        self._into.seek(0)
        self._into.truncate()
        self.digest = hashlib.sha256()
        self.size = self.total = 0
        self._mark = ""

    def rest(self) -> dict[str, str]:
        """Headers that ask for what is still to come, unless the object has changed."""
        return {"Range": f"bytes={self.size}-", "If-Range": f'"{self._mark}"'} if self.size and self._mark else {}

    def expect(self, answer: requests.Response) -> None:
        """An answer has begun: the rest, or all of it from the beginning."""
        if answer.status_code == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {self.size}-"):
            self.begin()
            raise _Again(
                StorageError(
                    "DownloadBroken", f"{redact_source(answer.url)} answers with another range than was asked for"
                )
            )
        if answer.status_code != 206:
            self.begin()
        self._mark = _mark(answer)
        length = answer.headers.get("Content-Length", "")
        self.total = self.size + int(length) if length.isdecimal() else 0
        if self._room and not self.size:
            self._room(self.total)

    def take(self, chunk: bytes) -> None:
        """Bytes came."""
        self._into.write(chunk)
        self.digest.update(chunk)
        self.size += len(chunk)
        self.furthest = max(self.furthest, self.size)
        if self._count:
            self._count(len(chunk))


def apart(uri: str) -> tuple[str, str]:
    """Address, and query with its question mark (empty if there is none). Only web addresses have one."""
    if not uri.startswith("https://"):
        return uri, ""
    address, mark, query = uri.partition("#")[0].partition("?")
    return address, mark + query


def _demand_readable(uri: str) -> None:
    """Errors: ConfigError `SourceInvalid` for what is no address, or carries a password."""
    try:
        parts = urlsplit(uri)
        whole, secret = bool(parts.hostname) and parts.port != 0, bool(parts.username or parts.password)
    except ValueError:
        whole, secret = False, False
    if not whole:
        raise ConfigError("SourceInvalid", f"{redact_source(uri)} is no URL that can be asked for", hint=READ)
    if secret:
        raise ConfigError(
            "SourceInvalid", f"{redact_source(uri)} is given with a user or password, which would be shown to everybody who may read it",
            hint="write it without",
        )  # fmt: skip


def _adapter(ca_bundle: str | None) -> Any:
    """Connections that are kept. Errors: StorageSetupError `TlsFailed` if the bundle cannot be read."""
    from finetune_trainer.storage.session import Adapter

    logging.getLogger("urllib3.connectionpool").addFilter(_without_query)
    context = ssl.create_default_context()
    try:
        if ca_bundle:
            context.load_verify_locations(ca_bundle)
    except OSError as error:  # SSLError among them
        raise StorageSetupError(
            "TlsFailed", f"the CA bundle {ca_bundle} cannot be read", hint="check caBundleRef, or --ca-bundle"
        ) from error

    return Adapter(context)


def _without_query(record: logging.LogRecord) -> bool:
    """Cut the queries out of what urllib3 logs: whole addresses, here and there."""
    record.msg, record.args = re.sub(r"\?\S*", "", record.getMessage()), ()
    return True


def _broken() -> tuple[type[Exception], ...]:
    from urllib3 import exceptions as pool

    return pool.ProtocolError, pool.TimeoutError, pool.SSLError


def _innermost(error: BaseException) -> BaseException:
    """What is behind the exceptions that wrap one another."""
    for _ in range(8):
        behind = (getattr(error, "reason", None), error.__cause__, *error.args)
        inner = next((one for one in behind if isinstance(one, BaseException)), None)
        if inner is None:
            break
        error = inner
    return error


def _mark(answer: requests.Response) -> str:
    """The ETag, if it stands for the very bytes."""
    tag = str(answer.headers.get("ETag", ""))
    return tag[1:-1] if len(tag) > 2 and tag[0] == tag[-1] == '"' else ""


def _retry_after(answer: requests.Response) -> float:
    """Seconds that the server asks to wait; 0 if it says nothing that can be understood."""
    from urllib3 import exceptions as pool
    from urllib3.util.retry import Retry

    try:
        return float(Retry().get_retry_after(answer.raw) or 0)
    except pool.InvalidHeader:
        return 0
