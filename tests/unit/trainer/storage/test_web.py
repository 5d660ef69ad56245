"""A web server as a read-only store: retries and refusals. No message may contain the query of a URL. The tests run a real server."""

from __future__ import annotations

import hashlib
import logging
import socket
import threading
import traceback
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from finetune_api.errors import FineTuneError
from finetune_api.pod import StoreTarget
from finetune_trainer.storage.base import ObjectStat
from finetune_trainer.storage.preflight import preflight
from finetune_trainer.storage.roots import open_store
from finetune_trainer.storage.web import MAX_PAUSE_SECONDS, MAX_TRIES, READ_BYTES, WebStore
from web_server import Fault, WebServer

SECRET_QUERY = "?X-Amz-Signature=hidden-word"
BODY = bytes(range(256)) * 4 * (READ_BYTES // 1024) * 3
"""The content of a file whose size is three times READ_BYTES."""


@pytest.fixture
def store(server: WebServer) -> WebStore:
    (server.folder / "a b").mkdir()
    (server.folder / "a b/weights").write_bytes(BODY)
    web_store = open_store(StoreTarget(uri=f"{server.url}/a b{SECRET_QUERY}", ca_bundle=server.ca))
    assert isinstance(web_store, WebStore)
    return web_store


def catch_download_error(store: WebStore, target: Path, key: str = "weights") -> FineTuneError:
    with pytest.raises(FineTuneError) as caught:
        store.download(key, target)
    assert "hidden-word" not in str(caught.value)
    assert "hidden-word" not in "".join(traceback.format_exception(caught.value))
    return caught.value


def test_a_download_returns_the_sha256_of_the_object(store: WebStore, server: WebServer, tmp_path: Path) -> None:
    chunk_sizes: list[int] = []
    sha256 = store.download("weights", tmp_path / "deep/weights", byte_counter=chunk_sizes.append)
    assert sha256 == hashlib.sha256(BODY).hexdigest() and sum(chunk_sizes) == len(BODY)
    assert (tmp_path / "deep/weights").read_bytes() == BODY == store.get("weights")
    assert store.stat("weights") == ObjectStat("weights", len(BODY), sha256[:12])
    assert server.requests[0] == f"GET /a%20b/weights{SECRET_QUERY}" and store.uri == f"{server.url}/a b"
    assert store.retries == 0


def test_a_missing_object_gives_none(store: WebStore, tmp_path: Path) -> None:
    results = store.get("nothing"), store.stat("nothing"), store.download("nothing", tmp_path / "nothing")
    assert results == (None, None, None) and not (tmp_path / "nothing").exists()


def test_stat_uses_get_if_head_is_refused(store: WebStore, server: WebServer) -> None:
    server.faults = [Fault(403)]
    object_stat = store.stat("weights")
    assert object_stat is not None and object_stat.size == len(BODY)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_server_is_retried(
    store: WebStore, server: WebServer, pauses: list[float], tmp_path: Path, status: int
) -> None:
    server.faults = [Fault(status), Fault(status)]
    assert store.download("weights", tmp_path / "weights") == hashlib.sha256(BODY).hexdigest()
    assert (store.retries, pauses) == (2, [1.0, 2.0])


def test_a_server_that_stays_busy_fails_after_all_tries(
    store: WebStore, server: WebServer, pauses: list[float], tmp_path: Path
) -> None:
    server.faults = [Fault(503)] * MAX_TRIES
    error = catch_download_error(store, tmp_path / "weights")
    assert (error.exit_code, error.code, len(pauses)) == (69, "DownloadFailed", MAX_TRIES - 1)
    assert error.message == f"{server.url}/a b/weights answers 503"


@pytest.mark.parametrize(
    ("retry_after", "expected_pause"),
    [("7", 7.0), ("86400", MAX_PAUSE_SECONDS), (formatdate(0), 1.0), ("soon", 1.0)],
)
def test_the_retry_after_header_is_followed(
    store: WebStore, server: WebServer, pauses: list[float], retry_after: str, expected_pause: float
) -> None:
    server.faults = [Fault(429, {"Retry-After": retry_after})]
    assert store.get("weights") == BODY and pauses == [expected_pause]


def test_an_interrupted_download_continues(store: WebStore, server: WebServer, tmp_path: Path) -> None:
    server.faults = [Fault(cut_bytes=READ_BYTES + 5), Fault(cut_bytes=7)]
    assert store.download("weights", tmp_path / "weights") == hashlib.sha256(BODY).hexdigest()
    ranges = [line.partition("hidden-word ")[2] for line in server.requests]
    assert ranges == ["", f"bytes={READ_BYTES + 5}-", f"bytes={READ_BYTES + 12}-"]
    assert (tmp_path / "weights").read_bytes() == BODY


@pytest.mark.parametrize("change", ["no ranges", "another body", "another range"])
def test_an_interrupted_download_that_cannot_continue_restarts(
    store: WebStore, server: WebServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: str
) -> None:
    new_body = BODY[::-1] if change == "another body" else BODY
    server.serves_ranges = change != "no ranges"
    server.faults = [Fault(cut_bytes=READ_BYTES + 5)]
    if change == "another range":
        server.faults.append(Fault(206, {"Content-Range": "bytes 5-9/10"}))

    def replace_object(_: float) -> None:
        (server.folder / "a b/weights").write_bytes(new_body)

    monkeypatch.setattr("finetune_trainer.storage.web.time.sleep", replace_object)
    assert store.download("weights", tmp_path / "weights") == hashlib.sha256(new_body).hexdigest()
    assert (tmp_path / "weights").read_bytes() == new_body


def test_a_download_that_is_always_interrupted_fails(store: WebStore, server: WebServer, tmp_path: Path) -> None:
    server.serves_ranges = False
    server.faults = [Fault(cut_bytes=10)] * MAX_TRIES
    error = catch_download_error(store, tmp_path / "weights")
    assert (error.exit_code, error.code) == (69, "DownloadBroken")
    assert f"ended after 10 of {len(BODY)} bytes" in error.message


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_is_not_retried(
    store: WebStore, server: WebServer, pauses: list[float], tmp_path: Path, status: int
) -> None:
    server.faults = [Fault(status)]
    error = catch_download_error(store, tmp_path / "weights")
    assert (error.exit_code, error.code, pauses) == (77, "PermissionDenied", [])


def test_a_redirect_is_followed_only_within_tls(store: WebStore, server: WebServer, tmp_path: Path) -> None:
    server.faults = [Fault(302, {"Location": f"{server.url}/a%20b/weights"})]
    assert store.get("weights") == BODY
    server.faults = [Fault(302, {"Location": "http://elsewhere.example/weights?token=hidden-word"})]
    error = catch_download_error(store, tmp_path / "weights")
    assert (error.exit_code, error.code) == (67, "RedirectRefused") and "http://elsewhere.example" in error.message
    server.faults = [Fault(302, {"Location": f"/a%20b/weights{SECRET_QUERY}"})] * 40
    assert "redirected endlessly" in catch_download_error(store, tmp_path / "weights").message


@pytest.mark.parametrize("host", ["169.254.169.254", "2852039166", "[fd00:ec2::254]"])
def test_a_redirect_to_a_metadata_address_is_refused(store: WebStore, server: WebServer, tmp_path: Path, host: str) -> None:
    server.faults = [Fault(302, {"Location": f"https://{host}/latest/meta-data?token=hidden-word"})]
    error = catch_download_error(store, tmp_path / "weights")
    assert (error.exit_code, error.code) == (64, "AddressForbidden")
    assert "the redirect of " in error.message and "hidden-word" not in error.message


def test_an_untrusted_certificate_is_not_retried(server: WebServer, pauses: list[float], tmp_path: Path) -> None:
    error = catch_download_error(WebStore(StoreTarget(uri=server.url + SECRET_QUERY)), tmp_path / "weights")
    assert (error.exit_code, error.code, pauses) == (69, "EndpointUnreachable", [])
    assert "SSLCertVerificationError" in error.message and "caBundleRef" in (error.hint or "")


def test_an_invalid_ca_bundle_is_named(tmp_path: Path, server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "none.pem").write_text("nothing")
    for file_name in ("none.pem", "missing.pem"):
        with pytest.raises(FineTuneError, match="cannot be read") as caught:
            WebStore(StoreTarget(uri=server.url, ca_bundle=str(tmp_path / file_name)))
        assert (caught.value.exit_code, caught.value.code) == (67, "TlsFailed")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "missing.pem"))
    assert "REQUESTS_CA_BUNDLE" in str(catch_download_error(WebStore(StoreTarget(uri=server.url)), tmp_path / "weights"))


