"""The line between a rank and its supervisor: small JSON messages over a local datagram socket, and three files.

Up go stages, progress, metrics, staged checkpoints and failures. Sending never blocks training: what is only news
(heartbeats, progress, metrics) is dropped when the supervisor is busy, what must arrive (failures, staged checkpoints, the
final model) waits a bounded time. Down come `inputs.json` (everything is fetched) and `stop` (save and end), as files.

How a rank uses it (see `finetune_trainer.rank`, which calls `train.preload()` if there is one, then `train.main`):

    channel = Channel.from_env()
    inputs = channel.wait_inputs()           # after the heavy imports
    channel.stage(Stage.LOADING)
    channel.resolved(Resolved(device="cpu", trainable_parameters=1))
    raise DataError("NoTrainableToken", ...)  # any FineTuneError: the rank's entry reports it and exits with its code

Step, epoch, pace, losses and checkpoints are reported by `finetune_trainer.checkpoint.rank.callbacks`; models passed to
`progress`, `metrics` and `resolved` are merged field by field: fields left None keep what was said before.
Tests use `Channel.recording()`, whose messages stand in `sent`.
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
from finetune_api.status import Metrics, Progress, Resolved, Stage

from finetune_trainer.inputs import Inputs

SOCKET = "FINETUNE_CHANNEL"
"""Environment variable with the path of the supervisor's socket; private to supervisor and ranks."""
STOP_FILE = "stop"
"""Below the work folder: exists from the moment the pod was asked to end. Holds the time (time.time()) by which to be done."""
POLL_SECONDS = 0.05
PATIENCE_SECONDS = 20.0
"""How long a message that must arrive waits for a busy supervisor."""
MAX_MESSAGE_BYTES = 60_000
ASIDE = ".json"
Sender = Callable[[dict[str, Any], float], bool]
"""Sends a message, waiting at most so many seconds; False: it was dropped."""


