"""A process that fails reports the failure and exits with the exit code of this kind of failure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from finetune_api.errors import DataError, MemoryExhaustedError, PeerError
from finetune_trainer.channel import Channel
from finetune_trainer.child_main import run_and_report_failure


def make_failing_action(error: BaseException) -> Callable[[Channel], None]:
    def action(_channel: Channel) -> None:
        raise error

    return action


def test_a_process_without_a_failure_reports_nothing_and_exits_with_0(tmp_path: Path) -> None:
    channel = Channel.create_recording(tmp_path)
    assert run_and_report_failure(channel, lambda process_channel: process_channel.send_message("checked")) == 0
    assert [message["kind"] for message in channel.sent] == ["checked"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (DataError("DatasetEmpty", "no row", hint="write rows"), (65, "DatasetEmpty", "write rows", True)),
        (PeerError("PeerLost", "gone"), (74, "PeerLost", None, False)),
        (MemoryExhaustedError("GpuMemory", "full", hint="train with less"), (71, "GpuMemory", "evaluate with less", True)),
        (KeyboardInterrupt(), (70, "TrainerCrashed", "the traceback is in the pod's log", True)),
    ],
    ids=["named", "another rank's failure", "memory", "not an Exception"],
)  # fmt: skip
def test_a_failure_is_reported_with_its_code_and_hint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: BaseException, expected: tuple[int, str, str | None, bool]
) -> None:
    channel = Channel.create_recording(tmp_path)
    code = run_and_report_failure(channel, make_failing_action(error), memory_hint="evaluate with less")
    sent_message = channel.sent[-1]
    assert (code, sent_message["code"], sent_message.get("hint"), sent_message["origin"]) == expected
    assert sent_message["exitCode"] == code and type(error).__name__ in capsys.readouterr().err
