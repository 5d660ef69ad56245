"""The supervisor's end of the line to its ranks: a datagram socket, read by one thread."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_trainer.channel import MAX_MESSAGE_BYTES, taken_in

log = logging.getLogger(__name__)
RECEIVE_BUFFER = 4 * 1024 * 1024


class Line:
    """Hears ranks and calls `hear` with each message, in order, on a thread of its own."""

    def __init__(self, hear: Callable[[dict[str, Any]], None]) -> None:
        # A socket's path may have 107 characters at most, and the work folder's may be longer.
        self._folder = Path(tempfile.mkdtemp(prefix="finetune-"))
        self.address = str(self._folder / "line")
        self._hear = hear
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        self._socket.bind(self.address)
        self._socket.settimeout(0.2)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="line", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while True:
            try:
                data = self._socket.recv(MAX_MESSAGE_BYTES + 1)
            except TimeoutError:
                if self._closing.is_set():
                    return
                continue
            except OSError:
                return
            message = self._read(data)
            if message is not None:
                try:
                    self._hear(message)
                except Exception:  # one message that cannot be used must not make us deaf to the next
                    log.exception("a rank's message could not be used: %s", message.get("kind"))

    def _read(self, data: bytes) -> dict[str, Any] | None:
        try:
            message = json.loads(data)
            message = taken_in(message, self._folder) if isinstance(message, dict) else None
        except (OSError, ValueError):
            return None  # not one of ours
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        """Hear what was already sent, then stop. Nobody may send any more."""
        self._closing.set()
        self._thread.join(timeout=30)
        self._socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)
