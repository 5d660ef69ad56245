"""Sources on the web: what goes wrong on the way has a name, and a signed address is never shown."""

from __future__ import annotations

import errno
import http.client
import io
import ssl
import urllib.error
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from finetune_api.errors import FineTuneError
from finetune_api.pod import StoreTarget
from finetune_trainer.storage import fetch
from finetune_trainer.storage.fetch import Fetcher

SIGNED = "https://files.example/sets/rows.jsonl?X-Amz-Signature=hidden-word"


@pytest.fixture
def fetcher(tmp_path: Path) -> Fetcher:
    run: Any = SimpleNamespace(model_store=None, dataset_store=None, storage=StoreTarget(uri=f"file://{tmp_path}/root"))
    return Fetcher(run, tmp_path / "work")


class Answer(io.BytesIO):
    """An answer of ten bytes that ends as the test says."""

    def __init__(self, length: int = 10, error: Exception | None = None) -> None:
        super().__init__(b"0123456789")
        self.headers = {"Content-Length": str(length)}
        self._error = error

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if not data and self._error is not None:
            raise self._error
        return data


def asked(monkeypatch: pytest.MonkeyPatch, answer: Exception | Answer) -> None:
    def urlopen(*_: object, **__: object) -> Answer:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("urllib.request.urlopen", urlopen)


def http_error(code: int) -> urllib.error.HTTPError:
    return urllib.error.HTTPError(SIGNED, code, "said", http.client.HTTPMessage(), io.BytesIO())


@pytest.mark.parametrize(
    ("answer", "exit_code", "code", "said"),
    [
        (http_error(404), 66, "DatasetNotFound", "answers 404"),
        (http_error(403), 77, "PermissionDenied", "answers 403"),
        (http_error(503), 69, "DownloadFailed", "answers 503"),
        (urllib.error.URLError(ssl.SSLCertVerificationError("self-signed")), 69, "EndpointUnreachable", "SSLCertVerificationError"),
        (TimeoutError(), 69, "EndpointUnreachable", "TimeoutError"),
        (http.client.InvalidURL(SIGNED), 64, "SourceInvalid", "no URL"),
        (Answer(20), 69, "DownloadBroken", "10 of 20 bytes"),
        (Answer(10, http.client.IncompleteRead(b"")), 69, "DownloadBroken", "IncompleteRead"),
        (Answer(10, ssl.SSLEOFError("cut")), 69, "EndpointUnreachable", "SSLEOFError"),
        (Answer(10, OSError(errno.ENOSPC, "No space left on device")), 69, "LocalDiskFull", "local disk"),
    ],
)  # fmt: skip
def test_what_goes_wrong_has_a_name(
    fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch, answer: Exception | Answer, exit_code: int, code: str, said: str
) -> None:
    asked(monkeypatch, answer)
    with pytest.raises(FineTuneError) as caught:
        fetcher.data(SIGNED, "dataset.train", "train")
    assert (caught.value.exit_code, caught.value.code) == (exit_code, code)
    shown = f"{caught.value.message} {caught.value.hint}"
    assert said in shown and "hidden-word" not in shown


def test_a_model_that_is_a_file_is_told_without_its_signature(
    fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(monkeypatch, Answer())
    with pytest.raises(FineTuneError) as caught:
        fetcher.model(SIGNED, "model.source", "model")
    assert caught.value.code == "ModelInvalid" and "hidden-word" not in caught.value.message


def test_a_file_of_the_web_is_kept_under_its_name(fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    asked(monkeypatch, Answer())
    (place,) = fetcher.data(SIGNED, "dataset.train", "train")
    assert (place.name, place.read_bytes()) == ("rows.jsonl", b"0123456789")
    assert fetch._shown("s3://bucket/key") == "s3://bucket/key"
