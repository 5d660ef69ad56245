"""Sources and renewal of a pod's credentials. The tests check which access key signs each request."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from finetune_api.pod import StoreTarget
from finetune_trainer.storage.s3 import S3Store


class CredentialIssuer:
    """A token service, a pod identity agent and an S3 server in one process. Issued credentials expire after a minute."""

    def __init__(self) -> None:
        self.issued_count = 0
        self.signed_requests: list[tuple[str, str]] = []
        """Access key and session token of each S3 request."""
        self.presented_tokens: list[str] = []
        """Tokens or request bodies that clients sent to get credentials."""
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if self.path == "/agent":
                    issuer.presented_tokens.append(self.headers["Authorization"])
                    self._answer(issuer.issue_json())
                else:
                    issuer.record_signature(dict(self.headers))
                    self._answer(b"body")

            def do_POST(self) -> None:
                request_body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                issuer.presented_tokens.append(request_body)
                self._answer(issuer.issue_xml())

            def _answer(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http_server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http_server.server_address[1]}"
        threading.Thread(target=self.http_server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def _issue_key(self) -> tuple[str, str]:
        self.issued_count += 1
        return f"KEY{self.issued_count}", (datetime.now(UTC) + timedelta(minutes=1)).strftime("%Y-%m-%dT%H:%M:%SZ")

    def issue_json(self) -> bytes:
        key, expires_at = self._issue_key()
        return json.dumps({"AccessKeyId": key, "SecretAccessKey": "s", "Token": f"T{key}", "Expiration": expires_at}).encode()

    def issue_xml(self) -> bytes:
        key, expires_at = self._issue_key()
        return (
            '<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">'
            f"<AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>{key}</AccessKeyId><SecretAccessKey>s</SecretAccessKey>"
            f"<SessionToken>T{key}</SessionToken><Expiration>{expires_at}</Expiration></Credentials>"
            "</AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
        ).encode()

    def record_signature(self, headers: dict[str, str]) -> None:
        key_match = re.search(r"Credential=([^/]+)/", headers["Authorization"])
        assert key_match is not None
        self.signed_requests.append((key_match[1], headers.get("X-Amz-Security-Token", "")))


@pytest.fixture
def issuer() -> Iterator[CredentialIssuer]:
    issuer = CredentialIssuer()
    yield issuer
    issuer.http_server.shutdown()
    issuer.http_server.server_close()


def sign_requests(issuer: CredentialIssuer, count: int, **target: str) -> list[tuple[str, str]]:
    store = S3Store(StoreTarget(uri="s3://bucket/root", endpoint=issuer.url, region="eu-central-1", **target))
    for _ in range(count):
        assert store.get("key") == b"body"
    store.close()
    return issuer.signed_requests


def test_the_session_token_of_a_secret_is_sent(issuer: CredentialIssuer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "session")
    assert sign_requests(issuer, 1) == [("AKIDENTIFIER", "session")]


def test_each_connection_has_its_own_keys(issuer: CredentialIssuer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_AWS_ACCESS_KEY_ID", "MODELKEY")
    monkeypatch.setenv("MODEL_AWS_SECRET_ACCESS_KEY", "s")
    assert sign_requests(issuer, 1, credentials_prefix="MODEL_") == [("MODELKEY", "")]


def test_a_web_identity_is_renewed_before_it_expires(
    issuer: CredentialIssuer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each renewal must read the ServiceAccount's token from its file, because the kubelet replaces this file."""
    unset_keys(monkeypatch)
    token_file = tmp_path / "token"
    token_file.write_text("first")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(token_file))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::111122223333:role/trainer")
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", issuer.url)
    store = S3Store(StoreTarget(uri="s3://bucket/root", endpoint=issuer.url, region="eu-central-1"))
    store.get("key")
    token_file.write_text("second")
    store.get("key")
    keys = [key for key, _ in issuer.signed_requests]
    assert len(set(keys)) == 2 and issuer.signed_requests == [(key, f"T{key}") for key in keys]
    assert "WebIdentityToken=first" in issuer.presented_tokens[0] and "WebIdentityToken=second" in issuer.presented_tokens[-1]


def test_a_pod_identity_is_renewed_before_it_expires(
    issuer: CredentialIssuer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    unset_keys(monkeypatch)
    (tmp_path / "token").write_text("pod-token")
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{issuer.url}/agent")
    monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(tmp_path / "token"))
    keys = [key for key, _ in sign_requests(issuer, 2)]
    assert len(set(keys)) == 2 and set(issuer.presented_tokens) == {"pod-token"}


def unset_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
