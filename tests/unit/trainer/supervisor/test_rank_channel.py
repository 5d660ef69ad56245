"""The channel between ranks and supervisor: every valid message arrives, and invalid messages are ignored."""

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
from finetune_trainer.channel import MAX_MESSAGE_BYTES, Channel, create_socket_sender
from finetune_trainer.failure import failure_from_message
from finetune_trainer.supervisor.rank_channel import RankChannel


class ChannelRecorder:
    """The supervisor's end of a channel, which records all messages."""

    def __init__(self) -> None:
        self.received_messages: list[dict[str, Any]] = []
        self.has_received = threading.Event()
        self.channel = RankChannel(self._record)

    def _record(self, message: dict[str, Any]) -> None:
        self.received_messages.append(message)
        self.has_received.set()
        if message.get("kind") == "unusable":
            raise ValueError(message)


@pytest.fixture
def recorder() -> Iterator[ChannelRecorder]:
    recorder = ChannelRecorder()
    yield recorder
    recorder.channel.close()


def open_rank_channel(recorder: ChannelRecorder, work: Path) -> Channel:
    return Channel(create_socket_sender(recorder.channel.address), work)


def test_a_message_larger_than_a_datagram_arrives(recorder: ChannelRecorder, tmp_path: Path) -> None:
    """The message about the final model can be larger than a datagram."""
    report = {"notes": [f"row {number}: too long" for number in range(10_000)]}
    open_rank_channel(recorder, tmp_path).report_output(tmp_path / "final", OutputKind.ADAPTER, report)
    recorder.channel.close()
    assert [message["extra"] for message in recorder.received_messages] == [report]
    assert not Path(recorder.channel.address).parent.exists()


def test_a_failure_with_many_wide_characters_arrives(recorder: ChannelRecorder, tmp_path: Path) -> None:
    """Each character of the message has twelve bytes in JSON."""
    text = "\N{FIRE}" * 8000
    assert len(json.dumps(text)) > MAX_MESSAGE_BYTES
    open_rank_channel(recorder, tmp_path).report_failure(DataError("RowBroken", text))
    recorder.channel.close()
    (message,) = recorder.received_messages
    assert failure_from_message(message).error.message.startswith("\N{FIRE}" * 100)


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff\x00", b"[1]", b'"spilled"', b'{"spilled": "socket"}', b'{"spilled": "../../etc/passwd.json"}', b'{"spilled": 7}',
     b'{"kind": "unusable"}', b'{"kind": "of a later version"}'],
    ids=["empty", "no-text", "list", "string", "no-json-file", "outside", "number", "unusable", "unknown-kind"],
)  # fmt: skip
def test_an_invalid_message_does_not_stop_the_channel(recorder: ChannelRecorder, tmp_path: Path, data: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(data, recorder.channel.address)
    open_rank_channel(recorder, tmp_path).report_note("still listening")
    recorder.channel.close()
    assert recorder.received_messages[-1]["text"] == "still listening"


def test_sending_to_a_supervisor_that_has_ended_raises_no_error(recorder: ChannelRecorder, tmp_path: Path) -> None:
    sender = open_rank_channel(recorder, tmp_path)
    recorder.channel.close()
    sender.report_note("not received")
    sender.report_output(tmp_path, OutputKind.MODEL, {"long": "x" * MAX_MESSAGE_BYTES})
    assert recorder.received_messages == []
