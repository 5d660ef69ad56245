"""The line between ranks and their supervisor: whatever is said arrives, and what is no message is no harm."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from finetune_api.errors import DataError
from finetune_api.spec.enums import OutputKind
from finetune_trainer.channel import MAX_MESSAGE_BYTES, Channel, socket_sender
from finetune_trainer.failure import from_message
from finetune_trainer.supervisor.line import Line


class Ear:
    """A supervisor's end that keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []
        self.any = threading.Event()
        self.line = Line(self._hear)

    def _hear(self, message: dict[str, Any]) -> None:
        self.heard.append(message)
        self.any.set()
        if message.get("kind") == "unusable":
            raise ValueError(message)


@pytest.fixture
def ear() -> Iterator[Ear]:
    made = Ear()
    yield made
    made.line.close()


def channel(ear: Ear, work: Path) -> Channel:
    return Channel(socket_sender(ear.line.address), work)


def test_a_message_that_no_datagram_holds_arrives(ear: Ear, tmp_path: Path) -> None:
    """A final model whose report is long must not be trained for nothing."""
    report = {"notes": [f"row {number}: too long" for number in range(10_000)]}
    channel(ear, tmp_path).finished(tmp_path / "final", OutputKind.ADAPTER, report)
    ear.line.close()
    assert [one["extra"] for one in ear.heard] == [report]
    assert not Path(ear.line.address).parent.exists()


def test_a_failure_in_pictures_is_told(ear: Ear, tmp_path: Path) -> None:
    """Each of these characters takes twelve bytes on the line."""
    text = "\N{FIRE}" * 8000
    assert len(json.dumps(text)) > MAX_MESSAGE_BYTES
    channel(ear, tmp_path).failed(DataError("RowBroken", text))
    ear.line.close()
    (found,) = ear.heard
    assert from_message(found).error.message.startswith("\N{FIRE}" * 100)


@pytest.mark.parametrize(
    "said",
    [b"", b"\xff\x00", b"[1]", b'"aside"', b'{"aside": "line"}', b'{"aside": "../../etc/passwd.json"}', b'{"aside": 7}',
     b'{"kind": "unusable"}', b'{"kind": "of a later version"}'],
)  # fmt: skip
def test_what_is_no_message_is_no_harm(ear: Ear, tmp_path: Path, said: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as somebody:
        somebody.sendto(said, ear.line.address)
    channel(ear, tmp_path).note("still listening")
    ear.line.close()
    assert ear.heard[-1]["text"] == "still listening"


def test_a_supervisor_that_is_gone_is_no_error(ear: Ear, tmp_path: Path) -> None:
    talks = channel(ear, tmp_path)
    ear.line.close()
    talks.note("nobody hears this")
    talks.finished(tmp_path, OutputKind.MODEL, {"long": "x" * MAX_MESSAGE_BYTES})
    assert ear.heard == []