class Channel:
    """One rank's end of the line. `rank`, `local_rank`, `world_size` and `node_rank` are torchrun's."""

    def __init__(
        self, send: Sender, work: Path, *, rank: int = 0, local_rank: int = 0, world_size: int = 1, node_rank: int = 0
    ) -> None:
        self._send = send
        self.work = work
        self.rank, self.local_rank, self.world_size, self.node_rank = rank, local_rank, world_size, node_rank
        self.sent: list[dict[str, Any]] = []
        """Messages of a recording channel."""

    @classmethod
    def from_env(cls) -> Channel:
        """The channel of this process, as the supervisor and torchrun described it."""
        numbers = {name: int(os.environ.get(name.upper(), default)) for name, default in _NUMBERS.items()}
        node = int(os.environ.get("GROUP_RANK", os.environ.get(Env.NODE_RANK, "0")))
        work = Path(os.environ.get(Env.WORK_DIR, WORK_MOUNT))
        address = os.environ.get(SOCKET)
        return cls(socket_sender(address) if address else _nowhere, work, node_rank=node, **numbers)

    @classmethod
    def recording(cls, work: Path, **world: int) -> Channel:
        """A channel without a supervisor that keeps its messages in `sent`: for tests."""
        channel = cls(_nowhere, work, **world)

        def keep(message: dict[str, Any], _patience: float) -> bool:
            channel.sent.append(message)
            return True

        channel._send = keep
        return channel

    # ---- down ----

    def wait_inputs(self, timeout: float | None = None) -> Inputs:
        """Wait until the supervisor has fetched everything.

        Errors: InternalError `InputsTimeout` after `timeout` seconds; without one the supervisor decides (it ends ranks).
        """
        end = math.inf if timeout is None else time.monotonic() + timeout
        while (inputs := Inputs.read(self.work)) is None:
            if time.monotonic() > end:
                raise InternalError("InputsTimeout", f"model and data were not there after {timeout:g} s")
            time.sleep(POLL_SECONDS)
        return inputs

    def stop_deadline(self) -> float | None:
        """None while the pod may go on; else the time (seconds since 1970) by which the state should be saved."""
        try:
            text = (self.work / STOP_FILE).read_text()
        except FileNotFoundError:
            return None
        return float(text) if text else math.inf

    # ---- up: news ----

    def hello(self) -> None:
        """The rank's process is alive: its pid is what the supervisor dumps and kills."""
        self._must("hello", pid=os.getpid())

    def stage(self, stage: Stage, detail: str | None = None) -> None:
        """What this rank is doing now, and in words."""
        self._news("stage", stage=stage.value, detail=detail)

    def progress(self, progress: Progress) -> None:
        """How far the run is; merged into what was said before."""
        self._news("progress", value=progress.to_wire())

    def metrics(self, metrics: Metrics) -> None:
        """Last values; merged into what was said before. Non-finite values are left out by the caller."""
        self._news("metrics", value=metrics.to_wire())

    def resolved(self, resolved: Resolved) -> None:
        """What the run really is; merged into what was said before."""
        self._must("resolved", value=resolved.to_wire())

    def note(self, text: str) -> None:
        """A sentence for `status.resolved.notes`."""
        self._must("note", text=text)

    def heartbeat(self, step: int) -> None:
        """An optimizer step is done."""
        self._news("heartbeat", step=step)

    def alive(self) -> None:
        """No step is done, but something moves (evaluation, a long accumulation)."""
        self._news("alive")

    def health(self, **facts: Any) -> None:
        """Facts about health, e.g. `nonFinite=True, step=7`."""
        self._must("health", **facts)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """One logged line of values, for `metrics/` in storage. Non-finite numbers travel as words."""
        self._must("log", step=step, values=values)

    # ---- up: what must arrive ----

    def failed(self, error: FineTuneError, *, step: int | None = None, origin: bool = True) -> None:
        """Name the failure; the process then exits with `error.exit_code`. `origin` False: a peer failed first."""
        message = error.message if len(error.message) < 8000 else error.message[:8000] + " ..."
        self._must(
            "failed", code=error.code, message=message, hint=error.hint, failureClass=error.failure_class.value,
            exitCode=int(error.exit_code), step=step, origin=origin,
        )  # fmt: skip

    def staged(self, step: int, folder: Path, **facts: Any) -> None:
        """This rank's files of the checkpoint of `step` are complete in `folder`."""
        self._must("staged", step=step, folder=str(folder), **facts)

    def finished(self, folder: Path, kind: OutputKind, extra: dict[str, Any]) -> None:
        """The final artefact is complete in `folder`."""
        self._must("finished", folder=str(folder), outputKind=kind.value, extra=extra)

    def message(self, kind: str, **fields: Any) -> None:
        """Any other message that must arrive."""
        self._must(kind, **fields)

    def _news(self, kind: str, **fields: Any) -> None:
        self._send(self._envelope(kind, fields), 0.0)

    def _must(self, kind: str, **fields: Any) -> None:
        self._send(self._envelope(kind, fields), PATIENCE_SECONDS)

    def _envelope(self, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
        head = {"kind": kind, "rank": self.rank, "localRank": self.local_rank, "timeNs": time.time_ns()}
        return head | {name: _plain(value) for name, value in fields.items() if value is not None}


_NUMBERS = {"rank": "0", "local_rank": "0", "world_size": "1"}


def _plain(value: Any) -> Any:
    if isinstance(value, WireModel):
        return value.to_wire()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, Path) else value


def _nowhere(_message: dict[str, Any], _patience: float) -> bool:
    return True


def socket_sender(address: str) -> Sender:
    """A sender over the datagram socket at `address`. A supervisor that is gone is no error here: it ends us itself."""
    line = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    line.setblocking(False)

    def send(message: dict[str, Any], patience: float) -> bool:
        data = json.dumps(message, separators=(",", ":"), default=str).encode()
        if len(data) > MAX_MESSAGE_BYTES:
            try:
                data = _set_aside(data, Path(address).parent)
            except OSError:  # the supervisor is gone, or the disk is full
                return False
        end = time.monotonic() + patience
        while True:
            with contextlib.suppress(OSError):
                try:
                    line.sendto(data, address)
                except (FileNotFoundError, ConnectionRefusedError):
                    return False
                return True
            if time.monotonic() >= end:
                return False
            time.sleep(0.005)

    return send


def _set_aside(data: bytes, folder: Path) -> bytes:
    """Put a message that no datagram can hold into a file beside the socket; what is sent names the file."""
    name = f"{uuid.uuid4().hex}{ASIDE}"
    (folder / f".{name}").write_bytes(data)
    (folder / f".{name}").rename(folder / name)
    return json.dumps({"aside": name}).encode()


def taken_in(message: dict[str, Any], folder: Path) -> Any:
    """The message itself, or what was set aside for it. Errors: OSError, ValueError if that is not there or no JSON."""
    name = message.get("aside")
    if not (isinstance(name, str) and name.endswith(ASIDE)):
        return message
    file = folder / Path(name).name
    try:
        return json.loads(file.read_bytes())
    finally:
        file.unlink(missing_ok=True)
