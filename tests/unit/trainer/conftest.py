from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from web_server import WebServer

sys.path[:0] = [str(Path(__file__).parent)]


@pytest.fixture(autouse=True)
def invalid_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set invalid S3 keys, and ignore the AWS configuration of this machine."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDENTIFIER")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret-word")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record the pauses in seconds between web requests instead of waiting."""
    from finetune_trainer.storage import web

    waited_seconds: list[float] = []
    monkeypatch.setattr(web.time, "sleep", waited_seconds.append)
    return waited_seconds


@pytest.fixture
def server(tmp_path: Path, pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    """An https server for `<tmp_path>/served`. Proxies of this machine are ignored."""
    from web_server import serve_folder

    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "served").mkdir()
    with serve_folder(tmp_path / "served", tmp_path) as web:
        yield web
