"""The channel between a rank and its supervisor: small JSON messages over a local datagram socket, and two files.

A rank sends stages, progress, metrics, staged checkpoints and failures. While the supervisor is busy, heartbeats, progress and metrics are
dropped, so that they do not delay training. A message about a failure, a staged checkpoint or the final model is sent again until the supervisor
receives it, for at most `SEND_TIMEOUT_SECONDS`. The supervisor writes two files for its ranks: `inputs.json` when all inputs are downloaded, and
`stop` when the ranks must save a checkpoint and end.

Example of a rank (`finetune_trainer.rank` calls `train.preload()` if it exists, then `train.main`):

    channel = Channel.from_env()
    inputs = channel.wait_inputs()           # after the heavy imports
    channel.report_stage(Stage.LOADING)
    channel.report_resolved(ResolvedConfig(device="cpu", trainable_parameters=1))
    raise DataError("NoTrainableToken", ...)  # `rank.main` reports any FineTuneError, and exits with the exit code of the error

Step, epoch, throughput, losses and checkpoints are reported by `finetune_trainer.checkpoint.rank.create_callbacks`. The objects that are passed
to `report_progress`, `report_metrics` and `report_resolved` are merged field by field: a field that is None keeps its earlier value.
Tests use `Channel.create_recording()`, which keeps its messages in `sent`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_api.base import WireModel
from finetune_api.errors import FineTuneError, InternalError
from finetune_api.names import WORK_MOUNT, Env
from finetune_api.spec.enums import OutputKind
from finetune_api.status import MemoryAdvice, Metrics, Progress, ResolvedConfig, RunPlan, Stage

from finetune_trainer.inputs import Inputs

SOCKET_VARIABLE = "FINETUNE_CHANNEL"
"""Environment variable with the path of the supervisor's socket. Only the supervisor and its ranks use this variable."""
STOP_FILE = "stop"
"""The supervisor creates this file in the work folder when the pod must stop. The stop file holds the time (seconds since 1970) by which a checkpoint
must be saved."""
POLL_SECONDS = 0.05
SEND_TIMEOUT_SECONDS = 20.0
"""How long the rank retries to send a failure, a staged checkpoint or the final model while the supervisor is busy. After this time, the rank drops
the message."""
MAX_MESSAGE_BYTES = 60_000
SPILL_SUFFIX = ".json"
Sender = Callable[[dict[str, Any], float], bool]
"""A function that sends a message and waits at most the given number of seconds. The function returns False if it dropped the message."""