def test_a_port_without_a_server_is_retried(pauses: list[float], tmp_path: Path, server: WebServer) -> None:
    with socket.socket() as bound_socket:
        bound_socket.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound_socket.getsockname()[1]}"
        error = catch_download_error(WebStore(StoreTarget(uri=f"https://{address}/x{SECRET_QUERY}"), max_tries=3), tmp_path / "weights")
    assert error.message == f"{address} could not be reached (ConnectionRefusedError)" and pauses == [1.0, 2.0]


def test_the_proxy_of_the_environment_is_used(server: WebServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    proxied_addresses: list[str] = []

    class RefusingProxy(BaseHTTPRequestHandler):
        def do_CONNECT(self) -> None:
            proxied_addresses.append(self.path)
            self.send_error(407)

        def log_message(self, format: str, *args: object) -> None:
            pass

    proxy = HTTPServer(("127.0.0.1", 0), RefusingProxy)
    threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.server_address[1]}")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")
    try:
        error = catch_download_error(WebStore(StoreTarget(uri="https://files.example/x"), max_tries=1), tmp_path / "weights")
    finally:
        proxy.shutdown()
        proxy.server_close()
    assert proxied_addresses == ["files.example:443"] and "proxy" in (error.hint or "")


def test_the_query_is_never_logged(
    store: WebStore, server: WebServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server.faults = [Fault(503), Fault(cut_bytes=10), Fault(302, {"Location": f"/a%20b/weights{SECRET_QUERY}"})]
    assert store.download("weights", tmp_path / "weights") == hashlib.sha256(BODY).hexdigest()
    assert "retry in 1 s" in caplog.text and "GET /a%20b/weights" in caplog.text
    assert "hidden-word" not in caplog.text


def test_listing_and_writing_are_refused(store: WebStore, tmp_path: Path) -> None:
    for write in (
        lambda: store.put("x", b""), lambda: store.create("x", b""), lambda: store.put_file(tmp_path, "x"),
        lambda: store.delete(["x"]), lambda: store.sweep("x"),
    ):  # fmt: skip
        with pytest.raises(FineTuneError, match="it has no conditional creation") as caught:
            write()
        assert (caught.value.exit_code, caught.value.code) == (67, "StorageReadOnly")
        assert "s3://bucket/prefix" in (caught.value.hint or "") and "hidden-word" not in str(caught.value)
    with pytest.raises(FineTuneError, match="cannot be listed") as caught:
        store.list("")
    assert caught.value.code == "StorageNotListable" and "/checkpoints/step-" in (caught.value.hint or "")
    assert "hidden-word" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "code"),
    [
        ("https://user:hidden-word@host/x", "SourceInvalid"),
        ("https://host:port/x?hidden-word", "SourceInvalid"),
        ("https:///x?hidden-word", "SourceInvalid"),
        ("http://host/x?hidden-word", "StorageUriInvalid"),
    ],
)
def test_an_invalid_url_is_refused(uri: str, code: str) -> None:
    with pytest.raises(FineTuneError) as caught:
        open_store(StoreTarget(uri=uri))
    assert (caught.value.exit_code, caught.value.code) == (64, code) and "hidden-word" not in str(caught.value)


def test_a_job_cannot_write_to_a_web_server() -> None:
    with pytest.raises(FineTuneError, match="a web server is read-only") as caught:
        preflight(StoreTarget(uri=f"https://host/x{SECRET_QUERY}"))
    assert (caught.value.exit_code, caught.value.code) == (64, "StorageUriInvalid")
    assert "s3://bucket/prefix" in (caught.value.hint or "") and "hidden-word" not in str(caught.value)


def test_the_image_contains_requests() -> None:
    lock = Path(__file__).parents[4] / "requirements/trainer.lock"
    assert any(line.startswith("requests==") for line in lock.read_text().splitlines()), (
        "tiktoken no longer depends on requests: add requests to trainer.in"
    )