class Channel:
    """One rank's end of the channel. `rank`, `local_rank`, `world_size` and `node_rank` are the values from torchrun."""

    def __init__(
        self, send: Sender, work_folder: Path, *, rank: int = 0, local_rank: int = 0, world_size: int = 1, node_rank: int = 0
    ) -> None:
        self._send = send
        self.work_folder = work_folder
        self.rank, self.local_rank, self.world_size, self.node_rank = rank, local_rank, world_size, node_rank
        self.sent: list[dict[str, Any]] = []
        """All messages so far. This list stays empty unless `create_recording` created the channel."""

    @classmethod
    def from_env(cls) -> Channel:
        """Create the channel of this process from the environment variables that the supervisor and torchrun set."""
        rank_values = {name: int(os.environ.get(name.upper(), default)) for name, default in _RANK_VARIABLE_DEFAULTS.items()}
        node_rank = int(os.environ.get("GROUP_RANK", os.environ.get(Env.NODE_RANK, "0")))
        work_folder = Path(os.environ.get(Env.WORK_DIR, WORK_MOUNT))
        address = os.environ.get(SOCKET_VARIABLE)
        return cls(create_socket_sender(address) if address else _discard_message, work_folder, node_rank=node_rank, **rank_values)

    @classmethod
    def create_recording(cls, work_folder: Path, **rank_values: int) -> Channel:
        """Create a channel for tests: it has no supervisor and keeps its messages in `sent`."""
        channel = cls(_discard_message, work_folder, **rank_values)

        def record(message: dict[str, Any], _timeout: float) -> bool:
            channel.sent.append(message)
            return True

        channel._send = record
        return channel

    # ---- files from the supervisor ----

    def wait_inputs(self, timeout_seconds: float | None = None) -> Inputs:
        """Wait until the supervisor has downloaded all inputs.

        Errors: InternalError `InputsTimeout` after `timeout_seconds` seconds. If `timeout_seconds` is None, the rank waits until the supervisor kills it.
        """
        deadline = math.inf if timeout_seconds is None else time.monotonic() + timeout_seconds
        while (inputs := Inputs.read(self.work_folder)) is None:
            if time.monotonic() > deadline:
                raise InternalError("InputsTimeout", f"model and data were not downloaded within {timeout_seconds:g} s")
            time.sleep(POLL_SECONDS)
        return inputs

    def stop_deadline(self) -> float | None:
        """Return the time (seconds since 1970) by which a checkpoint must be saved, or None if no stop was requested."""
        try:
            deadline_text = (self.work_folder / STOP_FILE).read_text()
        except FileNotFoundError:
            return None
        return float(deadline_text) if deadline_text else math.inf

    # ---- reports, dropped while the supervisor is busy ----

    def report_start(self) -> None:
        """Report that this rank's process has started."""
        self._send_reliably("hello", pid=os.getpid())

    def report_stage(self, stage: Stage, detail: str | None = None) -> None:
        """Report the stage of this rank, with an optional detail text."""
        self._send_if_possible("stage", stage=stage.value, detail=detail)

    def report_progress(self, progress: Progress) -> None:
        """Report progress. The supervisor merges the fields into the progress reported earlier."""
        self._send_if_possible("progress", value=progress.to_wire())

    def report_metrics(self, metrics: Metrics) -> None:
        """Report the newest metrics. The supervisor merges them into the metrics reported earlier. The caller must leave out values that are not finite."""
        self._send_if_possible("metrics", value=metrics.to_wire())

    def report_resolved(self, resolved_config: ResolvedConfig) -> None:
        """Report the effective configuration of the run. The supervisor merges its fields into the configuration reported earlier."""
        self._send_reliably("resolved", value=resolved_config.to_wire())

    def report_plan(self, plan: RunPlan) -> None:
        """Report the planned memory and work of the run, or the measured peak of memory. The supervisor merges the fields into the plan reported earlier."""
        self._send_reliably("plan", value=plan.to_wire())

    def report_note(self, text: str) -> None:
        """Add a sentence to `status.resolved.notes`."""
        self._send_reliably("note", text=text)

    def report_step(self, step: int) -> None:
        """Report that an optimizer step is done."""
        self._send_if_possible("heartbeat", step=step)

    def report_pause(self, activity: str, seconds: float) -> None:
        """Report a pause in training. `activity`: `evaluation` or `saving`."""
        self._send_if_possible("pause", part=activity, seconds=round(seconds, 4))

    def send_heartbeat(self) -> None:
        """Send a heartbeat during a long step or an evaluation."""
        self._send_if_possible("alive")

    def report_log_line(self, step: int, values: dict[str, Any]) -> None:
        """Send the values of one log call. The supervisor stores them below `metrics/`. Non-finite numbers are sent as strings."""
        self._send_reliably("log", step=step, values=values)

    # ---- messages that are retried while the supervisor is busy ----

    def report_out_of_memory(self, advice: MemoryAdvice) -> None:
        """Report the memory plan's advice for the next attempt, after the GPU of this rank had no memory left.

        Every rank whose GPU had no memory left reports its own advice.
        """
        self._send_reliably("outOfMemory", value=advice.to_wire())

    def report_failure(self, error: FineTuneError, *, step: int | None = None, is_origin: bool = True) -> None:
        """Report a failure.

        After this call, the caller must exit with `error.exit_code`. `is_origin`: False if this rank only failed because another rank failed.
        """
        message = error.message if len(error.message) < 8000 else error.message[:8000] + " ..."
        self._send_reliably(
            "failed", code=error.code, message=message, hint=error.hint, failureClass=error.failure_class.value,
            exitCode=int(error.exit_code), step=step, origin=is_origin,
        )  # fmt: skip

    def report_staged_files(self, step: int, folder: Path, **facts: Any) -> None:
        """Report that this rank's files of the checkpoint of `step` are complete in `folder`."""
        self._send_reliably("staged", step=step, folder=str(folder), **facts)

    def report_output(self, folder: Path, kind: OutputKind, extra: dict[str, Any]) -> None:
        """Report that the final artefact is complete in `folder`."""
        self._send_reliably("finished", folder=str(folder), outputKind=kind.value, extra=extra)

    def send_message(self, message_kind: str, **fields: Any) -> None:
        """Send a message of any kind, and retry while the supervisor is busy. Use this only for kinds of messages without a method in this class."""
        self._send_reliably(message_kind, **fields)

    def _send_if_possible(self, kind: str, **fields: Any) -> None:
        self._send(self._build_message(kind, fields), 0.0)

    def _send_reliably(self, kind: str, **fields: Any) -> None:
        self._send(self._build_message(kind, fields), SEND_TIMEOUT_SECONDS)

    def _build_message(self, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
        header = {"kind": kind, "rank": self.rank, "localRank": self.local_rank, "timeNs": time.time_ns()}
        return header | {name: _to_json_value(value) for name, value in fields.items() if value is not None}


_RANK_VARIABLE_DEFAULTS = {"rank": "0", "local_rank": "0", "world_size": "1"}


def _to_json_value(value: Any) -> Any:
    if isinstance(value, WireModel):
        return value.to_wire()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _to_json_value(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, Path) else value


def _discard_message(_message: dict[str, Any], _timeout: float) -> bool:
    return True


def create_socket_sender(address: str) -> Sender:
    """Create a sender for the datagram socket at `address`.

    If the supervisor has ended, the sender drops all messages, because the rank will end too.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    connection.setblocking(False)

    def send(message: dict[str, Any], timeout: float) -> bool:
        encoded_message = json.dumps(message, separators=(",", ":"), default=str).encode()
        if len(encoded_message) > MAX_MESSAGE_BYTES:
            try:
                encoded_message = _write_spill_file(encoded_message, Path(address).parent)
            except OSError:  # The supervisor has ended, or the disk is full.
                return False
        deadline = time.monotonic() + timeout
        while True:
            with contextlib.suppress(OSError):
                try:
                    connection.sendto(encoded_message, address)
                except (FileNotFoundError, ConnectionRefusedError):
                    return False
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.005)

    return send


def _write_spill_file(encoded_message: bytes, folder: Path) -> bytes:
    """Write a message that is too large for a datagram to a file next to the socket. Return a short message that names this file."""
    file_name = f"{uuid.uuid4().hex}{SPILL_SUFFIX}"
    (folder / f".{file_name}").write_bytes(encoded_message)
    (folder / f".{file_name}").rename(folder / file_name)
    return json.dumps({"spilled": file_name}).encode()


def read_spilled(message: dict[str, Any], folder: Path) -> Any:
    """Return the message that was sent. If `message` only names a file (see `_write_spill_file`), read the file and delete it.

    Errors: OSError, ValueError.
    """
    file_name = message.get("spilled")
    if not (isinstance(file_name, str) and file_name.endswith(SPILL_SUFFIX)):
        return message
    spill_file = folder / Path(file_name).name
    try:
        return json.loads(spill_file.read_bytes())
    finally:
        spill_file.unlink(missing_ok=True)
